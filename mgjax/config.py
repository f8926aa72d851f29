"""The shape of a model, as frozen data.  Families and sizes differ by values, nowhere by name."""
from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
  """A setting that does not exist, has no such value, or does not fit the others."""


class CheckpointError(ValueError):
  """A checkpoint that is missing, damaged, or of another model."""


def at_least(config: Any, least: float, *names: str) -> None:
  """Raises ConfigError naming the first field of `config` below `least` (nan counts as below)."""
  for name in names:
    value = getattr(config, name)
    if value is not None and not value >= least:
      raise ConfigError(f"{type(config).__name__}: {name} is {value}, expected at least {least}")


@dataclasses.dataclass(frozen=True)
class ClipVitConfig:
  """Low-resolution tower: a CLIP ViT (R1.2).  Defaults: openai/clip-vit-large-patch14-336."""

  image_size: int = 336
  patch_size: int = 14
  width: int = 1024
  depth: int = 24
  heads: int = 16
  mlp_width: int = 4096
  norm_eps: float = 1e-5
  select_layer: int = -2  # index into the depth+1 hidden states; -2 leaves the last block unused

  def __post_init__(self):
    at_least(self, 1, "image_size", "patch_size", "width", "depth", "heads", "mlp_width")
    if self.image_size % self.patch_size:
      raise ConfigError(f"clip: image_size {self.image_size} is not a multiple of patch_size "
                       f"{self.patch_size}")
    if self.width % self.heads:
      raise ConfigError(f"clip: width {self.width} is not a multiple of heads {self.heads}")
    if not -self.depth - 1 <= self.select_layer <= self.depth:
      raise ConfigError(f"clip: select_layer {self.select_layer} is outside the "
                       f"{self.depth + 1} hidden states")

  @property
  def side(self) -> int:
    """Patches along one side of the image."""
    return self.image_size // self.patch_size

  @property
  def used_depth(self) -> int:
    """Blocks that have to run for the selected hidden state."""
    return self.select_layer % (self.depth + 1)


