"""Parts of SDXL's UNet and autoencoder: convolutions, group norm, residual blocks, attention.

Maps are [N, H, W, C].  Where a mesh has more devices than pictures, a map is cut into strips along
its height: a convolution needs one row of its neighbour's strip and attention its keys, which is
less to move than the sums of layers whose channels are cut.  Weights are whole on every device.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from mgjax.kernels.short_attention import fits, short_attention
from mgjax.models.attention import choose, plain_attention
from mgjax.models.layers import Dense
from mgjax.models.platforms import platform
from mgjax.sharding import constrain, fitting_spec

WEIGHTS_BYTES = 1 << 28  # of attention at one time, on a device


def in_strips(x: jax.Array) -> jax.Array:
  """A map [N, H, W, C], or its positions in order [N, H*W, C], laid out as above."""
  return constrain(x, "batch", "strips", *(None,) * (x.ndim - 2))


class Conv(nnx.Module):
  """3x3 convolution [N, H, W, C_in] -> [N, H', W', C_out]; computed in `dtype`.

  padding: zeros before and behind, of both height and width.
  """

  def __init__(self, d_in: int, d_out: int, *, stride: int = 1, padding: tuple[int, int] = (1, 1),
               dtype, rngs: nnx.Rngs):
    self.stride, self.padding, self.dtype = stride, padding, dtype
    init = nnx.initializers.lecun_normal()
    self.kernel = nnx.Param(init(rngs(), (3, 3, d_in, d_out), jnp.float32))
    self.bias = nnx.Param(jnp.zeros(d_out))

  def __call__(self, x: jax.Array) -> jax.Array:
    y = jax.lax.conv_general_dilated(
        x.astype(self.dtype), self.kernel[...].astype(self.dtype), (self.stride,) * 2,
        (self.padding,) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return in_strips(y + self.bias[...].astype(self.dtype))


def dense(d_in: int, d_out: int, *, bias: bool = True, dtype, rngs: nnx.Rngs) -> Dense:
  """`Dense` that is whole on every device; of a map, it is a 1x1 convolution."""
  return Dense(d_in, d_out, (None, None), bias=bias, dtype=dtype, rngs=rngs)


class GroupNorm(nnx.Module):
  """Normalises groups of channels over all positions; statistics in float32.

  [N, ..., C] -> the same, in the dtype of the input.
  """

  def __init__(self, width: int, groups: int, eps: float):
    self.groups, self.eps = groups, eps
    self.scale = nnx.Param(jnp.ones(width))
    self.bias = nnx.Param(jnp.zeros(width))

  def __call__(self, x: jax.Array) -> jax.Array:
    n, c = x.shape[0], x.shape[-1]
    y = x.astype(jnp.float32).reshape(n, -1, c)
    # Channel by channel first: an axis of C / groups would fill few of a vector's lanes.
    by_group = lambda sums: jnp.repeat(
        jnp.mean(sums.reshape(n, 1, self.groups, -1), -1), c // self.groups, -1)
    mean = by_group(jnp.mean(y, 1))
    if x.dtype == jnp.bfloat16:  # one pass: its own rounding is more than what cancels here
      variance = jnp.maximum(by_group(jnp.mean(jnp.square(y), 1)) - jnp.square(mean), 0)
    else:
      variance = by_group(jnp.mean(jnp.square(y - mean), 1))
    factor = jax.lax.rsqrt(variance + self.eps) * self.scale[...]
    return ((y - mean) * factor + self.bias[...]).astype(x.dtype).reshape(x.shape)


class ResnetBlock(nnx.Module):
  """Two convolutions beside a shortcut; `time` (if time_width) shifts what lies between them."""

  def __init__(self, d_in: int, d_out: int, *, groups: int, eps: float, time_width: int = 0, dtype,
               rngs: nnx.Rngs):
    make = functools.partial(dense, dtype=dtype, rngs=rngs)
    self.norm1 = GroupNorm(d_in, groups, eps)
    self.conv1 = Conv(d_in, d_out, dtype=dtype, rngs=rngs)
    self.time = nnx.data(make(time_width, d_out) if time_width else None)
    self.norm2 = GroupNorm(d_out, groups, eps)
    self.conv2 = Conv(d_out, d_out, dtype=dtype, rngs=rngs)
    self.shortcut = nnx.data(make(d_in, d_out) if d_in != d_out else None)

  def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
    """x [N, H, W, C_in], time [N, T] -> [N, H, W, C_out]."""
    y = self.conv1(jax.nn.silu(self.norm1(x)))
    if self.time is not None:
      y = y + self.time(jax.nn.silu(time))[:, None, None]
    y = self.conv2(jax.nn.silu(self.norm2(y)))
    return in_strips((x if self.shortcut is None else self.shortcut(x)) + y)


def twice(x: jax.Array, height: int, width: int) -> jax.Array:
  """[N, h, w, C] -> [N, height, width, C], each value four times; cut where the size is odd."""
  return in_strips(jnp.repeat(jnp.repeat(x, 2, 2), 2, 1)[:, :height, :width])


def spatial_attention(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
  """Softmax attention where everyone sees everyone; each device has the queries of its strip.

  q [N, Lq, D], k, v [N, Lk, D] -> [N, Lq, D]
  """
  if k.shape[1] == q.shape[1]:  # of the map itself: each strip computes its own, then they meet
    k, v = in_strips(k), in_strips(v)
  queries = fitting_spec(q.shape, "batch", "strips", None)
  local = functools.partial(_local_attention, heads=heads)
  return jax.shard_map(local, in_specs=(queries, P(queries[0]), P(queries[0])), out_specs=queries,
                       check_vma=False)(q, k, v)


def _local_attention(q, k, v, heads):
  # Heads are split here, behind the devices' own borders: as an axis of a laid out array they cost
  # copies into tiles that 64 numbers fill by half.
  split = lambda x: x.reshape(*x.shape[:2], heads, -1)
  shape, q, k, v = q.shape, *map(split, (q, k, v))
  kernel = choose("auto", platform(), q.shape[1], q.dtype) == "splash" and fits(q, k, heads)
  return (_by_kernel if kernel else _in_pieces)(q, k, v).reshape(shape)


def _by_kernel(q, k, v):
  return short_attention(q, k, v, plain_attention, platform() != "tpu")


def _in_pieces(q, k, v):
  """A few queries at a time where all their weights together would be too large."""
  n, length, heads, _ = q.shape
  pieces = min(-(-4 * n * heads * length * k.shape[1] // WEIGHTS_BYTES), length)
  if pieces == 1:
    return plain_attention(q, k, v)
  size = -(-length // pieces)
  padded = jnp.pad(q, ((0, 0), (0, size * pieces - length), (0, 0), (0, 0)))
  split = padded.reshape(n, pieces, size, *q.shape[2:]).swapaxes(0, 1)
  out = jax.lax.map(lambda piece: plain_attention(piece, k, v), split)
  return out.swapaxes(0, 1).reshape(padded.shape)[:, :length]
