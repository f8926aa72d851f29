"""Which samples share a row, and which rows a batch: the plan of an epoch, before anything is read.

A plan follows from lengths, seed and epoch alone.  Whoever has these knows what every row of every
batch holds, whatever the number of hosts and workers, and wherever a run was stopped.
"""
from __future__ import annotations

import bisect
import dataclasses
import functools
import threading
import zlib
from collections.abc import Sequence

import numpy as np

from mgjax.data.processes import Sendable
from mgjax.data.sources import Source, draw

BATCHING = ("packed", "grouped", "single")
WINDOW = 8192  # samples that are packed together: nearly no waste, and rows stay well mixed


@dataclasses.dataclass(frozen=True)
class Format:
  """The shape of a batch: B rows of L positions with S pictures of H x H pixels, T tokens each."""

  rows: int
  length: int
  slots: int
  hr_size: int
  tokens_per_image: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """An epoch: `samples` int64 [E], row after row; row r holds those from row_starts[r] to
  row_starts[r + 1], batch b the rows from batch_starts[b] on, and has formats[batch_format[b]]."""

  samples: np.ndarray
  row_starts: np.ndarray    # int64 [R + 1]
  batch_starts: np.ndarray  # int64 [batches + 1]
  batch_format: np.ndarray  # int64 [batches]

  @property
  def batches(self) -> int:
    """How many steps the epoch has."""
    return len(self.batch_format)

  @property
  def rows(self) -> int:
    """Rows of all batches, those without samples included."""
    return len(self.row_starts) - 1

  def row(self, r: int) -> np.ndarray:
    """The samples of a row; none in the rows that fill up the last batch."""
    return self.samples[self.row_starts[r]:self.row_starts[r + 1]]


@dataclasses.dataclass(frozen=True)
class Use:
  """How well the batches of one format are filled: shares of 1 (no slots: 1)."""

  format: Format
  batches: int
  tokens: float
  images: float


@dataclasses.dataclass(frozen=True)
class Planner(Sendable):
  """Plans epochs.  The arrays are indexed by sample number [N]; `kept` int64 [K] are the usable."""

  sources: tuple[Source, ...]
  starts: tuple[int, ...]      # sample number at which each source begins, and the total
  kept: np.ndarray
  lengths: np.ndarray          # int32: positions that a sample takes, visual tokens included
  images: np.ndarray           # int16: image slots that it takes
  formats: tuple[tuple[Format, ...], ...]  # of each resolution: see `DataConfig.formats`
  resolution: tuple[int, ...]  # of each source: index into formats
  batching: str
  seed: int
  shuffle: bool

  @functools.cached_property
  def _made(self) -> tuple[threading.Lock, dict[int, Plan], dict[int, int]]:
    return threading.Lock(), {}, {}

  def plan(self, epoch: int) -> Plan:
    """The plan of an epoch; the last few are remembered."""
    lock, plans, rows = self._made
    with lock:
      if epoch not in plans:
        while len(plans) > 1:
          plans.pop(min(plans))
        plans[epoch] = self._make(epoch)
        rows[epoch] = plans[epoch].rows
      return plans[epoch]

  def rows(self, epoch: int) -> int:
    """How many rows an epoch has; remembered of every epoch."""
    known = self._made[2].get(epoch)
    return self.plan(epoch).rows if known is None else known

  @functools.cached_property
  def all_formats(self) -> tuple[Format, ...]:
    """Every shape that a batch may have; `Plan.batch_format` counts in it."""
    return tuple(f for formats in self.formats for f in formats)

  def use(self, epoch: int) -> list[Use]:
    """How well an epoch's batches are filled, by format."""
    plan = self.plan(epoch)
    first = plan.row_starts[plan.batch_starts]  # sample behind which each batch begins
    sums = lambda a: np.diff(np.concatenate([[0], np.cumsum(a[plan.samples], dtype=int)])[first])
    tokens, images = sums(self.lengths), sums(self.images)
    uses = []
    for f in np.unique(plan.batch_format):
      shape, mine = self.all_formats[f], plan.batch_format == f
      room = int(mine.sum()) * shape.rows
      uses.append(Use(shape, int(mine.sum()), float(tokens[mine].sum() / (room * shape.length)),
                      float(images[mine].sum() / (room * shape.slots)) if shape.slots else 1.0))
    return uses

  @property
  def fingerprint(self) -> int:
    """Differs where the plans do."""
    told = ([(s.epochs, s.weight) for s in self.sources], self.starts, self.resolution,
            self.formats, self.batching, self.seed, self.shuffle)
    sums = [zlib.crc32(a.tobytes()) for a in (self.kept, self.lengths, self.images)]
    return zlib.crc32(repr((sums, told)).encode())

  def _make(self, epoch: int) -> Plan:
    bounds = np.searchsorted(self.kept, self.starts)
    usable = [self.kept[a:b] for a, b in zip(bounds, bounds[1:])]
    drawn = draw([len(u) for u in usable], self.sources, self.seed, epoch, self.shuffle)
    rng = np.random.default_rng((self.seed, len(self.sources), epoch))
    batches: list[tuple[int, list[np.ndarray]]] = []  # (format, rows)
    for r, formats in enumerate(self.formats):
      mine = [k for k, own in enumerate(self.resolution) if own == r]
      numbers = np.concatenate([np.zeros(0, np.int64), *(usable[k][drawn[k]] for k in mine)])
      if self.shuffle:
        numbers = rng.permutation(numbers)
      first = self.all_formats.index(formats[0])
      batches += [(first + f, rows) for f, rows in self._batches(numbers, formats, rng)]
    if self.shuffle and len(self.formats) > 1:  # both compiled steps take turns all along
      batches = [batches[i] for i in rng.permutation(len(batches))]
    rows = [row for f, rows in batches
            for row in rows + [rows[0][:0]] * (self.all_formats[f].rows - len(rows))]
    empty = np.zeros(0, np.int64)
    return Plan(np.concatenate([empty, *rows]), _starts([len(row) for row in rows]),
                _starts([self.all_formats[f].rows for f, _ in batches]),
                np.array([f for f, _ in batches], np.int64))

  def _batches(self, numbers, formats, rng) -> list[tuple[int, list[np.ndarray]]]:
    """numbers [n], in the order of the epoch -> (which of the formats, its rows) of each batch."""
    whole = formats[0]
    if self.batching == "grouped":
      groups = group(numbers, self.lengths, self.images, whole.rows, rng if self.shuffle else None)
      return [(self._smallest(g, formats), list(g[:, None])) for g in groups]
    if self.batching == "packed":
      rows = []
      for at in range(0, len(numbers), WINDOW):
        window = numbers[at:at + WINDOW]
        packed = pack(self.lengths[window], self.images[window], whole.length, whole.slots)
        order = rng.permutation(len(packed)) if self.shuffle else range(len(packed))
        rows += [window[packed[i]] for i in order]
    else:
      rows = list(numbers[:, None])
    return [(0, rows[at:at + whole.rows]) for at in range(0, len(rows), whole.rows)]

  def _smallest(self, numbers, formats) -> int:
    """The cheapest of the formats that takes these samples."""
    length, slots = self.lengths[numbers].max(), self.images[numbers].max()
    fits = [i for i, f in enumerate(formats) if f.length >= length and f.slots >= slots]
    return min(fits, key=lambda i: (formats[i].slots, formats[i].length))


