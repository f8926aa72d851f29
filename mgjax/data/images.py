"""Pictures: found, checked and opened safely, and brought to the one square the device gets."""
from __future__ import annotations

import contextlib
import io
import os
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image

Picture = bytes | np.ndarray  # a picture's file in memory, or uint8 [H, W, 3]
PAD_COLOUR = (122, 116, 104)  # int(mean * 255) of CLIP
MAX_PIXELS = 89_478_485       # Pillow's own warning level: 256 MiB of RGB
MAX_SIDE = 32_768
ASPECTS = ("pad", "square")
# Formats that Pillow reads by itself: none of them starts another program.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
# What Pillow's decoders raise on bad bytes.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, MemoryError, IndexError, TypeError,
                   Image.DecompressionBombError)


class ImageError(Exception):
  """A picture that cannot be used: `kind` is missing_image, broken_image, oversized_image or
  path_escape."""

  def __init__(self, kind: str, message: str):
    super().__init__(kind, message)
    self.kind, self.message = kind, message

  def __str__(self) -> str:
    return self.message


def resolve_image(root: str | os.PathLike, relative: str,
                  real: Callable[[str], str] = os.path.realpath) -> pathlib.Path:
  """The file that a sample's `image` means, always below `root`.

  Absolute paths, `..` and links that lead out of `root` are refused.  Two habits of the released
  data are followed (R3.1): a missing OCR picture is looked for as .png, and both Visual Genome
  folders are one folder `images`.  `real` gives the real path of a folder: for many pictures, one
  that remembers.  Raises ImageError (path_escape, missing_image).
  """
  parts = pathlib.PurePath(relative)
  plain = relative.isprintable() and not parts.is_absolute() and ".." not in parts.parts
  if not relative or not plain:
    raise ImageError("path_escape", f"image path {relative!r} is not a plain path below the image "
                                    "folder; write it relative to the folder, without '..'")
  base = real(os.fspath(root))
  names = dict.fromkeys((relative, _alias(relative)))
  for name in names:
    folder, last = os.path.split(os.path.join(base, name))
    path = os.path.join(real(folder), last)
    if os.path.islink(path):
      path = os.path.realpath(path)
    if os.path.commonpath((base, path)) != base:
      raise ImageError("path_escape", f"image {name!r} leads out of the image folder {base} (to "
                                      f"{path}); copy the file into the folder")
    if os.path.isfile(path):
      return pathlib.Path(path)
  also = "".join(f", nor is {name!r}" for name in list(names)[1:])
  raise ImageError("missing_image", f"image {relative!r} is not in {base}{also}; fetch it, or set "
                                    "image_root to the folder that holds it")


def _alias(relative: str) -> str:
  """Where the released data may keep that picture instead."""
  if "ocr" in relative:
    return relative.replace(".jpg", ".png")
  return relative.replace("VG_100K_2", "images").replace("VG_100K", "images")


def check_header(source: str | os.PathLike | Picture, aspect: str = "pad", size: int = 0,
                 name: str = "") -> tuple[int, int]:
  """(width, height) read from the header alone.

  Raises ImageError: broken_image for an empty file and for what is no picture, oversized_image for
  sizes that would not fit in memory once decoded.
  """
  with open_image(source, aspect, size, name) as image:
    return image.size


def check_pixels(source: str | os.PathLike | Picture, aspect: str = "pad", size: int = 0,
                 name: str = "") -> None:
  """Decodes a picture whole.  Raises what `load_image` would."""
  with open_image(source, aspect, size, name) as image, _decoding(source, name):
    image.convert("RGB")


def load_image(source: str | os.PathLike | Picture, size: int, aspect: str,
               name: str = "") -> np.ndarray:
  """A picture as uint8 [size, size, 3]: see `square_pixels`.

  source: a path, or a Picture, which errors call `name`.
  Raises ImageError (broken_image, oversized_image) naming the file and the reason.
  """
  with open_image(source, aspect, size, name) as image, _decoding(source, name):
    return square_pixels(image, size, aspect)


