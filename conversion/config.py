"""config.json of the original <-> `ModelConfig`, families as data (R1.10, R2.4)."""
from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from conversion.tensors import ConversionError, Header
from mgjax.config import (
    ClipVitConfig,
    ConfigError,
    ConvNextConfig,
    DecoderConfig,
    ModelConfig,
    RopeScaling,
)

Json = dict[str, Any]
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclasses.dataclass(frozen=True)
class Family:
  """A kind of language model: its names, and what config.json leaves unsaid.

  kind: as in the class names LlamaForCausalLM, MGMLlamaForCausalLM.
  template: of chats, where the tokenizer does not tell more (see `guess_template`).
  fixed: fields of DecoderConfig that no field of config.json says.
  defaults: fields of config.json that its class does not always write.
  activation: which of `ACTIVATIONS` a config.json means.
  """

  kind: str
  template: str
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  activation: Callable[[Json], str] = lambda config: config.get("hidden_act", "silu")

  @property
  def plain(self) -> str:
    """model_type of the language model alone."""
    return self.kind.lower()

  @property
  def model_type(self) -> str:
    """model_type of the original with this language model."""
    return "mgm" if self.kind == "Llama" else f"mgm_{self.plain}"

  @property
  def model_types(self) -> tuple[str, ...]:
    """Every model_type that means this family; the first releases said mini_gemini (R2.6)."""
    return self.plain, self.model_type, self.model_type.replace("mgm", "mini_gemini")


def _gemma_activation(config: Json) -> str:
  """transformers before 4.39 used `hidden_act`; later `hidden_activation`, or tanh without it."""
  version = tuple(int(n) for n in re.findall(r"\d+", str(config.get("transformers_version")))[:2])
  if version < (4, 39) if version else "hidden_activation" not in config:
    return config.get("hidden_act") or "gelu"
  return config.get("hidden_activation") or "gelu_pytorch_tanh"


FAMILIES = (
    Family("Llama", "vicuna_v1"),
    Family("Gemma", "gemma", dict(norm_offset=1.0, scale_inputs=True),
           dict(tie_word_embeddings=True, head_dim=256), _gemma_activation),
    Family("Mistral", "mistral_instruct", {}, dict(sliding_window=4096, num_key_value_heads=8)),
    Family("Mixtral", "mistral_instruct", {},
           dict(num_local_experts=8, num_experts_per_tok=2, rope_theta=1e6,
                num_key_value_heads=8)),
)

# DecoderConfig <-> config.json; None: the class must have written it.
_FIELDS = {
    "vocab_size": ("vocab_size", None), "width": ("hidden_size", None),
    "depth": ("num_hidden_layers", None), "heads": ("num_attention_heads", None),
    "mlp_width": ("intermediate_size", None), "norm_eps": ("rms_norm_eps", None),
    "kv_heads": ("num_key_value_heads", "heads"), "head_dim": ("head_dim", "width // heads"),
    "tied_head": ("tie_word_embeddings", False), "sliding_window": ("sliding_window", None),
    "experts": ("num_local_experts", 0), "experts_per_token": ("num_experts_per_tok", 2),
}
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


def family_of(config: Json, where: str) -> Family:
  """The family that `model_type` names.  Raises ConversionError."""
  name = config.get("model_type")
  for family in FAMILIES:
    if name in family.model_types:
      return family
  known = ", ".join(t for f in FAMILIES for t in f.model_types)
  raise ConversionError(f"{where}: model_type is {name!r}; expected one of {known}")


def family_of_decoder(decoder: DecoderConfig) -> Family:
  """The family whose model a decoder is, for one that never had a config.json."""
  kind = ("Mixtral" if decoder.experts else "Gemma" if decoder.norm_offset else
          "Mistral" if decoder.sliding_window else "Llama")
  return next(f for f in FAMILIES if f.kind == kind)


def is_multimodal(config: Json) -> bool:
  """Whether a config.json is that of the original, not of a language model alone."""
  return bool(config.get("mm_vision_tower"))


