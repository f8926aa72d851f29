"""What the kernels of mining.py work on: windows, maps, the taps between them, and what fits."""
from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

SUBLANES, LANES = 8, 128
ALIGNED = 16  # columns that begin a register of any dtype
MOST = 32     # windows beside each other that are worked on at once
SPILLED = 5 << 20  # bytes of intermediate results outside registers, by byte of the dtype: measured


@dataclasses.dataclass(frozen=True)
class Map:
  """One map, or some of its columns: a position of it covers factor x factor fine ones; a window
  has rows x rows of them.  Its columns begin at `left` among those of the whole map, its channels
  at `start` among those of all maps."""

  factor: int
  rows: int
  left: int
  columns: int
  start: int
  channels: int

  @property
  def coarse(self) -> bool:
    return self.factor > 1

  @property
  def held(self) -> int:
    """Rows that a row of windows sees: neighbours above and below among them."""
    return self.rows + 2 * self.coarse


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a call works on: `side` windows of window x window fine positions along each side."""

  side: int
  window: int
  maps: tuple[Map, ...]
  dtype: np.dtype
  eps: float
  first: int = 0  # of the windows, where it is a part of more of them

  @property
  def queries(self) -> int:
    """Those of a row of windows, padded to whole registers."""
    return -(-self.side // SUBLANES) * SUBLANES

  @property
  def columns(self) -> int:
    return self.side * self.window

  @property
  def channels(self) -> int:
    return sum(m.channels for m in self.maps)

  @property
  def parts(self) -> tuple[Plan, ...]:
    """The same for fewer windows beside each other: what is masked grows with their square."""
    count = next((n for n in range(1, self.side + 1)
                  if self.side % (n * SUBLANES) == 0 and self.side // n <= MOST), 1)
    return tuple(self._part(k, self.side // count) for k in range(count))

  def among(self, whole: Plan) -> slice:
    """The queries of this part among all, padded ones with the only part."""
    return slice(self.first, self.first + (self.queries if self.side == whole.side else self.side))

  def _part(self, k: int, side: int) -> Plan:
    found = []
    for m in self.maps:
      first, behind = k * side * m.rows, (k + 1) * side * m.rows
      if m.coarse and side < self.side:  # neighbours, and whole registers
        first = max(0, (first - 1) // ALIGNED * ALIGNED)
        behind = min(m.columns, -(-(behind + 1) // ALIGNED) * ALIGNED)
      found.append(dataclasses.replace(m, left=first, columns=behind - first))
    return dataclasses.replace(self, side=side, maps=tuple(found), first=k * side)

  @property
  def lag(self) -> int:
    """Steps that a row of windows comes behind what is read: its lower neighbours come next."""
    return int(any(m.coarse for m in self.maps))


def plan_of(q: jax.Array, maps: tuple[jax.Array, ...], eps: float) -> Plan:
  """Of queries [N, P, P, C] and maps [N, P*w/f, P*w/f, C_r] (see `mine_maps`)."""
  side, fine = q.shape[1], maps[0].shape[1]
  window, found, start = fine // side, [], 0
  for m in maps:
    factor = fine // m.shape[1]
    found.append(Map(factor, window // factor, 0, m.shape[2], start, m.shape[3]))
    start += m.shape[3]
  return Plan(side, window, tuple(found), np.dtype(maps[0].dtype), eps)


def why_not(q: jax.Array, maps: list[jax.Array], vmem: int) -> str | None:
  """Why `mine_maps` cannot take these arguments on cores with so many bytes of memory (VMEM); None
  if it can."""
  plan = plan_of(q, maps, 0.0)
  sides = [m.shape[1] for m in maps]
  # Taps of larger factors, and of others than powers of two, are not exact in bfloat16.
  if any(f * m.rows != plan.window or f * side != sides[0] or f not in (1, 2, 4, 8, 16)
         for m, side, f in zip(plan.maps, sides, (m.factor for m in plan.maps))):
    return f"windows of {plan.window} are not whole positions of maps {sides} wide"
  if plan.window % SUBLANES or plan.side % SUBLANES:
    return f"{plan.side} windows of {plan.window} beside each other are not whole registers"
  if (taken := vmem_bytes(plan)) > vmem:
    return (f"a row of windows takes {taken / 2**20:.0f} MiB of a core's memory, there are "
            f"{vmem / 2**20:.0f}")
  return None


def vmem_bytes(plan: Plan) -> int:
  """Bytes of a core's memory for a row of windows, gradients of maps among them: blocks that are
  read and written (two each, the next is on its way), rows that are kept, what is worked on; and a
  quarter more, for the count is not exact."""
  lanes = lambda n: -(-n // LANES) * LANES
  own, kept = 0, 0
  for m in plan.maps:
    row = -(-m.columns // ALIGNED) * ALIGNED * lanes(m.channels)
    own += 4 * m.rows * row * plan.dtype.itemsize
    kept += m.coarse * row * (m.held * plan.dtype.itemsize + (m.rows + 1) * 4)
  rows = 6 * plan.queries * lanes(plan.channels) * 4
  return (own + kept + rows + SPILLED * plan.dtype.itemsize) * 5 // 4


def taps(factor: int, rows: int) -> list[list[tuple[int, float]]]:
  """Of each fine row of a window, which rows of the map it is made of, and by which weights.  Row 0
  is the neighbour above.

  >>> taps(2, 1)
  [[(0, 0.25), (1, 0.75)], [(1, 0.75), (2, 0.25)]]
  """
  if factor == 1:
    return [[(y, 1.0)] for y in range(rows)]
  found = []
  for y in range(factor * rows):
    at = (y + 0.5) / factor - 0.5
    low = math.floor(at)
    pair = (low + 1, 1 - (at - low)), (low + 2, at - low)
    found.append([(row, weight) for row, weight in pair if weight])
  return found


def column_matrix(factor: int, columns: int) -> np.ndarray:
  """Upsampling of a row, edges clamped: float32 [columns, columns * factor]."""
  fine = np.arange(columns * factor)
  at = np.clip((fine + 0.5) / factor - 0.5, 0, columns - 1)
  return np.maximum(0, 1 - np.abs(at - np.arange(columns)[:, None])).astype(np.float32)
