"""The transformer block of CLIP, the same for its pictures (R1.2) and its texts."""
from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mgjax.models.attention import attention
from mgjax.models.layers import Dense, TowerNorm
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
    self.norm1 = TowerNorm(d, config.norm_eps)
    self.q = Dense(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
    self.k = Dense(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
    self.v = Dense(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
    self.out = Dense(d, d, ("heads", "embed"), dtype=dtype, rngs=rngs)
    self.norm2 = TowerNorm(d, config.norm_eps)
    self.up = Dense(d, f, ("embed", "mlp"), dtype=dtype, rngs=rngs)
    self.down = Dense(f, d, ("mlp", "embed"), dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, tokens: int) -> jax.Array:
    """x: the positions of N sequences of so many tokens one behind the other, [N*T, D] -> same.

    As rows the TPU's compiler makes one operation of a product and what is done to its result.
    """
    y = self.norm1(x)
    q, k, v = (f(y).reshape(-1, tokens, self.heads, x.shape[-1] // self.heads)
               for f in (self.q, self.k, self.v))
    q, k, v = (constrain(a, "batch", "seq", "act_heads", None) for a in (q, k, v))
    segment_ids = jnp.ones(q.shape[:2], jnp.int32) if self.causal else None
    attended = attention(q, k, v, segment_ids, implementation=self.attention)
    x = x + self.out(attended.reshape(x.shape))
    y = constrain(self.activation(self.up(self.norm2(x))), "batch", "act_mlp")
    return constrain(x + self.down(y), "batch", "act_embed")
