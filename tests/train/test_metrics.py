"""What a run says of its speed, and the trace of its steps."""
import collections
import contextlib
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from small_run import make_run, stop_at

from mgjax.chips import CHIPS, Chip, chip_of
from mgjax.config import ConfigError
from mgjax.data.packing import Format
from mgjax.models.attention import packed_causal_mask
from mgjax.train import loop, metrics
from mgjax.train.config import ProfileConfig
from mgjax.train.flops import Work, model_flops, whole_batch
from mgjax.train.loop import train
from mgjax.train.profile import Profiler


@pytest.mark.parametrize("name,version,kind", [
    ("v4", "TPU_V4", "TPU v4"), ("v5e", "TPU_V5E", "TPU v5 lite"), ("v5p", "TPU_V5P", "TPU v5"),
    ("v6e", "TPU_V6E", "TPU v6 lite")])
def test_chips_are_those_that_jax_knows(name, version, kind):
  """By Pallas' table, which rounds memory up, and has an older bandwidth for the v5p."""
  chip = chip_of(kind)
  cores = chip.cores
  theirs = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[version], cores)
  assert chip.name == name
  assert chip.peak == pytest.approx(theirs.bf16_ops_per_second * cores, rel=0.01)
  assert chip.hbm_bandwidth == pytest.approx(theirs.mem_bw_bytes_per_second * cores, rel=0.13)
  assert 0.9 < chip.hbm / (theirs.hbm_capacity_bytes * cores) < 1
  # A systolic array of 128 x 128 (the v6e's two of 256 x 256 count double) at this clock.
  each = 2 * theirs.mxu_column_size**2 * theirs.num_mxus * cores * (2 if name == "v6e" else 1)
  assert chip.peak == pytest.approx(chip.clock * each, rel=0.01)


def test_a_device_may_be_half_a_chip():
  """As the v4 can be set up; elsewhere jax does not say how many cores a device has."""
  core, whole = (type("Device", (), {"num_cores": n}) for n in (1, 2))
  assert (chip_of("TPU v4").share(core), chip_of("TPU v4").share(whole)) == (0.5, 1)
  assert chip_of("NVIDIA H200").share(object()) == 1
  assert chip_of("cpu") is None
  kinds = [kind for chip in CHIPS for kind in chip.kinds]
  assert len(kinds) == len(set(kinds))


def test_useful_work_is_what_the_samples_see(tmp_path):
  """Packed rows with padding, and a decoder with a window."""
  config = make_run(tmp_path, steps=1)
  segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0, 0]], np.int32)
  positions = np.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 0, 0, 0]], np.int32)
  batch = {"segment_ids": segments, "positions": positions,
           "sample_index": np.array([[0, 1], [2, -1]]),
           "visual_index": np.where(positions == 1, 16 * (segments - 1), -1)}
  shape = Format(2, 8, 3, 128, 16)
  for window in (None, 2):
    decoder = dataclasses.replace(config.model.decoder, sliding_window=window)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder))
    used = loop.usage(batch, shape, config)
    seen = np.asarray(packed_causal_mask(segments, window)) & (segments > 0)[..., None]
    assert (used.tokens, used.positions, used.images, used.slots, used.samples) == (12, 16, 3, 6, 3)
    assert used.useful_flops == model_flops(config, Work(12, int(seen.sum()), 3, 128)).total
    assert used.flops == model_flops(config, whole_batch(shape, window)).total


