"""Pictures of a request: out of a `data:` URL, or from a host that was allowed."""
from __future__ import annotations

import base64
import binascii
import re

import numpy as np

from mgjax.data.images import ImageError
from mgjax.infer.assistant import Assistant
from mgjax.serve.errors import wrong
from mgjax.serve.fetch import FetchError, fetch
from mgjax.serve.limits import Limits
from mgjax.serve.messages import ImageRef

_DATA = re.compile(r"data:[\w.+/-]{0,100};base64,", re.IGNORECASE)


def is_remote(ref: ImageRef) -> bool:
  """Whether it has to be fetched."""
  return ref.url[:8].lower().startswith(("http://", "https://"))


def fetched(ref: ImageRef, limits: Limits) -> bytes:
  """The file behind a remote picture.  ApiError."""
  try:
    return fetch(ref.url, limits.image_hosts, limits.picture, limits.fetch_seconds)
  except FetchError as error:
    raise wrong(f"{ref.param}: {error}", ref.param, "image_not_fetched") from error


def check_url(ref: ImageRef, limits: Limits) -> None:
  """ApiError unless it is a `data:` URL that is not too long, or remote."""
  if is_remote(ref):
    return
  if not (head := _DATA.match(ref.url)):
    raise wrong(f"{ref.param}: {ref.url[:40]!r} is not a picture that can be had; send it as "
                "data:image/...;base64,...", ref.param, "invalid_image_url")
  if (size := (len(ref.url) - head.end()) // 4 * 3) > limits.picture:
    raise wrong(f"{ref.param}: the picture has {size:,} bytes, at most {limits.picture:,} are "
                "accepted", ref.param, "image_too_large")


def decoded(assistant: Assistant, ref: ImageRef, file: bytes | None) -> np.ndarray:
  """Its pixels as the model takes them; `file` of a remote one.  ApiError.

  The sizes in the header are checked before anything is decoded.
  """
  try:
    if file is None:
      file = base64.b64decode(ref.url[_DATA.match(ref.url).end():], validate=True)
    return assistant.pixels(file, hd=ref.hd)
  except (binascii.Error, ValueError) as error:
    raise wrong(f"{ref.param}: not base64 ({str(error)[:200]})", ref.param,
                "invalid_base64") from error
  except ImageError as error:
    raise wrong(f"{ref.param}: {error}", ref.param, error.kind) from error
