"""Attention to short sequences without order, as in a vision transformer, on a TPU."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

# What fits into the memory of a core: keys and values, and the weights of a block of queries.
LONGEST, WEIGHTS = 4096, 1 << 20
LANES = 128


def fits(q: jax.Array, k: jax.Array, heads: int) -> bool:
  """Whether `short_attention` can take q [B, Lq, H, h] and k, with so many of the heads a
  device."""
  h = q.shape[3]
  together = max(1, LANES // h)
  longest = LONGEST if k.dtype.itemsize <= 2 else LONGEST // 2
  return (k.shape[1] <= longest and q.shape[2] == k.shape[2] and h <= LANES
          and h * together % LANES == 0 and heads % together == 0)


def query_block(queries: int, keys: int) -> int:
  """Queries that one block takes.

  >>> [query_block(*n) for n in ((577, 577), (4096, 77), (4096, 4096), (2048, 1024))]
  [577, 4096, 128, 512]
  """
  if queries * keys <= WEIGHTS:
    return queries
  return max(LANES, WEIGHTS // 2 // keys // LANES * LANES)  # half: the next block's are on the way


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def short_attention(q: jax.Array, k: jax.Array, v: jax.Array, plain, interpret: bool) -> jax.Array:
  """Softmax attention where everyone sees everyone, of one device's rows and heads.

  q [B, Lq, H, h], k, v [B, Lk, H, h] -> [B, Lq, H, h].  plain: the same attention as XLA runs it;
  the backward pass goes through it.  interpret: run the kernel's steps as ordinary operations, on
  any platform.

  Heads are read as they lie in the rows that the projections give, 128 numbers of a position at a
  time, and written so.  Neither the weights nor any transposed or padded copy leave the core, which
  is what takes XLA's form (and splash attention, whose blocks do not divide 577) most of its time.
  """
  del plain
  b, queries, heads, h = q.shape
  keys, together = k.shape[1], max(1, LANES // h)  # heads of a block
  size = query_block(queries, keys)
  # The queries' blocks go round last: keys and values stay where they are meanwhile.
  own = pl.BlockSpec((None, size, together * h), lambda row, group, block: (row, block, group))
  all_keys = pl.BlockSpec((None, keys, together * h), lambda row, group, block: (row, 0, group))
  flat = lambda x: x.reshape(*x.shape[:2], heads * h)
  out = pl.pallas_call(
      functools.partial(_kernel, h=h), grid=(b, heads // together, pl.cdiv(queries, size)),
      in_specs=[own, all_keys, all_keys], out_specs=own,
      out_shape=jax.ShapeDtypeStruct((b, queries, heads * h), q.dtype),
      name="short_attention", interpret=interpret)(*map(flat, (q, k, v)))
  return out.reshape(q.shape)


def _kernel(q_ref, k_ref, v_ref, out_ref, *, h):
  outs = []
  for start in range(0, out_ref.shape[-1], h):
    q, k, v = (ref[:, start:start + h] for ref in (q_ref, k_ref, v_ref))
    logits = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())),
                                 preferred_element_type=jnp.float32) * h**-0.5
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    out = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    # Divided last: the sum of a row is one number, its weights are hundreds.
    outs.append((out / jnp.sum(weights, axis=-1, keepdims=True)).astype(out_ref.dtype))
  out_ref[...] = jnp.concatenate(outs, axis=-1)


def _forward(q, k, v, plain, interpret):
  return short_attention(q, k, v, plain, interpret), (q, k, v)


def _backward(plain, interpret, saved, g):
  del interpret
  return jax.vjp(plain, *saved)[1](g)


short_attention.defvjp(_forward, _backward)
