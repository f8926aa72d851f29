"""The whole model: two towers, mining, projector, decoder; or the decoder alone."""
from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mgjax.config import ModelConfig
from mgjax.models import images as views
from mgjax.models.clip_vit import ClipVit
from mgjax.models.convnext import ConvNext
from mgjax.models.decoder import Decoder
from mgjax.models.layers import gelu, new_dense
from mgjax.models.mining import PatchInfoMining
from mgjax.models.remat import KEEP_ALL, RematConfig, remat
from mgjax.sharding import constrain


class Projector(nnx.Module):
  """mlp{N}x_gelu: a linear layer, then N-1 times exact GELU and another."""

  def __init__(self, d_in: int, d_out: int, depth: int, *, dtype, rngs: nnx.Rngs):
    make = lambda d: new_dense(d, d_out, ("embed", None), dtype=dtype, rngs=rngs)
    self.layers = nnx.List([make(d_in)] + [make(d_out) for _ in range(depth - 1)])

  @jax.named_scope("projector")
  def __call__(self, x: jax.Array) -> jax.Array:  # [..., d_in] -> [..., d_out]
    x = self.layers[0](x)
    for layer in self.layers[1:]:
      x = layer(gelu(x))
    return x


class MiniGemini(nnx.Module):
  """Pictures and text in, scores of the next token out.

  `remat` says what each part keeps for the backward pass, `attention` how it is computed (see
  `attention.attention`); `dtype` is the dtype of the matrix products, parameters are created
  in float32.
  """

  def __init__(self, config: ModelConfig, *, remat: RematConfig = KEEP_ALL,
               attention: str = "auto", dtype=jnp.bfloat16, rngs: nnx.Rngs):
    self.config, self.dtype, self.remat = config, dtype, remat
    self.decoder = Decoder(config.decoder, remat_policy=remat.decoder, attention=attention,
                           dtype=dtype, rngs=rngs)
    kwargs = dict(remat_policy=remat.towers, dtype=dtype, rngs=rngs)
    self.vision = self.vision_hr = self.mining = self.projector = nnx.data(None)
    if config.vision is None:
      return
    self.vision = ClipVit(config.vision, attention=attention, **kwargs)
    hr = config.vision_hr
    self.vision_hr = nnx.data(ConvNext(hr, **kwargs) if hr else None)
    self.mining = nnx.data(
        PatchInfoMining(config.vision.width, hr.features, dtype=dtype, rngs=rngs) if hr else None)
    self.projector = Projector(
        config.vision.width, config.decoder.width, config.projector_depth, dtype=dtype, rngs=rngs)

  def encode_images(self, pixels: jax.Array, rng: jax.Array | None = None) -> jax.Array:
    """uint8 [N, H, H, 3] -> visual tokens [N, T, D] in the order global, tile 00, 01, 10, 11.
    rng: drop path, or None."""
    hr = constrain(views.normalize(pixels), "batch", "space", "space", None)
    tiles = views.low_resolution_tiles(hr, self.config)  # [N, tiles, s, s, 3]
    return self.encode_views(tiles, hr, rng)

  def encode_views(self, tiles: jax.Array, hr: jax.Array, rng=None) -> jax.Array:
    """tiles [N, tiles, s, s, 3], hr [N, H, H, 3], both normalised -> visual tokens [N, T, D]."""
    n = tiles.shape[0]
    x = self.vision(tiles.reshape(-1, *tiles.shape[2:]))  # [N*tiles, t, Dv]
    if self.mining is not None:
      # The upsampled map is eight times the stage maps: not to be kept for the backward pass.
      mine = remat(self.remat.mining, in_scan=False)(self._mine)
      x = x + mine(self.mining, x, self.vision_hr(hr, rng))
    x = self.projector(x)
    return constrain(x.reshape(n, self.config.visual_tokens, -1), "batch", "seq", "act_embed")

  @jax.named_scope("mining")
  def _mine(self, mining, x, maps):
    """x [N*tiles, t, D] -> what each tile's tokens mine, likewise."""
    whole, tiles = views.split_views(x, self.config)
    mined = mining(tiles, maps)
    if whole is not None:
      whole = mining(whole, views.shrunk_maps(maps, self.config.grid))
    return views.join_views(whole, mined, self.config)

  def place(self, tokens: jax.Array, visual_index: jax.Array, visual: jax.Array) -> jax.Array:
    """Text embeddings with the visual tokens put where they belong.

    tokens, visual_index int [B, L]; visual [B, S*T, D] -> [B, L, D].  visual_index is -1 for
    text, else the number of a visual token of the same row.
    """
    text = self.decoder.embed(tokens)
    if visual.shape[1] == 0:
      return text
    picked = jnp.take_along_axis(visual, jnp.maximum(visual_index, 0)[..., None], axis=1)
    return jnp.where((visual_index >= 0)[..., None], picked.astype(text.dtype), text)

  def visual_tokens(self, batch: dict[str, jax.Array], rng=None) -> jax.Array:
    """The visual tokens of every row, [B, S*T, D], from batch["images"] uint8 [B, S, H, H, 3]."""
    pixels = batch["images"]
    b, slots = pixels.shape[:2]
    if slots == 0:
      return jnp.zeros((b, 0, self.config.decoder.width), self.dtype)
    visual = self.encode_images(pixels.reshape(b * slots, *pixels.shape[2:]), rng)
    return visual.reshape(b, slots * self.config.visual_tokens, -1)

  def hidden(self, batch: dict[str, jax.Array],
             rng: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
    """The decoder's final states [B, L, D] for a batch (tokens, visual_index, positions,
    segment_ids, images; S = 0 image slots is a batch of text), and the scores of its routers,
    float32 [layers, B, L, E] or None.  rng: drop path, or None."""
    x = self.place(batch["tokens"], batch["visual_index"], self.visual_tokens(batch, rng))
    return self.decoder(x, batch["positions"], batch["segment_ids"])

  def __call__(self, batch: dict[str, jax.Array], rng: jax.Array | None = None) -> jax.Array:
    """Scores float32 [B, L, V] of the token after each position; the batch as in `hidden`."""
    return self.decoder.logits(self.hidden(batch, rng)[0])
