"""The weights against plain numpy, and each of them over the part of the picture that it is for."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mgjax import trees
from mgjax.models import images as views
from mgjax.models.convnext import concatenated_features
from mgjax.models.mini_gemini import MiniGemini
from mgjax.presets import find
from mgjax.sharding import make_mesh, mesh_context
from mgjax.visualize import heat_map, mined_weights, window_map

pytestmark = pytest.mark.usefixtures("highest_precision")

SIZES = [("tiny", 128), ("tiny-hd", 256), ("tiny-hd", 128)]  # a preset, and a picture for it


@pytest.fixture(scope="module")
def make():
  """`make(name)`: a model of that preset whose every parameter matters, inside its mesh."""
  with mesh_context(make_mesh(devices=jax.devices()[:1])):
    @functools.cache
    def make(name):
      graphdef, state = nnx.split(nnx.eval_shape(
          lambda: MiniGemini(find(name).model, dtype=jnp.float32, rngs=nnx.Rngs(0))))
      rng = np.random.default_rng(1)
      fill = lambda x: 2 * rng.normal(size=x.shape) * x.shape[-1]**-0.5 + (len(x.shape) == 1)
      return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(fill(x), x.dtype), state))
    yield make


def picture(side):
  return np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)


def place(config, m, row, column):
  """Token and candidate over a position of the map, as in R1.5 and R1.6: tile by tile, the global
  view first."""
  side = config.vision.side
  extent = side * m  # of a tile
  tile = row // extent * config.grid + column // extent + config.global_view
  row, column = row % extent, column % extent
  return tile * side**2 + row // m * side + column // m, row % m * m + column % m


def by_numpy(model, pixels):
  """[G, G]: the weight of each position of the map, from the parameters and the two towers."""
  config = model.config.at(len(pixels))
  hr = views.normalize(jnp.asarray(pixels[None]))
  tokens = np.asarray(model.vision(views.low_resolution_tiles(hr, config)[0]))
  tokens = tokens.reshape(-1, tokens.shape[-1])              # [T, D]
  a = np.asarray(concatenated_features(model.vision_hr(hr)))[0]  # [G, G, C]
  params = trees.flatten(trees.pure(nnx.state(model.mining)))

  def project(name, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * params[f"{name}/norm/scale"] + params[f"{name}/norm/bias"]
    return x @ params[f"{name}/dense/kernel"] + params[f"{name}/dense/bias"]

  q, k = project("query", tokens), project("key", a)
  m = len(a) // (config.grid * config.vision.side)
  out = np.zeros(a.shape[:2])
  for top in range(0, len(a), m):
    for left in range(0, len(a), m):
      window = np.s_[top:top + m, left:left + m]
      e = np.exp(k[window] @ q[place(config, m, top, left)[0]] / np.sqrt(q.shape[-1]))
      out[window] = e / e.sum()
  return out


@pytest.mark.parametrize("name, side", SIZES)
def test_weights_are_those_of_plain_numpy(make, name, side):
  model, pixels = make(name), picture(side)
  config = model.config.at(side)
  weights = mined_weights(model, pixels)
  assert weights.shape == (config.visual_tokens, 64)
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
  assert weights.max() > 0.1  # else nearly anything would agree
  np.testing.assert_allclose(window_map(weights, config), by_numpy(model, pixels), atol=2e-5)


@pytest.mark.parametrize("name, side", SIZES)
def test_what_is_mined_is_made_with_these_weights(make, name, side):
  model, pixels = make(name), picture(side)
  config = model.config.at(side)
  hr = views.normalize(jnp.asarray(pixels[None]))
  x = model.vision(views.low_resolution_tiles(hr, config)[0])
  features = views.feature_tiles(concatenated_features(model.vision_hr(hr)), config)[0]
  p, m = config.vision.side, 8
  windows = features.reshape(-1, p, m, p, m, features.shape[-1]).swapaxes(2, 3)
  values = model.mining.value(windows.reshape(config.visual_tokens, m * m, -1))
  mined = jnp.einsum("tj,tjd->td", mined_weights(model, pixels), values)
  want = model.mining(x, [features]).reshape(config.visual_tokens, -1)
  np.testing.assert_allclose(mined, want, atol=1e-4 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("name, side", SIZES)
def test_windows_lie_where_their_tokens_look(name, side):
  config = find(name).model.at(side)
  weights = np.arange(config.visual_tokens * 4).reshape(-1, 4)
  found = window_map(weights, config)
  wanted = [[weights[place(config, 2, r, c)] for c in range(len(found))] for r in range(len(found))]
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name, side", SIZES)
def test_heat_is_over_the_place_that_is_attended_to(name, side):
  config = find(name).model
  pixels = np.full((side, side, 3), 90, np.uint8)
  at = config.at(side)
  m, g = 8, at.grid * at.vision.side * 8
  weights = np.zeros((at.visual_tokens, m * m), np.float32)
  weights[:, 9] = 1e-3  # every other window: its second row and column
  token, candidate = place(at, m, g - 3, 5)
  weights[token] = 1e-9
  weights[token, candidate] = 0.7
  heat = np.asarray(heat_map(pixels, weights, config))
  assert heat.shape == pixels.shape
  coloured = (heat.max(-1).astype(int) - heat.min(-1)) > 20
  size = side // g
  wanted = np.zeros((g, g), bool)
  wanted[1::m, 1::m] = True
  wanted[-7, 1] = False
  wanted[g - 3, 5] = True
  np.testing.assert_array_equal(coloured, wanted.repeat(size, 0).repeat(size, 1))


def test_what_cannot_be_shown_is_refused(make):
  model, pixels = make("tiny"), picture(128)
  config = model.config
  alone = MiniGemini(dataclasses.replace(config, vision_hr=None), dtype=jnp.float32,
                     rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="has no mining"):
    mined_weights(alone, pixels)
  with pytest.raises(ValueError, match=r"float64 \(128, 128, 3\), expected uint8"):
    mined_weights(model, pixels / 2)
  with pytest.raises(ValueError, match=r"uint8 \(64, 128, 3\), expected"):
    mined_weights(model, pixels[:64])
  with pytest.raises(ValueError, match="hr_size 100 cannot be cut"):
    mined_weights(model, pixels[:100, :100])
  with pytest.raises(ValueError, match=r"shape \(80, 64\), expected \[16, m\*m\]"):
    heat_map(pixels, np.ones((80, 64)), config)
  with pytest.raises(ValueError, match="cover 12 positions a side, which do not divide the 128"):
    heat_map(pixels, np.ones((16, 9)), config)
