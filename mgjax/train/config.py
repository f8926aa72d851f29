"""From what a config file says to frozen, checked data."""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgjax.config import ConfigError, ModelConfig, at_least, build
from mgjax.data.config import DataConfig, Resolution
from mgjax.data.conversation import get_template
from mgjax.data.images import ASPECTS
from mgjax.models.attention import IMPLEMENTATIONS
from mgjax.models.lora import LoraConfig
from mgjax.models.remat import RematConfig
from mgjax.train.optimizer import OptimizerConfig

OBJECTIVES = ("language", "tags:vision", "tags:vision_hr")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; one may be -1 (what the others leave).  If fsdp and tensor both are,
  fsdp takes as many devices as can share the rows of a batch, tensor the rest."""

  data: int = 1
  fsdp: int = -1
  tensor: int = -1
  expert: int = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When to save and what to keep; the last step is always saved."""

  every: int = 1000
  keep: int = 2  # if the newest is damaged, the one before it serves

  def __post_init__(self):
    at_least(self, 1, "every", "keep")


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  """Which steps to trace into workdir/profile."""

  steps: str = ""  # "10:13" = from step 10 to step 13, both included; "" = none

  def __post_init__(self):
    self.span()

  def span(self) -> range:
    """The steps as numbers.  Raises ConfigError for anything but two of them in order."""
    if not self.steps:
      return range(0)
    numbers = re.fullmatch(r"(\d+):(\d+)", self.steps)
    first, last = map(int, numbers.groups()) if numbers else (0, 0)
    if not 1 <= first <= last:
      raise ConfigError(f"config.profile.steps is {self.steps!r}; expected the first and the last "
                        "step to trace, such as 10:13")
    return range(first, last + 1)


@dataclasses.dataclass(frozen=True)
class HeldoutConfig:
  """Samples that are not trained on, and when to measure the model on them (see `heldout.py`).

  They are read by the rules of `data`, at the model's own resolution.  All have to be usable,
  whatever data.on_error says: figures of another set could not be compared.
  """

  path: str = ""        # a data file, like data.path; "" = none
  image_root: str = ""  # the folder that its `image` paths are relative to
  every: int = 0        # steps from one time to the next; the last step always is one
  samples: int = 0      # only the first ones, at most so many; 0 = all

  def __post_init__(self):
    at_least(self, 0, "every", "samples")
    given = [name for name in ("image_root", "every", "samples") if getattr(self, name)]
    if given and not self.path:
      raise ConfigError(f"config.heldout.{given[0]} is {getattr(self, given[0])!r}, but "
                        "config.heldout.path is empty; expected a data file: "
                        f"--config.heldout.path=FILE, or leave {given[0]} out as well")
    if self.path and not self.every:
      raise ConfigError(f"config.heldout.path is {self.path!r}, but config.heldout.every is 0; "
                        "expected at least 1 step: --config.heldout.every=500")


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """One training run: a model, its data, and how it is trained."""

  model: ModelConfig
  data: DataConfig
  tokenizer: str = ""                 # folder with tokenizer.json or tokenizer.model; "" = that of
                                      # the checkpoint in init_from
  optimizer: OptimizerConfig = OptimizerConfig()
  lora: LoraConfig = LoraConfig()     # adapters beside frozen layers; rank 0: none
  objective: str = "language"         # language | tags:vision | tags:vision_hr (tower pre-training)
  router_loss: float = 0.0            # weight of the experts' balance (the original's: 0)
  steps: int | None = None            # None: `epochs` over the data
  epochs: float = 1.0
  accumulate: int = 1                 # micro-batches a step; data.batch_size counts all their rows
  mesh: MeshConfig = MeshConfig()
  remat: RematConfig = RematConfig()
  attention: str = "auto"             # auto (by the devices) | xla | splash (TPU) | cudnn (GPU)
  dtype: str = "bfloat16"             # of matrix products
  frozen_dtype: str = "bfloat16"      # of parameters that do not train; trained ones are float32
  seed: int = 0
  init_from: tuple[tuple[str, str], ...] = ()  # (prefix of parameter paths, checkpoint); config
                                      # files write it as text, see `parse_init_from`
  chat_template: str = ""             # what launch/chat.py uses; "" = data.template
  chat_aspect: str = ""               # "" = data.aspect
  chat_stop_ids: tuple[int, ...] = ()  # ids that end an answer, beside those of tokenizer, template
  checkpoint: CheckpointConfig = CheckpointConfig()
  profile: ProfileConfig = ProfileConfig()
  heldout: HeldoutConfig = HeldoutConfig()
  log_every: int = 1
  hang_timeout: float = 600.0         # seconds; a host of several that takes longer over a part of
                                      # a step (loading, computing, saving) ends the run

  def __post_init__(self):
    at_least(self, 1, "steps", "accumulate", "log_every")
    if not 0 < self.epochs < float("inf"):
      raise ConfigError(f"config.epochs is {self.epochs}; expected more than 0")
    at_least(self, 0, "router_loss")
    at_least(self, 1, "hang_timeout")
    if self.router_loss and not self.model.decoder.experts:
      raise ConfigError(f"config.router_loss is {self.router_loss}, but the decoder has no experts")
    if self.chat_template:
      get_template(self.chat_template)
    for name, value, allowed in (
        ("chat_aspect", self.chat_aspect, ("", *ASPECTS)),
        ("objective", self.objective, OBJECTIVES), ("attention", self.attention, IMPLEMENTATIONS),
        ("dtype", self.dtype, ("bfloat16", "float32")),
        ("frozen_dtype", self.frozen_dtype, ("bfloat16", "float32"))):
      if value not in allowed:
        raise ConfigError(f"config.{name} is {value!r}; expected one of {', '.join(allowed)}")
    if self.lora.used and self.objective != "language":
      raise ConfigError(f"config.lora adapts a language model's layers, but config.objective is "
                        f"{self.objective!r}; leave config.lora.rank at 0")
    if self.heldout.path and self.objective != "language":
      raise ConfigError(f"config.heldout.path is {self.heldout.path!r}, but config.objective is "
                        f"{self.objective!r}: a tower alone gives no answers to measure; expected "
                        "'language', or leave config.heldout out")
    for resolution in self.data.all_resolutions:
      if resolution.batch_size % self.accumulate:
        raise ConfigError(f"config.data: batch_size {resolution.batch_size} is not a multiple of "
                          f"config.accumulate {self.accumulate}")
    if self.model.vision is None:
      if self.data.images_per_row or self.objective != "language":
        raise ConfigError("config.model has no towers: it is a language model alone; set "
                          "config.data.images_per_row to 0, or start from a checkpoint with towers")
    elif self.objective == "language":
      if self.data.hr_size != self.model.hr_size:
        raise ConfigError(f"config.data.hr_size is {self.data.hr_size}, but the model needs "
                          f"{self.model.hr_size}; leave it out, it follows config.model")
      for resolution in self.data.all_resolutions:
        expected = self.model.at(resolution.hr_size).visual_tokens
        if resolution.tokens_per_image != expected:
          raise ConfigError(
              f"config.data: tokens_per_image is {resolution.tokens_per_image} at hr_size "
              f"{resolution.hr_size}, but the model makes {expected}; leave it out, it follows "
              "config.model")
    elif self.data.resolutions or self.data.batching != "single":
      raise ConfigError(f"config.objective {self.objective!r} takes one picture a row: leave "
                        "config.data.batching at 'single' and config.data.resolutions empty")


