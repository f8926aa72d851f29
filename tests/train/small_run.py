"""A run of the tiny model on pictures and conversations made on the spot."""
import json
import os
import pathlib
import signal

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from PIL import Image

from mgjax import trees
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


def saved(workdir, step):
  """Every saved array of a step, by path, whatever devices it was saved from."""
  folder = workdir / "checkpoints" / str(step)
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  state = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here),
                       ocp.checkpointables_metadata(folder).metadata["state"])
  return {k: np.asarray(v) for k, v in trees.flatten(
      ocp.load_checkpointables(folder, dict(state=state))["state"]).items()}


def same(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def close(root, one, other, step):
  """Losses and parameters of two runs agree in float32."""
  lines = lambda d: [json.loads(x) for x in (root / d / "metrics.jsonl").read_text().splitlines()]
  assert len(lines(one)) == step
  for a, b in zip(lines(one), lines(other), strict=True):
    assert a["terms"] == b["terms"]
    assert abs(a["loss"] - b["loss"]) < 1e-5
    assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-4
  a, b = saved(root / one, step), saved(root / other, step)
  for key in a:
    if not (key.startswith("opt_state") or key.endswith("key/dense/bias")
            or key.endswith("key/norm/bias")):  # biases whose true gradient is zero: noise
      np.testing.assert_allclose(a[key], b[key], atol=1e-5, rtol=0, err_msg=key)
