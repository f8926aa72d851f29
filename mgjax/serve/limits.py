"""What a request may take, checked before it is taken."""
from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
from collections.abc import Iterator

from fastapi import Request

from mgjax.serve.errors import ApiError, busy


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one request may take, and all together."""

  queue: int = 256                 # requests that wait for a row
  body: int = 20 << 20             # bytes
  body_seconds: float = 30.0       # from the headers to the end of the body
  images: int = 8                  # of a request, all messages together
  picture: int = 16 << 20          # bytes of a picture's file
  new_tokens: int | None = None    # longest answer; None: what the context leaves
  held: int = 1 << 30              # bytes of bodies and pixels of all requests that wait
  image_hosts: frozenset[str] = frozenset()  # "host" or "host:port" that pictures may come from
  fetch_seconds: float = 10.0      # for one picture
  draw_queue: int = 16             # pictures that wait to be painted
  draw_count: int = 4              # pictures of one request
  draw_steps: int = 100            # of the sampler
  draw_pixels: int | None = None   # of one picture; None: twice those that the painter learnt


class Memory:
  """Counts the bytes that waiting requests hold.  For one thread."""

  def __init__(self, limit: int):
    self.held, self._limit = 0, limit

  @contextlib.contextmanager
  def share(self) -> Iterator[Share]:
    """A share for one request, given back at the end."""
    share = Share(self)
    try:
      yield share
    finally:
      share.set(0)

  def change(self, by: int) -> None:
    """ApiError (429) if that is more than all may hold."""
    if by > 0 and self.held + by > self._limit:
      raise busy(f"waiting requests hold {self.held:,} bytes, and no more than {self._limit:,} "
                 "fit; try again")
    self.held += by


@dataclasses.dataclass(eq=False)
class Share:
  """What one request holds of it."""

  memory: Memory
  size: int = 0

  def set(self, size: int) -> None:
    """ApiError (429) if there is no room; nothing has changed then."""
    self.memory.change(size - self.size)
    self.size = size


async def read_body(request: Request, limits: Limits, share: Share) -> bytes:
  """The body, which `share` then holds.

  ApiError: 415 unless it is JSON, 413 if it is too long (by its header, or while it comes), 408 if
  it comes too slowly, 429 if all bodies together are too many.  ClientDisconnect if the client has
  left.
  """
  # Browsers ask before they send this type to another site, so no web page can send it unasked.
  kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
  if kind != "application/json":
    raise ApiError(415, f"the content type is {kind!r}, expected application/json", code="not_json")
  if int(request.headers.get("content-length", "0")) > limits.body:
    raise too_long(limits)
  body = bytearray()
  try:
    async with asyncio.timeout(limits.body_seconds):
      async for chunk in request.stream():
        if len(body) + len(chunk) > limits.body:
          raise too_long(limits)
        share.set(len(body) + len(chunk))
        body += chunk
  except TimeoutError:
    raise ApiError(408, f"the body did not come within {limits.body_seconds:g} s",
                   code="body_too_slow", headers={"connection": "close"}) from None
  return bytes(body)


def too_long(limits: Limits) -> ApiError:
  """What is said to a body that is longer than the limits allow."""
  return ApiError(413, f"the body is longer than {limits.body:,} bytes; send smaller pictures, or "
                       "fewer", code="body_too_large")


def is_key(given: bytes, key: str) -> bool:
  """Whether that is the key; comparing takes the same time wherever they differ."""
  return hmac.compare_digest(given, key.encode())
