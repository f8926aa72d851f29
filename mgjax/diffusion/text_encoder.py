"""CLIP's text transformer: what SDXL reads of a prompt."""
from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mgjax.diffusion.config import TextEncoderConfig
from mgjax.models.clip_block import ClipBlock, quick_gelu
from mgjax.models.layers import Dense, LayerNorm, gelu, stack

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


class TextEncoder(nnx.Module):
  """Token ids -> the hidden state before the last block, and with a projection the pooled vector.

  Without a projection the last block and the final norm never run; their weights are kept so that
  a checkpoint round-trips.
  """

  def __init__(self, config: TextEncoderConfig, *, dtype, rngs: nnx.Rngs):
    self.config, self.dtype = config, dtype
    d, normal = config.width, nnx.initializers.normal(0.02)
    self.token_embedding = nnx.Param(
        normal(rngs(), (config.vocab_size, d)), out_sharding=("vocab", "embed"))
    self.position_embedding = nnx.Param(
        normal(rngs(), (config.length, d)), out_sharding=(None, "embed"))
    block = lambda r: ClipBlock(config, activation=ACTIVATIONS[config.activation], causal=True,
                                dtype=dtype, rngs=r)
    self.blocks = stack(config.depth - 1, block, rngs)
    self.last = block(rngs)
    self.final_norm = LayerNorm(d, config.norm_eps)
    self.projection = nnx.data(
        Dense(d, config.projection, ("embed", None), bias=False, dtype=dtype, rngs=rngs)
        if config.projection else None)

  def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """ids int32 [N, L] -> (hidden [N, L, D], pooled [N, P] or None)."""
    x = (self.token_embedding[...].astype(self.dtype)[ids]
         + self.position_embedding[...].astype(self.dtype)[:ids.shape[1]])
    (_, length, d) = x.shape
    rows, _ = jax.lax.scan(lambda x, block: (block(x, length), None), x.reshape(-1, d), self.blocks)
    hidden = rows.reshape(x.shape)
    if self.projection is None:
      return hidden, None
    eos = self.config.eos_id
    end = jnp.argmax(ids if eos == 2 else ids == eos, axis=1)  # the first where there are several
    last = self.final_norm(self.last(rows, length)).reshape(x.shape)
    return hidden, self.projection(jnp.take_along_axis(last, end[:, None, None], 1)[:, 0])
