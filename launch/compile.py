"""Compiles the step of a config, or drawing, for a TPU slice, without one, and says whether it fits
and how fast it could be.

    python launch/compile.py --config=configs/stage2.py:mgm-7b --topology=v5e:8x8
    python launch/compile.py --config=configs/stage2.py:mgm-34b --topology=v5p-128 --sweep
    python launch/compile.py --draw --topology=v5e-8 --pictures=8

Takes the config of launch/train.py and its overrides (--config.mesh.tensor=2,
--config.remat.decoder=none, ...).  --draw is Stable Diffusion XL base 1.0 and needs none; with one,
that language model waits beside it.  --out=FILE writes all numbers as JSON.

Exit status: 0 if it compiles and fits, 1 if it does not fit, 2 if the command or the config is
wrong.
"""
import argparse
import json
import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "config file, e.g. configs/stage2.py:mgm-7b")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "slice: generation and shape (v5e:8x8, v5p:4x4x4), or its name (v5p-128)")
_SLICES = flags.DEFINE_integer("slices", 1, "how many of them, joined by the data-centre network")
_PREFILL = flags.DEFINE_bool(
    "prefill", False, "compile the reading of prompts instead of the train step")
_DECODE = flags.DEFINE_bool(
    "decode", False, "compile the step that makes the next token instead")
_ENCODE = flags.DEFINE_bool(
    "encode", False, "compile what makes pictures visual tokens instead; --rows is how many")
_ROWS = flags.DEFINE_integer(
    "rows", 0, "prefill and decode: answers that grow at once; 0: one a batch shard; so, too, for "
    "what waits beside --draw, as --length, --quantize and --cache_dtype are")
_LENGTH = flags.DEFINE_integer(
    "length", 0, "positions of the prompt, or slots of the cache; 0: config.data.max_length")
_QUANTIZE = flags.DEFINE_string(
    "quantize", None, "encode, prefill and decode: weights as int8 or int4")
_CACHE_DTYPE = flags.DEFINE_string(
    "cache_dtype", None, "prefill and decode: keys and values as int8, bfloat16 or float32; the "
    "config's dtype if not given")
_DRAW = flags.DEFINE_bool(
    "draw", False, "compile what SDXL draws with instead: text encoders, sampler, autoencoder")
_PICTURES = flags.DEFINE_integer("pictures", 1, "draw: how many at once")
_DRAW_STEPS = flags.DEFINE_integer("draw_steps", 30, "draw: of the sampler")
_SIZE = flags.DEFINE_string("size", "1024", "draw: pixels, WIDTHxHEIGHT or one number for both")
_SKETCH = flags.DEFINE_bool(
    "sketch", False, "stop when the schedule is made: seconds, not minutes; times are coarser")
_SWEEP = flags.DEFINE_bool(
    "sweep", False, "try meshes, rows and remat policies instead, and rank their sketches")
_OUT = flags.DEFINE_string("out", None, "JSON file for all numbers")
flags.mark_flags_as_required(["topology"])


def main(argv):
  if argv[1:]:
    raise app.UsageError(f"unexpected arguments {argv[1:]}", exitcode=2)
  from mgjax.checkpoint import CheckpointError
  from mgjax.command import last_line
  from mgjax.config import ConfigError
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  try:
    if _CONFIG.value is None and not _DRAW.value:
      raise ConfigError("--config: which is to be compiled? configs/stage2.py:mgm-7b, say; only "
                        "--draw needs none")
    values = _CONFIG.value and _CONFIG.value.to_dict()
    return draw(values) if _DRAW.value else run(values)
  except (ConfigError, CheckpointError) as e:
    logging.debug("where it came from", exc_info=True)  # --verbosity=1 shows it
    return stop(e)
  except OSError as e:  # a config file that is not there is told of when it is first used
    return stop(last_line(e))


