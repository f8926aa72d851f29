"""What stands between the page and those who are not its user."""
from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

# Whatever an answer says, nothing is loaded from another host, or sent there; nobody frames us.
_POLICY = "; ".join((
    "default-src 'self'", "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
    "style-src 'self' 'unsafe-inline'", "img-src 'self' data: blob:", "font-src 'self' data:",
    "media-src 'self' data: blob:", "connect-src 'self' data: blob:", "worker-src 'self' blob:",
    "object-src 'none'", "base-uri 'self'", "form-action 'self'", "frame-ancestors 'none'"))
_HEADERS = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer"}


class Guarded:
  """Refuses bodies that are too long and what pages of other sites send; names what ours may load.

  Args:
    longest: bytes of a body.
  """

  def __init__(self, app, longest: int):
    self._app, self._longest = app, longest

  async def __call__(self, scope, receive, send):
    if scope["type"] != "http":
      return await self._app(scope, receive, send)
    if refused := self._refusal(scope):
      return await refused(scope, receive, send)

    async def guarded(message):
      if message["type"] == "http.response.start":
        MutableHeaders(scope=message).update(_HEADERS)
      await send(message)
    await self._app(scope, receive, guarded)

  def _refusal(self, scope) -> PlainTextResponse | None:
    if scope["method"] in ("GET", "HEAD"):
      return None
    headers = Headers(scope=scope)
    # Browsers say where a request comes from; forms can be sent anywhere, unasked.
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
      return PlainTextResponse("sent by a page of another site", 403)
    length = headers.get("content-length")
    if length is None:
      return PlainTextResponse("a body needs a content-length", 411)
    if int(length) > self._longest:
      return PlainTextResponse(f"more than {self._longest:,} bytes at once", 413)
    return None
