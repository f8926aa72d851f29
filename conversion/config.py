"""config.json of the original <-> `ModelConfig`, families as data (R1.10, R2.4)."""
from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion.families import Json, family_of, family_of_decoder
from conversion.tensors import ConversionError, Header
from mgjax.config import (
    ClipVitConfig,
    ConfigError,
    ConvNextConfig,
    DecoderConfig,
    ModelConfig,
    RopeScaling,
)

HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


# DecoderConfig <-> config.json: those that must be there, and those that need not.
_NEEDED = {"vocab_size": "vocab_size", "width": "hidden_size", "depth": "num_hidden_layers",
           "heads": "num_attention_heads", "mlp_width": "intermediate_size",
           "norm_eps": "rms_norm_eps"}
_OPTIONAL = {"kv_heads": "num_key_value_heads", "head_dim": "head_dim",
             "tied_head": "tie_word_embeddings"}
_OF_FAMILY = {  # fields that only some classes read
    "Mistral": {"sliding_window": "sliding_window"},
    "Mixtral": {"sliding_window": "sliding_window", "experts": "num_local_experts",
                "experts_per_token": "num_experts_per_tok"}}
_NUMBER = (int, float)
_TYPES = {
    **dict.fromkeys((*_NEEDED.values(), *_OPTIONAL.values(), "sliding_window", "num_local_experts",
                     "num_experts_per_tok", "image_grid", "image_size_aux", "mm_hidden_size",
                     "mm_hidden_size_aux", "mm_vision_select_layer", "tokenizer_model_max_length",
                     "max_position_embeddings"), int),
    "rms_norm_eps": _NUMBER, "rope_theta": _NUMBER, "tie_word_embeddings": bool,
    **dict.fromkeys(("hidden_act", "hidden_activation", "mm_vision_tower", "mm_vision_tower_aux",
                     "mm_projector_type", "image_aspect_ratio"), str),
    "rope_scaling": dict, "rope_parameters": dict}
# What else would change the result, and the only value that is supported.
_REFUSED = {"attention_bias": False, "mlp_bias": False, "quantization_config": None,
            "partial_rotary_factor": 1.0, "mm_use_im_start_end": False}
# Where the original looks for its towers, if nothing else is known.
TOWERS = ("model_zoo/OpenAI/clip-vit-large-patch14-336",
          "model_zoo/OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup")


def read_json(path: Path) -> Json:
  """A JSON file that holds an object.  Raises ConversionError."""
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as e:
    raise ConversionError(f"{path}: no such file") from e
  except (OSError, ValueError) as e:
    raise ConversionError(f"{path}: cannot be read ({e})") from e
  if not isinstance(values, dict):
    raise ConversionError(f"{path}: expected a JSON object, found {type(values).__name__}")
  return values


def check_types(config: Json, where: str) -> None:
  """Raises ConversionError for a field of another type than it has to be."""
  for key, kind in _TYPES.items():
    value = config.get(key)
    wrong = value is not None and (not isinstance(value, kind)
                                   or isinstance(value, bool) and kind is not bool)
    if wrong:
      name = "number" if kind is _NUMBER else kind.__name__
      raise ConversionError(f"{where}: {key} is {value!r}; expected {name}")


def is_multimodal(config: Json) -> bool:
  """Whether a config.json is that of the original, not of a language model alone."""
  return bool(config.get("mm_vision_tower"))


def read_decoder(config: Json, where: str) -> DecoderConfig:
  """The language model of a config.json.  Raises ConversionError naming the field."""
  check_types(config, where)
  family = family_of(config, where)
  for key, only in _REFUSED.items():
    if config.get(key) not in (only, None):
      raise ConversionError(f"{where}: {key} is {config[key]!r}; only {only!r} is supported")
  activation = family.activation(config)
  if activation not in HF_ACTIVATIONS:
    raise ConversionError(f"{where}: activation {activation!r}; expected one of "
                          f"{', '.join(HF_ACTIVATIONS)}")
  config = {**family.defaults, **config}
  values = {field: _needed(config, key, where) for field, key in _NEEDED.items()}
  values["kv_heads"] = values["heads"]
  if values["heads"] < 1:
    raise ConversionError(f"{where}: num_attention_heads is {values['heads']}; expected 1 or more")
  values["head_dim"] = values["width"] // values["heads"]
  values |= {field: config[key] for field, key in _OPTIONAL.items() if config.get(key) is not None}
  values |= {field: config.get(key) for field, key in _OF_FAMILY.get(family.kind, {}).items()}
  rope = config.get("rope_parameters") or {}  # transformers 5 gathers them there
  theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
  if not isinstance(theta, _NUMBER):
    raise ConversionError(f"{where}: rope_theta is {theta!r}; expected number")
  try:
    return DecoderConfig(**values | dict(family.fixed), rope_theta=float(theta),
                         rope_scaling=_rope_scaling(rope or config.get("rope_scaling") or {}),
                         activation=HF_ACTIVATIONS[activation])
  except ConfigError as e:
    raise ConversionError(f"{where}: {e}") from e


