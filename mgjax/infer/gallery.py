"""Painted pictures as files, and their sizes as they are typed."""
from __future__ import annotations

import argparse
import os
import pathlib
import re

import numpy as np
from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Gallery:
  """Saves pictures to a file, further ones beside it: a.png, a-2.png, a-3.png.

  A file that is there already is never written over; its number is left out.
  Raises ValueError unless it is a picture's name in a folder that exists.
  """

  def __init__(self, file: str | os.PathLike, option: str = "output"):
    self._file = file = pathlib.Path(file)
    if file.suffix.lower() not in SUFFIXES:
      raise ValueError(f"{option} {file}: expected a name that ends in {', '.join(SUFFIXES)}")
    if not file.parent.is_dir():
      raise ValueError(f"{option} {file}: there is no folder {file.parent}; make it first")
    if not os.access(file.parent, os.W_OK):
      raise ValueError(f"{option} {file}: the folder {file.parent} cannot be written")

  def save(self, pixels: np.ndarray) -> pathlib.Path:
    """Where uint8 [H, W, 3] is saved now.  OSError, naming the file."""
    path, number = self._file, 1
    while True:
      try:
        file = path.open("xb")
        break
      except FileExistsError:
        number += 1
        path = self._file.with_stem(f"{self._file.stem}-{number}")
    try:
      with file:
        kind = {".png": "PNG", ".webp": "WEBP"}.get(path.suffix.lower(), "JPEG")
        Image.fromarray(pixels).save(file, kind, quality=95)
    except BaseException:  # half a picture is none
      path.unlink()
      raise
    return path


def size(text: str) -> tuple[int, int]:
  """For argparse: (width, height) of "1024x768", or "1024" for both.

  >>> size("1024x768"), size("512")
  ((1024, 768), (512, 512))
  """
  found = re.fullmatch(r"(\d{1,6})(?:[xX×](\d{1,6}))?", text.strip())
  if not found:
    raise argparse.ArgumentTypeError(f"{text!r} is no size; write WIDTHxHEIGHT, 1024x768 say, or "
                                     "one number for both")
  return int(found[1]), int(found[2] or found[1])
