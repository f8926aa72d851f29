"""Fetches a file from a host that was allowed, and from nowhere else."""
from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Collection

_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # carries an IPv4 address, private ones too


class FetchError(Exception):
  """A file that cannot be had, and why."""


def fetch(url: str, hosts: Collection[str], limit: int, seconds: float) -> bytes:
  """The file at an http(s) URL of one of `hosts` ("host", or "host:port" for another port).

  The name is resolved once, and the very address that was found public is connected to.  No
  redirects, no proxies, at most `limit` bytes, all within `seconds` once the name is resolved.
  Raises FetchError.
  """
  scheme, host, port, target = _parts(url, hosts)
  address = _address(host, port)
  late, deadline = threading.Event(), None
  try:
    with socket.create_connection((address, port), timeout=seconds) as raw, raw.dup() as watched:
      # Ends every wait on the connection, a handshake or a header that trickles in included.
      deadline = threading.Timer(seconds, _end, [watched, late])
      deadline.daemon = True
      deadline.start()
      with _secured(raw, host) if scheme == "https" else raw as connection:
        body = _get(connection, host, port, scheme, target, limit)
      if late.is_set():  # it may look whole
        raise TimeoutError
      return body
  except (OSError, http.client.HTTPException, ValueError) as error:
    why = f"it took more than {seconds:g} s" if late.is_set() else type(error).__name__
    raise FetchError(f"{host} could not be read ({why})") from error
  finally:
    if deadline:
      deadline.cancel()


def _secured(raw, host) -> ssl.SSLSocket:
  return ssl.create_default_context().wrap_socket(raw, server_hostname=host)


def _parts(url, hosts):
  try:
    parts = urllib.parse.urlsplit(url)
    host, port = (parts.hostname or "").rstrip("."), parts.port
    host.encode("ascii"), url.encode("ascii")
  except ValueError as error:
    raise FetchError("not a URL in ASCII") from error
  if parts.scheme not in _PORTS or parts.username is not None or not url.isprintable() or (
      " " in url):
    raise FetchError("not a plain http(s) URL")
  port = port or _PORTS[parts.scheme]
  name = host if port == _PORTS[parts.scheme] else f"{host}:{port}"
  if name not in hosts:
    raise FetchError("pictures are not fetched from this host; send them as data:image/...;base64")
  return parts.scheme, host, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _address(host, port) -> str:
  """The first of a host's addresses, all of which must be public."""
  try:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
  except (OSError, UnicodeError) as error:
    raise FetchError(f"{host} has no address") from error
  addresses = [entry[4][0] for entry in found]
  if not addresses or not all(map(is_public, addresses)):
    raise FetchError(f"{host} has an address that is not public")
  return addresses[0]


def is_public(address: str) -> bool:
  """Whether an address is on the open internet: not private, loopback, link-local, reserved,
  multicast, nor one that hides another."""
  ip = ipaddress.ip_address(address.partition("%")[0])
  if ip.version == 6:
    if ip.ipv4_mapped:
      return is_public(str(ip.ipv4_mapped))
    if ip.sixtofour or ip.teredo or ip in _NAT64:
      return False
  return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_private)


def _get(connection, host, port, scheme, target, limit) -> bytes:
  client = http.client.HTTPConnection(host, port)
  client.sock = connection
  name = host if port == _PORTS[scheme] else f"{host}:{port}"
  client.putrequest("GET", target, skip_host=True, skip_accept_encoding=True)
  for header in (("Host", name), ("Accept-Encoding", "identity"), ("Connection", "close")):
    client.putheader(*header)
  client.endheaders()
  response = client.getresponse()
  if response.status != 200:
    moved = ", and redirects are not followed" if 300 <= response.status < 400 else ""
    raise FetchError(f"{host} answered with status {response.status}{moved}")
  if (response.length or 0) > limit or len(body := response.read(limit + 1)) > limit:
    raise FetchError(f"the file has more than {limit:,} bytes")
  if response.length:
    raise http.client.IncompleteRead(body, response.length)
  return body


def _end(connection, late) -> None:
  late.set()
  try:
    connection.shutdown(socket.SHUT_RDWR)
  except OSError:  # closed already
    pass
