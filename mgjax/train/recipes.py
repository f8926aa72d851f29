"""What config files start from: every field of a run with its default, and the tables of the two
stages (R4.2)."""
from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from ml_collections import ConfigDict, config_dict

from mgjax.checkpoint import read_run
from mgjax.config import ConfigError, ModelConfig, build
from mgjax.data.config import DataConfig
from mgjax.data.sources import Source
from mgjax.presets import PRESETS, Preset, find
from mgjax.train.config import RunConfig

# (pattern of parameter paths, learning-rate multiplier; None freezes).  The first match counts.
ALIGN = (("^(mining|projector)/", 1.0), ("", None))


def tune(projector: float = 1.0):
  """The table of stage 2; `projector` multiplies the learning rate of projector and mining."""
  return (("^(mining|projector)/", projector), ("^decoder/", 1.0), ("", None))


# The table of a language model alone.
TUNE_TEXT = (("^decoder/", 1.0),)


def tune_adapters(sees: bool, projector: float = 1.0):
  """The table of a run with adapters (config.lora); `projector` as in `tune`."""
  rows = (("/lora_[ab]$", 1.0), ("^(mining|projector)/", projector), ("", None))
  return rows if sees else (rows[0], rows[-1])


# The parts of the released mixtures (R7), by the folder that their pictures lie in; the rest last.
PRETRAIN_PARTS = (("LLaVA-Pretrain", "^images/"), ("ALLaVA-4V", "^ALLaVA-4V/"), ("other", ""))
FINETUNE_PARTS = (
    ("text alone", "^$"), ("documents and charts", "^(docvqa|chartqa|dvqa|ai2d)/"),
    ("COCO", "^coco/"), ("GQA", "^gqa/"), ("OCR-VQA", "^ocr_vqa/"), ("Visual Genome", "^vg/"),
    ("ShareGPT4V", "^(llava|sam|share_textvqa|wikiart|web-celebrity|web-landmark)/"),
    ("LAION-GPT-4V", "^gpt4v-dataset/"), ("ALLaVA-4V", "^ALLaVA-4V/"), ("other", ""))


def parts_of(path: str, image_root: str, parts, **more) -> tuple[Source, ...]:
  """A released data file as a mixture of its parts; more: fields that all of them have."""
  return tuple(Source(path, image_root, name, pick=pick, **more) for name, pick in parts)


def loaders() -> dict[str, int]:
  """Threads and processes that load, for the cores that there are.  Decoding leaves Python's lock
  alone: eight threads share a process well, and cost less than eight processes."""
  return {"threads": 8, "workers": os.cpu_count() // 8}


def packed_rows(tokens_per_image: int, max_length: int, *, samples: int, text: int) -> dict:
  """Fields of packed rows, for about `samples` a step: room for a few pictures (2 to 4) with `text`
  tokens each, on average.  launch/check_data.py says how well they are filled, and what would be
  better."""
  images = 0 if not tokens_per_image else 4 if tokens_per_image <= 1024 else 2
  length = -(-images * (tokens_per_image + text) // 128) * 128  # the TPU's lanes
  return {"row_length": max(length, max_length), "images_per_row": images,
          "batch_size": samples // max(images, 4 - images)}


FINETUNE_ROWS = {"samples": 128, "text": 288}  # for `packed_rows`


def finetune_data(config: ConfigDict, chosen: Preset) -> None:
  """Gives a config the paper's mixture of stage 2, packed."""
  config.data.sources = parts_of(
      "data/MGM-Finetune/mgm_instruction.json", "data/MGM-Finetune", FINETUNE_PARTS)
  config.data.aspect = "pad"
  config.data.truncate = True
  config.data.update(loaders())
  config.data.batching = "packed"
  config.data.update(packed_rows(chosen.model.visual_tokens, chosen.max_length, **FINETUNE_ROWS))


def mix_resolutions(config: ConfigDict, names: tuple[str, ...], **rows) -> None:
  """Gives the sources of these names the pictures of the -hd model, in batches of their own; rows:
  as for `packed_rows`."""
  model = build(ModelConfig, config.model.to_dict(), "config.model")
  if model.grid > 1:
    raise ConfigError("the model is in high definition already; take its preset without -hd")
  hd, longest = model.at(2 * model.hr_size), 2 * config.data.max_length
  config.data.sources = tuple(
      dataclasses.replace(source, hr_size=hd.hr_size) if source.name in names else source
      for source in config.data.sources)
  config.data.resolutions = ({"hr_size": hd.hr_size, "max_length": longest}
                             | packed_rows(hd.visual_tokens, longest, **rows),)


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
