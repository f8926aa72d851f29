"""The transformer block of CLIP, the same for its pictures (R1.2) and its texts."""
from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mgjax.models.attention import attention
from mgjax.models.layers import Dense, LayerNorm
from mgjax.sharding import constrain


def quick_gelu(x: jax.Array) -> jax.Array:
  """x * sigmoid(1.702 x), CLIP's activation."""
  return x * jax.nn.sigmoid(1.702 * x)


class ClipBlock(nnx.Module):
  """Pre-norm transformer block.

  config: has width, heads, mlp_width and norm_eps.
  causal: whether a position sees only itself and those before it; else all see all.
  """

  def __init__(self, config, *, activation: Callable[[jax.Array], jax.Array] = quick_gelu,
               causal: bool = False, attention: str = "auto", dtype, rngs: nnx.Rngs):
    d, f = config.width, config.mlp_width
    self.heads, self.attention = config.heads, attention
    self.activation, self.causal = activation, causal
    self.norm1 = LayerNorm(d, config.norm_eps)
    self.q = Dense(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
    self.k = Dense(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
    self.v = Dense(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
    self.out = Dense(d, d, ("heads", "embed"), dtype=dtype, rngs=rngs)
    self.norm2 = LayerNorm(d, config.norm_eps)
    self.up = Dense(d, f, ("embed", "mlp"), dtype=dtype, rngs=rngs)
    self.down = Dense(f, d, ("mlp", "embed"), dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:  # [N, T, D] -> [N, T, D]
    n, t, d = x.shape
    y = self.norm1(x)
    q, k, v = (f(y).reshape(n, t, self.heads, -1) for f in (self.q, self.k, self.v))
    q, k, v = (constrain(a, "batch", "seq", "act_heads", None) for a in (q, k, v))
    segment_ids = jnp.ones((n, t), jnp.int32) if self.causal else None
    attended = attention(q, k, v, segment_ids, implementation=self.attention)
    x = x + self.out(attended.reshape(n, t, d))
    y = constrain(self.activation(self.up(self.norm2(x))), "batch", "seq", "act_mlp")
    return constrain(x + self.down(y), "batch", "seq", "act_embed")
