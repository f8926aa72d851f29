"""What the collectives of a compiled program carry over the links between chips, and how long that
takes at the least."""
from __future__ import annotations

import dataclasses
import re

import numpy as np
from jax.sharding import Mesh

from mgjax.chips import Chip
from mgjax.tpu.hlo import Instruction, Module
from mgjax.tpu.slices import Slice

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
         "ragged-all-to-all")
# A fusion that begins a collective, or goes on with it beside a product; the collective stands in
# each of them, and is done once.
_BEGUN, _CONTINUED = "async-collective-start", ("async_collective_fusion", "async-collective-done")


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective of one kind over some mesh axes.  bytes: the whole array as one chip of the group
  has it before an all-reduce or reduce-scatter, or after an all-gather.  seconds: on the links, at
  their full rate.  hidden: whether the core computes meanwhile."""

  kind: str
  axes: tuple[str, ...]
  bytes: float
  seconds: float
  over_dcn: bool
  hidden: bool


class Network:
  """The links of a slice, as the axes of a mesh use them."""

  def __init__(self, mesh: Mesh, chosen: Slice, chip: Chip):
    self._mesh, self._slice, self._chip = mesh, chosen, chip
    devices = mesh.devices.flatten()
    self._coords = np.array([d.coords[:len(chosen.shape)] for d in devices])
    self._slices = np.array([getattr(d, "slice_index", 0) or 0 for d in devices])

  def collective(self, module: Module, computation: str, i: Instruction,
                 hidden: bool) -> Collective:
    """What the instruction carries."""
    operands = module.computations[computation]
    read = sum(a.bytes for name in i.operands if name in operands for a in operands[name].arrays)
    kind = i.opcode.removesuffix("-start")
    written = i.arrays[1:] if i.opcode.endswith("-start") and len(i.arrays) > 1 else i.arrays
    size = sum(a.bytes for a in written) if kind == "all-gather" else read
    group = self._group(i)
    axes = self._axes(group)
    over_dcn = len(set(self._slices[group])) > 1
    return Collective(kind, axes, size, self._seconds(kind, size, group), over_dcn, hidden)

  def across_slices(self, module: Module, computation: str, i: Instruction) -> Collective:
    """What a `send` carries to the other slices: hosts do it, while the core goes on."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)[1]
    size = sum(a.bytes for a in module.computations[computation][i.operands[0]].arrays)
    axes = tuple(name for n, name in enumerate(self._mesh.axis_names)
                 if np.ptp(self._slices.reshape(self._mesh.devices.shape), axis=n).any())
    slices = self._slice.count
    times = 2 if kind == "ALL_REDUCE" else 1
    seconds = times * size * (slices - 1) / slices / self._chip.dcn
    return Collective(kind.lower().replace("_", "-"), axes, size, seconds, True, True)

  def _group(self, i: Instruction) -> np.ndarray:
    """The first group of devices that talk to each other, as places in the mesh."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", i.attributes)
    if pairs:
      return np.array([int(pairs[1]), int(pairs[2])])
    n = len(self._coords)
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", i.attributes):
      return np.array([int(x) for x in found[1].split(",")])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", i.attributes):
      sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
      chosen = re.findall(r"'([^']+)'", found[2])
      places = np.arange(n).reshape([int(s) for s in sizes.values()])
      return places[tuple(slice(None) if name in chosen else 0 for name in sizes)].flatten()
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?",
                          i.attributes):
      places = np.arange(n).reshape([int(x) for x in found[3].split(",")])
      if found[4]:
        places = places.transpose([int(x) for x in found[4].split(",")])
      return places.reshape(int(found[1]), int(found[2]))[0]
    return np.arange(n)

  def _axes(self, group) -> tuple[str, ...]:
    places = np.unravel_index(group, self._mesh.devices.shape)
    return tuple(name for name, at in zip(self._mesh.axis_names, places) if len(set(at)) > 1)

  def _seconds(self, kind, size, group) -> float:
    if len(group) < 2 or not size:
      return 0.0
    if len(set(self._slices[group])) > 1:
      slices = len(set(self._slices[group]))
      inside = group[self._slices[group] == self._slices[group[0]]]
      times = 2 if kind == "all-reduce" else 1
      # Within the slice first, so that each chip sends its part of the rest.
      return (times * size / len(inside) * (slices - 1) / slices / self._chip.dcn
              + self._seconds(kind, size, inside))
    spans = [len(set(c)) for c in self._coords[group].T]
    rings = [(n, n == self._slice.shape[axis] and self._slice.wraps(axis))
             for axis, n in enumerate(spans) if n > 1]
    if not rings:
      return 0.0
    # Both directions of a ring bring data; at the end of a line only one does.
    rate = sum(self._chip.ici * (2 if wraps and n > 2 else 1) for n, wraps in rings)
    if kind == "collective-permute":
      return size / self._chip.ici
    if "all-to-all" in kind:  # what crosses the middle of each ring or line
      return sum(size * n / (8 if wraps else 4) / self._chip.ici for n, wraps in rings)
    share = (len(group) - 1) / len(group)
    return (2 if kind == "all-reduce" else 1) * size * share / rate


def collectives(module: Module, computation: str, i: Instruction,
                network: Network) -> list[Collective]:
  """Those that an instruction does: itself, or inside a fusion; each counted where it begins."""
  if i.opcode == "send" and "_xla_megascale_transfer_type" in i.attributes:
    return [network.across_slices(module, computation, i)]
  if _is_collective(i):
    return [network.collective(module, computation, i, hidden=i.opcode.endswith("-start"))]
  if i.opcode == "fusion" and not i.called()[0].startswith(_CONTINUED) \
      and not i.name.startswith(_CONTINUED):
    body, begun = i.called()[0], i.name.startswith(_BEGUN)
    found = [network.collective(module, body, inner, begun)
             for inner in module.computations[body].values() if _is_collective(inner)]
    if body.startswith("all-reduce-scatter"):  # an all-reduce of which a slice is kept
      found = [dataclasses.replace(c, kind="reduce-scatter", seconds=c.seconds / 2)
               if c.kind == "all-reduce" else c for c in found]
    return found
  return []


def _is_collective(i: Instruction) -> bool:
  return i.opcode.removesuffix("-start") in KINDS


def total(found: list[tuple[Collective, float]]) -> dict[tuple[str, tuple[str, ...], bool],
                                                         tuple[float, float]]:
  """(kind, mesh axes, over DCN) -> (bytes, seconds), of collectives and how often they run."""
  sums: dict = {}
  for c, times in found:
    key = (c.kind, c.axes, c.over_dcn)
    size, seconds = sums.get(key, (0.0, 0.0))
    sums[key] = (size + c.bytes * times, seconds + c.seconds * times)
  return sums
