"""Attention of short sequences without order, as in a vision transformer, on a TPU."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LONGEST = 1024  # positions whose weights fit into the memory of a core
LANES = 128


def fits(q: jax.Array, k: jax.Array, heads: int) -> bool:
  """Whether `short_attention` can take q and k [B, L, H, h], with so many of the heads a device."""
  length, h = q.shape[1], q.shape[3]
  together = max(1, LANES // h)
  return (q.shape == k.shape and length <= LONGEST and h * together % LANES == 0
          and heads % together == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def short_attention(q: jax.Array, k: jax.Array, v: jax.Array, plain, interpret: bool) -> jax.Array:
  """Softmax attention where everyone sees everyone, of one device's rows and heads.

  q, k, v [B, L, H, h] -> [B, L, H, h].  plain: the same attention as XLA runs it; the backward pass
  goes through it.  interpret: run the kernel's steps as ordinary operations, on any platform.

  Heads are read as they lie in the rows that the projections give, 128 numbers of a position at a
  time, and written so.  Neither the weights nor any transposed or padded copy leave the core, which
  is what takes XLA's form (and splash attention, whose blocks do not divide 577) most of its time.
  """
  del plain
  b, length, heads, h = q.shape
  together = max(1, LANES // h)  # heads of a block
  block = pl.BlockSpec((None, length, together * h), lambda row, group: (row, 0, group))
  rows = lambda x: x.reshape(b, length, heads * h)
  out = pl.pallas_call(
      functools.partial(_kernel, h=h), grid=(b, heads // together), in_specs=[block] * 3,
      out_specs=block, out_shape=jax.ShapeDtypeStruct((b, length, heads * h), q.dtype),
      name="short_attention", interpret=interpret)(rows(q), rows(k), rows(v))
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
