"""A tiny random model behind a real server, and what clients send to it."""
import base64
import contextlib
import io
import json
import pathlib
import socket
import struct
import threading
import time
import zlib

import httpx2 as httpx
import jax
import openai
from PIL import Image
from tiny_models import random_model

from mgjax.config import ClipVitConfig, DecoderConfig, ModelConfig
from mgjax.data.conversation import get_template
from mgjax.data.tokenizer import load_tokenizer
from mgjax.infer.assistant import Assistant
from mgjax.infer.engine import Engine
from mgjax.infer.quantize import quantize
from mgjax.serve.app import make_app
from mgjax.serve.limits import Limits
from mgjax.serve.server import listen, make_server
from mgjax.sharding import make_mesh, mesh_context

CASES = pathlib.Path(__file__).resolve().parents[1] / "data" / "cases"


def tiny_assistant(rows=3, max_length=256, buckets=(64, 128), name=None):
  tokenizer = load_tokenizer(CASES / "small_yi")
  config = ModelConfig(vision=ClipVitConfig(28, 14, 16, 2, 2, 32), vision_hr=None, hr_size=56,
                       grid=2, global_view=True,
                       decoder=DecoderConfig(tokenizer.vocab_size, 32, 2, 4, 2, 8, 48))
  mesh = make_mesh(devices=jax.devices()[:1])
  model = random_model(config, mesh)
  if name:
    with mesh_context(mesh):
      quantize(model, name)
  engine = Engine(model, mesh=mesh, max_length=max_length, buckets=buckets,
                  rows=rows)
  return Assistant(engine, tokenizer, get_template("chatml_direct"), aspect="pad", name="tiny")


class Served:
  """A server that runs, and clients for it."""

  def __init__(self, port, assistant, studio=None):
    self.port, self.assistant, self.studio = port, assistant, studio
    self.url = f"http://127.0.0.1:{port}"
    self.http = httpx.Client(base_url=self.url, timeout=60)
    self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0,
                                timeout=60)

  def post(self, body, **options):
    return self.http.post("/v1/chat/completions", json=body, **options)

  def ask(self, text="Hello", *images, tokens=8, **options):
    """A completion by the official client."""
    return self.openai.chat.completions.create(
        model="tiny", messages=[user(text, *images)],
        **{"max_tokens": tokens, "temperature": 0} | options)

  def metric(self, name):
    lines = self.http.get("/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)

  def connect(self):
    return socket.create_connection(("127.0.0.1", self.port), timeout=30)


@contextlib.contextmanager
def serving(assistant, api_key=None, studio=None, **limits):
  limits = Limits(**limits)
  with contextlib.closing(listen("127.0.0.1", 0)) as sock:
    app = make_app(assistant, limits, api_key, studio=studio)
    server = make_server(app, limits.body_seconds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    eventually(lambda: server.started)
    served = Served(sock.getsockname()[1], assistant, studio)
    try:
      yield served
    finally:
      served.http.close()
      served.openai.close()
      server.should_exit = True
      thread.join(30)
      assert not thread.is_alive()


def eventually(holds, seconds=10.0):
  """Waits until it does; the seconds that took."""
  begun = time.monotonic()
  while not holds():
    assert time.monotonic() - begun < seconds, "it never did"
    time.sleep(0.01)
  return time.monotonic() - begun


def user(text, *images):
  """A user's message; each image a URL, or (URL, detail)."""
  parts = [{"type": "text", "text": text}]
  for image in images:
    url, detail = image if isinstance(image, tuple) else (image, None)
    parts.append({"type": "image_url", "image_url": {"url": url} | ({"detail": detail} if detail
                                                                   else {})})
  return {"role": "user", "content": parts if images else text}


def png(colour=(200, 10, 30), size=(40, 30)):
  file = io.BytesIO()
  Image.new("RGB", size, colour).save(file, "PNG")
  return file.getvalue()


def data_url(file):
  return "data:image/png;base64," + base64.b64encode(file).decode()


def bomb(width=30_000, height=30_000):
  """A PNG whose header alone promises gigabytes."""
  def chunk(kind, data):
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def raw_request(body, *, length=None, head=""):
  """A POST as bytes; `length` what the header says, if not the truth."""
  body = body if isinstance(body, bytes) else json.dumps(body).encode()
  length = len(body) if length is None else length
  return ("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
          f"content-length: {length}\r\n{head}\r\n").encode() + body
