"""Scaled dot-product attention with grouped keys."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mgjax.config import RopeScaling


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """Softmax attention; logits and softmax in float32.

  Args:
    q: [B, Lq, H, h].
    k, v: [B, Lk, K, h]; each of the K heads serves H // K consecutive query heads.
    mask: bool [B, Lq, Lk]; True where a query may look.  None: everywhere.

  Returns: [B, Lq, H, h] in the dtype of q.
  """
  b, lq, heads, h = q.shape
  groups, n = k.shape[2], heads // k.shape[2]
  # The query heads of a key head as so many more rows: plain products of two matrices for each
  # [B, K], which XLA's CPU backend runs twice as fast as the same with heads as an axis.
  q = q.reshape(b, lq, groups, n, h).transpose(0, 2, 3, 1, 4).reshape(b, groups, n * lq, h)
  k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)                 # [B, K, Lk, h]
  logits = jnp.einsum("bkqh,bksh->bkqs", q, k, preferred_element_type=jnp.float32) * h**-0.5
  if mask is not None:
    logits = jnp.where(jnp.tile(mask, (1, n, 1))[:, None], logits, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  out = jnp.einsum("bkqs,bksh->bkqh", weights, v).reshape(b, groups, n, lq, h)
  return out.transpose(0, 3, 1, 2, 4).reshape(b, lq, heads, h)


def packed_causal_mask(segment_ids: jax.Array, window: int | None = None) -> jax.Array:
  """Who sees whom in a packed row: earlier positions of the same sample, at most `window` with the
  position itself.

  segment_ids int32 [B, L] -> bool [B, L, L].  For one row [1, 1, 2, 2, 0]:

      1 . . . .
      1 1 . . .
      . . 1 . .
      . . 1 1 .
      . . . . 1     (padding sees itself alone, so that its softmax stays finite)
  """
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  index = jnp.arange(segment_ids.shape[1])
  distance = index[:, None] - index[None, :]
  seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
  return same & seen


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
  """Angle per position of each pair of dimensions: theta^(-2i/h), stretched by `scaling`.

  -> float32 [h/2]
  """
  half = head_dim // 2
  frequencies = np.float32(theta) ** (-np.arange(half, dtype=np.float32) / half)
  if scaling is None:
    return frequencies
  if not scaling.original_length:
    return frequencies / np.float32(scaling.factor)
  turns = scaling.original_length * frequencies / (2 * np.pi)  # in a text of the original length
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  kept = np.clip((turns - low) / (high - low), 0, 1)  # 0: divided, 1: as it was
  return (frequencies * (kept + (1 - kept) / scaling.factor)).astype(np.float32)


def rope(x: jax.Array, positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
  """Rotary embedding, rotate-half convention, angles in float32.

  x [B, L, H, h], positions int [B, L], frequencies [h/2] -> [B, L, H, h].
  """
  angles = positions[..., None, None].astype(jnp.float32) * frequencies  # [B, L, 1, h/2]
  sin, cos = jnp.sin(angles), jnp.cos(angles)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
