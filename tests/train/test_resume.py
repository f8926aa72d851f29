"""A run that stops and goes on is the run that never stopped, bit for bit."""
import dataclasses
import json

import jax
import numpy as np
import pytest
from small_run import make_run, same, saved, stop_at

from mgjax import checkpoint, trees
from mgjax.checkpoint import CheckpointError
from mgjax.config import ConfigError
from mgjax.data.config import Resolution
from mgjax.data.samples import DataError
from mgjax.data.sources import Source
from mgjax.sharding import mesh_context
from mgjax.train import loop
from mgjax.train.compiled import mesh_of
from mgjax.train.config import CheckpointConfig, MeshConfig
from mgjax.train.loop import TrainingError, train
from mgjax.train.optimizer import make_optimizer
from mgjax.train.state import abstract_state, init_state


@pytest.mark.slow
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


def test_a_mixed_packed_run_resumes_bit_identical(tmp_path, monkeypatch):
  """Two resolutions, two compiled steps: stopped between them."""
  config = make_run(tmp_path, steps=6)
  path, root = config.data.path, config.data.image_root
  config = dataclasses.replace(config, data=dataclasses.replace(
      config.data, path="", batching="packed", row_length=128, images_per_row=2, batch_size=2,
      sources=(Source(path, root, "fine", pick="^[1-6]", hr_size=256), Source(path, root, "rest")),
      resolutions=(Resolution(256, 80, 128, 256, 2, 2),)))
  straight, broken = tmp_path / "straight", tmp_path / "broken"
  shapes, usage = [], loop.usage
  with monkeypatch.context() as patch:
    patch.setattr(loop, "usage", lambda *a: (shapes.append(a[1]), usage(*a))[1])
    train(config, straight)
  assert {s.hr_size for s in shapes} == {128, 256}
  with monkeypatch.context() as patch:
    stop_at(patch, 3)
    assert train(config, broken) == 3
  assert train(config, broken) == 6
  same(saved(straight, 6), saved(broken, 6))
  lines = [json.loads(x) for x in (broken / "metrics.jsonl").read_text().splitlines()]
  for line in lines:
    assert 0 < line["data/filled_tokens"] <= 1 and 0 <= line["data/filled_images"] <= 1
    assert 0 <= line["data/waiting"] < 1


def test_accumulation_gives_the_exact_token_mean(tmp_path):
  config = make_run(tmp_path, steps=2)
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
  config = dataclasses.replace(config, checkpoint=CheckpointConfig(every=1))
  with pytest.raises(TrainingError, match=r"step 2: loss .*not finite.*#\d+ \(id s"):
    train(config, tmp_path / "run")
  assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["1"]
  assert all(np.isfinite(v).all() for v in saved(tmp_path / "run", 1).values())


def test_a_run_goes_on_only_as_the_same_model(tmp_path, caplog):
  config = make_run(tmp_path, steps=1)
  train(config, tmp_path / "run")
  assert train(config, tmp_path / "run") == 1  # nothing left to do
  decoder = dataclasses.replace(config.model.decoder, rope_theta=5.0)  # no shape shows it
  other = dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder))
  for changed in ({"steps": 2}, {"init_from": (("", str(tmp_path / "run")),)}):
    workdir = tmp_path / ("run" if "steps" in changed else "other")
    with pytest.raises(ValueError, match="rope_theta .*10000.0.* 5.0"):
      train(dataclasses.replace(other, **changed), workdir)
  decoder = dataclasses.replace(config.model.decoder, mlp_width=96)
  other = dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder))
  with pytest.raises(ConfigError, match="mlp_width was 128 and is 96"):
    train(dataclasses.replace(other, steps=2), tmp_path / "run")
  more = dataclasses.replace(config, steps=2, seed=7)
  with caplog.at_level("WARNING", logger="absl"):
    assert train(more, tmp_path / "run") == 2
  assert "seed was 0 and is 7" in caplog.text


def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog):
  config = dataclasses.replace(make_run(tmp_path, steps=3), checkpoint=CheckpointConfig(every=1))
  train(config, tmp_path / "run")
  good = saved(tmp_path / "run", 3)
  steps = tmp_path / "run/checkpoints"
  assert sorted(p.name for p in steps.iterdir()) == ["2", "3"]
  for file in (steps / "3/state").rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:10])
  more = dataclasses.replace(config, steps=4)
  with caplog.at_level("WARNING", logger="absl"):
    assert train(more, tmp_path / "run") == 4
  assert "checkpoints/3: " in caplog.text
  assert [p.name.split("-")[0] for p in (tmp_path / "run/damaged").iterdir()] == ["3"]
  lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  assert [x["step"] for x in lines] == [1, 2, 3, 4]
  assert good.keys() == saved(tmp_path / "run", 3).keys()


def test_a_sample_that_fails_late_loses_no_work(tmp_path):
  config = make_run(tmp_path, steps=4)
  whole = (tmp_path / "1.png").read_bytes()
  (tmp_path / "1.png").write_bytes(whole[:len(whole) // 2])
  data = dataclasses.replace(config.data, shuffle=False, batch_size=1)
  config = dataclasses.replace(config, data=data)
  with pytest.raises(DataError, match=r"#1 \(id s1\): broken_image"):
    train(config, tmp_path / "run")
  (tmp_path / "1.png").write_bytes(whole)
  assert train(config, tmp_path / "run") == 4
  train(config, tmp_path / "straight")
  same(saved(tmp_path / "run", 4), saved(tmp_path / "straight", 4))


def test_missing_checkpoint(tmp_path):
  with pytest.raises(CheckpointError, match="no checkpoint found"):
    checkpoint.resolve(tmp_path)


def test_init_from_takes_parts(tmp_path):
  config = make_run(tmp_path, steps=1)
  train(config, tmp_path / "first")
  second = dataclasses.replace(config, init_from=(("decoder", str(tmp_path / "first")),), seed=7)
  mesh = mesh_of(config)
  with mesh_context(mesh):
    tx = make_optimizer(config.optimizer, 1)
    state, _ = init_state(second, tx, abstract_state(second, tx, mesh)[1])
  a, b = saved(tmp_path / "first", 1), trees.flatten(state.params)
  decoder = [k for k in b if k.startswith("decoder")]
  assert decoder
  for key in decoder:
    np.testing.assert_array_equal(a[f"params/{key}"], b[key])
  key = "projector/layers/0/kernel"
  assert (a[f"params/{key}"] != b[key]).any()
  wrong = dataclasses.replace(config, init_from=(("decoderr", str(tmp_path / "first")),))
  with pytest.raises(CheckpointError, match="'decoderr' .* names no parameter"):
    train(wrong, tmp_path / "third")


def test_mesh_and_batch_that_do_not_fit(tmp_path):
  config = make_run(tmp_path, steps=1)
  wrong = dataclasses.replace(config, mesh=MeshConfig(1, 3, 1, 1))
  with pytest.raises(ValueError, match="fsdp=3.* does not cover the .* devices"):
    train(wrong, tmp_path / "run")


def test_no_recompilation_after_the_first_step(tmp_path, monkeypatch):
  compiled, counts = [], []
  listener = lambda name, seconds, **kw: compiled.append(name) if "backend_compile" in name else 0
  usage = loop.usage  # called as a step's record is written
  monkeypatch.setattr(loop, "usage", lambda *a: (counts.append(len(compiled)), usage(*a))[1])
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    train(make_run(tmp_path, steps=5), tmp_path / "run")
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)
  assert len(counts) == 5 and counts[0] > 0
  assert counts[1] == counts[-1]  # the first step may still place its batch