def _rope_scaling(values: Json) -> RopeScaling | None:
  kind = values.get("rope_type") or values.get("type") or "default"
  keys = {"default": (), "linear": ("factor",),
          "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                     "original_max_position_embeddings")}
  if kind not in keys:
    raise ConfigError(f"rope_scaling of type {kind!r}; supported are linear and llama3")
  for key in keys[kind]:
    if not isinstance(values.get(key), _NUMBER):
      raise ConfigError(f"rope_scaling: {key} is {values.get(key)!r}; expected number")
  return RopeScaling(*(float(values[key]) for key in keys[kind])) if keys[kind] else None


def read_model(config: Json, headers: Mapping[str, Header], where: str,
               clip: Json | None = None) -> ModelConfig:
  """The whole model of a config.json.

  headers: its tensors, by the original's names: they tell the shapes of the towers, of which
    config.json knows only the folders.
  clip: config.json of the CLIP tower, where there is one: what its shapes do not tell.

  Raises ConversionError naming the field or tensor.
  """
  decoder = read_decoder(config, where)
  if not is_multimodal(config):
    if config["model_type"] != family_of(config, where).plain:
      _needed(config, "mm_vision_tower", where)
    return ModelConfig(vision=None, vision_hr=None, decoder=decoder)
  for key, only in {"mm_vision_select_feature": "patch", "mm_use_im_patch_token": False}.items():
    if config.get(key, only) != only:
      raise ConversionError(f"{where}: {key} is {config[key]!r}; only {only!r} is supported")
  vision = read_clip(headers, where, clip, select_layer=_needed(config, "mm_vision_select_layer",
                                                                 where))
  hr = read_convnext(headers, where, config.get("mm_vision_tower_aux") or ""
                     ) if config.get("mm_vision_tower_aux") else None
  for key, ours in (("mm_hidden_size", vision.width), ("mm_hidden_size_aux", hr and hr.features)):
    if ours and config.get(key, ours) != ours:
      raise ConversionError(f"{where}: {key} is {config[key]}, but the tower's tensors are {ours} "
                            "wide; it is another tower")
  _check_name(config["mm_vision_tower"], vision, where)
  grid = config.get("image_grid") or 1
  lr_size = vision.image_size * grid
  size = _needed(config, "image_size_aux", where) if hr else config.get("image_size_aux", lr_size)
  try:
    return ModelConfig(
        vision=vision, vision_hr=hr, decoder=decoder, hr_size=size, grid=grid,
        global_view=bool(config.get("image_global")) and grid > 1,  # means nothing without a grid
        projector_depth=_projector_depth(config, where))
  except ConfigError as e:
    raise ConversionError(f"{where}: {e}") from e


def _check_name(name: str, vision: ClipVitConfig, where: str) -> None:
  """A CLIP whose name tells its pictures must see such."""
  if match := re.search(r"clip-vit.*patch(\d+)(?:-(\d+))?$", name.rstrip("/").lower()):
    wanted = int(match.group(1)), int(match.group(2) or 224)
    if (vision.patch_size, vision.image_size) != wanted:
      raise ConversionError(
          f"{where}: mm_vision_tower is {name!r}, but the CLIP tower given sees "
          f"{vision.image_size} pixels in patches of {vision.patch_size} "
          "(embeddings.position_embedding.weight, patch_embedding.weight); it is another tower")


def read_aspect(config: Json) -> str:
  """How pictures are made square: whatever is not 'pad' cuts the middle out (R3.1)."""
  return "pad" if config.get("image_aspect_ratio", "pad") == "pad" else "square"


def _needed(config: Json, key: str, where: str) -> Any:
  if config.get(key) is None:
    raise ConversionError(f"{where}: {key} is missing; it is needed to build the model")
  return config[key]


def _projector_depth(config: Json, where: str) -> int:
  kind = config.get("mm_projector_type", "linear")
  if kind == "linear":
    return 1
  if match := re.fullmatch(r"mlp(\d+)x_gelu", str(kind)):
    return int(match.group(1))
  raise ConversionError(f"{where}: mm_projector_type is {kind!r}; expected linear or mlp2x_gelu "
                        "(any number)")


CLIP = "model.vision_tower.vision_tower.vision_model."
CONVNEXT = "model.vision_tower_aux."
# Widths of published CLIP models whose heads are not 64 wide; tiny test models have 4 heads.
_CLIP_HEADS = {1280: 16, 1408: 16, 1664: 16}


def read_clip(headers: Mapping[str, Header], where: str, clip: Json | None = None,
              select_layer: int = -2) -> ClipVitConfig:
  """The CLIP tower that tensors are of.  clip: its config.json, whose sizes must agree."""
  shape = _shape_of(headers, CLIP, where)
  _, _, patch, _ = shape("embeddings.patch_embedding.weight", 4)
  positions, width = shape("embeddings.position_embedding.weight", 2)
  mlp_width, _ = shape("encoder.layers.0.mlp.fc1.weight", 2)
  side = round((positions - 1)**0.5)
  found = {"hidden_size": width, "patch_size": patch, "image_size": side * patch,
           "intermediate_size": mlp_width,
           "num_hidden_layers": _count(headers, re.escape(CLIP) + r"encoder\.layers\.(\d+)\.")}
  clip = (clip or {}).get("vision_config") or clip or {}
  for key, value in found.items():
    if clip.get(key, value) != value:
      raise ConversionError(f"{where}: the CLIP tower's {key} is {clip[key]} in its config.json, "
                            f"but {value} by its tensors; they belong to different towers")
  if clip.get("hidden_act", "quick_gelu") != "quick_gelu":
    raise ConversionError(f"{where}: the CLIP tower's hidden_act is {clip['hidden_act']!r}; only "
                          "quick_gelu is supported")
  heads = clip.get("num_attention_heads") or _CLIP_HEADS.get(width) or (
      width // 64 if width % 64 == 0 else 4)
  try:
    return ClipVitConfig(side * patch, patch, width, found["num_hidden_layers"], heads, mlp_width,
                         clip.get("layer_norm_eps", 1e-5), select_layer)
  except ConfigError as e:
    raise ConversionError(f"{where}: {e}") from e


def read_convnext(headers: Mapping[str, Header], where: str, name: str = "") -> ConvNextConfig:
  """The ConvNeXt tower that tensors are of.  name: its folder, which tells the xxlarge (R1.4)."""
  shape = _shape_of(headers, CONVNEXT, where)
  stages = _count(headers, re.escape(CONVNEXT) + r"vision_stages\.(\d+)\.")
  blocks = lambda s: _count(headers, re.escape(CONVNEXT) + rf"vision_stages\.{s}\.blocks\.(\d+)\.")
  if not stages:
    shape("vision_stages.0.blocks.0.gamma", 1)  # says that it is missing
  widths = tuple(shape(f"vision_stages.{s}.blocks.0.gamma", 1)[0] for s in range(stages))
  return ConvNextConfig(tuple(blocks(s) for s in range(stages)), widths,
                        1e-5 if "xxlarge" in name.lower() else 1e-6)


def _shape_of(headers, prefix, where):
  def shape(name, rank):
    header = headers.get(prefix + name)
    if header is None:
      raise ConversionError(f"{where}: {prefix}{name} is missing; the tower is neither in the "
                            "checkpoint nor given: name a folder with --towers")
    if len(header.shape) != rank:
      raise ConversionError(f"{header.file}: {prefix}{name} has shape {header.shape}; expected "
                            f"{rank} dimensions")
    return header.shape
  return shape


def _count(headers, pattern) -> int:
  numbers = {int(m.group(1)) for name in headers if (m := re.match(pattern, name))}
  return max(numbers, default=-1) + 1


def write_config(model: ModelConfig, base: Json | None, *, aspect: str, max_length: int,
                 dtype: str | None) -> Json:
  """A config.json that the original's loader takes.

  base: the one that the model came with, kept where it says the same; None writes a new one.
  dtype: of the numbers, None if they are as `base` says.
  """
  kept = bool(base)
  if not kept:
    family = family_of_decoder(model.decoder)
    base = {"model_type": family.plain, "architectures": [f"{family.kind}ForCausalLM"],
            "max_position_embeddings": max(4096, max_length), "transformers_version": "4.38.2",
            "initializer_range": 0.02, "use_cache": True, "torch_dtype": dtype}
  family = family_of(base, "config.json")
  out = dict(base)
  if not kept or read_decoder(base, "config.json") != model.decoder:
    out |= _decoder_fields(model.decoder, base)
  for key in ("torch_dtype", "dtype"):
    if dtype is not None and out.get(key) is not None:
      out[key] = dtype
  if model.vision is None:
    return out
  if not is_multimodal(base):
    out |= {"model_type": family.model_type, "architectures": [f"MGM{family.kind}ForCausalLM"],
            "mm_vision_tower": TOWERS[0], **_COMMON,
            # Where newer versions write these, the original's would not look.
            "rope_theta": model.decoder.rope_theta,
            "torch_dtype": dtype or base.get("torch_dtype") or base.get("dtype")}
    said: Json = {}
  else:
    said = {**_UNSAID, **base}
    said["image_global"] = bool(said["image_global"]) and model.grid > 1
  fields = _vision_fields(model)
  out |= {k: v for k, v in fields.items() if said.get(k) != v and (k in base or k not in _IMPLIED
                                                                   or not is_multimodal(base))}
  if model.vision_hr is not None:
    out["mm_vision_tower_aux"] = out.get("mm_vision_tower_aux") or TOWERS[1]
  elif out.get("mm_vision_tower_aux"):  # trained without the tower that it came with
    out["mm_vision_tower_aux"] = None
    out.pop("mm_hidden_size_aux", None)
  if not is_multimodal(base) or read_aspect(base) != aspect:
    out["image_aspect_ratio"] = aspect
  if not is_multimodal(base) or base.get("tokenizer_model_max_length", max_length) != max_length:
    out["tokenizer_model_max_length"] = max_length
  return out


# What a config.json without them means, and what its towers tell without it.
_UNSAID = {"image_grid": 1, "image_global": False, "mm_projector_type": "linear"}
_IMPLIED = ("mm_hidden_size", "mm_hidden_size_aux")
_COMMON = {"use_mm_proj": True, "mm_vision_select_feature": "patch", "mm_use_im_start_end": False,
           "mm_use_im_patch_token": False, "image_grid_pinpoints": None, "mm_projector_lr": None,
           "tokenizer_padding_side": "right", "tune_mm_mlp_adapter": False,
           "freeze_mm_mlp_adapter": False, "optimize_vision_tower": False,
           "optimize_vision_tower_aux": False}


def _decoder_fields(decoder: DecoderConfig, base: Json) -> Json:
  of_family = _OF_FAMILY.get(family_of_decoder(decoder).kind, {})
  out = {key: getattr(decoder, field) for field, key in (_NEEDED | _OPTIONAL | of_family).items()}
  out["hidden_act"] = next(k for k, v in HF_ACTIVATIONS.items() if v == decoder.activation)
  if decoder.norm_offset:  # Gemma: which of the two fields counts depends on the version
    out["hidden_activation"] = out["hidden_act"]
  scaling = decoder.rope_scaling
  scaled = scaling and ({"type": "linear", "factor": scaling.factor} if not scaling.original_length
                        else {"rope_type": "llama3", "factor": scaling.factor,
                              "low_freq_factor": scaling.low_freq_factor,
                              "high_freq_factor": scaling.high_freq_factor,
                              "original_max_position_embeddings": int(scaling.original_length)})
  if "rope_parameters" in base:
    return out | {"rope_parameters": {"rope_type": "default", **(scaled or {}),
                                      "rope_theta": decoder.rope_theta}}
  return out | {"rope_theta": decoder.rope_theta, "rope_scaling": scaled}


def _vision_fields(model: ModelConfig) -> Json:
  out = {"mm_hidden_size": model.vision.width,
         "mm_vision_select_layer": model.vision.select_layer,
         "mm_projector_type": ("linear" if model.projector_depth == 1 else
                               f"mlp{model.projector_depth}x_gelu"),
         "image_grid": model.grid, "image_global": model.global_view}
  if model.vision_hr is not None:
    out["mm_hidden_size_aux"] = model.vision_hr.features
  if model.vision_hr is not None or model.hr_size != model.lr_size:
    out["image_size_aux"] = model.hr_size
  return out
