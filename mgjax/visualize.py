"""What patch info mining looks at: where in its window each visual token takes its detail from."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from mgjax.config import ModelConfig
from mgjax.models import images as views
from mgjax.models.convnext import concatenated_features
from mgjax.models.mini_gemini import MiniGemini

# Heat from 0 to 1: transparent, then from red through yellow to white (RGBA).
COLOURS = np.array([[160, 0, 40, 0], [220, 20, 0, 140], [255, 190, 0, 200], [255, 255, 220, 230]])


def mined_weights(model: MiniGemini, pixels: np.ndarray) -> np.ndarray:
  """How each visual token shares its attention over its own window of the high-resolution map.

  uint8 [H, H, 3] -> float32 [T, m*m], windows row-major, each row summing to 1; tokens in the order
  of `MiniGemini.encode_images`.  H as `ModelConfig.at` takes it: an HD model has standard pictures
  too.  Call it inside `mesh_context` of the model's mesh.

  Raises ValueError if the model has no mining, or for pixels of another kind.
  """
  pixels = np.asarray(pixels)
  if model.mining is None:
    raise ValueError("this model has no mining: it does not see pictures at high resolution")
  if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape != (len(pixels),) * 2 + (3,):
    raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, expected uint8 [H, H, 3]; "
                     "`data.images.load_image` makes them")
  config = model.config.at(len(pixels))
  parts = nnx.split((model.vision, model.vision_hr, model.mining))
  return np.asarray(_weights(*parts, jnp.asarray(pixels[None]), config))


@functools.partial(jax.jit, static_argnames=("graphdef", "config"))
def _weights(graphdef, params, pixels, config):
  vision, vision_hr, mining = nnx.merge(graphdef, params)
  hr = views.normalize(pixels)
  x = vision(views.low_resolution_tiles(hr, config)[0])                         # [tiles, t, D]
  maps = views.feature_tiles(concatenated_features(vision_hr(hr, None)), config)[0]
  p = mining.weights(x, maps)                                                   # [tiles, t, m*m]
  return p.reshape(config.visual_tokens, -1)


def window_map(weights: np.ndarray, config: ModelConfig) -> np.ndarray:
  """The weights where their windows lie in the picture: [T, m*m] -> [G, G], G = grid * P * m.

  In HD the grid tiles cover the picture; the global view, whose windows cover it once more and
  coarser, is left out.  config: `at` the size of the picture.
  """
  g, side = config.grid, config.vision.side
  m = round(weights.shape[-1]**0.5)
  if weights.shape != (config.visual_tokens, m * m):
    raise ValueError(f"weights have shape {weights.shape}, expected [{config.visual_tokens}, m*m]")
  tiles = weights[-(g * side)**2:].reshape(g, g, side, side, m, m)  # the global view comes first
  return tiles.transpose(0, 2, 4, 1, 3, 5).reshape(g * side * m, g * side * m)


def heat_map(pixels: np.ndarray, weights: np.ndarray, config: ModelConfig) -> Image.Image:
  """The picture in grey, and over each token's window its weights as heat, the largest hottest.

  pixels uint8 [H, H, 3]; weights [T, m*m] from `mined_weights`; config: the model's.  Thin lines
  part the windows.  In HD the global view is left out (see `window_map`).  Raises ValueError where
  the weights are not those of such a picture.
  """
  config = config.at(len(pixels))
  heat = window_map(weights / weights.max(axis=-1, keepdims=True), config)  # [G, G]
  size, extra = divmod(len(pixels), len(heat))
  if extra:
    raise ValueError(f"weights cover {len(heat)} positions a side, which do not divide the "
                     f"{len(pixels)} pixels of the picture")
  stops = np.linspace(0, 1, len(COLOURS))
  colour = np.stack([np.interp(heat, stops, channel) for channel in COLOURS.T], axis=-1)
  colour = colour.repeat(size, axis=0).repeat(size, axis=1)                  # [H, H, 4]
  alpha = colour[..., 3:] / 255
  grey = pixels.mean(axis=-1, keepdims=True)  # so that the only colour is heat
  out = grey * (1 - alpha) + colour[..., :3] * alpha
  window = len(pixels) // (config.grid * config.vision.side)
  out[::window] *= 0.7
  out[:, ::window] *= 0.7
  return Image.fromarray(out.round().astype(np.uint8))
