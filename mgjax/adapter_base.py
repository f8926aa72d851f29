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
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mgjax.config import CheckpointError, build
from mgjax.models.lora import LoraConfig, merged

BASE = "base.json"
Read = Callable[[Path, dict[str, jax.ShapeDtypeStruct]], dict[str, jax.Array]]


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

  def read(self, read: Read, wanted: Mapping[str, jax.ShapeDtypeStruct]
           ) -> tuple[dict[str, jax.Array], dict[str, int]]:
    """These parameters, by `read(folder, wanted)`, in the dtype that they were trained against, and
    their checksums.  Raises CheckpointError for one that is not what it was."""
    if unknown := sorted(set(wanted) - set(self.parameters)):
      raise CheckpointError(f"{BASE} does not name {unknown[0]} ({len(unknown)} such); it belongs "
                            "to another model")
    values = {}
    for folder in {self.parameters[k][0] for k in wanted}:
      values |= read(folder, {k: v for k, v in wanted.items() if self.parameters[k][0] == folder})
    found = checksums(values)
    for path in values:
      self.check(path, found[path])
    return values, found

  def check(self, path: str, checksum: int) -> None:
    """Raises CheckpointError if a parameter with this checksum is not what it was."""
    folder, known = self.parameters[path]
    if known not in (None, checksum):
      raise CheckpointError(f"{folder}: {path} is not what the adapters were trained on; they "
                            "belong to another base model")


def read_base(run: Path) -> Base | None:
  """The base of a run's folder; None for a run that holds all its parameters itself.

  A base is looked for where it was, seen from the run (both may have moved), then at its old path.
  Raises CheckpointError if it is at neither.
  """
  try:
    if not (run / BASE).is_file():
      config = run / "config.json"
      lora = json.loads(config.read_text()).get("lora") if config.is_file() else None
      if lora and build(LoraConfig, lora, f"{config}: lora").used:
        raise CheckpointError(f"{run / BASE}, which says where the base of its adapters lies, is "
                              "lost; put it back")
      return None
    told = json.loads((run / BASE).read_text())
    folders = [_found(run, entry) for entry in told["folders"]]
    return Base({k: (folders[i], int(checksum, 16))
                 for k, (i, checksum) in told["parameters"].items()})
  except (KeyError, TypeError, IndexError, json.JSONDecodeError) as e:
    raise CheckpointError(f"{run}: its {BASE} or config.json cannot be read ({type(e).__name__}: "
                          f"{e})") from e


def _found(run: Path, entry: Mapping[str, str]) -> Path:
  places = [Path(os.path.normpath(run / entry["from_here"])), Path(entry["path"])]
  for place in places:
    if (place / "state").is_dir():
      return place
  raise CheckpointError(
      f"{run}: its adapters need the base model at {places[1]}, which is not there; put it back, "
      f"or write where that step of it, checkpoints/<step>, is now into {run / BASE} (\"path\")")


def checksums(values: Mapping[str, jax.Array]) -> dict[str, int]:
  """32 bits of all bits of each array, the same however it is cut."""
  return {k: int(n) for k, n in zip(values, _checksums(list(values.values())))}


@jax.jit  # all at once: one compilation, not one for each shape
def _checksums(values):
  def one(x):
    at = jnp.uint32(0)
    for axis in range(x.ndim):
      stride = math.prod(x.shape[axis + 1:]) % 2**32
      at = at + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    bits = x.view(jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    return jnp.sum(_mixed(bits, at), dtype=jnp.uint32)
  return [one(x) for x in values]


def checksum_on_host(x: np.ndarray) -> int:
  """As `checksums`, of an array in the host's memory: nothing is compiled, nothing copied whole."""
  bits, total = x.reshape(-1).view(f"uint{8 * x.dtype.itemsize}"), 0
  for start in range(0, bits.size, _PIECE):
    piece = bits[start:start + _PIECE].astype(np.uint32)
    at = np.arange(start, start + piece.size, dtype=np.uint64).astype(np.uint32)
    total += int(_mixed(piece, at).sum(dtype=np.uint64))
  return total % 2**32


_PIECE = 2**18  # elements, whose intermediate results stay in a core's cache


def _mixed(bits, at):
  mixed = (bits ^ at * np.uint32(0x9E3779B1)) * np.uint32(0x85EBCA6B)
  mixed = (mixed ^ mixed >> np.uint32(15)) * np.uint32(0xC2B2AE35)
  return mixed ^ mixed >> np.uint32(13)


def load_merged(read: Read, step: Path, base: Base, config: LoraConfig, frozen_dtype,
                own: set[str], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """Parameters of the model without adapters, whose products are merged into their matrices.

  read: as in `Base.read`.  own: paths of what the run's step holds itself.
  """
  changed = config.changes(wanted)
  as_trained = {k: jax.ShapeDtypeStruct(s.shape, frozen_dtype, sharding=s.sharding)
                for k, s in wanted.items() if k not in own}
  values = read(step, {k: s for k, s in wanted.items() if k in own})
  plain, _ = base.read(read, {k: s for k, s in as_trained.items() if k not in changed})
  values |= {k: value.astype(wanted[k].dtype) for k, value in plain.items()}
  for path in changed:  # one at a time: the matrices of a large model do not fit twice
    s = wanted[path]
    kernel = base.read(read, {path: as_trained[path]})[0][path]
    pair = _adapter(read, step, path, s, config.rank) if config.rank else ()
    values[path] = _merged(kernel, pair, config, s.dtype, s.sharding)
  return values


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _merged(kernel, pair, config, dtype, sharding):
  return jax.lax.with_sharding_constraint(merged(kernel, config, pair, dtype), sharding)


def _adapter(read: Read, step: Path, path: str, kernel: jax.ShapeDtypeStruct, rank: int):
  """A and B of a kernel, whole on every device."""
  (*lead, d_in, d_out), whole = kernel.shape, kernel.sharding
  if isinstance(whole, NamedSharding):
    whole = NamedSharding(whole.mesh, P())
  request = {path.replace("/kernel", f"/lora_{x}"):
             jax.ShapeDtypeStruct((*lead, *shape), jnp.float32, sharding=whole)
             for x, shape in zip("ab", ((d_in, rank), (rank, d_out)))}
  got = read(step, request)
  return tuple(got[k] for k in request)