def parse_init_from(text: str) -> tuple[tuple[str, str], ...]:
  """Where a run starts from, as config files write it: a checkpoint, or one for each part.

  >>> parse_init_from("checkpoints/mgm-7b"), parse_init_from("vision=runs/a,decoder=runs/b")
  ((('', 'checkpoints/mgm-7b'),), (('vision', 'runs/a'), ('decoder', 'runs/b')))
  """
  if not text or Path(text).exists():
    return (("", text),) if text else ()
  parts = []
  for entry in text.split(","):
    prefix, _, source = entry.rpartition("=")
    if not source:
      raise ConfigError(f"config.init_from is {text!r}; expected a checkpoint folder, or "
                        "part=FOLDER,part=FOLDER")
    parts.append((prefix, source))
  return tuple(parts)


def run_config(values: Mapping[str, Any]) -> RunConfig:
  """A config file's dictionary as a RunConfig.

  data.hr_size and data.tokens_per_image follow the model where they are left out.
  Raises ConfigError for a key that does not exist (naming the nearest), a missing key, a value of
  the wrong type, or values that do not fit together.
  """
  values = dict(values)
  if isinstance(values.get("init_from"), str):
    values["init_from"] = parse_init_from(values["init_from"])
  if isinstance(values.get("remat"), str):  # one policy for all parts
    values["remat"] = {f.name: values["remat"] for f in dataclasses.fields(RematConfig)}
  model = build(ModelConfig, values.get("model", {}), "config.model")
  data = dict(values.get("data", {}))
  if model.vision is not None:
    data = dict(hr_size=model.hr_size, tokens_per_image=model.visual_tokens) | data
    data["resolutions"] = tuple(_resolution(row, model, i)
                                for i, row in enumerate(data.get("resolutions", ())))
  return build(RunConfig, values | {"model": model, "data": data}, "config")


def _resolution(values: Any, model: ModelConfig, i: int) -> Resolution:
  resolution = build(Resolution, values, f"config.data.resolutions[{i}]")
  if resolution.tokens_per_image:
    return resolution
  return dataclasses.replace(
      resolution, tokens_per_image=model.at(resolution.hr_size).visual_tokens)
