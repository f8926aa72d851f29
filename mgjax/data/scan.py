"""A look at every sample before training: what cannot be used, and how long the others are."""
from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import multiprocessing
from collections.abc import Callable, Iterator

import numpy as np

from mgjax.config import ConfigError
from mgjax.data.images import check_header, check_pixels
from mgjax.data.processes import end_with_parent
from mgjax.data.rows import Loader
from mgjax.data.samples import UNNAMED, DataError, Problem, Sample

CHUNK = 1024  # samples that one task looks at
LOOKS = {"none": None, "headers": check_header, "decode": check_pixels}


@dataclasses.dataclass(frozen=True)
class Scan:
  """What `scan` found, with N samples of which K can be used."""

  kept: np.ndarray       # int64 [K]: their numbers
  lengths: np.ndarray    # int32 [N]: positions that a sample takes once it is cut; 0 if not kept
  images: np.ndarray     # int16 [N]
  ids: np.ndarray        # uint64 [N]: hash of what the sample says its id is; 0: it cannot be read
  text: np.ndarray       # int32 [N]: its length without visual tokens, before any cut; 0 if its
                         # structure is wrong, or a picture
  problems: tuple[Problem, ...]
  numbers: np.ndarray    # int64 [P]: whose these are
  late: tuple[Problem, ...]  # found by looking closer than a run does before its first step
  late_numbers: np.ndarray
  checked_in_depth: int  # samples whose pictures were opened as well
  truncated: int         # samples that will lose their end

  @property
  def counts(self) -> dict[str, int]:
    """Problems by kind."""
    return dict(collections.Counter(p.kind for p in self.problems))


def scan(loader: Loader, *, processes: int = 0, images: str = "",
         progress: Callable[[int], None] = lambda done: None) -> Scan:
  """Looks at every sample: its structure, its length, whether its pictures are there.

  The pictures' headers are opened for `scan_limit` samples, evenly spaced.  processes: how many
  share the work; 0 = this one alone.  images: 'headers' opens those of the others too, 'decode'
  decodes all pictures, both after everything else; 'none' does not even look for the files.
  progress is called with the number of samples done.  Raises DataError if one of them is killed.
  """
  if images and images not in LOOKS:
    raise ConfigError(f"images is {images!r}, expected one of {', '.join(LOOKS)}")
  total = len(loader.samples)
  if not total:
    raise DataError("no samples in any of the sources")
  limit = 0 if images == "none" else loader.config.scan_limit
  deep = np.zeros(total, bool)
  deep[np.linspace(0, total - 1, min(limit, total), dtype=int)] = True
  spans = [(at, min(total, at + CHUNK)) for at in range(0, total, CHUNK)]
  looked = _look_at_all(_Looker(loader, deep, images), spans, processes)
  parts, problems, late = [], {}, {}
  for (arrays, found, found_late), (_, end) in zip(looked, spans):
    parts.append(arrays)
    problems |= found
    late |= found_late
    progress(end)
  all_of = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
  numbers = lambda found: np.fromiter(found, np.int64, len(found))
  return Scan(np.flatnonzero(all_of["lengths"]), all_of["lengths"], all_of["images"],
              all_of["ids"], all_of["text"], tuple(problems.values()), numbers(problems),
              tuple(late.values()), numbers(late),
              total if LOOKS.get(images) else int(deep.sum()), int(all_of["truncated"].sum()))


def _look_at_all(look: _Looker, spans, processes) -> Iterator:
  if not processes or len(spans) == 1:
    yield from map(look, spans)
    return
  context = multiprocessing.get_context("spawn")  # threads of JAX do not survive a fork
  with concurrent.futures.ProcessPoolExecutor(
      min(processes, len(spans)), context, initializer=_set_looker, initargs=(look,)) as pool:
    waiting = collections.deque()
    rest = iter(spans)
    try:
      for span in rest:
        waiting.append(pool.submit(_look, span))
        if len(waiting) > 4 * processes:  # a few ahead: results that nobody took use memory
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    except concurrent.futures.process.BrokenProcessPool as error:
      raise DataError("a process that was looking at the samples was killed (out of memory?); use "
                      "fewer: --config.data.workers") from error


class _Looker:
  """(first, end) -> arrays of these samples, their problems by number, and the late ones."""

  def __init__(self, loader: Loader, deep: np.ndarray, images: str):
    self._loader, self._deep, self._images = loader, deep, images

  def __call__(self, span: tuple[int, int]):
    loader, begin = self._loader, span[0]
    samples: list[Sample] = []
    problems: dict[int, Problem | None] = {}
    for number in range(*span):
      sample, problem = loader.read(number, pictures=False)
      if not problem and self._images != "none":
        problem = loader.check_files(number, sample, check_header if self._deep[number] else None)
      samples.append(sample)
      problems[number] = problem
    good = [number for number in problems if not problems[number]]
    measured = loader.measure(good, [samples[number - begin] for number in good])
    text, lengths, truncated = (np.zeros(len(samples), t) for t in (np.int32, np.int32, bool))
    late = {}
    for number, length in zip(good, measured):
      at = number - begin
      sample, resolution = samples[at], loader.resolution(number)
      text[at] = length - len(sample.images) * resolution.tokens_per_image
      truncated[at] = loader.config.truncate and length > resolution.max_length
      problems[number] = loader.judge_length(number, sample, length)
      if not problems[number]:
        lengths[at] = min(length, resolution.max_length)
        if found := self._look_closer(number, sample):
          late[number] = found
    arrays = {"lengths": lengths, "text": text, "truncated": truncated,
              "images": np.array([min(len(s.images), 32767) for s in samples], np.int16),
              "ids": np.array([hash_id(s.id) for s in samples], np.uint64)}
    return arrays, {number: p for number, p in problems.items() if p}, late

  def _look_closer(self, number: int, sample: Sample) -> Problem | None:
    look = LOOKS.get(self._images)
    if not (look and sample.images) or look is check_header and self._deep[number]:
      return None
    return self._loader.check_files(number, sample, look)


def hash_id(name: str) -> int:
  """64 bits of a sample's id, 0 for none: two of a million that differ agree in one of 37 million
  files."""
  if name == UNNAMED:
    return 0
  data = name.encode(errors="replace")
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


_looker: _Looker | None = None  # of this process of the pool


def _set_looker(looker: _Looker) -> None:
  global _looker
  end_with_parent()
  _looker = looker


def _look(span):
  return _looker(span)
