"""A tiny random SDXL in diffusers' own classes and folder, of every part that the real one has."""
from __future__ import annotations

import json
from pathlib import Path

UNET = dict(
    sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32),
    layers_per_block=1, norm_num_groups=8, cross_attention_dim=48, attention_head_dim=(2, 4),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2), use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=24 + 6 * 8)
VAE = dict(
    sample_size=32, block_out_channels=(8, 16), latent_channels=4, norm_num_groups=8,
    layers_per_block=1, scaling_factor=0.13025, force_upcast=True,
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
TEXT = dict(vocab_size=600, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=77, hidden_act="quick_gelu",
            projection_dim=16, bos_token_id=598, eos_token_id=2, pad_token_id=1)
TEXT_2 = TEXT | dict(hidden_size=32, intermediate_size=48, hidden_act="gelu", projection_dim=24)
SCHEDULER = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
    prediction_type="epsilon", timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False,
    clip_sample=False, interpolation_type="linear", use_karras_sigmas=False)


def make_pipeline(folder: Path):
  """diffusers' pipeline of it, its tokenizers in `folder`."""
  import torch
  from diffusers import (
      AutoencoderKL,
      EulerDiscreteScheduler,
      StableDiffusionXLPipeline,
      UNet2DConditionModel,
  )
  from transformers import (
      CLIPTextConfig,
      CLIPTextModel,
      CLIPTextModelWithProjection,
      CLIPTokenizer,
  )
  torch.manual_seed(0)
  parts = dict(
      unet=UNet2DConditionModel(**UNET), vae=AutoencoderKL(**VAE),
      text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
      text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_2)))
  for model in parts.values():
    for name, p in model.named_parameters():
      if "embedding" in name and p.ndim == 2:
        torch.nn.init.normal_(p, std=0.3)
      elif p.ndim == 1:  # scales of 1 and biases of 0 would hide what is mixed up
        p.data += 0.2 * torch.randn_like(p)
    model.eval()
  tokenizers = {}
  for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
    write_tokenizer(folder / name, pad)
    tokenizers[name] = CLIPTokenizer.from_pretrained(folder / name)
  scheduler = EulerDiscreteScheduler.from_config(SCHEDULER)
  return StableDiffusionXLPipeline(**parts, **tokenizers, scheduler=scheduler,
                                   force_zeros_for_empty_prompt=True, add_watermarker=False)


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
