"""What config files start from: every field of a run with its default, and the tables of the two
stages (R4.2)."""
from __future__ import annotations

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict, config_dict

from mgjax.checkpoint import read_run
from mgjax.config import ModelConfig, build
from mgjax.data.config import DataConfig
from mgjax.presets import PRESETS, Preset, find
from mgjax.train.config import RunConfig

# (pattern of parameter paths, learning-rate multiplier; None freezes).  The first match counts.
ALIGN = (("^(mining|projector)/", 1.0), ("", None))


def tune(projector: float = 1.0):
  """The table of stage 2; `projector` multiplies the learning rate of projector and mining."""
  return (("^(mining|projector)/", projector), ("^decoder/", 1.0), ("", None))


# The table of a language model alone.
TUNE_TEXT = (("^decoder/", 1.0),)


def preset_of(name: str) -> Preset:
  """A preset by name, or the model of a checkpoint folder.

  The numbers of the recipe are those of the preset with the same language model, if there is one.
  Raises ConfigError or CheckpointError.
  """
  if name in PRESETS or not Path(name).is_dir():
    return find(name)
  run = read_run(name)[1]
  template = run["chat_template"] or run["data"]["template"]
  model = build(ModelConfig, run["model"], f"{name}/config.json: model")
  align = template if template in ("gemma", "llama_3") else "plain"  # R8 N14
  kin = next((p for p in PRESETS.values() if p.model.decoder == model.decoder), Preset(model, ""))
  if model.vision_hr is not None and kin.model.vision_hr is not None:
    hr = dataclasses.replace(model.vision_hr, drop_path=kin.model.vision_hr.drop_path)
    model = dataclasses.replace(model, vision_hr=hr)
  return dataclasses.replace(kin, model=model, template=template, align_template=align,
                             max_length=run["data"]["max_length"])


def base_config(preset: str) -> ConfigDict:
  """A run of a preset with all defaults: a mutable ConfigDict whose keys are RunConfig's.

  preset: as in `preset_of`; a run of a checkpoint's model starts from it.
  """
  chosen = preset_of(preset)
  defaults = {f.name: _default(f) for f in dataclasses.fields(RunConfig)
              if f.name not in ("model", "data", "tokenizer")}
  data = {f.name: f.default for f in dataclasses.fields(DataConfig)
          if f.name not in ("path", "hr_size", "tokens_per_image")}
  config = ConfigDict({"model": dataclasses.asdict(chosen.model),
                       "data": data | {"path": "", "template": chosen.template,
                                       "max_length": chosen.max_length},
                       "tokenizer": ""} | defaults | {"init_from": ""})
  config.chat_template = chosen.template
  config.optimizer.learning_rate = chosen.learning_rate
  if preset not in PRESETS:
    config.init_from = preset
  if chosen.model.vision is None:
    config.data.images_per_row = 0
  # None has no type: flags need to know what may stand there.
  config.steps = config_dict.placeholder(int)
  config.optimizer.clip_norm = config_dict.placeholder(float)
  return config


def _default(field):
  value = field.default
  return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
