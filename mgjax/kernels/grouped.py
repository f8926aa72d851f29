"""Products of groups of rows with a matrix of their own, in the form that suits the platform."""
from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm


@jax.custom_vjp
def grouped_dot(rows: jax.Array, weights: jax.Array, counts: jax.Array) -> jax.Array:
  """rows [M, D], sorted by group; weights [G, D, F]; counts int [G] -> [M, F].

  Row r is multiplied by the matrix of its group.  What comes out for rows behind all groups means
  nothing, and they must get no gradient.  `jax.lax.ragged_dot` has a kernel on TPU and GPU; XLA's
  CPU backend multiplies every row by every matrix, so there a loop over blocks of rows does it.
  """
  return jax.lax.platform_dependent(rows, weights, counts, cpu=_blocks,
                                    default=jax.lax.ragged_dot)


def _forward(rows, weights, counts):
  return grouped_dot(rows, weights, counts), (rows, weights, counts)


def _backward(saved, g):
  d_rows, d_weights = jax.lax.platform_dependent(*saved, g, cpu=_blocks_backward,
                                                 tpu=_kernel_backward, default=_ragged_backward)
  return d_rows, d_weights, None


grouped_dot.defvjp(_forward, _backward)


def _ragged_backward(rows, weights, counts, g):
  return jax.vjp(lambda r, w: jax.lax.ragged_dot(r, w, counts), rows, weights)[1](g)


def _kernel_backward(rows, weights, counts, g, interpret=False):
  # XLA multiplies all rows with all groups' masks for the gradient of the weights: as many times
  # too much work as there are groups.
  block = next((b for b in (512, 256, 128) if rows.shape[0] % b == 0), None)
  if block is None:
    return _ragged_backward(rows, weights, counts, g)
  d_rows = jax.lax.ragged_dot(g, weights.swapaxes(1, 2), counts)
  # Groups end where they end: rows behind the last belong to none and are not read.
  d_weights = tgmm(rows.T, g, counts.astype(jnp.int32), weights.dtype, (block, 1024, 1024),
                   interpret=interpret)
  return d_rows, d_weights


def _schedule(rows, weights, counts):
  """Block length, number of blocks, and block number -> (group, first row, rows of the group)."""
  size = max(8, min(128, 1 << (rows.shape[0] // weights.shape[0]).bit_length() >> 1))
  ends, blocks = jnp.cumsum(counts), jnp.cumsum(-(-counts // size))

  def block(t):
    group = jnp.searchsorted(blocks, t, side="right")
    before = jnp.where(group > 0, blocks[group - 1], 0)
    start = ends[group] - counts[group] + (t - before) * size
    return group, start, ends[group] - start

  return size, blocks[-1], block


def _blocks(rows, weights, counts):
  size, number, block = _schedule(rows, weights, counts)
  padded = jnp.pad(rows, ((0, size), (0, 0)))

  def body(t, out):
    group, start, _ = block(t)
    y = jax.lax.dynamic_slice_in_dim(padded, start, size) @ weights[group]
    # What sticks out of the group is written over by the groups behind it.
    return jax.lax.dynamic_update_slice_in_dim(out, y, start, axis=0)

  out = jnp.zeros((padded.shape[0], weights.shape[-1]), rows.dtype)
  return jax.lax.fori_loop(0, number, body, out)[:rows.shape[0]]


def _blocks_backward(rows, weights, counts, g):
  size, number, block = _schedule(rows, weights, counts)
  padded, g_padded = (jnp.pad(x, ((0, size), (0, 0))) for x in (rows, g))

  def body(t, carry):
    d_rows, d_weights = carry
    group, start, left = block(t)
    own = (jnp.arange(size) < left)[:, None]
    x = jax.lax.dynamic_slice_in_dim(padded, start, size)
    dy = jnp.where(own, jax.lax.dynamic_slice_in_dim(g_padded, start, size), 0)
    d_rows = jax.lax.dynamic_update_slice_in_dim(d_rows, dy @ weights[group].T, start, axis=0)
    return d_rows, d_weights.at[group].add(x.T @ dy)

  d_rows, d_weights = jax.lax.fori_loop(
      0, number, body, (jnp.zeros_like(padded), jnp.zeros_like(weights)))
  return d_rows[:rows.shape[0]], d_weights
