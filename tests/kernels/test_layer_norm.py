"""The TPU's LayerNorm against the plain form, step by step, and where it is used."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgjax.kernels.layer_norm import fits, layer_norm, layer_norm_gradient
from mgjax.models import layers
from mgjax.models.layers import TowerNorm, plain_layer_norm
from mgjax.sharding import make_mesh, mesh_context


def arguments(shape, dtype):
  rng = np.random.default_rng(0)
  x = jnp.asarray(3 + rng.normal(size=shape), dtype)
  return x, *(jnp.asarray(rng.normal(size=shape[-1]), jnp.float32) for _ in range(2))


SHAPES = pytest.mark.parametrize("shape, dtype, bar", [
    ((2, 7, 5, 100), jnp.float32, 1e-5),   # nothing is a whole register
    ((3, 577, 256), jnp.float32, 1e-5),    # chunks, and one row left over
    ((700, 8, 192), jnp.bfloat16, 2e-2),   # several blocks, the last beyond the end
    ((2, 1100, 512), jnp.float32, 1e-5),   # blocks of rows, the last beyond the end
    ((33, 64), jnp.bfloat16, 2e-2)])


@SHAPES
def test_is_the_plain_form(shape, dtype, bar):
  args = arguments(shape, dtype)
  got = layer_norm(*args, 1e-6, interpret=True)
  assert got.shape == shape and got.dtype == dtype
  want = plain_layer_norm(args[0].astype(jnp.float32), *args[1:], 1e-6)
  np.testing.assert_allclose(got.astype(jnp.float32), want, atol=bar, rtol=bar / 4)


@SHAPES
def test_gradient_is_that_of_the_plain_form(shape, dtype, bar):
  x, scale, shift = arguments(shape, dtype)
  g = jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)
  got = layer_norm_gradient(x, g, scale, 1e-6, interpret=True)
  want = jax.vjp(lambda *a: plain_layer_norm(*a, 1e-6), x.astype(jnp.float32), scale, shift)[1](
      g.astype(jnp.float32))
  assert got[0].dtype == dtype and got[1].dtype == got[2].dtype == jnp.float32
  for ours, exact in zip(got, want, strict=True):
    assert ours.shape == exact.shape
    np.testing.assert_allclose(ours.astype(jnp.float32), exact,
                               atol=bar * max(1, float(jnp.abs(exact).max())), rtol=0)


def test_a_variance_as_small_as_eps():
  x, *vectors = arguments((4, 64), jnp.float32)
  x = (x - 3) * 1e-3
  np.testing.assert_allclose(layer_norm(x, *vectors, 1e-6, interpret=True),
                             plain_layer_norm(x, *vectors, 1e-6), atol=1e-5)
  got = layer_norm_gradient(x, jnp.ones_like(x), vectors[0], 1e-6, interpret=True)[0]
  want = jax.grad(lambda x: jnp.sum(plain_layer_norm(x, *vectors, 1e-6)))(x)
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_rows_that_are_too_long_are_left_to_xla():
  assert fits((4616, 1024), jnp.bfloat16) and fits((1, 192, 192, 384), jnp.float32)
  assert not fits((8, 2**16), jnp.float32) and not fits((8, 16, 64), jnp.float16)


def test_gradients(monkeypatch):
  """Of the layer as a TPU has it."""
  args, g = arguments((2, 9, 48), jnp.float32), jnp.asarray(np.random.default_rng(1).normal(
      size=(2, 9, 48)), jnp.float32)

  def run(norm):
    return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(norm(*a) * g), (0, 1, 2)))(*args)

  def of_layer(x, scale, shift):
    layer = TowerNorm(48, 1e-6)
    layer.scale[...], layer.bias[...] = scale, shift
    return layer(x)

  def on_tpu():
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    for kernel in (layer_norm, layer_norm_gradient):
      monkeypatch.setattr(layers.kernels, kernel.__name__, lambda *a, eps, interpret, kernel=kernel:
                          kernel(*a, eps, interpret=True))

  with mesh_context(make_mesh(devices=jax.devices()[:1])):
    want = run(of_layer)
    on_tpu()
    assert "layer_norm_gradient" in str(jax.make_jaxpr(jax.grad(lambda x: of_layer(
        x, *args[1:]).sum()))(args[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run(of_layer), want)
