"""TPU slices by name, and their devices as the compiler describes them, without hardware."""
from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
from typing import Any

from mgjax.chips import Chip, chip_of
from mgjax.config import ConfigError

# Chips along each axis.  The number in a name counts chips (v5e, v6e) or cores, two a chip.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8",
          512: "4x8x8", 1024: "8x8x8", 2048: "8x8x16", 4096: "8x16x16"}
SLICES = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT}


@dataclasses.dataclass(frozen=True)
class Slice:
  """One or several equal slices: `count` of `shape` chips of a generation ("v5e", (8, 8))."""

  generation: str
  shape: tuple[int, ...]
  count: int = 1

  @property
  def chips(self) -> int:
    """Of all slices together."""
    return self.count * math.prod(self.shape)

  @property
  def topology(self) -> str:
    """As the compiler calls one of them: "v5e:8x8"."""
    return f"{self.generation}:{'x'.join(map(str, self.shape))}"

  @property
  def name(self) -> str:
    """As the cloud calls one of them: "v5e-64", "v5p-128" (cores)."""
    table = {v: k for k, v in SLICES[self.generation].items()}
    number = table.get("x".join(map(str, self.shape)))
    name = f"{self.generation}-{number}" if number else self.topology
    return name if self.count == 1 else f"{self.count} x {name}"

  def wraps(self, axis: int) -> bool:
    """Whether the links of an axis close to a ring."""
    if self.generation in ("v4", "v5p"):
      return all(n % 4 == 0 for n in self.shape)
    return self.shape[axis] == 16


def parse_slice(text: str, count: int = 1) -> Slice:
  """"v5e:8x8" or "v5e-64" (the cloud's names: v4 and v5p count cores) as a Slice.

  Raises ConfigError with the nearest name if there is no such slice.
  """
  found = re.fullmatch(r"(v\d\w?)[:-](\d+(?:x\d+)*)", text)
  generation = found and found[1]
  if generation not in SLICES or count < 1:
    raise ConfigError(f"--topology {text!r} with {count} slices: expected a generation and a "
                      f"shape, as v5e:8x8 or v5p-128; generations are {', '.join(SLICES)}")
  shapes = SLICES[generation]
  shape = shapes.get(int(found[2])) if "x" not in found[2] else found[2]
  cubes = generation in ("v4", "v5p")
  sizes = [int(n) for n in (shape or "").split("x") if n]
  if shape not in shapes.values() and not (cubes and len(sizes) == 3
                                           and all(n % 4 == 0 for n in sizes)):
    names = [f"{generation}-{n} ({generation}:{s})" for n, s in shapes.items()]
    near = difflib.get_close_matches(text, names, 3, cutoff=0) or names
    raise ConfigError(f"--topology {text!r}: there is no such slice; near it: {', '.join(near)}")
  return Slice(generation, tuple(int(n) for n in shape.split("x")), count)


@functools.cache
def describe(chosen: Slice) -> tuple[Any, ...]:
  """The devices of a slice, for `make_mesh`; they compile, and do not run.

  Raises ConfigError if the TPU compiler is not installed, or does not know the slice.
  """
  # Read once, when libtpu is loaded: no TPU is to be looked for, several may compile at once, and
  # what it says of the TPU that is not here is not to be shown.
  for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
                      ("TPU_WORKER_HOSTNAMES", "localhost"),
                      ("TPU_ACCELERATOR_TYPE", "v5litepod-8"), ("TPU_STDERR_LOG_LEVEL", "3"),
                      ("TPU_MIN_LOG_LEVEL", "3")):
    os.environ.setdefault(name, value)
  from jax.experimental import topologies
  kwargs = {"num_slices": chosen.count} if chosen.count > 1 else {}
  if math.prod(chosen.shape) == 1:
    kwargs["chips_per_host_bounds"] = (1, 1, 1)
  try:
    return tuple(topologies.get_topology_desc(
        platform="tpu", topology_name=chosen.topology, **kwargs).devices)
  except Exception as error:
    said = str(error).strip().splitlines()[0]
    if "not installed" in said or "libtpu" in said:
      raise ConfigError("the TPU compiler is not installed: pip install -e '.[tpu]'") from error
    raise ConfigError(f"--topology {chosen.topology}: {said}") from error


def chip(chosen: Slice) -> Chip:
  """The chip that the slice is made of."""
  kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
  return chip_of(kinds[chosen.generation])
