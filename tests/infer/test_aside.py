"""An engine that is set aside while something else uses the devices."""
import gc

import jax
import numpy as np
import pytest
import several_devices
from tiny_models import random_model

from mgjax.config import DecoderConfig, ModelConfig
from mgjax.infer.aside import to_devices, to_host
from mgjax.infer.engine import Engine, Prompt
from mgjax.infer.quantize import quantize
from mgjax.infer.sampling import Sampling
from mgjax.sharding import make_mesh, mesh_context

CONFIG = ModelConfig(vision=None, vision_hr=None, hr_size=56,
                     decoder=DecoderConfig(97, 64, 2, 4, 2, 16, 96))


def make_engine(mesh, form=None, cache_dtype=None):
  model = random_model(CONFIG, mesh)
  if form:
    with mesh_context(mesh):
      quantize(model, form)
  return Engine(model, mesh=mesh, max_length=64, rows=2, buckets=(16,), cache_dtype=cache_dtype)


def prompt(seed, behind=()):
  tokens = np.append(np.random.RandomState(seed).randint(0, 97, 12), np.array(behind, int))
  return Prompt(tokens, np.full(len(tokens), -1))


def held():
  gc.collect()
  return sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted())


def check_nothing_changes(engine):
  """Answers that were growing, and what was read before."""
  greedy, hot = Sampling(max_new_tokens=12), Sampling(1.5, max_new_tokens=12, seed=3)
  expected = [list(engine.generate(prompt(i), how)) for i, how in enumerate((greedy, hot))]
  engine._forget()
  answers = [engine.submit(prompt(i), how) for i, how in enumerate((greedy, hot))]
  for _ in range(5):
    engine.step()
  weights = engine.programs._params
  shardings, values = [x.sharding for x in weights], [np.array(x) for x in weights]
  size = sum(x.nbytes for x in [*weights, *jax.tree.leaves(engine._cache)])
  before = held()
  del weights
  with engine.set_aside():
    assert held() <= before - size
    with pytest.raises(RuntimeError, match="set aside"):
      engine.step()
  assert [x.sharding for x in engine.programs._params] == shardings
  assert all((np.array(x) == y).all() for x, y in zip(engine.programs._params, values))
  while any(answer.ended is None for answer in answers):
    engine.step()
  assert [answer.tokens for answer in answers] == expected
  with engine.set_aside():
    pass
  after = engine.submit(prompt(0, expected[0]), greedy)
  while after.ended is None:
    engine.step()
  assert after.reused == 12 + 11
  assert set(engine.programs.compiled.values()) == {1}


def test_nothing_changes_in_fewer_bytes():
  check_nothing_changes(make_engine(make_mesh(devices=jax.devices()[:1]), "int4", "int8"))


def on_four_devices():
  mesh = make_mesh({"tensor": 2, "fsdp": 2})
  check_nothing_changes(make_engine(mesh))
  array = jax.device_put(np.arange(8.0), jax.NamedSharding(mesh, jax.P("tensor")))
  waiting = to_host(array)
  assert len(waiting.pieces) == 2 and len(waiting.places) == 4  # equal pieces wait once
  np.testing.assert_array_equal(to_devices(waiting), array)


def test_nothing_changes_on_four_devices():
  several_devices.run(__file__, "on_four_devices", 4)


def test_a_failure_meanwhile_brings_it_back(monkeypatch):
  engine = make_engine(make_mesh(devices=jax.devices()[:1]))
  expected = list(engine.generate(prompt(0), Sampling(max_new_tokens=4)))
  with pytest.raises(ValueError, match="another model"):
    with engine.set_aside():
      raise ValueError("another model")
  assert list(engine.generate(prompt(0), Sampling(max_new_tokens=4))) == expected
  with monkeypatch.context() as patch, pytest.raises(MemoryError):
    def full(*_):
      raise MemoryError
    with engine.set_aside():
      patch.setattr("mgjax.infer.programs.to_devices", full)
  assert engine.is_aside
  with pytest.raises(RuntimeError, match="set aside"):
    engine.programs.decode(None, np.zeros(2), None)