def read_decoder(config: Json, where: str) -> DecoderConfig:
  """The language model of a config.json.  Raises ConversionError naming the field."""
  family = family_of(config, where)
  for key, only in _REFUSED.items():
    if config.get(key) not in (only, None):
      raise ConversionError(f"{where}: {key} is {config[key]!r}; only {only!r} is supported")
  config = {**family.defaults, **config}
  values: Json = {}
  for field, (key, default) in _FIELDS.items():
    value = config.get(key)
    if value is None and isinstance(default, str):  # follows from the fields before it
      value = values["heads"] if default == "heads" else values["width"] // values["heads"]
    elif value is None and (default is not None or key in ("sliding_window",)):
      value = default
    elif value is None:
      raise ConversionError(f"{where}: {key} is missing; it is needed to build the model")
    if not isinstance(value, (int, float, type(None))):
      raise ConversionError(f"{where}: {key} is {value!r}; expected a number")
    if field == "heads" and value < 1:
      raise ConversionError(f"{where}: {key} is {value!r}; expected at least 1")
    values[field] = value
  if family.kind != "Mixtral":
    values["experts"] = 0
  if config.get("use_sliding_window") is False:
    values["sliding_window"] = None
  activation = family.activation(config)
  if activation not in ACTIVATIONS:
    raise ConversionError(f"{where}: activation {activation!r}; expected one of "
                          f"{', '.join(ACTIVATIONS)}")
  rope = config.get("rope_parameters") or {}  # transformers 5 gathers them there
  values |= dict(family.fixed, activation=ACTIVATIONS[activation],
                 rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
                 rope_scaling=_rope_scaling(rope or config.get("rope_scaling"), where),
                 norm_eps=float(values["norm_eps"]), tied_head=bool(values["tied_head"]))
  try:
    return DecoderConfig(**values)
  except (ConfigError, TypeError) as e:
    raise ConversionError(f"{where}: {e}") from e


def _rope_scaling(values: Json | None, where: str) -> RopeScaling | None:
  kind = (values or {}).get("rope_type") or (values or {}).get("type") or "default"
  if kind == "default":
    return None
  try:
    if kind == "linear":
      return RopeScaling(float(values["factor"]))
    if kind == "llama3":
      return RopeScaling(*(float(values[k]) for k in (
          "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")))
  except KeyError as e:
    raise ConversionError(f"{where}: rope_scaling of type {kind} without {e}") from e
  raise ConversionError(f"{where}: rope_scaling of type {kind!r}; supported are linear and llama3")


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
                 dtype: str) -> Json:
  """A config.json that the original's loader takes.

  base: the one that the model came with, kept where it says the same; None writes a new one.
  """
  base = dict(base or {})
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
  if model.vision is not None:
    if not is_multimodal(base):
      out |= {"model_type": family.model_type, "architectures": [f"MGM{family.kind}ForCausalLM"],
              "mm_vision_tower": TOWERS[0], **_COMMON,
              # Where newer versions write these, the original's would not look.
              "rope_theta": model.decoder.rope_theta, "torch_dtype": dtype}
    said = {**_UNSAID, **base} if is_multimodal(base) else {}
    out |= {k: v for k, v in _vision_fields(model).items() if said.get(k) != v}
    if model.vision_hr is not None and not out.get("mm_vision_tower_aux"):
      out["mm_vision_tower_aux"] = TOWERS[1]
    if not is_multimodal(base) or read_aspect(base) != aspect:
      out["image_aspect_ratio"] = aspect
    if not is_multimodal(base) or base.get("tokenizer_model_max_length", max_length) != max_length:
      out["tokenizer_model_max_length"] = max_length
  for key in ("torch_dtype", "dtype"):
    if out.get(key) is not None:
      out[key] = dtype
  return out


_UNSAID = {"image_grid": 1, "image_global": False}  # what a config.json without them means
_COMMON = {"use_mm_proj": True, "mm_vision_select_feature": "patch", "mm_use_im_start_end": False,
           "mm_use_im_patch_token": False, "image_grid_pinpoints": None, "mm_projector_lr": None,
           "tokenizer_padding_side": "right", "tune_mm_mlp_adapter": False,
           "freeze_mm_mlp_adapter": False, "optimize_vision_tower": False,
           "optimize_vision_tower_aux": False}


def _decoder_fields(decoder: DecoderConfig, base: Json) -> Json:
  out = {key: getattr(decoder, field) for field, (key, _) in _FIELDS.items()
         if key not in ("num_local_experts", "num_experts_per_tok") or decoder.experts}
  out["hidden_act"] = next(k for k, v in ACTIVATIONS.items() if v == decoder.activation)
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
    out |= {"mm_hidden_size_aux": model.vision_hr.features, "image_size_aux": model.hr_size}
  return out


def guess_template(family: Family, has_token: Callable[[str], bool]) -> str:
  """The conversation template of a release: config.json does not say it, its tokenizer tells."""
  if family.kind == "Llama" and has_token("<|eot_id|>"):
    return "llama_3"
  if family.kind == "Llama" and has_token("<|im_end|>"):
    return "chatml_direct"
  return family.template