def _starts(sizes: Sequence[int]) -> np.ndarray:
  return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)


def pack(lengths: np.ndarray, images: np.ndarray, row_length: int, slots: int) -> list[list[int]]:
  """Samples into rows of at most `row_length` positions and `slots` pictures.

  lengths, images int [n]; every sample must fit a row by itself.  Returns the samples of each row,
  as places in `lengths`, in the better of two ways: best fit where rows are bounded by positions
  or by pictures alone, matching where both bind.
  """
  sizes, pictures = lengths.tolist(), images.tolist()
  order = np.argsort(lengths, kind="stable").tolist()  # shortest first
  ways = (way(sizes, pictures, order, row_length, slots) for way in (_best_fit, _matched))
  return min(ways, key=len)


def _best_fit(lengths, images, order, row_length, slots) -> list[list[int]]:
  """Longest first, each into the fullest row that still takes it."""
  rows: list[list[int]] = []
  # Open rows by the slots that they have left: sorted (positions left, row).
  open_rows: list[list[tuple[int, int]]] = [[] for _ in range(slots + 1)]
  for i in reversed(order):
    n, k = lengths[i], images[i]
    best = None
    for left in range(k, slots + 1):
      at = bisect.bisect_left(open_rows[left], (n, -1))
      if at < len(open_rows[left]) and (best is None or open_rows[left][at][0] < best[0]):
        best = (open_rows[left][at][0], left, at)
    if best is None:
      rest, row, left = row_length, len(rows), slots
      rows.append([i])
    else:
      _, left, at = best
      rest, row = open_rows[left].pop(at)
      rows[row].append(i)
    bisect.insort(open_rows[left - k], (rest - n, row))
  return rows


def _matched(lengths, images, order, row_length, slots) -> list[list[int]]:
  """Row by row: the longest, then for each slot that is left the longest that leaves the other
  slots as much for a picture; text fills up.  Long and short thus share rows, and neither all that
  is short nor all that is text is left for the end."""
  pools: dict[int, list[tuple[int, int]]] = {}  # by number of pictures: sorted (length, sample)
  for i in order:
    pools.setdefault(images[i], []).append((lengths[i], i))
  most_first = sorted(pools, reverse=True)
  rows = []
  while any(pools.values()):
    k = max((k for k in most_first if pools[k]), key=lambda k: pools[k][-1][0])
    n, i = pools[k].pop()
    row, rest, left = [i], row_length - n, slots - k
    for k in most_first:
      pool = pools[k]
      while pool and k <= left and pool[0][0] <= rest:
        share = rest * k / left if k else rest
        at = bisect.bisect_right(pool, (share, len(lengths)))
        n, i = pool.pop(max(at - 1, 0))
        row.append(i)
        rest, left = rest - n, left - k
    rows.append(row)
  return rows


def group(numbers: np.ndarray, lengths: np.ndarray, images: np.ndarray, size: int,
          rng: np.random.Generator | None) -> list[np.ndarray]:
  """Batches of `size` samples of one modality, as the original groups them (R4.6).

  numbers [n]: sample numbers in the order of the epoch; lengths, images are indexed by them.
  Within a batch the longest comes first.  The last batch of either modality, full or not, goes to
  the end together with the other's, in the order of the data; the rest are shuffled by `rng`.
  (The original then deals a batch out to devices so that each gets the same total length; rows here
  have one length, so that this would change nothing.)
  """
  has_image = images[numbers] > 0

  def cut(part):
    parts = [part[at:at + size] for at in range(0, len(part), size)]
    return [p[np.argsort(-lengths[p], kind="stable")] for p in parts]

  with_image, text = cut(numbers[has_image]), cut(numbers[~has_image])
  if not (with_image and text):
    return with_image or text
  rest = np.sort(np.concatenate([with_image.pop(), text.pop()]))
  groups = with_image + text
  if rng is not None:
    groups = [groups[i] for i in rng.permutation(len(groups))]
  return groups + [rest[at:at + size] for at in range(0, len(rest), size)]
