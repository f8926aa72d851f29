import contextlib
import http.server
import socket
import threading
import time

import openai
import pytest
from serving import png, serving

from mgjax.serve import fetch as module
from mgjax.serve.fetch import FetchError, fetch, is_public


@contextlib.contextmanager
def files():
  """A server of one picture, with ways to misbehave."""
  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      if self.path == "/moved":
        self.send_response(302)
        self.send_header("location", "http://127.0.0.1:1/")
        return self.end_headers()
      body = bytes(5000) if self.path == "/large" else png()
      self.send_response(200)
      if self.path != "/no-length":
        self.send_header("content-length", str(len(body) + (self.path == "/short")))
      if self.path == "/slow-header":
        self.wfile.write(b"HTTP/1.0 200 OK\r\na:")
        return self.trickle()
      self.end_headers()
      if self.path == "/slow":
        return self.trickle()
      self.wfile.write(body)

    def trickle(self):
      with contextlib.suppress(OSError):
        for _ in range(100):
          self.wfile.write(b"x")
          time.sleep(0.05)

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


@pytest.mark.parametrize("address, public", [
    ("8.8.8.8", True), ("2606:4700:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False),
    ("192.168.0.1", False), ("172.16.0.1", False), ("169.254.169.254", False), ("0.0.0.0", False),
    ("100.64.0.1", False), ("224.0.0.1", False), ("240.0.0.1", False), ("255.255.255.255", False),
    ("::1", False), ("::", False), ("fe80::1%eth0", False), ("fc00::1", False), ("ff02::1", False),
    ("::ffff:127.0.0.1", False), ("::ffff:8.8.8.8", True), ("64:ff9b::7f00:1", False),
    ("2002:7f00:1::", False), ("2001:0:7f00:1::", False)])
def test_public_addresses(address, public):
  assert is_public(address) == public


@pytest.mark.parametrize("url", [
    "http://other.com/a", "http://pics.com.evil.com/a", "http://evil.com@pics.com/a",
    "http://pics.com@evil.com/a", "http://pics.com:81/a", "ftp://pics.com/a", "http:///a",
    "http://pics.com:99999/", "http://pics.com/\r\nx: y", "http://pics.com/a b", "http://[::1/a",
    "http://p\u0456cs.com/"])
def test_hosts_that_were_not_allowed(url, monkeypatch):
  monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("resolved"))
  with pytest.raises(FetchError):
    fetch(url, {"pics.com"}, 1000, 1)


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], []])
def test_allowed_names_that_lead_inside(addresses, monkeypatch):
  monkeypatch.setattr(socket, "getaddrinfo",
                      lambda *a, **k: [(0, 0, 0, "", (x, 80)) for x in addresses])
  monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("connected"))
  with pytest.raises(FetchError, match="not public"):
    fetch("http://Pics.com./a", {"pics.com"}, 1000, 1)


def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch):
  answers, resolve = [], socket.getaddrinfo

  def rebinding(host, port, *a, **k):
    answers.append(host)
    assert answers.count("pics.com") == 1
    return resolve("127.0.0.1" if host == "pics.com" else host, port, *a, **k)

  with files() as port:
    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(module, "is_public", lambda address: address == "127.0.0.1")
    hosts = {f"pics.com:{port}"}
    get = lambda path, limit=4000, seconds=5: fetch(f"http://pics.com:{port}{path}", hosts, limit,
                                                    seconds)
    answers.clear()
    assert get("/a.png") == png()
    for path in ("/no-length", "/a?b=/../c"):
      answers.clear()
      assert get(path) == png()
    for path, message in (("/moved", "redirects are not followed"), ("/large", "more than 4,000"),
                          ("/short", "IncompleteRead"), ("/slow", "more than 0.4 s"),
                          ("/slow-header", "more than 0.4 s")):
      answers.clear()
      begun = time.monotonic()
      with pytest.raises(FetchError, match=message):
        get(path, seconds=0.4)
      assert time.monotonic() - begun < 2


def test_a_picture_from_an_allowed_host(assistant, monkeypatch):
  with files() as port, serving(
      assistant, image_hosts=frozenset({f"127.0.0.1:{port}"})) as served:
    url = f"http://127.0.0.1:{port}/a.png"
    with pytest.raises(openai.BadRequestError, match="not public"):
      served.ask("What?", url)
    monkeypatch.setattr(module, "is_public", lambda address: True)
    there = served.ask("What?", url)
    from serving import data_url
    own = served.ask("What?", data_url(png()))
    assert there.choices[0].message.content == own.choices[0].message.content
    assert there.usage.prompt_tokens == own.usage.prompt_tokens
