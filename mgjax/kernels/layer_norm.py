"""LayerNorm on a TPU in one pass over its input; XLA makes two, at five times the instructions."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK_BYTES = 1 << 20  # of the input: four such blocks and float32 of a chunk are in the core
SUBLANES = 8
CHUNK = 64 * 1024      # values that are worked on at once: their sums hide one another's latency


def fits(shape: tuple[int, ...], dtype) -> bool:
  """Whether the kernel can take [..., R, C] of this dtype."""
  return (jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32) and len(shape) >= 2
          and SUBLANES * shape[-1] * jnp.dtype(dtype).itemsize <= BLOCK_BYTES)


def layer_norm(x: jax.Array, scale: jax.Array, shift: jax.Array, eps: float, *,
               interpret: bool) -> jax.Array:
  """Over the last axis, statistics in float32: (x - mean) / sqrt(variance + eps) * scale + shift.

  x [..., R, C], scale and shift [C] -> as x.  interpret: run the kernel's steps as ordinary
  operations, on any platform.
  """
  rows, c = x.shape[-2:]
  flat = x.reshape(-1, rows, c)  # of which nothing is moved, whatever R is
  most = BLOCK_BYTES // (c * x.dtype.itemsize)
  many = rows if rows <= most else most // SUBLANES * SUBLANES
  several = min(max(1, most // rows), len(flat))
  block = pl.BlockSpec((several, many, c), lambda n, i: (n, i, 0))
  y = pl.pallas_call(
      functools.partial(_kernel, eps=eps), grid=(pl.cdiv(len(flat), several), pl.cdiv(rows, many)),
      in_specs=[block, pl.BlockSpec((2, c), lambda n, i: (0, 0))], out_specs=block,
      out_shape=jax.ShapeDtypeStruct(flat.shape, x.dtype),
      compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
      name="layer_norm", interpret=interpret)(
          flat, jnp.stack([scale, shift]).astype(jnp.float32))
  return y.reshape(x.shape)


def _kernel(x_ref, vectors_ref, y_ref, *, eps):
  several, rows, c = x_ref.shape
  size = max(SUBLANES, CHUNK // c // SUBLANES * SUBLANES)

  @pl.loop(0, several)
  def _(n):
    for start in range(0, rows, size):
      part = pl.ds(start, min(size, rows - start))
      x = x_ref[n, part].astype(jnp.float32)
      x = x - jnp.mean(x, axis=-1, keepdims=True)
      x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
      y_ref[n, part] = (x * vectors_ref[:1] + vectors_ref[1:]).astype(y_ref.dtype)
