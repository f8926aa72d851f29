"""A run that stops and goes on is the run that never stopped, bit for bit."""
import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
from small_run import make_run

from mgjax import checkpoint, trees
from mgjax.checkpoint import CheckpointError
from mgjax.train import loop
from mgjax.train.loop import TrainingError, train


def saved(workdir, step):
  """Every saved array of a step, by path."""
  from orbax.checkpoint import v1 as ocp
  return {k: np.asarray(v) for k, v in trees.flatten(
      ocp.load_checkpointables(workdir / "checkpoints" / str(step))["state"]).items()}


def same(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bit_identical(tmp_path, workers, monkeypatch):
  config = make_run(tmp_path, steps=4, accumulate=2, workers=workers)
  straight, broken = tmp_path / "straight", tmp_path / "broken"
  train(config, straight)
  with monkeypatch.context() as patch:  # stopped as a preempted machine is
    stop_at(patch, 2)
    assert train(config, broken) == 2
  assert train(config, broken) == 4
  same(saved(straight, 4), saved(broken, 4))
  lines = [json.loads(x) for x in (broken / "metrics.jsonl").read_text().splitlines()]
  assert [x["step"] for x in lines] == [1, 2, 3, 4]


def stop_at(monkeypatch, step):
  """Sends SIGTERM to this process as the batch of that step goes to the device."""
  put, calls = loop.put, []

  def watched(batch, mesh):
    calls.append(None)
    if len(calls) == step:
      os.kill(os.getpid(), signal.SIGTERM)
    return put(batch, mesh)

  monkeypatch.setattr(loop, "put", watched)


def test_accumulation_gives_the_exact_token_mean(tmp_path):
  config = make_run(tmp_path, steps=3)
  for accumulate in (1, 4):
    train(dataclasses.replace(config, accumulate=accumulate), tmp_path / str(accumulate))
  lines = lambda d: [json.loads(x) for x in
                     (tmp_path / d / "metrics.jsonl").read_text().splitlines()]
  for whole, parts in zip(lines("1"), lines("4")):
    assert whole["terms"] == parts["terms"]
    assert abs(whole["loss"] - parts["loss"]) < 1e-5
    assert abs(whole["grad_norm"] / parts["grad_norm"] - 1) < 1e-4


def test_nonfinite_loss_stops_before_the_update(tmp_path):
  config = make_run(tmp_path, steps=4)
  config = dataclasses.replace(config, optimizer=dataclasses.replace(
      config.optimizer, learning_rate=1e30, clip_norm=None, schedule="constant"))
  with pytest.raises(TrainingError, match=r"step 2: loss .*not finite.*#\d+ \(id s"):
    train(config, tmp_path / "run")


def test_checkpoint_of_another_config_is_refused(tmp_path):
  config = make_run(tmp_path, steps=1)
  train(config, tmp_path / "run")
  decoder = dataclasses.replace(config.model.decoder, mlp_width=96)
  other = dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder))
  with pytest.raises(CheckpointError, match=r"has shape \(.*\) there and \(.*96.*another model"):
    train(other, tmp_path / "run")


def test_missing_checkpoint(tmp_path):
  with pytest.raises(CheckpointError, match="no checkpoint found"):
    checkpoint.resolve(tmp_path)


def test_init_from_takes_parts(tmp_path):
  config = make_run(tmp_path, steps=1)
  train(config, tmp_path / "first")
  second = dataclasses.replace(config, init_from=(("decoder", str(tmp_path / "first")),), seed=7,
                               optimizer=dataclasses.replace(config.optimizer, learning_rate=0.0))
  train(second, tmp_path / "second")
  a, b = saved(tmp_path / "first", 1), saved(tmp_path / "second", 1)
  decoder = [k for k in a if k.startswith("params/decoder")]
  assert decoder
  for key in decoder:
    np.testing.assert_array_equal(a[key], b[key])
  key = "params/projector/layers/0/kernel"
  assert (a[key] != b[key]).any()
  wrong = dataclasses.replace(config, init_from=(("decoderr", str(tmp_path / "first")),))
  with pytest.raises(CheckpointError, match="'decoderr' .* names no parameter"):
    train(wrong, tmp_path / "third")


def test_eight_devices_equal_one(tmp_path):
  """Losses and parameters on a 2x2x2x1 mesh against one device, float32."""
  import subprocess
  import sys
  script = (
      "import jax, sys, pathlib; jax.config.update('jax_num_cpu_devices', int(sys.argv[2]));"
      "jax.config.update('jax_default_matmul_precision', 'highest');"
      "from small_run import make_run; from mgjax.train.loop import train; import dataclasses;"
      "from mgjax.train.config import MeshConfig;"
      "root = pathlib.Path(sys.argv[1]);"
      "mesh = MeshConfig(2, 2, 2, 1) if sys.argv[2] == '8' else MeshConfig(1, 1, 1, 1);"
      "train(dataclasses.replace(make_run(root, steps=3), mesh=mesh), root / sys.argv[2])")
  here = os.path.dirname(os.path.abspath(__file__))
  env = os.environ | {"PYTHONPATH": os.pathsep.join([here, os.getcwd()]), "JAX_PLATFORMS": "cpu"}
  for devices in ("1", "8"):
    subprocess.run([sys.executable, "-c", script, str(tmp_path), devices], check=True, env=env)
  lines = lambda d: [json.loads(x) for x in
                     (tmp_path / d / "metrics.jsonl").read_text().splitlines()]
  for one, eight in zip(lines("1"), lines("8")):
    assert abs(one["loss"] - eight["loss"]) < 1e-5
    assert abs(one["grad_norm"] - eight["grad_norm"]) < 1e-4
  a, b = saved(tmp_path / "1", 3), saved(tmp_path / "8", 3)
  for key in a:
    if not (key.startswith("opt_state") or key.endswith("key/dense/bias")
            or key.endswith("key/norm/bias")):  # biases whose true gradient is zero: noise
      np.testing.assert_allclose(a[key], b[key], atol=1e-5, rtol=0, err_msg=key)


def test_mesh_and_batch_that_do_not_fit(tmp_path):
  from mgjax.train.config import MeshConfig
  config = make_run(tmp_path, steps=1)
  wrong = dataclasses.replace(config, mesh=MeshConfig(1, 3, 1, 1))
  with pytest.raises(ValueError, match="fsdp=3.* does not cover the .* devices"):
    train(wrong, tmp_path / "run")


def test_no_recompilation_after_the_first_step(tmp_path):
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
      lambda name, seconds, **kw: compiled.append(name) if "backend_compile" in name else None)
  train(make_run(tmp_path, steps=2), tmp_path / "two")
  two = len(compiled)
  compiled.clear()
  train(make_run(tmp_path, steps=6), tmp_path / "six")
  assert len(compiled) <= two
