"""Rows of an embedding table, each device its own."""
from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mgjax.sharding import batch_shards, fitting_spec, spec


def lookup(table: jax.Array, tokens: jax.Array, dtype) -> jax.Array:
  """table [V, D] with axes ("vocab", "embed"), int tokens [B, L] -> [B, L, D] in `dtype`.

  Ids outside the table are taken to its ends.  The gradient is added up on each device, in float32,
  and then over the devices.  XLA, left alone, brings the gradients of all positions to all devices.
  """
  tokens = jnp.clip(tokens, 0, table.shape[0] - 1)
  return _lookup(_Table(table.shape, table.dtype, jnp.dtype(dtype)), table, tokens)


@dataclasses.dataclass(frozen=True)
class _Table:
  shape: tuple[int, int]
  dtype: jnp.dtype   # as it is stored
  used: jnp.dtype

  @property
  def stored(self) -> P:
    return fitting_spec(self.shape, "vocab", "embed")

  def cut(self, axis) -> bool:
    return axis is not None and jax.sharding.get_abstract_mesh().shape[axis] > 1

  def own(self, tokens):
    """Which row of this device's part each token is; the number of its rows for those of others."""
    if not self.cut(vocab := self.stored[0]):
      return tokens
    rows = self.shape[0] // jax.lax.axis_size(vocab)
    row = tokens - jax.lax.axis_index(vocab) * rows
    return jnp.where((row >= 0) & (row < rows), row, rows)


def _rows_of(tokens):
  fit = tokens.shape[0] % batch_shards(jax.sharding.get_abstract_mesh()) == 0
  return spec("batch") if fit else P()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(about, table, tokens):
  vocab = about.stored[0]

  def local(table, tokens):
    x = table.at[about.own(tokens)].get(mode="fill", fill_value=0)
    return jax.lax.psum(x, vocab) if about.cut(vocab) else x

  # One table for all rows beats the rows of all devices: gathered over fsdp, then looked up.
  rows = _rows_of(tokens)
  return jax.shard_map(local, in_specs=(P(vocab, None), rows), out_specs=rows, check_vma=False)(
      table.astype(about.used), tokens)


def _forward(about, table, tokens):
  return _lookup(about, table, tokens), tokens


def _backward(about, tokens, g):
  vocab, embed = about.stored
  rows = _rows_of(tokens)

  def local(tokens, g):
    parts = jax.lax.axis_size(vocab) if about.cut(vocab) else 1
    d = jnp.zeros((about.shape[0] // parts, about.shape[1]))
    d = d.at[about.own(tokens)].add(g.astype(d.dtype), mode="drop")
    summed = [a for a in (rows[0] if rows else ()) if a != embed or not about.cut(embed)]
    if about.cut(embed):
      d = jax.lax.psum_scatter(d, embed, scatter_dimension=1, tiled=True)
      d = d if rows else d / jax.lax.axis_size(embed)  # all devices had the same rows
    return jax.lax.psum(d, summed).astype(about.dtype)

  return jax.shard_map(local, in_specs=(rows, rows), out_specs=about.stored, check_vma=False)(
      tokens, g), None


_lookup.defvjp(_forward, _backward)
