"""Runs the application on a port."""
from __future__ import annotations

import asyncio
import socket

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from mgjax.serve.errors import ApiError, error_response

SHUTDOWN_SECONDS = 10  # for answers that still grow when the server is told to stop
GRACE_SECONDS = 5.0    # more than the application gives a body, so that it can say so itself


def listen(host: str, port: int) -> socket.socket:
  """A socket that listens; port 0 takes a free one.  OSError naming the address."""
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    sock = socket.socket(family, kind, protocol)
    try:
      sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      sock.bind(address)
      # At once, though the model is not there yet: a second server must fail now, not in minutes.
      sock.listen(2048)
    except OSError:
      sock.close()
      raise
  except OSError as error:
    raise OSError(f"cannot listen on {host} port {port}: {error.strerror}") from error
  return sock


def make_server(app: FastAPI, body_seconds: float) -> uvicorn.Server:
  """A server whose clients have to send their requests in time."""
  return _Server(uvicorn.Config(
      app, http=_protocol(body_seconds + GRACE_SECONDS), ws="none", lifespan="on",
      log_level="warning", access_log=False, server_header=False, proxy_headers=False,
      timeout_graceful_shutdown=SHUTDOWN_SECONDS))


class _Server(uvicorn.Server):
  """Lets answers end when it is told to stop, but not what would go on as long as a window is open.
  """

  async def shutdown(self, sockets=None):
    self.config.app.state.end_streams()
    await super().shutdown(sockets)


def _protocol(seconds: float) -> type[H11Protocol]:
  """HTTP that closes a connection whose request, headers included, takes longer to come.

  uvicorn itself would wait for ever for the end of a header, and for that of a body that nobody
  reads any more.
  """
  class Impatient(H11Protocol):
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport):
      super().connection_made(transport)
      self._watch(waits=True)

    def data_received(self, data):
      super().data_received(data)
      begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
      self._watch(waits=begun or self.conn.their_state is h11.SEND_BODY)

    def connection_lost(self, exc):
      self._watch(waits=False)
      super().connection_lost(exc)

    def send_400_response(self, msg):
      response = error_response(ApiError(400, msg, code="invalid_http"))
      headers = [*response.raw_headers, (b"connection", b"close")]
      for event in (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                    h11.Data(data=response.body), h11.EndOfMessage()):
        self.transport.write(self.conn.send(event))
      self.transport.close()

    def _watch(self, waits):
      if not waits and self._deadline:
        self._deadline.cancel()
        self._deadline = None
      elif waits and not self._deadline:
        self._deadline = self.loop.call_later(seconds, self.transport.close)

  return Impatient
