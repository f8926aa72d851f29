"""The low-resolution tower: CLIP's vision transformer (R1.2)."""
from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mgjax.config import ClipVitConfig
from mgjax.models.clip_block import ClipBlock
from mgjax.models.layers import Dense, TowerNorm, stack
from mgjax.models.remat import remat
from mgjax.sharding import constrain, gathered


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
    self.pre_norm = TowerNorm(d, config.norm_eps)
    block = lambda r: ClipBlock(config, attention=attention, dtype=dtype, rngs=r)
    self.blocks = stack(config.used_depth, block, rngs)
    unused = config.depth - config.used_depth
    self.unused_blocks = nnx.data(stack(unused, block, rngs) if unused else None)
    self.post_norm = TowerNorm(d, config.norm_eps)

  @jax.named_scope("clip")
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
    x, (_, tokens, d) = constrain(self.pre_norm(x), "batch", "seq", "act_embed"), x.shape
    body = remat(self.remat_policy)(lambda x, block: (block(x, tokens), None))
    x, _ = jax.lax.scan(body, x.reshape(-1, d), self.blocks)
    return x.reshape(n, tokens, d)[:, 1:]
