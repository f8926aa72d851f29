"""What config files start from: every field of a run with its default, and the tables of the two
stages (R4.2)."""
from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict, config_dict

from mgjax.data.pipeline import DataConfig
from mgjax.presets import find
from mgjax.train.config import RunConfig

# (pattern of parameter paths, learning-rate multiplier; None freezes).  The first match counts.
ALIGN = (("^(mining|projector)/", 1.0), ("", None))


def tune(projector: float = 1.0):
  """The table of stage 2; `projector` multiplies the learning rate of projector and mining."""
  return (("^(mining|projector)/", projector), ("^decoder/", 1.0), ("", None))


def base_config(preset: str) -> ConfigDict:
  """A run of a preset with all defaults: a mutable ConfigDict whose keys are RunConfig's.

  Raises ValueError for a preset that does not exist.
  """
  chosen = find(preset)
  defaults = {f.name: _default(f) for f in dataclasses.fields(RunConfig)
              if f.name not in ("model", "data", "tokenizer")}
  data = {f.name: f.default for f in dataclasses.fields(DataConfig)
          if f.name not in ("path", "hr_size", "tokens_per_image")}
  config = ConfigDict({"model": dataclasses.asdict(chosen.model),
                       "data": data | {"path": "", "template": chosen.template,
                                       "max_length": chosen.max_length},
                       "tokenizer": ""} | defaults)
  config.chat_template = chosen.template
  config.optimizer.learning_rate = chosen.learning_rate
  # None has no type: flags need to know what may stand there.
  config.steps = config_dict.placeholder(int)
  config.init_from = ""
  config.optimizer.clip_norm = config_dict.placeholder(float)
  return config


def _default(field):
  value = field.default
  return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
