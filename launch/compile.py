"""Compiles the step of a config for a TPU slice, without one, and says whether it fits and how fast
it could be.

    python launch/compile.py --config=configs/stage2.py:mgm-7b --topology=v5e:8x8
    python launch/compile.py --config=configs/stage2.py:mgm-34b --topology=v5p-128 --sweep

Takes the config of launch/train.py and its overrides (--config.mesh.tensor=2,
--config.remat.decoder=none, ...).  --out=FILE writes all numbers as JSON.

Exit status: 0 if it compiles and fits, 1 if it does not fit, 2 if the command or the config is
wrong.
"""
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
_ROWS = flags.DEFINE_integer(
    "rows", 0, "prefill and decode: answers that grow at once; 0: one a batch shard")
_LENGTH = flags.DEFINE_integer(
    "length", 0, "positions of the prompt, or slots of the cache; 0: config.data.max_length")
_QUANTIZE = flags.DEFINE_string(
    "quantize", None, "prefill and decode: weights as int8 or int4")
_CACHE_DTYPE = flags.DEFINE_string(
    "cache_dtype", None, "prefill and decode: keys and values as int8, bfloat16 or float32; the "
    "config's dtype if not given")
_SKETCH = flags.DEFINE_bool(
    "sketch", False, "stop when the schedule is made: seconds, not minutes; times are coarser")
_SWEEP = flags.DEFINE_bool(
    "sweep", False, "try meshes, rows and remat policies instead, and rank their sketches")
_OUT = flags.DEFINE_string("out", None, "JSON file for all numbers")
flags.mark_flags_as_required(["config", "topology"])


def main(argv):
  if argv[1:]:
    raise app.UsageError(f"unexpected arguments {argv[1:]}", exitcode=2)
  from mgjax.checkpoint import CheckpointError
  from mgjax.command import last_line
  from mgjax.config import ConfigError
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  try:
    return run(_CONFIG.value.to_dict())
  except (ConfigError, CheckpointError) as e:
    logging.debug("where it came from", exc_info=True)  # --verbosity=1 shows it
    return stop(e)
  except OSError as e:  # a config file that is not there is told of when it is first used
    return stop(last_line(e))


def run(values: dict) -> int:
  from mgjax.config import ConfigError
  from mgjax.tpu import account, slices, sweep
  from mgjax.train.config import run_config

  chosen = slices.parse_slice(_TOPOLOGY.value, _SLICES.value)
  if "runs" in values:
    raise ConfigError("--config: a recipe of several runs; give the config file of one, as "
                      "configs/stage2.py")
  config = run_config(values)
  if _SWEEP.value:
    found = sweep.sweep(config, chosen, show=lambda line: print(line, flush=True))
    write([r.as_json() for r in found])
    return 0 if found else 1
  what = wanted()
  found = account.of_config(config, what, chosen, rows=_ROWS.value, length=_LENGTH.value,
                            sketched=_SKETCH.value)
  for made in found:
    print(made.as_text(), flush=True)
    if not made.fits:
      print(account.nearest(config, made.request, chosen))
    print()
  write([r.as_json() for r in found])
  return 0 if all(r.fits for r in found) else 1


def wanted():
  """The program that the flags ask for.  Raises ConfigError."""
  from mgjax.config import ConfigError
  from mgjax.infer.cache import check_cache_dtype
  from mgjax.infer.quantize import check_format
  from mgjax.tpu.aot import Generation
  if not (_PREFILL.value or _DECODE.value):
    if _QUANTIZE.value or _CACHE_DTYPE.value:
      raise ConfigError("--quantize and --cache_dtype are for --prefill and --decode")
    return "train"
  try:
    check_format(_QUANTIZE.value)
    if _CACHE_DTYPE.value:
      check_cache_dtype(_CACHE_DTYPE.value)
  except ValueError as error:
    raise ConfigError(f"--{error}") from error
  return Generation("prefill" if _PREFILL.value else "decode", _QUANTIZE.value, _CACHE_DTYPE.value)


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
