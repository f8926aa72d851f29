"""A run of the tiny model on pictures and conversations made on the spot."""
import json
import os
import pathlib
import signal

import numpy as np
from PIL import Image

from mgjax.data.config import DataConfig
from mgjax.models.remat import KEEP_ALL
from mgjax.presets import find
from mgjax.train import loop
from mgjax.train.config import CheckpointConfig, MeshConfig, RunConfig
from mgjax.train.optimizer import OptimizerConfig, Row

TOKENIZER = pathlib.Path(__file__).parents[1] / "data" / "cases" / "small_yi"


def make_run(root, *, steps, accumulate=1, workers=0) -> RunConfig:
  """Stage 2 of the `tiny` preset in float32, batch 8; data under `root`."""
  root = pathlib.Path(root)
  if not (root / "data.json").exists():
    rng, records = np.random.default_rng(0), []
    for i in range(12):
      record = {"id": f"s{i}", "conversations": [
          {"from": "human", "value": f"What is {i}?"}, {"from": "gpt", "value": f"It is {i}."}]}
      if i % 4:  # some are text alone
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(root / f"{i}.png")
        record["image"] = f"{i}.png"
        record["conversations"][0]["value"] = f"<image>\nWhat is {i}?"
      records.append(record)
    (root / "data.json").write_text(json.dumps(records))
  preset = find("tiny")
  return RunConfig(
      model=preset.model, tokenizer=str(TOKENIZER), steps=steps, accumulate=accumulate,
      data=DataConfig(str(root / "data.json"), str(root), "chatml_direct", 64, hr_size=128,
                      tokens_per_image=16, batch_size=8, workers=workers),
      optimizer=OptimizerConfig(
          1e-3, (Row("^(mining|projector|decoder)/"), Row("", None)), clip_norm=1.0),
      mesh=MeshConfig(1, 1, 1, 1), remat=KEEP_ALL, dtype="float32", frozen_dtype="float32",
      checkpoint=CheckpointConfig(every=1000))


def stop_at(monkeypatch, step):
  """Sends SIGTERM to this process before that step is done."""
  usage, calls = loop.usage, []

  def watched(*args):  # called as a step's record is written
    calls.append(None)
    if len(calls) == step - 1:
      os.kill(os.getpid(), signal.SIGTERM)
    return usage(*args)

  monkeypatch.setattr(loop, "usage", watched)
