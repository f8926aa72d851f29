"""From the one uint8 picture that the host sends to the views that the towers see (R3.1)."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mgjax.config import ModelConfig

# One normalisation for both towers: the statistics of CLIP's training images.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def normalize(pixels: jax.Array) -> jax.Array:
  """uint8 [N, H, W, 3] -> float32, rescaled by 1/255 and standardised per channel."""
  return (pixels.astype(jnp.float32) * np.float32(1 / 255) - MEAN) / STD


def resize_bilinear(x: jax.Array, height: int, width: int) -> jax.Array:
  """[N, H, W, C] -> [N, height, width, C] in float32: two taps, half-pixel centres, edges
  clamped, no antialiasing (torch's `interpolate(mode="bilinear", align_corners=False)`)."""
  shape = (x.shape[0], height, width, x.shape[-1])
  return jax.image.resize(x.astype(jnp.float32), shape, "linear", antialias=False)


def low_resolution_tiles(hr: jax.Array, config: ModelConfig) -> jax.Array:
  """The crops that CLIP sees, from the normalised picture.

  hr [N, H, H, 3] -> [N, tiles, s, s, 3]: the view shrunk to grid*s, cut row-major; with
  `global_view` the whole view shrunk once more to s comes first.
  (The original appends it and moves it to the front after mining: the token order is the same.)
  """
  s, g = config.vision.image_size, config.grid
  view = resize_bilinear(hr, config.lr_size, config.lr_size)
  tiles = view.reshape(-1, g, s, g, s, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, g * g, s, s, 3)
  if not config.global_view:
    return tiles
  return jnp.concatenate([resize_bilinear(view, s, s)[:, None], tiles], axis=1)


def feature_tiles(features: jax.Array, config: ModelConfig) -> jax.Array:
  """The high-resolution map of each tile of `low_resolution_tiles`, in the same order.

  features [N, H, H, C] -> [N, tiles, H/grid, H/grid, C].  The global tile sees the map shrunk by
  `grid` (float32, cast back), a grid tile its own part at full detail.
  """
  g = config.grid
  n, h, _, c = features.shape
  side = h // g
  tiles = features.reshape(n, g, side, g, side, c).transpose(0, 1, 3, 2, 4, 5)
  tiles = tiles.reshape(n, g * g, side, side, c)
  if not config.global_view:
    return tiles
  whole = resize_bilinear(features, side, side).astype(features.dtype)
  return jnp.concatenate([whole[:, None], tiles], axis=1)


def split_views(x: jax.Array, config: ModelConfig) -> tuple[jax.Array | None, jax.Array]:
  """Tokens of `low_resolution_tiles` as those of two pictures: the global view (None without), and
  the tiles put together, which is how the maps of the high resolution lie.

  [N*tiles, P*P, D] -> [N, P*P, D] or None, [N, (grid*P)^2, D].
  """
  g, p, d = config.grid, config.vision.side, x.shape[-1]
  if g == 1:
    return None, x
  x = x.reshape(-1, config.tiles, p * p, d)
  tiles = x[:, config.tiles - g * g:].reshape(-1, g, g, p, p, d).transpose(0, 1, 3, 2, 4, 5)
  return x[:, 0] if config.global_view else None, tiles.reshape(-1, (g * p)**2, d)


def join_views(whole: jax.Array | None, tiles: jax.Array, config: ModelConfig) -> jax.Array:
  """The inverse of `split_views`."""
  g, p, d = config.grid, config.vision.side, tiles.shape[-1]
  if g == 1:
    return tiles
  tiles = tiles.reshape(-1, g, p, g, p, d).transpose(0, 1, 3, 2, 4, 5).reshape(-1, g * g, p * p, d)
  x = tiles if whole is None else jnp.concatenate([whole[:, None], tiles], axis=1)
  return x.reshape(-1, p * p, d)


def shrunk_maps(maps: list[jax.Array], grid: int) -> list[jax.Array]:
  """Maps whose `concatenated_features` are those of `maps` shrunk by `grid`, as the global view
  sees them.

  What is upsampled more than `grid` times is straight between two neighbours of the finest grid
  that are brought together: upsampled the less, it is the same.
  """
  fine = maps[0].shape[1]
  side = fine // grid

  def shrunk(m):
    if fine // m.shape[1] > grid and grid == 2:
      return m
    m = resize_bilinear(m, fine, fine).astype(m.dtype)
    return resize_bilinear(m, side, side).astype(m.dtype)
  return [shrunk(m) for m in maps]
