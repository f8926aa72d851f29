"""The shapes of SDXL's parts.  The defaults are those of Stable Diffusion XL base 1.0."""
from __future__ import annotations

import dataclasses

from mgjax.config import ConfigError, at_least


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
  """A CLIP text transformer; SDXL's first is OpenAI's CLIP-L, its second OpenCLIP's bigG."""

  vocab_size: int = 49408
  length: int = 77           # positions; every prompt is padded to them
  width: int = 768
  depth: int = 12
  heads: int = 12
  mlp_width: int = 3072
  activation: str = "quick_gelu"  # or "gelu", the exact one
  norm_eps: float = 1e-5
  projection: int = 0        # width of the pooled vector; 0: nothing is pooled
  eos_id: int = 2            # whose position is pooled; 2, as old configs say, means the largest id

  def __post_init__(self):
    at_least(self, 1, "vocab_size", "length", "width", "heads", "mlp_width")
    at_least(self, 2, "depth")
    if self.width % self.heads:
      raise ConfigError(f"text encoder: {self.heads} heads do not divide the width {self.width}")


BIG_G = TextEncoderConfig(width=1280, depth=32, heads=20, mlp_width=5120, activation="gelu",
                          projection=1280)


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """The network that takes noise out of latents, level by level (SDXL, section 2.1, table 1)."""

  channels: int = 4                         # of the latents
  side: int = 128                           # of the latents that it was trained on
  widths: tuple[int, ...] = (320, 640, 1280)
  resnets: int = 2                          # of a level on the way down; one more on the way up
  depths: tuple[int, ...] = (0, 2, 10)      # transformer blocks behind each; 0: no attention
  middle_depth: int = 10                    # of those in the middle
  heads: tuple[int, ...] = (5, 10, 20)
  context: int = 2048                       # width of the encoded prompt
  pooled: int = 1280                        # width of the pooled vector of the prompt
  number_width: int = 256                   # of each of the six numbers of the micro-conditioning
  groups: int = 32                          # of the group norms
  norm_eps: float = 1e-5

  def __post_init__(self):
    at_least(self, 1, "channels", "side", "resnets", "groups", "number_width")
    at_least(self, 0, "middle_depth")
    if not len(self.widths) == len(self.depths) == len(self.heads):
      raise ConfigError(f"unet: widths {self.widths}, depths {self.depths} and heads {self.heads} "
                        "must have an entry for each level")
    for width, heads in zip(self.widths, self.heads):
      if width % heads or width % self.groups:
        raise ConfigError(f"unet: neither {heads} heads nor {self.groups} groups may cut the width "
                          f"{width}")


@dataclasses.dataclass(frozen=True)
class VaeConfig:
  """The autoencoder between pictures and latents."""

  channels: int = 4                         # of the latents
  widths: tuple[int, ...] = (128, 256, 512, 512)
  resnets: int = 2                          # of a level of the encoder; one more in the decoder
  groups: int = 32
  norm_eps: float = 1e-6
  scaling: float = 0.13025                  # latents are the encoder's times this

  def __post_init__(self):
    at_least(self, 1, "channels", "resnets", "groups")
    if wrong := [w for w in self.widths if w % self.groups]:
      raise ConfigError(f"vae: {self.groups} groups do not divide the width {wrong[0]}")

  @property
  def shrink(self) -> int:
    """Pixels of a side for one latent."""
    return 2 ** (len(self.widths) - 1)


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """How noise was added in training, and how the sampler takes it out."""

  sampler: str = "euler"           # or "ddim"
  train_steps: int = 1000
  beta_start: float = 0.00085
  beta_end: float = 0.012
  beta_schedule: str = "scaled_linear"  # or "linear"
  prediction: str = "epsilon"      # or "v_prediction"
  spacing: str = "leading"         # or "trailing", "linspace"
  offset: int = 1                  # of the time steps, where they are leading
  last_alpha_one: bool = False     # DDIM: whether the last step ends without any noise

  def __post_init__(self):
    at_least(self, 1, "train_steps")
    for name, known in (("sampler", ("euler", "ddim")),
                        ("beta_schedule", ("scaled_linear", "linear")),
                        ("prediction", ("epsilon", "v_prediction")),
                        ("spacing", ("leading", "trailing", "linspace"))):
      if getattr(self, name) not in known:
        raise ConfigError(f"schedule.{name}: {getattr(self, name)!r} does not exist; one of "
                          f"{', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class SdxlConfig:
  """All parts, and what belongs to none of them.

  zero_negative: whether no negative prompt means an encoding of zeros, not that of "".
  """

  text_encoder: TextEncoderConfig = TextEncoderConfig()
  text_encoder_2: TextEncoderConfig = BIG_G
  unet: UNetConfig = UNetConfig()
  vae: VaeConfig = VaeConfig()
  schedule: ScheduleConfig = ScheduleConfig()
  zero_negative: bool = True

  def __post_init__(self):
    context = self.text_encoder.width + self.text_encoder_2.width
    for what, got, want in (
        ("unet.context", self.unet.context, context),
        ("unet.pooled", self.unet.pooled, self.text_encoder_2.projection),
        ("vae.channels", self.vae.channels, self.unet.channels),
        ("text_encoder_2.length", self.text_encoder_2.length, self.text_encoder.length)):
      if got != want:
        raise ConfigError(f"{what} is {got}, the other parts want {want}; they belong to different "
                          "models")

  @property
  def side(self) -> int:
    """Pixels of a side that the model was trained to draw."""
    return self.unet.side * self.vae.shrink
