"""What a server gives to many clients at once.

    python launch/serve.py --checkpoint RUN &
    python benchmarks/serve.py --url http://127.0.0.1:8000 --clients 200 --seconds 120

Every client asks again as soon as it has its answer, in turn with and without a picture.  Printed
are errors, throughput, the time to the first token and between tokens, and how fairly the clients
were served.  The API key, if there is one, comes from the environment (MGJAX_API_KEY).
"""
import argparse
import asyncio
import base64
import collections
import dataclasses
import io
import json
import os
import time

import httpx2 as httpx
import numpy as np
from PIL import Image

CONTENTS = 16  # different pictures


@dataclasses.dataclass
class Client:
  """What one of them has seen: seconds, counts."""

  first: list[float] = dataclasses.field(default_factory=list)
  between: list[float] = dataclasses.field(default_factory=list)
  answers: int = 0
  tokens: int = 0


def arguments(argv=None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--url", default="http://127.0.0.1:8000")
  parser.add_argument("--clients", type=int, default=200)
  parser.add_argument("--seconds", type=float, default=120)
  parser.add_argument("--tokens", type=int, default=64, help="longest answer (default: 64)")
  parser.add_argument("--text-only", action="store_true", help="no pictures")
  return parser.parse_args(argv)


def picture(number: int) -> str:
  """A photograph of noise as a data: URL."""
  coarse = np.random.default_rng(number).integers(0, 256, (24, 32, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(coarse).resize((640, 480)).save(file, "JPEG")
  return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def question(client: int, turn: int, tokens: int, pictures: list[str]) -> dict:
  """The body of a request."""
  content = [{"type": "text", "text": f"Client {client} asks for the {turn}th time: what is this?"}]
  if pictures and (client + turn) % 2:
    content.append({"type": "image_url", "image_url": {"url": pictures[client % len(pictures)]}})
  return {"messages": [{"role": "user", "content": content}], "max_tokens": tokens,
          "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.7}


async def ask(http: httpx.AsyncClient, body: dict, client: Client) -> None:
  """One answer, measured.  RuntimeError if it is an error."""
  gaps, last = [], time.perf_counter()
  async with http.stream("POST", "/v1/chat/completions", json=body) as response:
    if response.status_code != 200:
      raise RuntimeError(f"status {response.status_code}")
    async for line in response.aiter_lines():
      if not line.startswith("data: {"):
        continue
      chunk, now = json.loads(line[6:]), time.perf_counter()
      if "error" in chunk:
        raise RuntimeError(chunk["error"]["message"])
      if chunk["choices"] and chunk["choices"][0]["delta"].get("content") is not None:
        gaps.append(now - last)
        last = now
      elif chunk.get("usage"):
        client.tokens += chunk["usage"]["completion_tokens"]
  client.first.append(gaps[0])
  client.between += gaps[2:]  # the chunk with the role comes with the first token
  client.answers += 1


async def measure(args: argparse.Namespace) -> tuple[list[Client], collections.Counter, float]:
  """All clients, the errors, and the seconds that it took."""
  pictures = [] if args.text_only else [picture(i) for i in range(CONTENTS)]
  key, errors = os.environ.get("MGJAX_API_KEY"), collections.Counter()
  clients = [Client() for _ in range(args.clients)]
  async with httpx.AsyncClient(
      base_url=args.url, timeout=600, headers={"authorization": f"Bearer {key}"} if key else None,
      limits=httpx.Limits(max_connections=args.clients)) as http:
    begun = time.perf_counter()

    async def work(number, client):
      turn = 0
      while time.perf_counter() - begun < args.seconds:
        turn += 1
        try:
          await ask(http, question(number, turn, args.tokens, pictures), client)
        except (RuntimeError, httpx.HTTPError) as error:
          errors[f"{type(error).__name__}: {error}"] += 1
          await asyncio.sleep(1)  # as Retry-After says

    await asyncio.gather(*(work(i, client) for i, client in enumerate(clients)))
    return clients, errors, time.perf_counter() - begun


def main() -> None:
  args = arguments()
  clients, errors, seconds = asyncio.run(measure(args))
  answers, tokens = sum(c.answers for c in clients), sum(c.tokens for c in clients)
  print(f"{args.clients} clients, {seconds:.0f} s: {answers} answers, "
        f"{sum(errors.values())} errors")
  for error, count in errors.most_common():
    print(f"  {count:6} {error}")
  print(f"{answers / seconds:.2f} requests/s, {tokens / seconds:.1f} tokens/s")
  for name, field in (("time to first token", "first"), ("between two pieces of text", "between")):
    values = [x for c in clients for x in getattr(c, field)]
    if values:
      p50, p99 = np.percentile(values, [50, 99]) * 1e3
      print(f"{name}: p50 {p50:,.0f} ms, p99 {p99:,.0f} ms")
  served = [c.answers for c in clients]
  print(f"answers of a client: min {min(served)}, max {max(served)}")


if __name__ == "__main__":
  main()
