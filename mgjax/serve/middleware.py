"""What every request passes before it reaches the application."""
from __future__ import annotations

import re
from collections.abc import Collection

from fastapi import FastAPI
from starlette.datastructures import Headers

from mgjax.serve.errors import ApiError, error_response
from mgjax.serve.metrics import Metrics


class Counted:
  """Counts requests by status, but those of whoever watches."""

  def __init__(self, app, metrics: Metrics):
    self._app, self._metrics = app, metrics

  async def __call__(self, scope, receive, send):
    if scope["type"] != "http" or scope["path"] in ("/health", "/metrics"):
      return await self._app(scope, receive, send)

    async def counted(message):
      if message["type"] == "http.response.start":
        self._metrics.requests.labels(str(message["status"])).inc()
      await send(message)
    try:
      await self._app(scope, receive, counted)
    except Exception:  # what is sent then is sent further out
      self._metrics.requests.labels("500").inc()
      raise


class Addressed:
  """Refuses requests that are addressed to another host.

  A web page can give its own name an address of this machine, and so becomes a page of this server
  to the browser that shows it (DNS rebinding); what it sends still carries that name.  Only
  programs that are no browsers send none.
  """

  def __init__(self, app, hosts: Collection[str]):
    self._app, self._hosts = app, hosts

  async def __call__(self, scope, receive, send):
    if scope["type"] == "http" and (host := Headers(scope=scope).get("host")):
      if re.sub(r":\d*$", "", host).lower() not in self._hosts:
        refused = ApiError(400, f"this server is not called {host[:200]!r}; it listens to "
                                f"{', '.join(sorted(self._hosts))}", code="wrong_host")
        return await error_response(refused)(scope, receive, send)
    await self._app(scope, receive, send)


class Elsewhere:
  """Gives whatever is no path of the API to the page."""

  def __init__(self, app, page: FastAPI):
    self._app, self._page = app, page

  async def __call__(self, scope, receive, send):
    own = scope["type"] != "http" or re.fullmatch("/(v1(/.*)?|health|metrics)", scope["path"])
    await (self._app if own else self._page)(scope, receive, send)
