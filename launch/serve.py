"""Serves a trained model over HTTP, as OpenAI's chat completions.

  python launch/serve.py --checkpoint RUN --port 8000
  curl localhost:8000/v1/chat/completions -H 'content-type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Hello"}]}'

Any OpenAI client works with base_url http://127.0.0.1:8000/v1; pictures go in as data: URLs.
With --web a browser can chat with it at http://127.0.0.1:8000/ as well.
With --draw SDXL it paints too: /v1/images/generations, and completions with
"modalities": ["text", "image"].
/health says whether it works, /metrics how well (Prometheus).  Ctrl-C ends it.
"""
from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys

KEY = "MGJAX_API_KEY"
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
  """The command line, parsed; argparse reports what is wrong with it and exits with 2."""
  summary, _, rest = __doc__.partition("\n")
  parser = argparse.ArgumentParser(
      prog="serve.py", description=summary, epilog=rest, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("--checkpoint", required=True, metavar="DIR",
      help="folder of a training run (its --workdir)")
  add("--step", type=at_least(0), metavar="N", help="which saved step; default: the newest")
  add("--template", metavar="NAME", help="conversation template; default: that of the training")
  add("--host", default="127.0.0.1",
      help="address to listen on; 0.0.0.0 is open to all (default: 127.0.0.1, this machine)")
  add("--port", type=int, default=8000, choices=range(65536), metavar="N",
      help="default: 8000; 0 takes a free one")
  add("--web", action="store_true", help="show a page to chat at / (needs the extra 'web')")
  add("--api-key", metavar="KEY", help="what clients must send; better in the environment, as "
      f"{KEY}, where other users cannot read it (default: none)")
  add("--rows", type=at_least(1), default=8, metavar="N",
      help="answers that grow at once (default: 8)")
  add("--quantize", choices=("int8", "int4"), help="weights in fewer bytes (default: as saved)")
  add("--cache-dtype", choices=("int8", "bfloat16", "float32"),
      help="keys and values in fewer bytes (default: as the model)")
  add("--max-length", type=at_least(2), metavar="N",
      help="longest conversation in tokens (default: that of the training)")
  add("--max-new-tokens", type=at_least(1), metavar="N",
      help="longest answer in tokens (default: what the conversation leaves)")
  add("--max-queue", type=at_least(0), default=256, metavar="N",
      help="requests that may wait for a row (default: 256)")
  add("--max-body-mb", type=at_least(1), default=20, metavar="N",
      help="longest request in MiB (default: 20)")
  add("--max-images", type=at_least(0), default=8, metavar="N",
      help="pictures in one request (default: 8)")
  add("--allow-image-host", action="append", default=[], metavar="HOST", type=str.lower,
      help="fetch pictures from there too, written HOST or HOST:PORT; may be given several times "
      "(default: data: URLs only)")
  add = parser.add_argument_group("drawing (needs --draw)").add_argument
  add("--draw", metavar="DIR", help="folder of a converted SDXL to paint with")
  add("--draw-memory", choices=("keep", "swap"), default="keep",
      help="keep both models on the devices, or swap: one at a time (default: keep)")
  add("--max-draw-pixels", type=at_least(1), metavar="N",
      help="of a picture (default: twice those that SDXL was trained on)")
  add("--max-draw-steps", type=at_least(1), default=100, metavar="N",
      help="of the sampler (default: 100)")
  add("--max-draw-count", type=at_least(1), default=4, metavar="N",
      help="pictures in one request (default: 4)")
  add("--max-draw-queue", type=at_least(0), default=16, metavar="N",
      help="requests that may wait to be painted (default: 16)")
  args = parser.parse_args(argv)
  for name, value in vars(args).items():
    if args.draw is None and "draw_" in name and value != parser.get_default(name):
      parser.error(f"--{name.replace('_', '-')} says how to draw, but there is nothing to draw "
                   "with; give --draw DIR too")
  return args


def at_least(least: int):
  """For argparse: an int that is not less."""
  def number(text: str) -> int:
    if (value := int(text)) < least:
      raise argparse.ArgumentTypeError(f"{value} is less than {least}")
    return value
  return number


def build(args: argparse.Namespace, api_key: str | None):
  """The server, its model loaded and compiled.  Raises ValueError or OSError."""
  from mgjax.infer.assistant import load
  from mgjax.serve.app import make_app
  from mgjax.serve.limits import Limits
  from mgjax.serve.server import make_server
  from mgjax.serve.warm import warm_up

  painter = None
  if args.draw is not None:  # what is wrong with it is told before minutes of loading
    from mgjax.diffusion.painter import open_painter
    painter = open_painter(args.draw)
  # Orbax warns that it leaves out the position in the training data: that is as it should be.
  logging.getLogger("absl").setLevel(logging.ERROR)
  assistant = load(args.checkpoint, template=args.template, max_length=args.max_length,
                   rows=args.rows, step=args.step, quantize=args.quantize,
                   cache_dtype=args.cache_dtype)
  print("compiling ...", file=sys.stderr, flush=True)
  warm_up(assistant)
  studio = painter and make_studio(args, painter, assistant)
  body = args.max_body_mb << 20
  limits = Limits(queue=args.max_queue, body=body, images=args.max_images,
                  picture=min(Limits.picture, body), new_tokens=args.max_new_tokens,
                  held=max(Limits.held, 4 * body), image_hosts=frozenset(args.allow_image_host),
                  draw_queue=args.max_draw_queue, draw_count=args.max_draw_count,
                  draw_steps=args.max_draw_steps, draw_pixels=args.max_draw_pixels)
  hosts = ("127.0.0.1", "localhost", "[::1]") if args.host in THIS_MACHINE else ()
  app = make_app(assistant, limits, api_key, hosts=hosts, web=args.web, studio=studio)
  return make_server(app, limits.body_seconds), assistant.name


def make_studio(args: argparse.Namespace, painter, assistant):
  """What paints beside that assistant, after a first picture.  Raises ValueError or OSError."""
  from mgjax.infer.studio import Studio
  from mgjax.serve.warm import warm_up_painter
  name = os.path.basename(os.path.abspath(args.draw))
  if name == assistant.name:
    name += "-draw"
  studio = Studio(painter, assistant.engine, memory=args.draw_memory, name=name)
  print(f"painting a first picture with {name} ...", file=sys.stderr, flush=True)
  warm_up_painter(studio)
  return studio


def main(argv: list[str] | None = None) -> int:
  """The program; returns its exit code."""
  args = arguments(argv)
  api_key = args.api_key or os.environ.get(KEY) or None
  try:
    from mgjax.serve.server import listen
    if args.web:
      import gradio  # noqa: F401
  except ModuleNotFoundError as error:
    extras = "serve,web" if args.web else "serve"
    print(f"error: no module {error.name!r}; pip install -e '.[{extras}]'", file=sys.stderr)
    return 2
  try:
    with contextlib.closing(listen(args.host, args.port)) as sock:  # before minutes of loading
      server, name = build(args, api_key)
      host, port = sock.getsockname()[:2]
      host = f"[{host}]" if ":" in host else host
      print(f"serving {name} on http://{host}:{port}/v1", file=sys.stderr, flush=True)
      if args.web:
        print(f"chat with it at http://{host}:{port}/", file=sys.stderr, flush=True)
      if not api_key and args.host not in THIS_MACHINE:
        print(f"warning: whoever can reach {host} can use it; set {KEY}", file=sys.stderr)
      server.run(sockets=[sock])
  except (ValueError, OSError) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return 130
  return 0


if __name__ == "__main__":
  sys.exit(main())
