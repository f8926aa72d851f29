"""Photographs, signs, and the pixels of scenes and crops."""

import functools
import math
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .world import PALETTE, Sign, World

# Photographs inside the wheels of scikit-image and scikit-learn: nothing is downloaded.
TRAIN_PHOTOS = (
  "astronaut",
  "brick",
  "chelsea",
  "coins",
  "flower",
  "grass",
  "gravel",
  "hubble_deep_field",
  "immunohistochemistry",
  "moon",
  "motorcycle",
  "retina",
  "rocket",
)
HELD_OUT_PHOTOS = ("camera", "china", "coffee")

# Regular weights only: a thin stroke falls between the samples of the low-resolution view, a bold
# one does not.
FONTS = ("DejaVuSans.ttf", "DejaVuSansMono.ttf", "DejaVuSerif.ttf", "cmss10.ttf")
SUPERSAMPLE = 3  # signs are drawn at this multiple and averaged down: clean edges at any angle


@functools.cache
def photo(name: str) -> Image.Image:
  """A photograph as RGB."""
  import skimage.data
  import sklearn.datasets

  if name in ("china", "flower"):
    pixels = sklearn.datasets.load_sample_image(f"{name}.jpg")
  elif name == "motorcycle":
    pixels = skimage.data.stereo_motorcycle()[0]
  else:
    pixels = getattr(skimage.data, name)()
  return Image.fromarray(pixels).convert("RGB")


def background(rng, names, size: int, of: int) -> np.ndarray:
  """A random crop of one of the photographs, flipped and re-lit; float32 [size, size, 3].

  `of` is the side of the scene that the piece belongs to: it sets the scale.
  """
  source = photo(names[rng.integers(len(names))])
  # Never enlarged, so that the background keeps real high-resolution detail.
  side = rng.uniform(of, min(3 * of, *source.size)) * size / of
  left = rng.uniform(0, source.width - side)
  top = rng.uniform(0, source.height - side)
  box = (left, top, left + side, top + side)
  pixels = np.asarray(source.resize((size, size), Image.Resampling.BILINEAR, box), np.float32)
  if rng.random() < 0.5:
    pixels = pixels[:, ::-1]
  return pixels * (rng.uniform(0.6, 1.15) * rng.uniform(0.92, 1.08, 3)).astype(np.float32)


@functools.cache
def glyph_mask(font: str, char: str, height: int) -> Image.Image:
  """A character as an 8-bit mask, cut to its ink; `height` is that of the font's digit zero."""
  import matplotlib

  path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", font)
  probe = ImageFont.truetype(path, 200).getbbox("0")
  drawn = ImageFont.truetype(path, 200 * height / (probe[3] - probe[1]))
  left, top, right, bottom = drawn.getbbox(char)
  if right <= left or bottom <= top:
    raise ValueError(f"character {char!r} has no ink in {font}; take it out of World.characters")
  # Two pixels of margin: the bilinear sampling below must find zeros at the rim.
  mask = Image.new("L", (math.ceil(right - left) + 4, math.ceil(bottom - top) + 4))
  ImageDraw.Draw(mask).text((2 - left, 2 - top), char, 255, drawn)
  return mask


@functools.cache
def plate_mask(width: int, height: int, radius: int) -> Image.Image:
  """A filled rounded rectangle with a margin of two pixels."""
  mask = Image.new("L", (width + 4, height + 4))
  ImageDraw.Draw(mask).rounded_rectangle((2, 2, width + 1, height + 1), radius, 255)
  return mask


def place(mask: Image.Image, size: int, x: float, y: float, angle: float) -> np.ndarray:
  """`mask` turned by `angle`, its middle at (x, y) of a square; float32 [size, size], 0..1."""
  c, s = math.cos(angle), math.sin(angle)
  S = SUPERSAMPLE
  x, y = x * S, y * S
  w, h = mask.size
  # Image.transform wants the way back, from the output's pixels to the mask's.
  back = (c, s, w / 2 - c * x - s * y, -s, c, h / 2 + s * x - c * y)
  big = mask.transform((size * S,) * 2, Image.Transform.AFFINE, back, Image.Resampling.BILINEAR)
  return np.asarray(big.reduce(S), np.float32) / 255


