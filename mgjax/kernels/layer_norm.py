"""LayerNorm on a TPU in one pass over its input, and its gradient in one; XLA makes several."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK_BYTES = 1 << 20  # of the input: four such blocks (backward six) are in the core
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
  flat, grid, block = _blocks(x)
  y = pl.pallas_call(
      functools.partial(_kernel, eps=eps), grid=grid,
      in_specs=[block, pl.BlockSpec((2, x.shape[-1]), lambda n, i: (0, 0))], out_specs=block,
      out_shape=jax.ShapeDtypeStruct(flat.shape, x.dtype),
      compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
      name="layer_norm", interpret=interpret)(
          flat, jnp.stack([scale, shift]).astype(jnp.float32))
  return y.reshape(x.shape)


def layer_norm_gradient(x: jax.Array, g: jax.Array, scale: jax.Array, eps: float, *,
                        interpret: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of x, scale and shift of `layer_norm`, for what comes back for its result.

  x, g [..., R, C], scale [C] -> as x, float32 [C], [C].
  """
  (flat, grid, block), c = _blocks(x), x.shape[-1]
  whole = pl.BlockSpec((2, c), lambda n, i: (0, 0))
  dx, sums = pl.pallas_call(
      functools.partial(_gradient_kernel, eps=eps, extent=flat.shape[:2]), grid=grid,
      in_specs=[block, block, pl.BlockSpec((1, c), lambda n, i: (0, 0))],
      out_specs=[block, whole],
      out_shape=[jax.ShapeDtypeStruct(flat.shape, x.dtype),
                 jax.ShapeDtypeStruct((2, c), jnp.float32)],
      compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
      name="layer_norm_gradient", interpret=interpret)(
          flat, g.reshape(flat.shape), scale.astype(jnp.float32)[None])
  return dx.reshape(x.shape), sums[0], sums[1]


def _blocks(x):
  """x as [N, R, C], of which nothing is moved, whatever R is; and how it is cut."""
  rows, c = x.shape[-2:]
  flat = x.reshape(-1, rows, c)
  most = BLOCK_BYTES // (c * x.dtype.itemsize)
  many = rows if rows <= most else most // SUBLANES * SUBLANES
  several = min(max(1, most // rows), len(flat))
  grid = pl.cdiv(len(flat), several), pl.cdiv(rows, many)
  return flat, grid, pl.BlockSpec((several, many, c), lambda n, i: (n, i, 0))


def _parts(rows, c):
  """Which rows of a block are worked on at once."""
  size = max(SUBLANES, CHUNK // c // SUBLANES * SUBLANES)
  return [pl.ds(start, min(size, rows - start)) for start in range(0, rows, size)]


def _normed(x, eps):
  """[R, C] in float32 less its mean, over its deviation; and one over that, [R, 1]."""
  x = x.astype(jnp.float32)
  x = x - jnp.mean(x, axis=-1, keepdims=True)
  r = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
  return x * r, r


def _kernel(x_ref, vectors_ref, y_ref, *, eps):
  several, rows, c = x_ref.shape

  @pl.loop(0, several)
  def _(n):
    for part in _parts(rows, c):
      x, _ = _normed(x_ref[n, part], eps)
      y_ref[n, part] = (x * vectors_ref[:1] + vectors_ref[1:]).astype(y_ref.dtype)


def _gradient_kernel(x_ref, g_ref, scale_ref, dx_ref, sums_ref, *, eps, extent):
  """dx = (s g - mean(s g) - y mean(s g y)) / deviation, of y without scale and shift."""
  several, rows, c = x_ref.shape
  first, start = pl.program_id(0) * several, pl.program_id(1) * rows

  @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
  def _():
    sums_ref[...] = jnp.zeros_like(sums_ref)

  @pl.loop(0, several)
  def _(n):
    for part in _parts(rows, c):
      y, r = _normed(x_ref[n, part], eps)
      g = g_ref[n, part].astype(jnp.float32)
      scaled = g * scale_ref[...]
      along = jnp.mean(scaled * y, axis=-1, keepdims=True)
      middle = jnp.mean(scaled, axis=-1, keepdims=True)
      dx_ref[n, part] = ((scaled - middle - y * along) * r).astype(dx_ref.dtype)
      row = start + part.start + jax.lax.broadcasted_iota(jnp.int32, (part.size, 1), 0)
      inside = (first + n < extent[0]) & (row < extent[1])  # the last blocks reach beyond the end
      for k, product in enumerate((g * y, g)):
        sums_ref[k:k + 1] += jnp.sum(jnp.where(inside, product, 0.0), axis=0, keepdims=True)
