"""The kernels' attention against the plain form, and what `auto` means where."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgjax.config import ConfigError
from mgjax.kernels.short_attention import fits, short_attention
from mgjax.kernels.splash import block_size
from mgjax.models.attention import attention, choose, packed_causal_mask, plain_attention
from mgjax.sharding import make_mesh, mesh_context


@pytest.fixture(autouse=True)
def one_device():
  with mesh_context(make_mesh(devices=jax.devices()[:1])), jax.default_matmul_precision("highest"):
    yield


def inputs(b, length, heads, kv_heads, h):
  rng = np.random.default_rng(0)
  make = lambda n: jnp.asarray(rng.normal(size=(b, length, n, h)), jnp.float32)
  return make(heads), make(kv_heads), make(kv_heads), make(heads)


def packed(b, length):
  """Samples of many lengths, one of a single position, and padding behind them."""
  ends = [0, 1, length // 3, length // 2, length - length // 5]
  ids = np.zeros((b, length), np.int32)
  for row in range(b):
    for sample, (start, end) in enumerate(zip(ends[:-1 - row], ends[1:]), 1):
      ids[row, start:end] = sample
  return jnp.asarray(ids)


def value_and_gradients(f, q, k, v, g):
  def weighed(q, k, v):
    y = f(q, k, v)
    return jnp.sum(y * g), y
  gradients, y = jax.jit(jax.grad(weighed, (0, 1, 2), has_aux=True))(q, k, v)
  return y, *gradients


@pytest.mark.parametrize("heads,kv_heads,h,length,window", [
    (4, 2, 16, 256, None),   # queries share keys
    (2, 1, 96, 300, 70),     # a window; a length that has to be padded
    (2, 2, 64, 1100, None),  # several blocks
    (1, 1, 256, 256, 256)])  # a window that sees everything
def test_splash_is_the_plain_form(heads, kv_heads, h, length, window):
  q, k, v, g = inputs(2 if length < 512 else 1, length, heads, kv_heads, h)
  ids = packed(len(q), length)
  ours = lambda q, k, v: attention(q, k, v, ids, window, implementation="splash")
  plain = lambda q, k, v: plain_attention(q, k, v, packed_causal_mask(ids, window))
  for a, b in zip(*(value_and_gradients(f, q, k, v, g) for f in (ours, plain)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)  # padding too, so it is finite


@pytest.mark.parametrize("heads,h,length", [(4, 64, 145), (4, 32, 17), (2, 128, 24)])
def test_without_order(heads, h, length):
  """As in the low-resolution tower."""
  q, k, v, g = inputs(2, length, heads, heads, h)
  ours = lambda q, k, v: attention(q, k, v, implementation="splash")
  assert "short_attention" in str(jax.make_jaxpr(ours)(q, k, v))
  for a, b in zip(*(value_and_gradients(f, q, k, v, g) for f in (ours, plain_attention))):
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("queries,keys", [(300, 77), (1100, 1024)])  # the last in three blocks
def test_other_keys_than_queries(queries, keys):
  q, k = inputs(1, queries, 2, 2, 64)[0], inputs(1, keys, 2, 2, 64)[0]
  assert fits(q, k, 2)
  ours = short_attention(q, k, k + 1, plain_attention, True)
  np.testing.assert_allclose(ours, plain_attention(q, k, k + 1), atol=2e-5)


@pytest.mark.parametrize("heads,kv_heads,h", [(2, 2, 16), (4, 2, 64), (3, 3, 64), (2, 2, 96)])
def test_without_order_what_the_kernel_cannot_take(heads, kv_heads, h):
  q, k, v, _ = inputs(1, 9, heads, kv_heads, h)
  ours = attention(q, k, v, implementation="splash")
  np.testing.assert_allclose(ours, plain_attention(q, k, v), atol=2e-5)


@pytest.mark.parametrize("length,padded", [
    (257, 384), (577, 640), (1024, 1024), (2048, 2048), (2944, 3072), (3456, 3584), (6400, 6400)])
def test_blocks_cover_a_row_with_little_to_spare(length, padded):
  block = block_size(length)
  assert block % 128 == 0 and -(-length // block) * block == padded


def test_auto_is_by_the_platform_of_the_mesh():
  auto = lambda platform, length=2048, dtype=jnp.bfloat16: choose("auto", platform, length, dtype)
  assert (auto("cpu"), auto("tpu"), auto("gpu")) == ("xla", "splash", "cudnn")
  assert (auto("tpu", 64), auto("gpu", 2047), auto("gpu", dtype=jnp.float32)) == ("xla",) * 3
  with pytest.raises(ConfigError, match="'cudnn' is for GPUs, the devices here are cpu"):
    attention(*inputs(1, 8, 1, 1, 8)[:3], jnp.ones((1, 8), int), implementation="cudnn")
  with pytest.raises(ConfigError, match="'flash' does not exist; one of auto, xla"):
    choose("flash", "tpu", 2048, jnp.bfloat16)
