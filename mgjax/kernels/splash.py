"""Attention on a TPU by the splash kernel: blocks that nobody may see are not computed, and the
matrix of weights never exists."""
from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

LARGEST, SMALLEST = 1024, 512  # blocks: smaller ones pay for their start, larger ones do not fit


def splash_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *,
                     window: int | None = None, name: str | None = None,
                     interpret: bool = False) -> jax.Array:
  """Softmax attention in packed rows, of one device's rows and heads.

  Args:
    q: [B, L, H, h].
    k, v: [B, L, K, h]; each of the K heads serves H // K consecutive query heads.
    segment_ids: int [B, L]; a position sees earlier ones of its segment.
    window: at most so many, itself included.
    name: under which `jax.checkpoint` policies know what the backward kernel needs of the forward
      one, the output and the logarithm of the softmax's denominators.
    interpret: run the kernel's steps as ordinary operations, on any platform.

  Returns: [B, L, H, h] in the dtype of q.
  """
  length, heads, h = q.shape[1:]
  block = block_size(length)
  padded = -(-length // block) * block
  pad = lambda x: jnp.pad(x, ((0, 0), (0, padded - length)) + ((0, 0),) * (x.ndim - 2))
  # In float32 before it is rounded: in bfloat16 the factor itself would be.
  q = (q.astype(jnp.float32) * h**-0.5).astype(q.dtype)
  heads_first = lambda x: pad(x).transpose(0, 2, 1, 3)
  attend = kernel.make_splash_mha(
      masks.MultiHeadMask([_mask(padded, window)] * heads), head_shards=1, q_seq_shards=1,
      block_sizes=_block_sizes(block), residual_checkpoint_name=name, interpret=interpret)
  # What is padded here is of no segment, and sees itself alone or others of its kind.
  ids = pad(segment_ids + 1)
  out = jax.vmap(lambda q, k, v, ids: attend(q, k, v, kernel.SegmentIds(ids, ids)))(
      *map(heads_first, (q, k, v)), ids)
  return out.transpose(0, 2, 1, 3)[:, :length]


def block_size(length: int) -> int:
  """Positions of a block: as little padding as may be, then as large as may be.

  >>> [block_size(n) for n in (577, 2048, 2944, 3456, 6400)]
  [640, 1024, 1024, 896, 640]
  """
  if length <= LARGEST:
    return -(-length // 128) * 128
  return min(range(LARGEST, SMALLEST - 1, -128), key=lambda b: -(-length // b) * b)


def _mask(length, window):
  shape = (length, length)
  if window is None or window >= length:
    return masks.CausalMask(shape)
  return masks.LocalMask(shape, (window - 1, 0), 0)


def _block_sizes(block):
  # One backward kernel for all three gradients: five products in place of seven.
  return kernel.BlockSizes(
      block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
      block_kv_dkv=block, block_kv_dkv_compute=block, use_fused_bwd_kernel=True)
