"""OpenAI's requests for pictures: a prompt in, pictures out, without the language model."""
from __future__ import annotations

import base64
import dataclasses
import time
from typing import Any

import numpy as np

from mgjax.diffusion.painter import Painting
from mgjax.infer.studio import Studio
from mgjax.serve.drawing import FORMATS, SETTINGS, checked, data_url, encoded, read_painting
from mgjax.serve.errors import wrong
from mgjax.serve.limits import Limits
from mgjax.serve.parameters import check_model, check_names, read_json, typed

_USED = (*SETTINGS, "prompt", "model", "n", "response_format", "output_format",
         "output_compression")
# Known, but without effect here: accepted where they ask for nothing.
_NEUTRAL: dict[str, tuple] = {
    "quality": ("auto", "standard"), "style": ("vivid",), "background": ("auto", "opaque"),
    "moderation": ("auto", "low"), "stream": (False,), "partial_images": (0,)}
_LABELS = {"user": str}


@dataclasses.dataclass(frozen=True)
class Order:
  """What a body asks to be painted, and how it is sent."""

  prompt: str
  count: int
  painting: Painting
  kind: str       # one of FORMATS
  quality: int
  as_url: bool


def read_order(body: bytes, studio: Studio, limits: Limits) -> Order:
  """ApiError (4xx) naming what is wrong with it."""
  request = read_json(body)
  check_names(request, _USED, _NEUTRAL, _LABELS)
  check_model(request, studio.name)
  prompt = checked(typed(request, "prompt", str, ""), "prompt").strip()
  if not prompt:
    raise wrong("prompt is empty; say what to paint", "prompt")
  count = typed(request, "n", int, 1)
  if not 1 <= count <= limits.draw_count:
    raise wrong(f"n is {count}; this server paints 1 to {limits.draw_count} at once", "n")
  kind = _one_of(request, "output_format", FORMATS)
  quality = typed(request, "output_compression", int, 100)
  if not 0 <= quality <= 100 or (kind == "png" and quality != 100):
    raise wrong(f"output_compression is {quality}, expected 0 to 100, and 100 for a png",
                "output_compression")
  as_url = _one_of(request, "response_format", ("b64_json", "url")) == "url"
  return Order(prompt, count, read_painting(request, studio, limits), kind, quality, as_url)


def _one_of(request, name, allowed) -> str:
  value = typed(request, name, str, allowed[0])
  if value not in allowed:
    raise wrong(f"{name} is {value[:40]!r}, expected {', '.join(allowed)}", name)
  return value


def response(order: Order, studio: Studio, pictures: np.ndarray) -> dict[str, Any]:
  """The body of the answer for uint8 [N, H, W, 3]; a prompt that was cut comes back as read."""
  cut, data = studio.painter.cut(order.prompt), []
  revised = {"revised_prompt": order.prompt[:-len(cut)].strip()} if cut else {}
  for picture in pictures:
    file = encoded(picture, order.kind, order.quality)
    sent = ({"url": data_url(file, order.kind)} if order.as_url else
            {"b64_json": base64.b64encode(file).decode()})
    data.append(sent | revised)
  height, width = pictures.shape[1:3]
  return {"created": int(time.time()), "data": data, "background": "opaque",
          "output_format": order.kind, "size": f"{width}x{height}", "seed": order.painting.seed}
