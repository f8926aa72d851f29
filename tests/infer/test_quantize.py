"""Integers against the matrices that they stand for, and engines of quantised models and caches."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several_devices
from flax import nnx
from folders import BF16, config_of, make_folder

from conversion import from_hf
from mgjax.checkpoint import abstract_params, load_model
from mgjax.config import DecoderConfig, ModelConfig
from mgjax.infer import quantize as quantization
from mgjax.infer.assistant import load
from mgjax.infer.cache import cached_attention, quantized_vectors
from mgjax.infer.engine import Engine, Prompt
from mgjax.infer.programs import Programs
from mgjax.infer.quantize import FEW_TOKENS, QuantizedMatrix, load_quantized, quantize
from mgjax.infer.sampling import Sampling
from mgjax.models import integers
from mgjax.models.integers import FEW_ROWS, FORMATS, dequantized, product, quantized
from mgjax.models.mini_gemini import MiniGemini
from mgjax.sharding import make_mesh, mesh_context

pytestmark = pytest.mark.usefixtures("highest_precision")
DENSE = DecoderConfig(97, 64, 2, 8, 8, 8, 96)
SPARSE = dataclasses.replace(DENSE, experts=4)
TIED = dataclasses.replace(DENSE, tied_head=True, kv_heads=4, norm_offset=1.0)


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(devices=jax.devices()[:1])


def random(*shape, seed=0):
  return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def make_model(mesh, decoder, name=None):
  """A language model of random weights, the same each time, quantised or not."""
  with mesh_context(mesh):
    model = nnx.eval_shape(lambda: MiniGemini(
        ModelConfig(vision=None, vision_hr=None, decoder=decoder), dtype=jnp.float32,
        rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    rng = np.random.RandomState(0)
    fill = lambda s: rng.randn(*s.shape) * (s.shape[-2]**-0.5 if len(s.shape) > 2 else 1.0)
    put = lambda s: jax.device_put(fill(s).astype(np.float32))
    model = nnx.merge(graphdef, jax.tree.map(put, state))
    if name:
      quantize(model, name)
  return model


def make_prompt(seed, length):
  return Prompt(np.random.RandomState(seed).randint(0, 97, length), np.full(length, -1))


def greedy(n):
  return Sampling(max_new_tokens=n)


def logits_of(model, mesh, cache_dtype=None, length=40):
  """Scores [97] after a prompt and after one more token of it."""
  engine = Engine(model, mesh=mesh, max_length=64, buckets=(64,), cache_dtype=cache_dtype)
  ids = np.pad(make_prompt(0, length).tokens, (0, 64 - length))
  step, cache = engine.programs.empty()
  step, cache = engine.programs.prefill(ids, np.full(64, -1), (), step, cache, row=0, start=0,
                                        last=length - 1, sampling=greedy(9))
  first = np.asarray(step.logits[0])
  # What is read next does not depend on what this model likes best.
  step = dataclasses.replace(step, token=jnp.full_like(step.token, 7))
  step, _ = engine.programs.decode(step, np.full(engine.rows, length), cache)
  return np.stack([first, step.logits[0]])


# Matrices.

@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_product_is_that_with_the_matrix_the_integers_stand_for(name, lead, rows):
  w, x = random(*lead, 96, 40), random(*(1 for _ in lead), rows, 96, seed=1)
  parts = quantized(jnp.asarray(w), name)
  assert parts[0].dtype == FORMATS[name] and len(parts) == (2 if name == "int8" else 3)
  whole = np.zeros_like(w)
  numbers, (scales, *offsets) = np.asarray(parts[0].astype(jnp.int32)), map(np.asarray, parts[1:])
  for at in np.ndindex(*w.shape):
    *e, i, o = at
    if name == "int8":
      whole[at] = numbers[at] * scales[(*e, o)]
    else:
      group, inside = divmod(i, numbers.shape[-2])
      whole[at] = (numbers[(*e, group, inside, o)] * scales[(*e, group, o)]
                   + offsets[0][(*e, group, o)])
  np.testing.assert_allclose(dequantized(parts, jnp.float32), whole, atol=1e-6)
  np.testing.assert_allclose(product(jnp.asarray(x), parts), x @ whole, atol=2e-4)


def test_the_error_of_a_weight_is_bounded():
  w = random(256, 64) * np.geomspace(1e-3, 1e3, 64, dtype=np.float32)
  off = np.abs(np.asarray(dequantized(quantized(jnp.asarray(w), "int8"), jnp.float32)) - w)
  half = np.abs(w).max(0) / 127 / 2
  assert (off <= half * 1.001).all() and (off.max(0) > half / 2).all()
  parts = quantized(jnp.asarray(w), "int4", ways=8)
  assert [part.shape for part in parts] == [(8, 32, 64), (8, 64), (8, 64)]
  off = np.square(np.asarray(dequantized(parts, jnp.float32)) - w).reshape(8, 32, 64)
  grouped = w.reshape(8, 32, 64)
  low, step = grouped.min(1, keepdims=True), np.ptp(grouped, axis=1, keepdims=True) / 15
  plain = np.round((grouped - low) / step) * step + low - grouped
  ours, theirs = off.sum(1), np.square(plain).sum(1)
  assert (ours <= theirs * 1.001).all() and ours.sum() < 0.97 * theirs.sum()


def test_what_is_on_the_grid_of_int4_comes_back_exactly():
  rng = np.random.RandomState(0)
  grid = rng.randint(0, 16, (4, 32, 24)) + rng.randint(-20, 5, (4, 1, 24))  # with an offset
  grid[:, 0], grid[:, 1] = grid.min(1), grid.min(1) + 15  # the range is used up in each group
  w = (grid * 2.0 ** rng.randint(-9, 3, (4, 1, 24))).reshape(128, 24).astype(np.float32)
  for dtype in (jnp.float32, jnp.bfloat16):
    back = dequantized(quantized(jnp.asarray(w, dtype), "int4", ways=4), jnp.float32)
    np.testing.assert_array_equal(back, w)


def test_a_matrix_of_zeros_stays_one():
  for name in FORMATS:
    assert not np.asarray(dequantized(quantized(jnp.zeros((64, 8)), name), jnp.float32)).any()


# Models.

def relative(a, b):
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("decoder", [
    pytest.param(DENSE, id="dense", marks=pytest.mark.slow), pytest.param(TIED, id="tied"),
    pytest.param(SPARSE, id="experts", marks=pytest.mark.slow)])
def test_scores_stay_close(mesh, decoder):
  """int8 weights change random scores by less than 5 %, int4 by less than 40 %, an int8 cache by
  less than 2 %; scales that are off by a tenth change them by more than the bound of int8."""
  want = logits_of(make_model(mesh, decoder), mesh)
  int8 = make_model(mesh, decoder, "int8")
  off = {"int8": relative(logits_of(int8, mesh), want),
         "cache": relative(logits_of(make_model(mesh, decoder), mesh, "int8"), want),
         "int4": relative(logits_of(make_model(mesh, decoder, "int4"), mesh), want)}
  assert 0 < off["int8"] < 0.05 and 0 < off["cache"] < 0.02 and off["int8"] < off["int4"] < 0.4, off
  for _, part in nnx.iter_modules(int8):
    if isinstance(part, QuantizedMatrix):
      scale = part.parts[1]
      scale[...] = scale[...] * (1 + 0.1 * jnp.asarray(random(*scale.shape, seed=3)))
  assert relative(logits_of(int8, mesh), want) > 0.05


def test_the_experts_of_few_tokens_and_of_many_agree(mesh):
  experts = make_model(mesh, SPARSE, "int4").decoder.blocks[0].experts
  x = jnp.asarray(random(2, FEW_TOKENS, 64))
  with mesh_context(mesh):
    many, scores = experts(x)
    few, own = experts(x[:, :FEW_TOKENS // 2])
  np.testing.assert_allclose(few, many[:, :FEW_TOKENS // 2], atol=1e-5)
  np.testing.assert_allclose(own, scores[:, :FEW_TOKENS // 2], atol=1e-6)


def test_floats_are_let_go(mesh):
  model = make_model(mesh, SPARSE, "int8")
  with mesh_context(mesh):
    sizes = {}
    for leaf in jax.tree.leaves(nnx.state(model)):
      sizes[leaf.dtype.name] = sizes.get(leaf.dtype.name, 0) + leaf.size
  c = SPARSE
  assert sizes["int8"] == c.depth * (4 * 64 * 64 + 3 * c.experts * 64 * 96) + 64 * 97
  norms_and_router = c.depth * (2 * 64 + 64 * c.experts) + 64
  scales = c.depth * (4 * 64 + c.experts * (2 * 96 + 64)) + 97
  assert sizes["float32"] == 97 * 64 + norms_and_router + scales
  with pytest.raises(ValueError, match="quantised already"):
    quantize(model, "int8")


@pytest.mark.parametrize("name", [None, *FORMATS])
def test_a_model_that_is_only_described_has_the_same_programs(mesh, name):
  build = lambda: MiniGemini(ModelConfig(vision=None, vision_hr=None, decoder=SPARSE),
                             dtype=jnp.float32, rngs=nnx.Rngs(0))
  with mesh_context(mesh):
    described = nnx.merge(*abstract_params(build, mesh))
    if name:
      quantize(described, name)
  models = make_model(mesh, SPARSE, name), described
  one, other = ([(a.shape, a.dtype) for a in jax.tree.leaves(
      Programs(model, mesh, 2, 128, "int8").lower_decode().in_avals)] for model in models)
  assert one == other  # each layer has its own weights


def test_names_that_do_not_exist_are_refused(mesh, tmp_path):
  model = make_model(mesh, DENSE)
  with pytest.raises(ValueError, match="quantize: 'int3' does not exist; one of int8, int4"):
    quantize(model, "int3")
  with pytest.raises(ValueError, match="one of int8, int4"):
    load(tmp_path, quantize="fp8")
  expected = "cache_dtype: 'int4' does not exist; one of float32, bfloat16, int8"
  for dtype in ("int4", jnp.int4):
    with pytest.raises(ValueError, match=expected):
      Engine(model, mesh=mesh, max_length=64, cache_dtype=dtype)
  with pytest.raises(ValueError, match=expected):
    load(tmp_path, cache_dtype="int4")


# The cache.

def test_attention_over_integers_is_that_over_what_they_stand_for():
  """Blocks, rows of different lengths, a window; against the float form on the same numbers."""
  k, v = random(3, 2, 384, 8), random(3, 2, 384, 8, seed=1) * 5
  q, start = jnp.asarray(random(3, 4, 6, 8, seed=2)), jnp.asarray([0, 140, 379])
  (k8, k_scale), (v8, v_scale) = quantized_vectors(k), quantized_vectors(v)
  assert np.abs(np.asarray(k8)).max(-1).min() == 127
  whole = lambda a, scale: jnp.asarray(np.asarray(a, np.float32) * np.asarray(scale)[..., None])
  for window in (None, 100):
    got = cached_attention(q, k8, v8, start, window, k_scale, v_scale)
    want = cached_attention(q, whole(k8, k_scale), whole(v8, v_scale), start, window)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name", [pytest.param(None, marks=pytest.mark.slow), "int4"])
def test_rows_together_are_rows_alone(mesh, name):
  """Continuous batching, and prompts of which another row or turn has read the beginning."""
  model = make_model(mesh, DENSE, name)
  make = lambda rows: Engine(model, mesh=mesh, max_length=200, rows=rows, buckets=(16, 64),
                             cache_dtype="int8")
  engine, one = make(3), make(1)
  assert engine.programs.empty()[1].k[0].dtype == jnp.int8

  def alone(prompt):
    one._forget()
    return list(one.generate(prompt, greedy(8)))

  begin = make_prompt(9, 70)
  longer = lambda prompt, ids: Prompt(np.append(prompt.tokens, ids),
                                      np.full(len(prompt) + len(ids), -1))
  prompts = [make_prompt(n, 5 + 29 * n) for n in range(6)] + [longer(begin, [n]) for n in range(4)]
  answers = [engine.submit(prompt, greedy(8)) for prompt in prompts]
  while engine.step():
    pass
  assert [a.tokens for a in answers] == [alone(p) for p in prompts]
  assert [a.reused for a in answers[-3:]] == [70] * 3
  turn = longer(prompts[-1], [*answers[-1].tokens, 3, 4])
  again = engine.submit(turn, greedy(8))
  while engine.step():
    pass
  assert again.tokens == alone(turn) and again.reused == len(prompts[-1]) + 7


# More devices.

def on_eight_devices():
  integers.GROUP = 8  # else one device has larger groups
  with jax.default_matmul_precision("highest"):
    one = make_mesh(devices=jax.devices()[:1])
    for decoder, shape, name in ((DENSE, {"tensor": 8}, "int8"),
                                 (TIED, {"tensor": 2, "fsdp": 4}, "int4"),
                                 (SPARSE, {"tensor": 2, "expert": 4}, "int4")):
      mesh, decoder = make_mesh(shape), dataclasses.replace(decoder, mlp_width=128)
      alone, shared = ((make_model(m, decoder, name), m) for m in (one, mesh))
      want, got = logits_of(*alone, "int8"), logits_of(*shared, "int8")
      assert relative(got, want) < 0.002, (shape, relative(got, want))
      block = shared[0].decoder.blocks[0]
      values = (block.experts if decoder.experts else block).down.parts[0].get_value()
      assert values.addressable_shards[0].data.size * mesh.size == values.size


@pytest.mark.slow
def test_eight_devices_give_the_same():
  several_devices.run(__file__, "on_eight_devices", 8)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_checkpoint_is_quantised_as_it_is_read(family, mesh, tmp_path, monkeypatch):
  make_folder(tmp_path / "hf", config_of(family, text=True), BF16)
  assert from_hf.main(["--llm", str(tmp_path / "hf"), "--output", str(tmp_path / "run")]) == 0
  held, load_params = [], quantization.load_params
  is_matrix = lambda a: a.dtype == jnp.float32 and a.ndim > 2
  matrices = lambda: sum(a.nbytes for a in jax.live_arrays() if is_matrix(a))

  def watched(path, wanted):
    held.append(matrices() - before)
    return load_params(path, wanted)

  with mesh_context(mesh):
    whole = load_model(tmp_path / "run", mesh, dtype=jnp.float32)
    stacks = sum(a.nbytes for a in jax.tree.leaves(nnx.state(whole.model)) if a.ndim > 2)
    quantize(whole.model, "int8")
    before = matrices()
    monkeypatch.setattr(quantization, "load_params", watched)
    read = load_quantized(tmp_path / "run", mesh, dtype=jnp.float32, name="int8")
  assert len(held) == 8 and max(held) < stacks / 3  # each is let go before the next is read
  for one, other in zip(*(jax.tree.leaves(nnx.state(m.model)) for m in (whole, read)), strict=True):
    np.testing.assert_array_equal(one, other)
