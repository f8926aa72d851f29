"""The low-resolution tower: CLIP's vision transformer (R1.2)."""
from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mgjax.config import ClipVitConfig
from mgjax.models.attention import attention
from mgjax.models.layers import Dense, LayerNorm, stack
from mgjax.models.remat import remat
from mgjax.sharding import constrain, gathered


def quick_gelu(x: jax.Array) -> jax.Array:
  """x * sigmoid(1.702 x), CLIP's activation."""
  return x * jax.nn.sigmoid(1.702 * x)


class ClipBlock(nnx.Module):
  """Pre-norm transformer block, bidirectional."""

  def __init__(self, config: ClipVitConfig, *, attention: str, dtype, rngs: nnx.Rngs):
    d, f = config.width, config.mlp_width
    self.heads, self.attention = config.heads, attention
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
    attended = attention(q, k, v, implementation=self.attention)
    x = x + self.out(attended.reshape(n, t, d))
    y = constrain(quick_gelu(self.up(self.norm2(x))), "batch", "seq", "act_mlp")
    return constrain(x + self.down(y), "batch", "seq", "act_embed")


class ClipVit(nnx.Module):
  """Images -> patch tokens of the selected hidden state, class token dropped.

  Blocks after the selected layer (the last one, in every release) never run; their weights and
  the final norm are kept in `unused_blocks` and `post_norm` so that a checkpoint round-trips.
  """

  def __init__(self, config: ClipVitConfig, *, remat_policy: str = "none",
               attention: str = "auto", dtype, rngs: nnx.Rngs):
    self.config, self.dtype, self.remat_policy = config, dtype, remat_policy
    d, tokens = config.width, config.side**2
    patch = config.patch_size**2 * 3
    normal = nnx.initializers.normal(0.02)
    self.patch_embed = Dense(patch, d, (None, "embed"), bias=False, dtype=dtype, rngs=rngs)
    self.class_embedding = nnx.Param(normal(rngs(), (d,)), out_sharding=("embed",))
    self.position_embedding = nnx.Param(
        normal(rngs(), (tokens + 1, d)), out_sharding=(None, "embed"))
    self.pre_norm = LayerNorm(d, config.norm_eps)
    block = lambda r: ClipBlock(config, attention=attention, dtype=dtype, rngs=r)
    self.blocks = stack(config.used_depth, block, rngs)
    unused = config.depth - config.used_depth
    self.unused_blocks = nnx.data(stack(unused, block, rngs) if unused else None)
    self.post_norm = LayerNorm(d, config.norm_eps)

  def __call__(self, images: jax.Array) -> jax.Array:
    """images: normalised [N, s, s, 3] -> [N, T, D]."""
    n, p, side = images.shape[0], self.config.patch_size, self.config.side
    patches = images.astype(self.dtype).reshape(n, side, p, side, p, 3)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(n, side**2, p * p * 3)
    x = self.patch_embed(patches)
    first = gathered(self.class_embedding[...].astype(x.dtype), "embed")
    first = jnp.broadcast_to(first, (n, 1, x.shape[-1]))
    x = jnp.concatenate([first, x], axis=1)
    x = x + gathered(self.position_embedding[...].astype(x.dtype), None, "embed")
    x = constrain(self.pre_norm(x), "batch", "seq", "act_embed")
    body = remat(self.remat_policy)(lambda x, block: (block(x), None))
    x, _ = jax.lax.scan(body, x, self.blocks)
    return x[:, 1:]
