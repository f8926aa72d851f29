"""The runs that the demo's recipes are made of, as config files write them."""
from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from mgjax.config import ModelConfig
from mgjax.demo.make import Sizes
from mgjax.train.recipes import base_config

LENGTH = 136  # a scene and five questions about it, with 16 visual tokens
SIZES = {"full": Sizes(crops=40_000, text=40_000, scenes=12_000, held_out=480),
         "quick": Sizes(crops=2_000, text=4_000, scenes=1_000, held_out=60)}


def run(model: ModelConfig, steps: int, batch_size: int, max_length: int, learning_rate: float):
  """What all runs of the demo share."""
  config = base_config("demo")
  config.model = ConfigDict(dataclasses.asdict(model))
  config.steps = steps
  config.data.batch_size, config.data.max_length = batch_size, max_length
  config.data.scan_limit = 1000
  config.optimizer.learning_rate = learning_rate
  config.optimizer.b2, config.optimizer.clip_norm = 0.95, 1.0
  config.optimizer.warmup_ratio = 0.05
  config.mesh.fsdp = 1
  config.remat.update(decoder="none", towers="none", mining="none")
  config.dtype = config.frozen_dtype = "float32"
  config.checkpoint.every = 500
  return config


def tower(model: ModelConfig, name: str, path: str, steps: int, hr_size: int):
  """Pre-trains the tower of that name ("vision", "vision_hr") on captioned pictures."""
  config = run(model, steps, 64, 24, 3e-3 if name == "vision_hr" else 1e-3)
  config.objective = f"tags:{name}"
  config.data.path, config.data.template = path, "plain"
  config.data.hr_size, config.data.tokens_per_image = hr_size, 1
  config.optimizer.weight_decay = 0.05
  return config


def language(model: ModelConfig, steps: int):
  """Pre-trains the decoder on scenes written as text."""
  config = run(model, steps, 24, LENGTH, 3e-3)
  config.data.path, config.data.images_per_row = "text.json", 0
  config.optimizer.table = (("^decoder/", 1.0), ("", None))
  return config


def stage(model: ModelConfig, path: str, steps: int, learning_rate: float, table, init_from: str,
          max_length: int = LENGTH):
  """Stage 1 or stage 2, by what `table` trains, from other runs by name."""
  config = run(model, steps, 32, max_length, learning_rate)
  config.data.path, config.optimizer.table, config.init_from = path, table, init_from
  return config
