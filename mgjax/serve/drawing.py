"""What a request says about the picture that it asks for, and the picture as it is sent."""
from __future__ import annotations

import base64
import dataclasses
import io
import re
import secrets
from typing import Any

import numpy as np
from PIL import Image

from mgjax.diffusion.painter import NEGATIVE, PaintError, Painting
from mgjax.infer.studio import Studio
from mgjax.serve.errors import no_painter, wrong
from mgjax.serve.limits import Limits
from mgjax.serve.parameters import check_names, typed

SETTINGS = ("size", "steps", "guidance", "seed", "negative_prompt")
FORMATS = ("png", "jpeg", "webp")
_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")


@dataclasses.dataclass(frozen=True)
class Draw:
  """How an answer is drawn.  force: its text begins with `<h>` before the model goes on."""

  painting: Painting
  force: bool


@dataclasses.dataclass(frozen=True)
class Drawn:
  """What came of an answer that was to be drawn; prompt: None if the model wrote none.

  file: the picture as a PNG; cut: the end of the prompt, which the painter does not read; error:
  why there is no picture of the prompt.
  """

  prompt: str | None
  file: bytes = b""
  cut: str = ""
  error: str | None = None

  def parts(self) -> list[dict[str, Any]]:
    """The picture as an answer has it: one part, or none."""
    if not self.file:
      return []
    return [{"type": "image_url", "index": 0, "image_url": {"url": data_url(self.file, "png")}}]

  def about(self) -> dict[str, Any]:
    """What is said besides."""
    said = {"prompt": self.prompt}
    if self.cut:
      said["cut"] = self.cut
    if self.prompt is None:
      said["note"] = "the model wrote no drawing prompt; draw.force makes it begin with one"
    return said


def read_draw(request: dict[str, Any], studio: Studio | None, limits: Limits) -> Draw | None:
  """How a request for a completion wants its answer drawn; None: not at all.

  `modalities` with "image" asks for it, as does `draw`: true, or an object of settings.  ApiError.
  """
  value, modalities = request.get("draw"), request.get("modalities") or []
  if not isinstance(value, bool | dict | None):
    raise wrong("draw must be true, false or an object of settings", "draw", "invalid_type")
  asked = "image" in modalities
  if asked and value is False:
    raise wrong('draw is false, but modalities has "image"', "draw")
  if not asked and value in (None, False):
    return None
  if studio is None:
    raise no_painter("modalities" if asked else "draw")
  settings = value if isinstance(value, dict) else {}
  check_names(settings, (*SETTINGS, "force"), {}, {}, "draw.")
  # An answer that is repeated has the same picture.
  painting = read_painting({"seed": request.get("seed")} | settings, studio, limits, "draw.")
  return Draw(painting, typed(settings, "force", bool, False, "draw."))


def read_painting(request: dict[str, Any], studio: Studio, limits: Limits,
                  at: str = "") -> Painting:
  """The settings among a request's fields.  ApiError calls them by what is `at` before the name."""
  width, height = _size(typed(request, "size", str, "auto", at), f"{at}size")
  most = limits.draw_pixels or 2 * studio.painter.side**2
  if (pixels := (width or studio.painter.side) * (height or studio.painter.side)) > most:
    raise wrong(f"{at}size is {width}x{height}, {pixels:,} pixels; this server paints at most "
                f"{most:,}", f"{at}size")
  steps = typed(request, "steps", int, min(Painting.steps, limits.draw_steps), at)
  if steps > limits.draw_steps:
    raise wrong(f"{at}steps is {steps}; this server takes at most {limits.draw_steps}",
                f"{at}steps")
  seed = typed(request, "seed", int, None, at)
  painting = Painting(
      width=width, height=height, steps=steps,
      guidance=typed(request, "guidance", float, Painting.guidance, at),
      negative=checked(typed(request, "negative_prompt", str, NEGATIVE, at),
                       f"{at}negative_prompt") or None,
      seed=secrets.randbits(32) if seed is None else seed % 2**32)
  try:
    studio.painter.check(painting)
  except PaintError as error:
    named = str(error).partition(" ")[0]
    raise wrong(f"{at}{error}", at + ("size" if named in ("width", "height") else named)) from error
  return painting


def _size(text, param) -> tuple[int | None, int | None]:
  if text == "auto":
    return None, None
  if not (found := _SIZE.fullmatch(text)):
    raise wrong(f'{param} is {text[:40]!r}, expected "1024x1024", say, or "auto"', param)
  return int(found[1]), int(found[2])


def checked(text: str, param: str) -> str:
  """The text.  ApiError if it is too long for a prompt, or holds half a character."""
  if len(text) > LONGEST:
    raise wrong(f"{param} has {len(text):,} characters, at most {LONGEST:,} are accepted", param)
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise wrong(f"{param} holds half a character ({error})", param) from error
  return text


LONGEST = 32_000  # characters of a prompt, as at OpenAI; the painter reads some hundred of them


def encoded(pixels: np.ndarray, kind: str = "png", quality: int = 100) -> bytes:
  """uint8 [H, W, 3] as a file of one of FORMATS; quality is not of a PNG."""
  file, image = io.BytesIO(), Image.fromarray(pixels)
  if kind == "png":
    image.save(file, "PNG", compress_level=4)
  else:
    image.save(file, kind.upper(), quality=quality)
  return file.getvalue()


def data_url(file: bytes, kind: str) -> str:
  """The file as a URL that holds it."""
  return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"
