"""The base of a run with adapters: the checkpoint that holds what the run does not train.

Such a run saves only what it trains.  `base.json` in its folder says where each of the other
parameters lies, and a checksum of it, so that adapters never meet weights that they were not
trained for.
"""
from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mgjax.models.lora import LoraConfig, merged

BASE = "base.json"
Read = Callable[[Path, dict[str, jax.ShapeDtypeStruct]], dict[str, jax.Array]]


class BaseError(ValueError):
  """A base that is missing, or another one."""


@dataclasses.dataclass(frozen=True)
class Base:
  """Path of a parameter -> the folder of the step that holds it, and its checksum (None: not known
  yet)."""

  parameters: Mapping[str, tuple[Path, int | None]]

  def write(self, run: Path, at: Path | None = None) -> None:
    """Puts it into a run's folder.  at: where that will be, if not there."""
    folders = sorted({str(folder) for folder, _ in self.parameters.values()})
    text = json.dumps({
        "folders": [{"path": f, "from_here": os.path.relpath(f, at or run)} for f in folders],
        "parameters": {k: [folders.index(str(folder)), f"{checksum:08x}"]
                       for k, (folder, checksum) in sorted(self.parameters.items())}}, indent=1)
    unfinished = run / f"{BASE}.part"
    unfinished.write_text(text + "\n")
    unfinished.rename(run / BASE)

  def read(self, read: Read, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """These parameters, by `read(folder, wanted)`, in the dtype that they were trained against.

    Raises BaseError for one that is not what it was.
    """
    if unknown := sorted(set(wanted) - set(self.parameters)):
      raise BaseError(f"{BASE} does not name {unknown[0]} ({len(unknown)} such); it belongs to "
                      "another model")
    values = {}
    for folder in {self.parameters[k][0] for k in wanted}:
      values |= read(folder, {k: v for k, v in wanted.items() if self.parameters[k][0] == folder})
    for path, value in values.items():
      folder, known = self.parameters[path]
      if known not in (None, checksum(value)):
        raise BaseError(f"{folder}: {path} is not what the adapters were trained on; they belong "
                        "to another base model")
    return values


def read_base(run: Path) -> Base | None:
  """The base of a run's folder; None for a run that holds all its parameters itself.

  A base is looked for where it was, seen from the run (both may have moved), then at its old path.
  Raises BaseError if it is at neither.
  """
  if not (run / BASE).is_file():
    return None
  try:
    told = json.loads((run / BASE).read_text())
    folders = [_found(run, entry) for entry in told["folders"]]
    return Base({k: (folders[i], int(checksum, 16))
                 for k, (i, checksum) in told["parameters"].items()})
  except (KeyError, TypeError, IndexError, json.JSONDecodeError) as e:
    raise BaseError(f"{run / BASE}: cannot be read ({type(e).__name__}: {e})") from e


def _found(run: Path, entry: Mapping[str, str]) -> Path:
  places = [Path(os.path.normpath(run / entry["from_here"])), Path(entry["path"])]
  for place in places:
    if (place / "state").is_dir():
      return place
  raise BaseError(f"{run}: its adapters need the base model at {places[1]}, which is not there; "
                  f"put it back, or write where it is now into {run / BASE} (\"path\")")


def checksum(x: jax.Array) -> int:
  """32 bits of all bits of an array, the same however it is cut."""
  return int(_checksum(x))


@jax.jit
def _checksum(x):
  bits = x.view(jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
  at = jnp.uint32(0)
  for axis in range(x.ndim):
    stride = math.prod(x.shape[axis + 1:]) % 2**32
    at = at + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
  mixed = (bits ^ at * jnp.uint32(0x9E3779B1)) * jnp.uint32(0x85EBCA6B)
  mixed = (mixed ^ mixed >> 15) * jnp.uint32(0xC2B2AE35)
  return jnp.sum(mixed ^ mixed >> 13, dtype=jnp.uint32)


def load_merged(read: Read, step: Path, base: Base, config: LoraConfig, frozen_dtype,
                own: set[str], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """Parameters of the model without adapters, whose products are merged into their matrices.

  read: as in `Base.read`.  own: paths of what the run's step holds itself.
  """
  adapters = lambda path: [path.replace("/kernel", f"/lora_{x}") for x in "ab"]
  changed = config.changes(list(wanted))
  plain = {k: v for k, v in wanted.items() if k not in changed}
  values = read(step, {k: v for k, v in plain.items() if k in own})
  as_trained = lambda s: jax.ShapeDtypeStruct(s.shape, frozen_dtype, sharding=s.sharding)
  rest = {k: v for k, v in plain.items() if k not in own}
  for path, value in base.read(read, {k: as_trained(v) for k, v in rest.items()}).items():
    values[path] = value.astype(wanted[path].dtype)
  for path in changed:  # one at a time: the matrices of a large model do not fit twice
    s = wanted[path]
    whole = (NamedSharding(s.sharding.mesh, P()) if isinstance(s.sharding, NamedSharding)
             else s.sharding)
    kernel = base.read(read, {path: as_trained(s)})[path]
    pair = []
    if config.rank:
      *lead, d_in, d_out = s.shape
      shapes = (*lead, d_in, config.rank), (*lead, config.rank, d_out)
      request = {k: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole)
                 for k, shape in zip(adapters(path), shapes)}
      got = read(step, request)
      pair = [got[k] for k in request]
    values[path] = jax.jit(functools.partial(merged, config=config, dtype=s.dtype),
                           out_shardings=s.sharding)(kernel, adapter=pair)
  return values
