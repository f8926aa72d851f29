"""Words read in a picture, given to the model as a hint beside the question (R5.1)."""
from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import numpy as np
from PIL import ImageOps

from mgjax.config import ConfigError
from mgjax.data.images import check_pixels, open_image

LEAST_CONFIDENCE = 0.1


@functools.cache
def reader():
  """What finds and reads the lines: PP-OCR on the CPU, its weights within the package.

  Raises ConfigError without the extra `ocr`.
  """
  try:
    from rapidocr_onnxruntime import RapidOCR
  except ImportError as error:
    raise ConfigError(f"the rapidocr-onnxruntime package is missing ({error}): pip install -e "
                      "'.[ocr]'") from error
  return RapidOCR(text_score=0.0)  # `read_text` chooses


def read_text(picture: str | os.PathLike) -> list[str]:
  """The lines in a picture (turned as its EXIF says), from top to bottom; often none.

  Raises ConfigError without the extra `ocr`, ImageError naming the file.
  """
  read = reader()
  check_pixels(picture)
  with open_image(picture) as image:
    rgb = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
  found, _ = read(np.ascontiguousarray(rgb[..., ::-1]))  # OpenCV's order of colours
  return [text for _, text, confidence in found or () if float(confidence) > LEAST_CONFIDENCE]


def hint(texts: Sequence[str]) -> str:
  """What is written behind a question; nothing where nothing was read.

  >>> hint(["EXIT 42", "Open daily"]), hint([])
  ('\\nReference OCR Token: EXIT 42, Open daily\\n', '')
  """
  return f"\nReference OCR Token: {', '.join(texts)}\n" if texts else ""
