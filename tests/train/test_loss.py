"""The two ends of the decoder: the loss that never forms all scores, and the lookup of tokens, both
against the plain form."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several_devices
from test_flops import operations

from mgjax.models.lookup import lookup
from mgjax.sharding import make_mesh, mesh_context
from mgjax.train.loss import next_token_loss, token_loss

KERNEL, TABLE = ("embed", "vocab"), ("vocab", "embed")


def inputs(axes, b=8, length=13, width=16, vocab=40):
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(b, length, width)).astype(np.float32)
  weights = rng.normal(size=(width, vocab)).astype(np.float32)
  targets, mask = rng.integers(0, vocab, (b, length)), rng.random((b, length)) < 0.7
  mask[3:5] = False  # rows, and with them chunks, in which nothing counts
  return hidden, weights if axes == KERNEL else weights.T.copy(), targets, mask


def plain(axes):
  def loss(hidden, weights, targets, mask):
    total, terms = token_loss(hidden @ (weights if axes == KERNEL else weights.T), targets, mask)
    return 3 * total, terms
  return loss


def chunked(axes, chunk_bytes):
  def loss(hidden, weights, targets, mask):
    total, terms = next_token_loss(hidden, weights, axes, targets, mask, chunk_bytes=chunk_bytes)
    return 3 * total, terms
  return loss


def all_of(loss, x):
  (total, terms), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*x)
  return total, terms, *gradients


def compare(axes, chunk_bytes):
  x = inputs(axes)
  ours, theirs = all_of(chunked(axes, chunk_bytes), x), all_of(plain(axes), x)
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  assert ours[1] == x[3].sum()
  np.testing.assert_allclose(jax.jit(chunked(axes, chunk_bytes))(*x)[0], ours[0], rtol=1e-6)
  return ours


@pytest.fixture
def exact():
  with mesh_context(make_mesh(devices=jax.devices()[:1])), jax.default_matmul_precision("highest"):
    yield


@pytest.mark.parametrize("axes", [KERNEL, TABLE])
@pytest.mark.parametrize("chunk_bytes", [2**29, 40 * 4 * 30])  # one chunk; several, the last padded
def test_value_and_gradients(exact, axes, chunk_bytes):
  compare(axes, chunk_bytes)


def test_weights_that_do_not_train_cost_nothing(exact):
  """Products of [N, D] and [D, V]: one for the value alone, one more for each gradient."""
  x = inputs(KERNEL, b=4, length=16)
  f = lambda hidden, weights: next_token_loss(hidden, weights, KERNEL, *x[2:])[0]
  for argument, products in (((), 1), ((0,), 2), ((1,), 2), ((0, 1), 3)):
    program = jax.make_jaxpr(jax.grad(f, argument) if argument else f)(*x[:2])
    assert operations(program.jaxpr) == products * 2 * 64 * 16 * 40


def test_the_scores_never_exist_as_a_whole(exact):
  x = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs(KERNEL, 8, 64, 16, 4096)]
  memory = lambda loss: jax.jit(jax.grad(loss, (0, 1), has_aux=True)).lower(
      *x).compile().memory_analysis().temp_size_in_bytes
  scores = 8 * 64 * 4096 * 4
  assert memory(plain(KERNEL)) > scores > 4 * memory(chunked(KERNEL, scores // 32))


def collectives_in_loops(text):
  """(kind, shape) of those that a compiled program runs once a chunk."""
  bodies = set(re.findall(r"body=%([\w.-]+)", text))
  for computation in text.split("\n\n"):
    if (name := re.match(r"\s*%([\w.-]+) ", computation)) and name[1] in bodies:
      yield from re.findall(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all)[\w-]*\(",
                            computation)


def compare_lookup(rows):
  rng = np.random.default_rng(0)
  table, tokens = rng.normal(size=(40, 16)).astype(np.float32), rng.integers(0, 40, (rows, 13))
  g = rng.normal(size=(rows, 13, 16)).astype(np.float32)
  ours, theirs = (jax.jit(jax.value_and_grad(lambda table, f=f: jnp.sum(f(table) * g)))(table)
                  for f in (lambda table: lookup(table, tokens, jnp.float32),
                            lambda table: table[tokens]))
  np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4)
  np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5, atol=1e-5)


def test_lookup(exact):
  compare_lookup(3)


def on_eight_devices():
  """Sharded; in the loop over chunks nothing goes between devices but a number a position, of those
  that share the vocabulary."""
  for axes, shape in ((KERNEL, (2, 2, 2, 1)), (TABLE, (1, 4, 2, 1)), (KERNEL, (1, 8, 1, 1)),
                      (TABLE, (1, 1, 3, 1))):  # the last does not divide the vocabulary
    mesh = make_mesh(shape, jax.devices()[:np.prod(shape)])
    with mesh_context(mesh), jax.default_matmul_precision("highest"):
      compare(axes, 40 * 4 * 10)
      compare_lookup(8)
      compare_lookup(3)  # rows that the batch axes do not divide
      loss = jax.grad(chunked(axes, 40 * 4 * 10), (0, 1), has_aux=True)
      text = jax.jit(loss).lower(*inputs(axes)).compile().as_text()
      assert "body=" in text
      for shapes, kind in collectives_in_loops(text):
        assert shape[2] == 2 and kind == "all-reduce" and "f32[16]" in shapes, (shapes, kind)


def test_eight_devices_give_the_same():
  several_devices.run(__file__, "on_eight_devices", 8)
