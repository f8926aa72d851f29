"""An image tower with a bag-of-caption-tokens head: how a tower is pre-trained from scratch."""
from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mgjax.config import ModelConfig
from mgjax.models import images as views
from mgjax.models.clip_vit import ClipVit
from mgjax.models.convnext import ConvNext, concatenated_features
from mgjax.models.layers import Dense, standardize


class Tagger(nnx.Module):
  """Pictures [B, 1, H, H, 3] -> scores [B, V] of the tokens of their captions.

  tower: "vision" (CLIP on the low-resolution view) or "vision_hr" (ConvNeXt, pictures of any
  size).  Its parameters carry the same paths as in MiniGemini, which starts from them.
  """

  def __init__(self, config: ModelConfig, tower: str, *, remat_policy: str = "none",
               attention: str = "auto", dtype=jnp.bfloat16, rngs: nnx.Rngs):
    self.config, self.tower = config, tower
    kwargs = dict(remat_policy=remat_policy, dtype=dtype, rngs=rngs)
    if tower == "vision":
      self.vision = ClipVit(config.vision, attention=attention, **kwargs)
      width = config.vision.width
    elif tower == "vision_hr" and config.vision_hr is not None:
      self.vision_hr = ConvNext(config.vision_hr, **kwargs)
      width = config.vision_hr.features
    else:
      raise ValueError(f"tagger: tower {tower!r} is neither 'vision' nor the 'vision_hr' of a "
                       "model that has one")
    self.head = Dense(width, config.decoder.vocab_size, ("embed", "vocab"), dtype=dtype, rngs=rngs)

  def __call__(self, batch: dict[str, jax.Array], rng: jax.Array | None = None) -> jax.Array:
    hr = views.normalize(batch["images"][:, 0])
    if self.tower == "vision":
      tiles = views.low_resolution_tiles(hr, self.config)
      x = self.vision(tiles.reshape(-1, *tiles.shape[2:])).reshape(hr.shape[0], -1,
                                                                   self.config.vision.width)
    else:
      x = concatenated_features(self.vision_hr(hr, rng))
      x = x.reshape(hr.shape[0], -1, x.shape[-1])
    # Maximum over places: a small thing anywhere in the picture is enough to name it.
    x = jnp.max(standardize(x, 1e-5), axis=1)
    return self.head(x).astype(jnp.float32)
