"""The JSON files of a diffusers SDXL folder <-> `SdxlConfig`.

Missing fields mean what diffusers 0.42 and transformers 5 take for them; a field that would change
the computation, and whose value this package does not compute, is refused.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from conversion.config import read_json
from conversion.families import Json
from conversion.tensors import ConversionError
from mgjax.config import ConfigError
from mgjax.diffusion.config import (
    ScheduleConfig,
    SdxlConfig,
    TextEncoderConfig,
    UNetConfig,
    VaeConfig,
)

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
PIPELINE = "StableDiffusionXLPipeline"
# Sub-folder -> its library and class, as model_index.json names them.
COMPONENTS = {"text_encoder": ("transformers", "CLIPTextModel"),
              "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
              "tokenizer": ("transformers", "CLIPTokenizer"),
              "tokenizer_2": ("transformers", "CLIPTokenizer"),
              "unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL")}
SAMPLERS = {"EulerDiscreteScheduler": "euler", "DDIMScheduler": "ddim"}


@dataclasses.dataclass(frozen=True)
class Fields:
  """How a JSON file and a config dataclass say the same.

  names: field of the dataclass -> of the JSON, where one value is the other.
  defaults: of the JSON, where a field is missing.
  only: fields of the JSON that change the result, and the one value that is computed here.
  idle: other known fields, which change nothing here; None: any unknown field may stand there.
  """

  names: Mapping[str, str]
  defaults: Json
  only: Json
  idle: frozenset[str] | None = None

  def check(self, values: Json, where: str) -> Json:
    """`values` with defaults.  Raises ConversionError for what is not supported."""
    if values.get("quantization_config"):
      raise ConversionError(f"{where}: quantization_config is {values['quantization_config']!r}; "
                            "only weights that are not quantised are supported")
    for key, only in self.only.items():
      value = values.get(key, self.defaults.get(key, only))
      by_level = isinstance(value, list) and only is False
      if not all(_same(v, only) for v in (value if by_level else [value])):
        raise ConversionError(f"{where}: {key} is {value!r}; only {only!r} is supported")
    if self.idle is not None:
      known = {*self.names.values(), *self.defaults, *self.only, *self.idle}
      for key, value in values.items():
        if key not in known and not key.startswith("_") and value not in (None, False):
          raise ConversionError(f"{where}: {key} is {value!r}, a field that is not known; if it "
                                "changes nothing, remove it")
    return self.defaults | values

  def read(self, cls: type, values: Json, where: str, **more) -> Any:
    """The dataclass `cls` of checked `values`; `more` are fields that take more than a copy."""
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}
    fields = {ours: _typed(values, key, kinds[ours], where) for ours, key in self.names.items()}
    try:
      return cls(**fields, **more)
    except ConfigError as e:
      raise ConversionError(f"{where}: {e}") from e

  def write(self, config: Any) -> Json:
    """What a JSON says of `config`: its plain fields, and that what is fixed is so."""
    out = {key: getattr(config, ours) for ours, key in self.names.items()}
    return {**self.only, **{k: list(v) if isinstance(v, tuple) else v for k, v in out.items()}}


def _same(value: Any, only: Any) -> bool:
  return value == only or not value and not only  # diffusers writes null for False too


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", lambda v: type(v) is int),
    "float": ("a number", lambda v: type(v) in (int, float) and math.isfinite(v)),
    "str": ("a name", lambda v: type(v) is str),
    "bool": ("true or false", lambda v: type(v) is bool),
    "tuple[int, ...]": ("whole numbers", lambda v: type(v) is list and len(v) > 0 and all(
        type(n) is int for n in v))}


def _typed(values: Json, key: str, kind: str, where: str) -> Any:
  value, (expected, fits) = values.get(key), _KINDS[kind]
  if not fits(value):
    raise ConversionError(f"{where}: {key} is {value!r}; expected {expected}")
  return tuple(value) if type(value) is list else float(value) if kind == "float" else value


TEXT = Fields(
    names={"vocab_size": "vocab_size", "length": "max_position_embeddings", "width": "hidden_size",
           "depth": "num_hidden_layers", "heads": "num_attention_heads",
           "mlp_width": "intermediate_size", "activation": "hidden_act",
           "norm_eps": "layer_norm_eps", "eos_id": "eos_token_id"},
    defaults={"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048,
              "projection_dim": 512, "num_hidden_layers": 12, "num_attention_heads": 8,
              "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
              "eos_token_id": 49407},
    only={"model_type": "clip_text_model"})  # transformers writes much that means nothing to CLIP

UNET = Fields(
    names={"channels": "in_channels", "side": "sample_size", "widths": "block_out_channels",
           "number_width": "addition_time_embed_dim", "groups": "norm_num_groups",
           "norm_eps": "norm_eps"},
    defaults={"sample_size": None, "in_channels": 4, "out_channels": 4,
              "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
              "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
              "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
              "transformer_layers_per_block": 1, "attention_head_dim": 8,
              "cross_attention_dim": 1280, "addition_time_embed_dim": None,
              "projection_class_embeddings_input_dim": None, "norm_num_groups": 32,
              "norm_eps": 1e-5, "use_linear_projection": False, "addition_embed_type": None},
    only={"act_fn": "silu", "addition_embed_type": "text_time", "attention_type": "default",
          "center_input_sample": False, "class_embed_type": None, "class_embeddings_concat": False,
          "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_norm": None,
          "downsample_padding": 1, "dual_cross_attention": False, "encoder_hid_dim": None,
          "encoder_hid_dim_type": None, "flip_sin_to_cos": True, "freq_shift": 0,
          "mid_block_only_cross_attention": None, "mid_block_scale_factor": 1,
          "mid_block_type": "UNetMidBlock2DCrossAttn", "num_attention_heads": None,
          "num_class_embeds": None, "only_cross_attention": False, "resnet_out_scale_factor": 1.0,
          "resnet_skip_time_act": False, "resnet_time_scale_shift": "default",
          "reverse_transformer_layers_per_block": None, "time_cond_proj_dim": None,
          "time_embedding_act_fn": None, "time_embedding_dim": None,
          "time_embedding_type": "positional", "timestep_post_act": None,
          "use_linear_projection": True},
    idle=frozenset({"addition_embed_type_num_heads", "dropout", "upcast_attention",
                    # what a trainer's moving average leaves
                    "decay", "inv_gamma", "min_decay", "optimization_step", "power",
                    "update_after_step", "use_ema_warmup"}))

VAE = Fields(
    names={"channels": "latent_channels", "widths": "block_out_channels",
           "resnets": "layers_per_block", "groups": "norm_num_groups", "scaling": "scaling_factor"},
    defaults={"block_out_channels": [64], "layers_per_block": 1, "latent_channels": 4,
              "norm_num_groups": 32, "scaling_factor": 0.18215,
              "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]},
    only={"in_channels": 3, "out_channels": 3, "act_fn": "silu", "shift_factor": None,
          "latents_mean": None, "latents_std": None, "use_quant_conv": True,
          "use_post_quant_conv": True, "mid_block_add_attention": True},
    idle=frozenset({"sample_size", "force_upcast"}))

_SCHEDULE = Fields(
    names={"train_steps": "num_train_timesteps", "beta_start": "beta_start",
           "beta_end": "beta_end", "beta_schedule": "beta_schedule",
           "prediction": "prediction_type", "spacing": "timestep_spacing",
           "offset": "steps_offset"},
    defaults={"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02,
              "beta_schedule": "linear", "prediction_type": "epsilon", "steps_offset": 0},
    # Fields of other schedulers may stay there and mean nothing.
    only={"trained_betas": None, "rescale_betas_zero_snr": False})
SCHEDULES = {
    "euler": dataclasses.replace(
        _SCHEDULE, defaults=_SCHEDULE.defaults | {"timestep_spacing": "linspace"},
        only=_SCHEDULE.only | {
            "interpolation_type": "linear", "use_karras_sigmas": False,
            "use_exponential_sigmas": False, "use_beta_sigmas": False, "sigma_min": None,
            "sigma_max": None, "timestep_type": "discrete", "final_sigmas_type": "zero"}),
    "ddim": dataclasses.replace(
        _SCHEDULE, names=_SCHEDULE.names | {"last_alpha_one": "set_alpha_to_one"},
        defaults=_SCHEDULE.defaults | {
            "timestep_spacing": "leading", "set_alpha_to_one": True, "clip_sample": True},
        only=_SCHEDULE.only | {"clip_sample": False, "thresholding": False})}


def read_configs(folder: Path) -> SdxlConfig:
  """The shapes that a diffusers folder tells.  Raises ConversionError naming file and field."""
  index, where = read_json(folder / INDEX), str(folder / INDEX)
  sampler = _components(index, where)
  read = lambda name: (read_json(folder / name), str(folder / name))
  zeros = index.get("force_zeros_for_empty_prompt", True)
  if type(zeros) is not bool:
    raise ConversionError(f"{where}: force_zeros_for_empty_prompt is {zeros!r}; expected true or "
                          "false")
  values, there = read(SCHEDULER)
  fields = SCHEDULES[sampler]
  schedule = fields.read(ScheduleConfig, fields.check(values, there), there, sampler=sampler)
  try:
    return SdxlConfig(
        text_encoder=_read_text(*read("text_encoder/config.json"), projection=False),
        text_encoder_2=_read_text(*read("text_encoder_2/config.json"), projection=True),
        unet=_read_unet(*read("unet/config.json")), vae=_read_vae(*read("vae/config.json")),
        schedule=schedule, zero_negative=zeros)
  except ConfigError as e:
    raise ConversionError(f"{folder}: {e}") from e


def _components(index: Json, where: str) -> str:
  """The sampler of a pipeline that has just the components which are known here."""
  if index.get("_class_name") != PIPELINE:
    raise ConversionError(f"{where}: _class_name is {index.get('_class_name')!r}; expected "
                          f"{PIPELINE!r}")
  for name, (library, kind) in COMPONENTS.items():
    known = [[library, kind]]
    if name.startswith("tokenizer"):
      known.append([library, f"{kind}Fast"])  # which reads the same files
    if index.get(name) not in known:
      raise ConversionError(f"{where}: {name} is {index.get(name)!r}; expected {known[0]!r}")
  for name, got in index.items():
    if isinstance(got, list) and any(got) and name not in (*COMPONENTS, "scheduler"):
      raise ConversionError(f"{where}: {name} is {got!r}; a pipeline with this component is not "
                            f"supported, expected {', '.join(COMPONENTS)} and scheduler")
  scheduler = index.get("scheduler")
  kind = scheduler[1] if isinstance(scheduler, list) and len(scheduler) == 2 else scheduler
  if kind not in SAMPLERS:
    raise ConversionError(f"{where}: scheduler is {kind!r}; expected {' or '.join(SAMPLERS)}")
  return SAMPLERS[kind]


def _class(values: Json, part: str, where: str) -> None:
  if (got := values.get("_class_name", COMPONENTS[part][1])) != COMPONENTS[part][1]:
    raise ConversionError(f"{where}: _class_name is {got!r}; expected {COMPONENTS[part][1]!r}")


def _read_text(values: Json, where: str, *, projection: bool) -> TextEncoderConfig:
  values = TEXT.check(values, where)
  if values["hidden_act"] not in ("quick_gelu", "gelu"):
    raise ConversionError(f"{where}: hidden_act is {values['hidden_act']!r}; expected 'quick_gelu' "
                          "or 'gelu'")
  wide = _typed(values, "projection_dim", "int", where) if projection else 0
  return TEXT.read(TextEncoderConfig, values, where, projection=wide)


def _read_unet(values: Json, where: str) -> UNetConfig:
  _class(values, "unet", where)
  values = UNET.check(values, where)
  if values["out_channels"] != values["in_channels"]:
    raise ConversionError(f"{where}: out_channels is {values['out_channels']!r}; expected as many "
                          f"as in_channels, {values['in_channels']!r}")
  down = _blocks(values, where, {"DownBlock2D": False, "CrossAttnDownBlock2D": True},
                 {"UpBlock2D": False, "CrossAttnUpBlock2D": True})
  levels = len(down)
  depths = _per_level(values, "transformer_layers_per_block", levels, where)
  if min(depths) < 1:
    raise ConversionError(f"{where}: transformer_layers_per_block is "
                          f"{values['transformer_layers_per_block']!r}; expected at least 1 each")
  number_width = _typed(values, "addition_time_embed_dim", "int", where)
  extra = _typed(values, "projection_class_embeddings_input_dim", "int", where)
  if extra <= 6 * number_width:
    raise ConversionError(
        f"{where}: projection_class_embeddings_input_dim is {extra}; expected more than the "
        f"{6 * number_width} of six numbers (addition_time_embed_dim)")
  return UNET.read(
      UNetConfig, values, where, middle_depth=depths[-1],
      depths=tuple(depth if attends else 0 for depth, attends in zip(depths, down)),
      heads=_per_level(values, "attention_head_dim", levels, where),
      resnets=_alike(values, "layers_per_block", levels, where),
      context=_alike(values, "cross_attention_dim", levels, where),
      pooled=extra - 6 * number_width)


def _read_vae(values: Json, where: str) -> VaeConfig:
  _class(values, "vae", where)
  values = VAE.check(values, where)
  _blocks(values, where, {"DownEncoderBlock2D": False}, {"UpDecoderBlock2D": False})
  return VAE.read(VaeConfig, values, where)


def _blocks(values: Json, where: str, down: Mapping[str, bool],
            up: Mapping[str, bool]) -> list[bool]:
  """Whether each level has attention, of down_block_types; up_block_types must mirror them."""
  levels = len(_typed(values, "block_out_channels", "tuple[int, ...]", where))
  found = []
  for key, known in (("down_block_types", down), ("up_block_types", up)):
    kinds = values[key]
    if not isinstance(kinds, list) or len(kinds) != levels or any(k not in known for k in kinds):
      raise ConversionError(f"{where}: {key} is {kinds!r}; expected {levels} of "
                            f"{' or '.join(known)}, as block_out_channels has")
    found.append([known[kind] for kind in kinds])
  if found[0] != found[1][::-1]:
    raise ConversionError(f"{where}: up_block_types is {values['up_block_types']!r}; expected the "
                          f"mirror of down_block_types {values['down_block_types']!r}")
  return found[0]


def _per_level(values: Json, key: str, levels: int, where: str) -> tuple[int, ...]:
  value = values[key]
  out = [value] * levels if type(value) is int else value
  if type(out) is not list or len(out) != levels or any(type(v) is not int for v in out):
    raise ConversionError(f"{where}: {key} is {value!r}; expected a whole number or {levels}")
  return tuple(out)


def _alike(values: Json, key: str, levels: int, where: str) -> int:
  out = _per_level(values, key, levels, where)
  if len(set(out)) > 1:
    raise ConversionError(f"{where}: {key} is {values[key]!r}; expected the same for all levels")
  return out[0]


def write_configs(config: SdxlConfig) -> dict[str, Json]:
  """JSON files by their path in a diffusers folder, for a model that never had any."""
  sampler = config.schedule.sampler
  scheduler = next(kind for kind, name in SAMPLERS.items() if name == sampler)
  unet, vae = config.unet, config.vae
  attends = [depth > 0 for depth in unet.depths]
  kinds = lambda end, levels: [f"CrossAttn{end}" if attending else end for attending in levels]
  mark = lambda part: {"_class_name": COMPONENTS[part][1]}
  text = lambda part, c: {"architectures": [COMPONENTS[part][1]], **TEXT.write(c),
                          "projection_dim": c.projection or c.width}
  return {
      INDEX: {"_class_name": PIPELINE, "force_zeros_for_empty_prompt": config.zero_negative,
              **{name: list(kind) for name, kind in COMPONENTS.items()},
              "scheduler": ["diffusers", scheduler]},
      SCHEDULER: {"_class_name": scheduler, **SCHEDULES[sampler].write(config.schedule)},
      "text_encoder/config.json": text("text_encoder", config.text_encoder),
      "text_encoder_2/config.json": text("text_encoder_2", config.text_encoder_2),
      "unet/config.json": {
          **mark("unet"), **UNET.write(unet), "out_channels": unet.channels,
          "down_block_types": kinds("DownBlock2D", attends),
          "up_block_types": kinds("UpBlock2D", attends[::-1]),
          # Where nothing attends, only the middle reads it.
          "transformer_layers_per_block": [d or 1 for d in unet.depths[:-1]] + [unet.middle_depth],
          "attention_head_dim": list(unet.heads), "layers_per_block": unet.resnets,
          "cross_attention_dim": unet.context,
          "projection_class_embeddings_input_dim": unet.pooled + 6 * unet.number_width},
      "vae/config.json": {
          **mark("vae"), **VAE.write(vae), "down_block_types": ["DownEncoderBlock2D"] * len(
              vae.widths), "up_block_types": ["UpDecoderBlock2D"] * len(vae.widths)}}
