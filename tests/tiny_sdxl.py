"""A tiny random SDXL in a diffusers folder, of every part that the real one has."""
from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

UNET = dict(
    _class_name="UNet2DConditionModel", sample_size=16, in_channels=4, out_channels=4,
    block_out_channels=[16, 32], layers_per_block=1, norm_num_groups=8, cross_attention_dim=48,
    attention_head_dim=[2, 4], down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], transformer_layers_per_block=[1, 2],
    use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=24 + 6 * 8)
VAE = dict(
    _class_name="AutoencoderKL", sample_size=32, block_out_channels=[8, 16], latent_channels=4,
    norm_num_groups=8, layers_per_block=1, scaling_factor=0.13025, force_upcast=True,
    down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
TEXT = dict(
    architectures=["CLIPTextModel"], model_type="clip_text_model", vocab_size=600, hidden_size=16,
    intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=77,
    hidden_act="quick_gelu", projection_dim=16, bos_token_id=598, eos_token_id=2, pad_token_id=1)
TEXT_2 = TEXT | dict(architectures=["CLIPTextModelWithProjection"], hidden_size=32,
                     intermediate_size=48, hidden_act="gelu", projection_dim=24)
SCHEDULER = dict(
    _class_name="EulerDiscreteScheduler", beta_start=0.00085, beta_end=0.012,
    beta_schedule="scaled_linear", num_train_timesteps=1000, prediction_type="epsilon",
    timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False, clip_sample=False,
    interpolation_type="linear", use_karras_sigmas=False)
INDEX = dict(
    _class_name="StableDiffusionXLPipeline", _diffusers_version="0.42.1",
    force_zeros_for_empty_prompt=True, add_watermarker=False,
    unet=["diffusers", "UNet2DConditionModel"], vae=["diffusers", "AutoencoderKL"],
    scheduler=["diffusers", "EulerDiscreteScheduler"],
    text_encoder=["transformers", "CLIPTextModel"], tokenizer=["transformers", "CLIPTokenizer"],
    text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
    tokenizer_2=["transformers", "CLIPTokenizer"])
FILES = {
    "unet/config.json": UNET, "vae/config.json": VAE, "text_encoder/config.json": TEXT,
    "text_encoder_2/config.json": TEXT_2, "scheduler/scheduler_config.json": SCHEDULER,
    "model_index.json": INDEX}


def write_folder(folder: Path, dtype=np.float32) -> Path:
  """Writes it, always the same."""
  from conversion.sdxl_config import read_configs
  from conversion.sdxl_mapping import sdxl_rows
  from conversion.store import parameter_shapes
  from conversion.tensors import SafetensorsWriter
  for name, values in FILES.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values, indent=2))
  write_tokenizer(folder / "tokenizer", "<|endoftext|>")
  write_tokenizer(folder / "tokenizer_2", "!")
  config, rng, parts = read_configs(folder), np.random.default_rng(0), {}
  shapes = parameter_shapes(config)
  for row in sdxl_rows(config):
    part, name = row.hf.split("/", 1)
    shape = row.form.there(tuple(shapes[row.path])[len(row.at):])
    value = rng.normal(size=shape)
    # Scales of 1 and biases of 0 would hide what is mixed up.
    value = (1 + 0.2 * value if row.path.endswith("scale") else
             0.2 * value if row.path.endswith("bias") else
             0.3 * value if "embedding" in row.path else value / math.prod(shape[1:]) ** 0.5)
    parts.setdefault(part, {})[name] = value.astype(dtype)
  for part, tensors in parts.items():
    stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
    writer = SafetensorsWriter(folder / part / f"{stem}.safetensors",
                               {n: (v.shape, v.dtype) for n, v in tensors.items()})
    for name, value in tensors.items():
      writer.write(name, value)
    writer.close()
  return folder


def write_tokenizer(folder: Path, pad: str) -> None:
  """A CLIP tokenizer in the files of the published ones: bytes, their ends of words, some words."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in printable]
  letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
  merges = ["t h", "th e</w>", "c a", "ca t</w>", "r e", "re d</w>", "d o", "do g</w>", "o n</w>"]
  pieces = letters + [c + "</w>" for c in letters] + [m.replace(" ", "") for m in merges]
  pieces += [f"<unused{i}>" for i in range(598 - len(pieces))]
  pieces += ["<|startoftext|>", "<|endoftext|>"]
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
  (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
  names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
           "unk_token": "<|endoftext|>", "pad_token": pad}
  (folder / "special_tokens_map.json").write_text(json.dumps(names))
  (folder / "tokenizer_config.json").write_text(json.dumps(
      names | {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}))
