"""Paints pictures from words with SDXL alone.

  python launch/draw.py --model SDXL --prompt "a lighthouse in a storm, oil on canvas"
  python launch/draw.py --model SDXL --prompt "a cat" --count 4 --size 1024x768 --output cat.png

SDXL is a folder that `python -m conversion.from_hf --sdxl` has made.  The names of the pictures go
to the standard output, one a line; no file is written over.
"""
from __future__ import annotations

import argparse
import logging
import sys
import time

from mgjax.infer.gallery import Gallery, size
from mgjax.terminal import exit_code, note, ticking


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
  """The command line, parsed; argparse reports what is wrong with it and exits with 2."""
  summary, _, rest = __doc__.partition("\n")
  parser = argparse.ArgumentParser(
      prog="draw.py", description=summary, epilog=rest, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("--model", required=True, metavar="DIR", help="folder of a converted SDXL")
  add("--prompt", action="append", required=True, metavar="TEXT",
      help="what to paint; may be given several times")
  add("--output", metavar="FILE.png", default="picture.png",
      help="where to save; further pictures are numbered (default: picture.png)")
  add("--count", type=int, default=1, metavar="N",
      help="pictures of each prompt, painted at once (default: 1)")
  add("--size", type=size, metavar="WxH",
      help="pixels, or one number for both (default: what the model was trained on)")
  add("--negative", metavar="TEXT", help='what they should not be; "" says nothing (default: that '
      "of the original)")
  add("--steps", type=int, default=50, metavar="N", help="of the sampler (default: 50)")
  add("--guidance", type=float, default=5.0, metavar="X",
      help="how much the prompt counts; up to 1: no negative prompt, half the time (default: 5)")
  add("--seed", type=int, default=0, metavar="N",
      help="of the noise, of which every picture has its own (default: 0)")
  add("--sampler", choices=("euler", "ddim"), help="default: as the model was published")
  return parser.parse_args(argv)


def paint(args: argparse.Namespace) -> None:
  """Paints and saves what the arguments describe.  Raises ValueError or OSError."""
  gallery = Gallery(args.output, "--output")
  for prompt in args.prompt:
    if not prompt.strip():
      raise ValueError("--prompt is empty; say what to paint")
  # After what needs no JAX.
  from mgjax.diffusion.painter import NEGATIVE, Painting, open_painter
  from mgjax.infer.studio import explained
  logging.getLogger("absl").setLevel(logging.ERROR)
  width, height = args.size or (None, None)
  negative = NEGATIVE if args.negative is None else args.negative or None
  painting = Painting(width=width, height=height, steps=args.steps, guidance=args.guidance,
                      negative=negative, seed=args.seed)
  painter = open_painter(args.model, sampler=args.sampler)
  prompts = [prompt for prompt in args.prompt for _ in range(args.count)]
  painter.check(painting, len(prompts))
  for prompt in args.prompt:
    if cut := painter.cut(prompt):
      note(f"longer than SDXL reads (77 tokens); it does not see the end: {cut}")
  with explained():
    begun = time.monotonic()
    with ticking("loading"):
      painter.load()
    loaded = time.monotonic()
    with ticking(f"painting {len(prompts)} with {args.steps} steps"):
      pictures = painter.paint(prompts, painting)
  note(f"loaded in {loaded - begun:.1f} s, painted in {time.monotonic() - loaded:.1f} s")
  for picture in pictures:
    print(gallery.save(picture), flush=True)


def main(argv: list[str] | None = None) -> int:
  """The program; returns its exit code."""
  args = arguments(argv)
  return exit_code(lambda: paint(args))


if __name__ == "__main__":
  sys.exit(main())
