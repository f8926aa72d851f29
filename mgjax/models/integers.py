"""Matrices as small integers: how they are made, what they stand for, and products with them.

    int8    one scale for each output channel
    int4    a scale and an offset for each output channel and 32 inputs

Products are computed in the dtype of the other factor; integers are what lies in memory.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

FORMATS = {"int8": jnp.int8, "int4": jnp.int4}
GROUP = 32                                # inputs that share a scale in int4
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)  # of the range of a group, tried in int4
# Rows for which sums of int4 groups are scaled rather than weights: the compiler of TPUs counts
# 10 and 53 thousand cycles for 8 rows of a 4096 x 1376 matrix, 243 and 111 for 64 of 4096 x 11008.
FEW_ROWS = 16


def group_size(inputs: int, ways: int = 1) -> int:
  """Inputs of a matrix that share a scale in int4, where `ways` devices share the inputs: no group
  is cut.

  >>> [group_size(*n) for n in ((4096, 8), (11008, 8), (100, 1))]
  [32, 32, 4]
  """
  return math.gcd(inputs // ways, GROUP)


def quantized(w: jax.Array, name: str, ways: int = 1) -> tuple[jax.Array, ...]:
  """w [..., D, F] -> integers, and the scales and offsets that make them weights again.

  int8: integers [..., D, F] and scales, float32 [..., F]; zero is zero.
  int4: integers [..., G, D/G, F] and, in the dtype of w, scales and offsets [..., G, F]; of the
  ranges that CLIPS give the one with the least squared error.  `ways` as in `group_size`.
  """
  exact = w.astype(jnp.float32)
  if name == "int8":
    scale = jnp.max(jnp.abs(exact), axis=-2) / 127                        # [..., F]
    values = jnp.round(exact / jnp.where(scale > 0, scale, 1)[..., None, :])
    return jnp.clip(values, -127, 127).astype(jnp.int8), scale
  size = group_size(w.shape[-2], ways)
  grouped = exact.reshape(*w.shape[:-2], -1, size, w.shape[-1])
  low, high = (f(grouped, axis=-2, keepdims=True) for f in (jnp.min, jnp.max))  # [..., G, 1, F]

  def rounded(clip):
    scale = (clip * (high - low) / 15).astype(w.dtype)
    step = scale.astype(jnp.float32)
    offset = ((low + high + step) / 2).astype(w.dtype)  # -8 and 7 are as far from the middle
    values = jnp.round((grouped - offset) / jnp.where(step > 0, step, 1))
    values = jnp.clip(values, -8, 7)
    error = jnp.sum(jnp.square(values * step + offset - grouped), axis=-2, keepdims=True)
    return values, scale, offset, error

  best = rounded(1.0)
  for clip in CLIPS[1:]:
    other = rounded(clip)
    better = other[-1] < best[-1]
    best = tuple(jnp.where(better, new, old) for new, old in zip(other, best))
  values, scale, offset, _ = best
  return values.astype(jnp.int4), scale[..., 0, :], offset[..., 0, :]


def dequantized(parts: Sequence[jax.Array], dtype) -> jax.Array:
  """What `quantized` gave -> the matrix [..., D, F] that it stands for."""
  values, scale, *offset = parts
  w = values.astype(dtype) * scale.astype(dtype)[..., None, :]
  if not offset:
    return w
  w += offset[0].astype(dtype)[..., None, :]
  return w.reshape(*w.shape[:-3], -1, w.shape[-1])


def packed(values: jax.Array) -> jax.Array:
  """int4 [..., D, F] -> int8 [..., D/2, F], two values to a byte.  ValueError for an odd D."""
  low, high = jnp.split(values.astype(jnp.int8), 2, axis=-2)
  return (high << 4) | (low & 15)


def unpacked(values: jax.Array) -> jax.Array:
  """int8 [..., D/2, F] -> the values, as int8 [..., D, F]."""
  return jnp.concatenate([(values << 4) >> 4, values >> 4], axis=-2)


def product(x: jax.Array, parts: Sequence[jax.Array]) -> jax.Array:
  """x [..., N, D] times what `quantized` gave, in the dtype of x -> [..., N, F]."""
  values, scale, *offset = parts
  if not offset:  # the scale of a whole channel can wait until the sum is made
    y = x @ values.astype(x.dtype)
    return (y * (scale if scale.ndim == 1 else scale[..., None, :])).astype(x.dtype)
  x = x.reshape(*x.shape[:-1], values.shape[-3], -1)                      # [..., N, G, D/G]
  if x.shape[-3] > FEW_ROWS:
    # In three dimensions: with scales repeated for two, the compiler writes them out as a matrix.
    scale, offset = (a.astype(x.dtype)[..., None, :] for a in (scale, *offset))
    return jnp.einsum("...ngk,...gkf->...nf", x, values.astype(x.dtype) * scale + offset)
  sums = jnp.einsum("...ngk,...gkf->...gnf", x, values.astype(x.dtype),
                    preferred_element_type=jnp.float32)
  scaled = jnp.sum(sums * scale[..., None, :], axis=-3)
  moved = jnp.einsum("...ng,...gf->...nf", x.sum(-1, dtype=jnp.float32),
                     offset[0].astype(jnp.float32))
  return (scaled + moved).astype(x.dtype)


def part_axes(dtype, axes: tuple[str | None, ...]) -> tuple[tuple[str | None, ...], ...]:
  """Logical names of the dimensions of the parts of a matrix with these names."""
  *lead, inputs, outputs = axes
  if dtype == jnp.int8:
    return axes, (*lead, outputs)
  return (*lead, inputs, None, outputs), *((*lead, inputs, outputs),) * 2