def test_utilisation(tmp_path, monkeypatch):
  """A step of 2 s on a chip of 100 TFLOP/s; an unknown chip has no utilisation."""
  used = metrics.Usage(tokens=300, positions=400, images=6, slots=8, samples=6,
                       flops=80e12 * jax.device_count(), useful_flops=60e12 * jax.device_count())
  for chip in (Chip("x", ("cpu",), 100e12, 1, 1.0), None):
    now = iter((0.0, 10.0, 12.0))
    monkeypatch.setattr(metrics, "chip_of", lambda kind, chip=chip: chip)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda now=now: next(now))
    log = metrics.Metrics(tmp_path, name="x", start=0, steps=1, enabled=True)
    log.restart_clock()
    log.write(1, {"loss": 1.0, "learning_rate": 0.1}, used, waited=0.5, show=True)
    log.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    expected = {"step_time": 2.0, "tokens_per_s": 150.0, "samples_per_s": 3.0,
                "tokens_per_s_per_device": 150 / jax.device_count(),
                "images_per_s_per_device": 3 / jax.device_count(),
                "tflops_per_s_per_device": 40.0, "data/filled_tokens": 0.75,
                "data/filled_images": 0.75, "data/waiting": 0.25}
    if chip:
      expected |= {"mfu": 0.4, "mfu_useful": 0.3}
    assert ("mfu" in record) == (chip is not None)
    assert {k: record[k] for k in expected} == pytest.approx(expected)


def traced(workdir):
  """Of each trace, the numbers of its steps, and how often each event is in it."""
  traces = []
  for path in sorted(workdir.glob("profile/plugins/profile/*/*.xplane.pb")):
    events = [e for plane in jax.profiler.ProfileData.from_file(str(path)).planes
              for line in plane.lines for e in line.events]
    steps = [dict(e.stats)["step_num"] for e in events if e.name == "train"]
    traces.append((sorted(steps), collections.Counter(e.name for e in events)))
  return traces


def test_a_trace_holds_its_steps_and_what_ran_in_them(tmp_path):
  """Also of a loop that begins amid them, or ends there."""
  def double(x):
    return 2 * x
  double = jax.jit(double)
  def run(first, last):
    with contextlib.closing(Profiler(tmp_path / "profile", range(3, 6))) as profiler:
      for number in range(first, last + 1):
        with profiler.step(number):
          double(np.float32(number)).block_until_ready()
  for first, last, expected in (1, 9, [3, 4, 5]), (4, 9, [4, 5]), (1, 4, [3, 4]), (6, 9, None):
    run(first, last)
    if expected is None:
      assert not (tmp_path / "profile").exists()
      continue
    [(steps, events)] = traced(tmp_path)
    assert steps == expected
    assert events["PjitFunction(double)"]
    assert {n for name, n in events.items() if "::Execute" in name} == {len(expected)}, events
    shutil.rmtree(tmp_path / "profile")
  with pytest.raises(RuntimeError, match="in the step"):
    with contextlib.closing(Profiler(tmp_path / "profile", range(1, 9))) as profiler:
      with profiler.step(1):
        raise RuntimeError("in the step")
  assert [steps for steps, _ in traced(tmp_path)] == [[1]]


@pytest.mark.slow
def test_a_trace_changes_nothing(tmp_path, monkeypatch):
  """A run stopped amid the steps to trace, and gone on with."""
  config = make_run(tmp_path, steps=4)
  train(config, tmp_path / "plain")
  config = dataclasses.replace(config, profile=ProfileConfig("2:3"))
  with monkeypatch.context() as patch:
    stop_at(patch, 2)
    assert train(config, tmp_path / "run") == 2
  assert train(config, tmp_path / "run") == 4
  assert sorted(steps for steps, _ in traced(tmp_path / "run")) == [[2], [3]]
  losses = lambda name: [json.loads(line)["loss"] for line in  # noqa: E731
                         (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
  assert losses("run") == losses("plain") and len(losses("run")) == 4


def test_wrong_steps_to_trace(tmp_path):
  for text in ("13:10", "abc", "10", "0:3", "3:", "-1:2", "1:2:3", " 1:2"):
    with pytest.raises(ConfigError, match="config.profile.steps is .*; expected the first and the"):
      ProfileConfig(text)
  config = dataclasses.replace(make_run(tmp_path, steps=4), profile=ProfileConfig("3:5"))
  with pytest.raises(ConfigError, match="config.profile.steps is 3:5, but the run has only 4 st"):
    train(config, tmp_path / "run")
