"""Where samples come from: one data file, or a mixture of several."""
from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import os
import pathlib
import re
import zlib
from collections.abc import Sequence

import numpy as np

from mgjax.config import ConfigError, at_least
from mgjax.data.records import Records, open_records
from mgjax.data.samples import Problem, Sample, name_of, to_sample
from mgjax.data.tfds_records import TFDS


@dataclasses.dataclass(frozen=True)
class Source:
  """One part of a mixture."""

  path: str              # see `records.open_records`
  image_root: str = ""   # the folder that `image` paths are relative to; of TFDS: its data_dir
  name: str = ""         # in reports and errors; "" = the path
  epochs: float = 1.0    # how often a run's epoch goes through it; 0.5: another half each time
  weight: float = 0.0    # instead of epochs, in all sources: its share of the samples
  hr_size: int = 0       # resolution of its pictures, one of data.resolutions; 0 = the model's own
  pick: str = ""         # regular expression: of its file, only the samples whose first image path
                         # ("" without one) has it and that no earlier source of the file took
  adapter: str = ""      # of a TFDS data set: 'module:function', see adapters.py

  def __post_init__(self):
    at_least(self, 0, "weight", "hr_size")
    if not 0 < self.epochs < float("inf"):
      raise ConfigError(f"source {self.label}: epochs is {self.epochs}; expected more than 0")
    try:
      re.compile(self.pick)
    except re.error as error:
      raise ConfigError(f"source {self.label}: pick {self.pick!r} is no regular expression "
                        f"({error})") from error

  @property
  def label(self) -> str:
    """What reports call it."""
    return self.name or self.path


@dataclasses.dataclass(frozen=True)
class SampleSet(Sequence):
  """All samples of all sources, usable or not, numbered through."""

  sources: tuple[Source, ...]
  records: tuple[Records, ...]
  taken: tuple[np.ndarray | None, ...]  # int64: which records each source takes; None: all

  @functools.cached_property
  def starts(self) -> list[int]:
    """Number of the first sample of each source, and of all."""
    sizes = (len(r if t is None else t) for r, t in zip(self.records, self.taken))
    return [0, *itertools.accumulate(sizes)]

  def __len__(self) -> int:
    return self.starts[-1]

  def locate(self, number: int) -> tuple[int, int]:
    """(which source, which of its records)."""
    k = bisect.bisect_right(self.starts, number) - 1
    at = number - self.starts[k]
    return k, at if self.taken[k] is None else int(self.taken[k][at])

  def read(self, number: int, pictures: bool = True) -> tuple[Sample, Problem | None]:
    """A sample; an empty one and the reason where the record is none.  pictures: those that lie in
    the data file itself are read as well."""
    k, index = self.locate(number)
    records = self.records[k]
    record, pictures = records[index] if pictures else (records.text(index), ())
    try:
      return to_sample(index, record, pictures), None
    except ValueError as error:
      empty = Sample(index, name_of(record), (), ())
      return empty, Problem("format", self.sources[k].label, index, empty.id, str(error))

  def __getitem__(self, number: int) -> Sample:
    return self.read(range(len(self))[number], pictures=False)[0]

  def embeds(self, number: int) -> bool:
    """Whether a sample's pictures lie in the data file itself."""
    return self.records[self.locate(number)[0]].embeds

  @property
  def fingerprint(self) -> int:
    """Differs where the samples, or their order, do."""
    told = [(r.fingerprint, None if t is None else zlib.crc32(t.tobytes()))
            for r, t in zip(self.records, self.taken)]
    return zlib.crc32(repr(told).encode())


def open_sources(sources: Sequence[Source]) -> SampleSet:
  """Raises DataError or ConfigError for one that cannot be read."""
  opened: dict[tuple[str, ...], Records] = {}
  keys = [_file_of(source) for source in sources]
  for key in keys:
    if key not in opened:
      opened[key] = open_records(*key)
  taken: list[np.ndarray | None] = [None] * len(sources)
  for key, records in opened.items():
    mine = [k for k, other in enumerate(keys) if other == key]
    if any(sources[k].pick for k in mine):
      choice = _choose(records, [re.compile(sources[k].pick) for k in mine])
      for place, k in enumerate(mine):
        taken[k] = np.flatnonzero(choice == place)
  return SampleSet(tuple(sources), tuple(opened[key] for key in keys), tuple(taken))


def _file_of(source: Source) -> tuple[str, ...]:
  """What `open_records` takes; sources that have it in common share a file."""
  return source.path, source.adapter, source.image_root if source.path.startswith(TFDS) else ""


def _choose(records: Records, picks: Sequence[re.Pattern]) -> np.ndarray:
  """For each record the first pattern that its first image path has, -1 = none: int8 [N]."""
  choice = np.zeros(len(records), np.int8)
  for i in range(len(records)):
    record = records.text(i)
    image = record.get("image") if isinstance(record, dict) else None
    image = image[0] if isinstance(image, list) and image else image
    choice[i] = next((k for k, pick in enumerate(picks)
                      if pick.search(image if isinstance(image, str) else "")), -1)
  return choice


def load_samples(path: str | os.PathLike) -> tuple[list[Sample], list[Problem]]:
  """All of a data file at once: for small ones.

  A record that cannot be read as one keeps its place as an empty sample and is returned as a
  Problem of kind `format`.  Raises DataError where the file itself is not readable.
  """
  samples = open_sources([Source(str(pathlib.Path(path)))])
  read = [samples.read(i) for i in range(len(samples))]
  return [sample for sample, _ in read], [problem for _, problem in read if problem]


def draw(sizes: Sequence[int], sources: Sequence[Source], seed: int, epoch: int,
         shuffle: bool) -> list[np.ndarray]:
  """Which of its `sizes[k]` usable samples each source gives to an epoch of the run: int64 [n_k].

  Every source is an endless stream, each of its own epochs in an order of its own; epoch e of the
  run takes the stretch from e to e + 1 times its share.  Over the epochs nothing is taken twice
  before all of it was taken once.
  """
  drawn = []
  for k, (size, copies) in enumerate(zip(sizes, _copies(sizes, sources))):
    begin, end = int(epoch * copies * size + 0.5), int((epoch + 1) * copies * size + 0.5)
    parts = []
    while begin < end:
      turn, at = divmod(begin, size)
      stop = min(size, at + end - begin)
      order = (np.random.default_rng((seed, k, turn)).permutation(size) if shuffle
               else np.arange(size))
      parts.append(order[at:stop])
      begin += stop - at
    drawn.append(np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64))
  return drawn


def _copies(sizes: Sequence[int], sources: Sequence[Source]) -> list[float]:
  """How often an epoch goes through each source; weights share out as many samples as there are."""
  weights = [s.weight for s in sources]
  if not any(weights):
    return [s.epochs for s in sources]
  total, whole = sum(sizes), sum(w for w, n in zip(weights, sizes) if n)
  return [total * w / whole / n if n else 0.0 for w, n in zip(weights, sizes)]