@contextlib.contextmanager
def _decoding(source, name):
  try:
    yield
  except DECODING_ERRORS as error:
    raise ImageError("broken_image", f"{_name(source, name)}: cannot be decoded ({error}); fetch "
                                     "the file again or remove the sample") from error


def _name(source, name) -> str:
  return name or ("picture" if isinstance(source, Picture) else str(source))


def open_image(source: str | os.PathLike | Picture, aspect: str = "pad", size: int = 0,
               name: str = "") -> Image.Image:
  """A picture whose header has been read and found harmless; raises as `check_header`."""
  name = _name(source, name)
  try:
    if isinstance(source, np.ndarray):
      image = Image.fromarray(source.squeeze())  # TFDS gives grey pictures as [H, W, 1]
    else:
      if not (len(source) if isinstance(source, bytes) else os.path.getsize(source)):
        raise ImageError("broken_image", f"{name}: the file is empty; fetch it again")
      image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source,
                         formats=FORMATS)
  except FileNotFoundError as error:
    raise ImageError("missing_image", f"{name}: no such file") from error
  except Image.UnidentifiedImageError as error:
    raise ImageError("broken_image", f"{name}: not a picture that can be read; expected one of "
                                     f"{', '.join(FORMATS)}") from error
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise ImageError("oversized_image", f"{name}: {error}; at most {MAX_PIXELS:,} pixels are "
                                        "decoded; shrink the file") from error
  except DECODING_ERRORS as error:
    raise ImageError("broken_image", f"{name}: cannot be opened ({error})") from error
  width, height = image.size
  resized = size * size * max(width, height) // min(width, height) if aspect == "square" else 0
  if max(width * height, resized) > MAX_PIXELS or max(width, height) > MAX_SIDE:
    image.close()
    then = f" ({resized:,} resized to cover a square; aspect 'pad' needs less)" if resized else ""
    raise ImageError("oversized_image", f"{name}: {width} x {height} pixels{then}; at most "
                                        f"{MAX_PIXELS:,} pixels and {MAX_SIDE:,} a side are "
                                        "decoded; shrink the file")
  return image


def square_pixels(image: Image.Image, size: int, aspect: str) -> np.ndarray:
  """A picture as uint8 [size, size, 3], as the original brings it to high resolution (R3.1).

  Alpha is dropped, not blended, and EXIF rotation is not applied.  'pad' centres the picture on a
  square of the mean colour; 'square' makes the shorter side `size` and cuts the middle out.
  Resizing is Pillow's bicubic on 8-bit values.
  """
  if aspect not in ASPECTS:
    raise ValueError(f"aspect is {aspect!r}, expected one of {', '.join(ASPECTS)}")
  image = image.convert("RGB")
  width, height = image.size
  if aspect == "pad":
    return _pad_and_resize(image, size)
  short, long = size, int(size * max(width, height) / min(width, height))
  new = (short, long) if width <= height else (long, short)
  image = image.resize(new, Image.Resampling.BICUBIC)
  left, top = (new[0] - size) // 2, (new[1] - size) // 2
  return np.asarray(image.crop((left, top, left + size, top + size)))


def _pad_and_resize(image: Image.Image, size: int) -> np.ndarray:
  # Pillow resizes rows first, columns after.  Rows of padding stay what they are, so that a wide
  # picture is padded between the two passes: same bits, and neither memory nor time for the bars.
  width, height = image.size
  if width >= height:
    image = image.resize((size, height), Image.Resampling.BICUBIC)  # columns untouched
    canvas = Image.new("RGB", (size, width), PAD_COLOUR)
    canvas.paste(image, (0, (width - height) // 2))
  else:
    canvas = Image.new("RGB", (size, height))
    strip = max(1, MAX_PIXELS // (16 * height))  # rows at a time, so that the bars stay small
    for top in range(0, height, strip):
      rows = min(strip, height - top)
      bars = Image.new("RGB", (height, rows), PAD_COLOUR)
      bars.paste(image.crop((0, top, width, top + rows)), ((height - width) // 2, 0))
      canvas.paste(bars.resize((size, rows), Image.Resampling.BICUBIC), (0, top))
  return np.asarray(canvas.resize((size, size), Image.Resampling.BICUBIC))