def draw_sign(world: World, pixels: np.ndarray, colour: str, char: str, rng, nearness=1.0) -> None:
  """Draws one sign into a cell, in place; pixels float32 [cell, cell, 3].

  The sign fits wholly; one that is seen from nearer may lose its rim.
  """
  cell, S = world.cell, SUPERSAMPLE
  glyph = world.glyph * nearness * rng.uniform(0.93, 1.07)
  height = glyph * rng.uniform(1.6, 1.8)
  width = glyph * rng.uniform(1.5, 1.9)
  angle = math.radians(rng.uniform(-12, 12))
  reach_x = (width * math.cos(angle) + height * abs(math.sin(angle))) / 2 + 0.5
  reach_y = (height * math.cos(angle) + width * abs(math.sin(angle))) / 2 + 0.5
  x = rng.uniform(min(reach_x, cell / 2), max(cell - reach_x, cell / 2))
  y = rng.uniform(min(reach_y, cell / 2), max(cell - reach_y, cell / 2))
  light = rng.uniform(0.75, 1.05)
  plate, ink = (np.asarray(c) * light + rng.uniform(-12, 12, 3) for c in PALETTE[colour])

  def paint(mask, value):
    pixels[:] += mask[..., None] * (value.astype(np.float32) - pixels)

  # The rim is of the ink's colour, so that a plate stands out from a like-coloured background.
  outer = round(width * S), round(height * S)
  inner = outer[0] - 2 * S, outer[1] - 2 * S
  radius = round(rng.uniform(0.5, 4) * S)
  alike = np.abs(pixels.mean((0, 1)) - plate).max() < 90
  if alike or rng.random() < 0.5:
    paint(place(plate_mask(*outer, radius), cell, x, y, angle), ink)
    paint(place(plate_mask(*inner, max(radius - S, 0)), cell, x, y, angle), plate)
  else:
    paint(place(plate_mask(*outer, radius), cell, x, y, angle), plate)
  mask = glyph_mask(FONTS[rng.integers(len(FONTS))], char, round(glyph * S))
  slack = 0.08 * glyph
  x, y = x + rng.uniform(-slack, slack), y + rng.uniform(-slack, slack)
  paint(place(mask, cell, x, y, angle), ink)


@functools.cache
def noise_sheet() -> np.ndarray:
  """Noise to cut pieces from: drawing it anew for each picture would take most of the time."""
  return np.random.default_rng(0).standard_normal((640, 640, 3), np.float32)


def to_uint8(world: World, pixels: np.ndarray, rng) -> np.ndarray:
  """Adds sensor noise and rounds; uint8, same shape."""
  sheet = noise_sheet()
  row, column = rng.integers(sheet.shape[0] - pixels.shape[0], size=2)
  noise = sheet[row : row + pixels.shape[0], column : column + pixels.shape[1]]
  return np.clip(pixels + world.noise * noise + 0.5, 0, 255).astype(np.uint8)


def render_scene(world: World, signs: tuple[Sign, ...], photos, rng) -> np.ndarray:
  """A photograph with signs; uint8 [hr, hr, 3]."""
  pixels = background(rng, photos, world.hr, world.hr)
  for s in signs:
    row, column = divmod(s.cell, world.grid)
    row, column = row * world.cell, column * world.cell
    window = pixels[row : row + world.cell, column : column + world.cell]
    draw_sign(world, window, s.colour, s.char, rng)
  return to_uint8(world, pixels, rng)


def render_crop(world: World, pair: tuple[str, str] | None, photos, rng,
                nearness=1.0) -> np.ndarray:
  """One cell as it is cut from a scene, with one sign or none; uint8 [cell, cell, 3]."""
  pixels = background(rng, photos, world.cell, world.hr)
  if pair:
    draw_sign(world, pixels, *pair, rng, nearness)
  return to_uint8(world, pixels, rng)


def low_resolution(world: World, pixels: np.ndarray) -> np.ndarray:
  """What the low-resolution tower sees: bilinear, not antialiased; float32 [lr, lr, 3].

  The same arithmetic as on the device (half-pixel centres, no widened kernel), for pictures and
  measurements on the host.
  """
  scale = pixels.shape[0] / world.lr
  at = (np.arange(world.lr) + 0.5) * scale - 0.5
  low = np.clip(np.floor(at).astype(int), 0, pixels.shape[0] - 1)
  high = np.minimum(low + 1, pixels.shape[0] - 1)
  t = np.clip(at - low, 0, 1).astype(np.float32)
  rows = pixels[low] * (1 - t)[:, None, None] + pixels[high] * t[:, None, None]
  return rows[:, low] * (1 - t)[:, None] + rows[:, high] * t[:, None]
