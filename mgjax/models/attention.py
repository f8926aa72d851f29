"""Scaled dot-product attention with grouped keys."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from mgjax.config import ConfigError, RopeScaling
from mgjax.kernels.short_attention import fits, short_attention
from mgjax.kernels.splash import splash_attention
from mgjax.models.platforms import platform
from mgjax.sharding import batch_shards, spec

IMPLEMENTATIONS = ("auto", "xla", "splash", "cudnn")
SHORTEST = 256  # below, the kernel's blocks are mostly padding


@jax.named_scope("attention")
def attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None,
              window: int | None = None, *, implementation: str = "auto") -> jax.Array:
  """Softmax attention; logits and softmax in float32.

  Args:
    q: [B, Lq, H, h].
    k, v: [B, Lk, K, h]; each of the K heads serves H // K consecutive query heads.
    segment_ids: int [B, L], for packed rows (Lq = Lk): who sees whom is `packed_causal_mask`, with
      `window`.  None: everyone sees everyone.
    implementation: "xla" is the plain form, which runs everywhere; "splash" the TPU's kernels,
      "cudnn" the GPU's, for packed rows; "auto" those for the devices of the mesh.

  Returns: [B, Lq, H, h] in the dtype of q; finite for padding too.
  Raises ConfigError for an implementation that does not exist or not here.
  """
  chosen = choose(implementation, platform(), q.shape[1], q.dtype)
  if segment_ids is None:
    heads, left = divmod(q.shape[2], jax.sharding.get_abstract_mesh().shape["tensor"])
    if chosen == "splash" and not left and fits(q, k, heads):
      return _by_rows_and_heads(_short, q, k, v)
    return plain_attention(q, k, v)
  if chosen == "splash":
    local = functools.partial(splash_attention, window=window, name="attention",
                              interpret=platform() != "tpu")
    return _by_rows_and_heads(local, q, k, v, segment_ids)
  mask = packed_causal_mask(segment_ids, window)
  if chosen == "cudnn":
    return _cudnn(q, k, v, mask)
  return checkpoint_name(plain_attention(q, k, v, mask), "attention")


def choose(implementation: str, platform: str, length: int, dtype) -> str:
  """What `implementation` means for rows of this length and dtype on this platform.

  >>> [choose("auto", "tpu", length, jnp.bfloat16) for length in (64, 2048)]
  ['xla', 'splash']
  >>> [choose("auto", platform, 2048, jnp.bfloat16) for platform in ("cpu", "gpu")]
  ['xla', 'cudnn']
  """
  if implementation not in IMPLEMENTATIONS:
    raise ConfigError(f"attention: {implementation!r} does not exist; one of "
                      f"{', '.join(IMPLEMENTATIONS)}")
  if implementation == "auto":
    if platform == "tpu" and length >= SHORTEST:
      return "splash"
    # cuDNN has no float32, and its backward pass no odd lengths.
    fits = dtype != jnp.float32 and length >= SHORTEST and length % 2 == 0
    return "cudnn" if platform == "gpu" and fits else "xla"
  if implementation == "cudnn" and platform != "gpu":
    raise ConfigError(f"attention: 'cudnn' is for GPUs, the devices here are {platform}; use "
                      "--config.attention=auto")
  return implementation


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array,
                    mask: jax.Array | None = None) -> jax.Array:
  """`attention` as XLA runs it; mask: bool [B, Lq, Lk], True where a query may look."""
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


def _short(q, k, v):
  return short_attention(q, k, v, plain_attention, platform() != "tpu")


def _cudnn(q, k, v, mask):
  def local(q, k, v, mask):
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")
  return checkpoint_name(_by_rows_and_heads(local, q, k, v, mask), "attention")


def _by_rows_and_heads(local, q, k, v, *rows):
  """local(q, k, v, *rows) on each device, with its own rows and heads: XLA cannot cut a kernel."""
  mesh = jax.sharding.get_abstract_mesh()
  batch = spec("batch")[0] if q.shape[0] % batch_shards(mesh) == 0 else None
  heads = P(batch, None, *spec("act_heads"), None)
  return jax.shard_map(local, in_specs=(heads, heads, heads, *(P(batch) for _ in rows)),
                       out_specs=heads, check_vma=False)(q, k, v, *rows)


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