def run(values: dict) -> int:
  """The programs of a config; returns the exit status."""
  from mgjax.tpu import account, aot, slices, sweep

  chosen, config = slices.parse_slice(_TOPOLOGY.value, _SLICES.value), config_of(values)
  if _SWEEP.value:
    found = sweep.sweep(config, chosen, show=lambda line: print(line, flush=True))
    write([r.as_json() for r in found])
    return 0 if found else 1
  found = []
  for job in aot.requests(config, wanted(), _ROWS.value, _LENGTH.value):
    found.append(account.of_job(job, chosen, sketched=_SKETCH.value))
    print(found[-1].as_text(), flush=True)
    if not found[-1].fits:
      print(account.nearest(job, chosen))
    print()
  write([r.as_json() for r in found])
  return 0 if all(r.fits for r in found) else 1


def draw(values: dict | None) -> int:
  """The programs that paint, with a config's model beside them or not; returns the exit status."""
  from mgjax.config import ConfigError
  from mgjax.diffusion.config import SdxlConfig
  from mgjax.diffusion.painter import Painting
  from mgjax.infer.gallery import size
  from mgjax.tpu import account, drawing, slices

  if _SWEEP.value or _ENCODE.value or _PREFILL.value or _DECODE.value:
    raise ConfigError("--draw: without --sweep, --encode, --prefill and --decode")
  try:
    width, height = size(_SIZE.value)
  except argparse.ArgumentTypeError as error:
    raise ConfigError(f"--size: {error}") from error
  chosen, config, beside = slices.parse_slice(_TOPOLOGY.value, _SLICES.value), SdxlConfig(), 0
  painting = Painting(width=width, height=height, steps=_DRAW_STEPS.value)
  if values:
    beside = account.kept(config_of(values), generation("decode"), chosen, rows=_ROWS.value,
                          length=_LENGTH.value)
  jobs = drawing.drawings(config, painting, _PICTURES.value, chosen, beside)
  found = []
  for job in jobs:
    found.append(account.of_job(job, chosen, sketched=_SKETCH.value))
    print(found[-1].as_text() + "\n", flush=True)
    if not found[-1].fits:
      print("fewer --pictures or a smaller --size take less; weights are whole on every chip")
  if all(r.fits for r in found):
    print(drawing.summary(jobs, found))
  write([r.as_json() for r in found])
  return 0 if all(r.fits for r in found) else 1


def config_of(values: dict):
  """A config of the flags as a `RunConfig`.  Raises ConfigError."""
  from mgjax.config import ConfigError
  from mgjax.train.config import run_config
  if "runs" in values:
    raise ConfigError("--config: a recipe of several runs; give the config file of one, as "
                      "configs/stage2.py")
  return run_config(values)


def wanted():
  """The program of a config that the flags ask for.  Raises ConfigError."""
  from mgjax.config import ConfigError
  asked = [f.name for f in (_ENCODE, _PREFILL, _DECODE) if f.value]
  if len(asked) > 1:
    raise ConfigError(f"--{asked[0]} and --{asked[1]}: one program at a time")
  if asked:
    return generation(asked[0])
  if _QUANTIZE.value or _CACHE_DTYPE.value:
    raise ConfigError("--quantize and --cache_dtype are for --encode, --prefill and --decode")
  return "train"


def generation(program: str):
  """A program of the engine with the formats that the flags ask for.  Raises ConfigError."""
  from mgjax.config import ConfigError
  from mgjax.infer.cache import check_cache_dtype
  from mgjax.infer.quantize import check_format
  from mgjax.tpu.aot import Generation
  try:
    check_format(_QUANTIZE.value)
    if _CACHE_DTYPE.value:
      check_cache_dtype(_CACHE_DTYPE.value)
  except ValueError as error:
    raise ConfigError(f"--{error}") from error
  return Generation(program, _QUANTIZE.value, _CACHE_DTYPE.value)


def write(rows: list) -> None:
  if _OUT.value:
    path = Path(_OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows if len(rows) != 1 else rows[0], indent=1) + "\n")


def stop(message) -> int:
  print(f"error: {message}", file=sys.stderr)
  return 2


if __name__ == "__main__":
  from mgjax.command import parser

  os.environ["JAX_PLATFORMS"] = "cpu"  # whatever this machine has: nothing runs
  os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # it cannot hold programs for other machines
  app.run(main, flags_parser=parser(2))
