"""HuggingFace folders of tiny random models, for every family."""
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from conversion import mapping
from conversion.config import is_multimodal
from conversion.families import family_of
from conversion.store import parameter_shapes
from mgjax.config import ClipVitConfig, ConvNextConfig, DecoderConfig, ModelConfig

BF16 = np.dtype(ml_dtypes.bfloat16)
LLM = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
       "num_key_value_heads": 2, "intermediate_size": 24, "rms_norm_eps": 1e-5,
       "hidden_act": "silu", "rope_theta": 10000.0, "max_position_embeddings": 256,
       "torch_dtype": "float32", "transformers_version": "4.36.2", "eos_token_id": 2}
VIEWS = {"mm_vision_tower": "zoo/clip-tiny", "mm_vision_tower_aux": "zoo/openclip-convnext-tiny",
         "mm_hidden_size": 32, "mm_hidden_size_aux": 24, "mm_projector_type": "mlp2x_gelu",
         "mm_vision_select_layer": -2, "image_size_aux": 64, "image_grid": 1, "image_global": False,
         "image_aspect_ratio": "pad", "tokenizer_model_max_length": 128}
FAMILIES = {
    "llama": {"model_type": "mgm", "architectures": ["MGMLlamaForCausalLM"],
              "tie_word_embeddings": False},
    "old": {"model_type": "mini_gemini", "architectures": ["MiniGeminiLlamaForCausalLM"],
            "tie_word_embeddings": False},
    "gemma": {"model_type": "mgm_gemma", "architectures": ["MGMGemmaForCausalLM"], "head_dim": 8,
              "num_key_value_heads": 1, "hidden_act": "gelu", "transformers_version": "4.38.2"},
    "mistral": {"model_type": "mgm_mistral", "architectures": ["MGMMistralForCausalLM"],
                "sliding_window": 32, "tie_word_embeddings": False},
    "mixtral": {"model_type": "mgm_mixtral", "architectures": ["MGMMixtralForCausalLM"],
                "sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2,
                "tie_word_embeddings": False},
}


def config_of(family: str, *, text: bool = False, **changes) -> dict:
  """config.json of a family's tiny model; text: the language model alone."""
  config = {**LLM, **FAMILIES[family], **({} if text else VIEWS), **changes}
  if text:
    kind = family_of(config, family).kind
    config |= {"model_type": kind.lower(), "architectures": [f"{kind}ForCausalLM"]}
  return config


def model_of(config: dict) -> ModelConfig:
  """The model that such a config.json means."""
  kind = family_of(config, "test").kind
  decoder = DecoderConfig(
      config["vocab_size"], config["hidden_size"], config["num_hidden_layers"],
      config["num_attention_heads"], config["num_key_value_heads"], config.get("head_dim", 4),
      config["intermediate_size"], config["rms_norm_eps"], config["rope_theta"],
      tied_head=config.get("tie_word_embeddings", kind == "Gemma"),
      sliding_window=config.get("sliding_window"), experts=config.get("num_local_experts", 0),
      activation="gelu" if kind == "Gemma" else "silu", norm_offset=float(kind == "Gemma"),
      scale_inputs=kind == "Gemma")
  if not is_multimodal(config):
    return ModelConfig(vision=None, vision_hr=None, decoder=decoder)
  hr = ConvNextConfig((1, 1, 2, 1), (4, 4, 8, 8)) if config["mm_vision_tower_aux"] else None
  grid = config["image_grid"]
  return ModelConfig(
      ClipVitConfig(28, 14, 32, 3, 4, 48), hr, decoder,
      config["image_size_aux"] if hr else 28 * grid, grid, config["image_global"],
      1 if config["mm_projector_type"] == "linear" else 2)


def random_tensors(model: ModelConfig, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
  """Every tensor of a model, by the original's names."""
  shapes, rng = parameter_shapes(model), np.random.default_rng(seed)
  there = {r.hf: r.form.there(shapes[r.path][len(r.at):]) for r in mapping.all_rows(model)}
  return {name: rng.normal(size=shape).astype(dtype) for name, shape in there.items()}


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], shards: int = 0) -> None:
  """As one model.safetensors, or as shards with their index."""
  folder.mkdir(parents=True, exist_ok=True)
  if not shards:
    save_file(tensors, folder / "model.safetensors")
    return
  names, weight_map = sorted(tensors), {}
  for i in range(shards):
    file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
    chosen = names[i * len(names) // shards:(i + 1) * len(names) // shards]
    save_file({n: tensors[n] for n in chosen}, folder / file)
    weight_map |= dict.fromkeys(chosen, file)
  index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
           "weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_folder(folder: Path, config: dict, dtype=np.float32, shards: int = 0, *,
                drop: str = "nothing") -> dict[str, np.ndarray]:
  """Writes a folder; names that start with `drop` are left out.  Returns its tensors."""
  tensors = random_tensors(model_of(config), dtype)
  tensors = {n: t for n, t in tensors.items() if not n.startswith(drop)}
  write_tensors(folder, tensors, shards)
  (folder / "config.json").write_text(json.dumps(config, indent=2))
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
  return tensors


def make_towers(root: Path, config: dict, tensors: dict[str, np.ndarray]) -> tuple[Path, Path]:
  """CLIP and OpenCLIP folders that hold the towers among `tensors`."""
  clip, openclip = root / "clip-tiny", root / "openclip-convnext-tiny"
  prefix = "model.vision_tower.vision_tower."
  own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
  write_tensors(clip, own | {"text_model.final_layer_norm.weight": np.ones(3, np.float32),
                             "logit_scale": np.ones(1, np.float32)})
  (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {
      "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "patch_size": 14,
      "image_size": 28, "intermediate_size": 48, "hidden_act": "quick_gelu"}}))
  prefix = "model.vision_tower_aux.vision_"
  own = {f"visual.trunk.{n.removeprefix(prefix)}": t for n, t in tensors.items()
         if n.startswith(prefix)}
  openclip.mkdir(parents=True)
  save_file(own | {"visual.trunk.head.norm.weight": np.ones(3, np.float32),
                   "text.token_embedding.weight": np.ones((3, 3), np.float32),
                   "visual.head.proj.weight": np.ones((3, 3), np.float32)},
            openclip / "open_clip_model.safetensors")
  (openclip / "open_clip_config.json").write_text("{}")
  return clip, openclip