@dataclasses.dataclass(frozen=True)
class ConvNextConfig:
  """High-resolution tower: an OpenCLIP ConvNeXt trunk (R1.4).  Defaults: convnext_large_d_320."""

  depths: tuple[int, ...] = (3, 3, 27, 3)
  widths: tuple[int, ...] = (192, 384, 768, 1536)
  norm_eps: float = 1e-6
  drop_path: float = 0.0  # rate of the last block, rising linearly from 0; the recipe trains at 0.1

  def __post_init__(self):
    if len(self.depths) != len(self.widths) or not self.depths:
      raise ConfigError(f"convnext: {len(self.depths)} depths for {len(self.widths)} widths")
    if not 0 <= self.drop_path < 1:
      raise ConfigError(f"convnext: drop_path is {self.drop_path}, expected 0 <= drop_path < 1")

  @property
  def features(self) -> int:
    """Channels of the concatenated stage maps."""
    return sum(self.widths)

  @property
  def stride(self) -> int:
    """Pixels per position of the first (finest) stage map."""
    return 4

  @property
  def total_stride(self) -> int:
    """Pixels per position of the last (coarsest) stage map."""
    return self.stride * 2 ** (len(self.depths) - 1)


ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Rotary frequencies for texts longer than those of pre-training.

  All are divided by `factor` (linear scaling); with `original_length` only those that turn less
  than `low_freq_factor` times in it, those above `high_freq_factor` stay, with a smooth passage
  between (LLaMA-3.1).
  """

  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_length: float = 0.0  # 0: linear

  def __post_init__(self):
    at_least(self, 1, "factor")
    if self.original_length and self.high_freq_factor <= self.low_freq_factor:
      raise ConfigError(f"rope: high_freq_factor {self.high_freq_factor} is not above "
                       f"low_freq_factor {self.low_freq_factor}")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A decoder of the Llama, Gemma or Mistral family (R1.10, R1.11).  Defaults: Vicuna-7B."""

  vocab_size: int = 32000
  width: int = 4096
  depth: int = 32
  heads: int = 32
  kv_heads: int = 32
  head_dim: int = 128
  mlp_width: int = 11008
  norm_eps: float = 1e-5
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  activation: str = "silu"      # of the gated MLP: silu | gelu (exact) | gelu_tanh
  norm_offset: float = 0.0      # norms multiply by offset + weight (Gemma: 1)
  scale_inputs: bool = False    # embeddings, visual tokens too, times sqrt(width) (Gemma)
  tied_head: bool = False       # the head is the embedding table
  sliding_window: int | None = None  # positions that a position sees, itself included (Mistral)
  experts: int = 0              # MLPs to choose from (Mixtral); 0: one MLP for all tokens
  experts_per_token: int = 2    # how many of them a token uses

  def __post_init__(self):
    at_least(self, 1, "vocab_size", "width", "depth", "heads", "kv_heads", "head_dim", "mlp_width")
    at_least(self, 1, "sliding_window", "experts_per_token")
    if self.experts and self.experts_per_token > self.experts:
      raise ConfigError(f"decoder: experts_per_token {self.experts_per_token} of only "
                        f"{self.experts} experts")
    if self.activation not in ACTIVATIONS:
      raise ConfigError(f"decoder: activation {self.activation!r}; one of {', '.join(ACTIVATIONS)}")
    if self.head_dim % 2:
      raise ConfigError(f"decoder: head_dim {self.head_dim} is odd; RoPE turns pairs")
    if self.heads % self.kv_heads:
      raise ConfigError(f"decoder: heads {self.heads} is not a multiple of kv_heads "
                        f"{self.kv_heads}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A whole Mini-Gemini.  `vision_hr=None` is the single-tower model: no mining, same tokens;
  `vision=None` the language model alone."""

  vision: ClipVitConfig | None = ClipVitConfig()
  vision_hr: ConvNextConfig | None = ConvNextConfig()
  decoder: DecoderConfig = DecoderConfig()
  hr_size: int = 768        # side of the one image that the host sends
  grid: int = 1             # HD: the LR view is cut into grid x grid tiles
  global_view: bool = False  # HD: one more tile, the whole view shrunk
  projector_depth: int = 2  # mlp{N}x_gelu; 1 is a single linear layer

  def __post_init__(self):
    at_least(self, 1, "grid", "hr_size", "projector_depth")
    if self.global_view and self.grid == 1:
      raise ConfigError("model: global_view needs grid >= 2 (with grid 1 the view is the image)")
    if self.vision is None and self.vision_hr is not None:
      raise ConfigError("model: vision_hr without vision; mining needs the tokens of both towers")
    if self.vision_hr is not None:
      cells = self.vision.side * self.grid
      stride = self.vision_hr.total_stride
      if self.hr_size % (self.vision_hr.stride * cells) or self.hr_size % stride:
        raise ConfigError(
            f"model: hr_size {self.hr_size} must be a multiple of {stride} (the last ConvNeXt "
            f"stage) and of {self.vision_hr.stride * cells} (so that each of {cells} LR tokens a "
            "side owns a whole window)")

  def at(self, hr_size: int) -> ModelConfig:
    """The same parameters at another size of pictures: tiles as in HD where it is larger.

    Raises ConfigError unless the size is a multiple of what one CLIP crop covers.
    """
    tile = self.hr_size // self.grid
    if hr_size % tile or hr_size < tile:
      raise ConfigError(f"model: hr_size {hr_size} cannot be cut into tiles; expected a multiple "
                        f"of {tile}")
    if hr_size == self.hr_size:
      return self
    grid = hr_size // tile
    return dataclasses.replace(self, hr_size=hr_size, grid=grid, global_view=grid > 1)

  @property
  def lr_size(self) -> int:
    """Side of the low-resolution view before it is cut into tiles."""
    return self.vision.image_size * self.grid

  @property
  def tiles(self) -> int:
    """CLIP crops per image."""
    return self.grid**2 + self.global_view

  @property
  def visual_tokens(self) -> int:
    """T: tokens that one image takes in the text; 0 for a language model alone."""
    return self.tiles * self.vision.side**2 if self.vision else 0


def build(cls, values: Any, where: str) -> Any:
  """`values` (nested mappings and sequences) as the dataclass `cls`; errors name `where`."""
  if isinstance(values, cls):
    return values
  if isinstance(values, tuple | list):  # a row of a table, by position
    names = [f.name for f in dataclasses.fields(cls)]
    if len(values) > len(names):
      raise ConfigError(f"{where} is {values!r}; expected at most {len(names)} entries: "
                        f"{', '.join(names)}")
    values = dict(zip(names, values))
  if not isinstance(values, Mapping):
    raise ConfigError(f"{where} is {values!r}; expected the fields of {cls.__name__}")
  hints = typing.get_type_hints(cls)
  for key in values:
    if key not in hints:
      near = difflib.get_close_matches(key, hints, 1)
      hint = f"did you mean {where}.{near[0]}?  " if near else ""
      raise ConfigError(f"{where}.{key} does not exist; {hint}There are: {', '.join(hints)}")
  missing = [f.name for f in dataclasses.fields(cls) if f.name not in values
             and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
  if missing:
    raise ConfigError(f"{where} needs {', '.join(missing)}")
  return cls(**{k: _convert(hints[k], v, f"{where}.{k}") for k, v in values.items()})


def _convert(hint, value, where):
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    if value is None:
      return None
    return _convert(next(a for a in args if a is not type(None)), value, where)
  if dataclasses.is_dataclass(hint):
    return build(hint, value, where)
  if origin is tuple:
    if not isinstance(value, tuple | list):
      raise ConfigError(f"{where} is {value!r}; expected a tuple (one entry ends in a comma: (x,))")
    inner = [args[0]] * len(value) if args[1:] == (...,) else args
    if len(inner) != len(value):
      raise ConfigError(f"{where} is {value!r}; expected {len(inner)} entries, got {len(value)}")
    return tuple(_convert(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(inner, value)))
  if hint is float and type(value) is int:
    return float(value)
  if not isinstance(value, hint) or (hint in (int, float) and isinstance(value, bool)):
    raise ConfigError(f"{where} is {value!r}; expected {hint.__name__}")
  return value
