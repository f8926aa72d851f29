"""A look at every sample before training: what cannot be used, and how long the others are."""
from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import multiprocessing
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from mgjax.data.rows import Loader
from mgjax.data.samples import DataError, Problem

CHUNK = 1024  # samples that one task looks at


@dataclasses.dataclass(frozen=True)
class Scan:
  """What `scan` found, with N samples of which K can be used."""

  kept: np.ndarray       # int64 [K]: their numbers
  lengths: np.ndarray    # int32 [N]: positions that a sample takes once it is cut; 0 if not kept
  images: np.ndarray     # int16 [N]
  ids: np.ndarray        # uint32 [N]: hash of what the sample says its id is
  text: np.ndarray       # int32 [N]: its length without visual tokens, before any cut
  picked: np.ndarray     # bool [N]: whether the source takes it at all
  problems: tuple[Problem, ...]
  checked_in_depth: int  # samples whose pictures were opened as well
  truncated: int         # samples that will lose their end

  @property
  def counts(self) -> dict[str, int]:
    """Problems by kind."""
    return dict(collections.Counter(p.kind for p in self.problems))


def scan(loader: Loader, *, processes: int = 0,
         progress: Callable[[int], None] = lambda done: None) -> Scan:
  """Looks at every sample: its structure, its length, whether its pictures are there.

  The pictures' headers are opened for `scan_limit` samples, evenly spaced.  processes: how many
  share the work; 0 = this one alone.  progress is called with the number of samples done.
  Raises DataError if one of them is killed.
  """
  total = len(loader.samples)
  if not total:
    raise DataError("no samples in any of the sources")
  limit = loader.config.scan_limit
  deep = np.zeros(total, bool)
  deep[np.linspace(0, total - 1, min(limit, total), dtype=int)] = True
  spans = [(at, min(total, at + CHUNK)) for at in range(0, total, CHUNK)]
  looked = _look_at_all(_Looker(loader, deep), spans, processes)
  parts, problems = [], []
  for (arrays, found), (_, end) in zip(looked, spans):
    parts.append(arrays)
    problems += found
    progress(end)
  all_of = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
  return Scan(np.flatnonzero(all_of["lengths"]), all_of["lengths"], all_of["images"],
              all_of["ids"], all_of["text"], all_of["picked"], tuple(problems),
              int((deep & all_of["picked"]).sum()), int(all_of["truncated"].sum()))


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
  """(first, end) -> arrays of these samples, and their problems."""

  def __init__(self, loader: Loader, deep: np.ndarray):
    self._loader, self._deep = loader, deep

  def __call__(self, span: tuple[int, int]):
    loader, numbers = self._loader, range(*span)
    n = len(numbers)
    arrays = {"lengths": np.zeros(n, np.int32), "images": np.zeros(n, np.int16),
              "ids": np.zeros(n, np.uint32), "text": np.zeros(n, np.int32),
              "picked": np.ones(n, bool), "truncated": np.zeros(n, bool)}
    problems: dict[int, Problem] = {}
    good = []
    for at, number in enumerate(numbers):
      sample, problem = loader.read(number)
      arrays["ids"][at] = zlib.crc32(sample.id.encode(errors="replace"))
      if not loader.picks(number, sample):
        arrays["picked"][at] = False
        continue
      arrays["images"][at] = min(len(sample.images), 32767)
      problem = problem or loader.check_files(number, sample, bool(self._deep[number]))
      if problem:
        problems[at] = problem
      else:
        good.append((at, number, sample))
    lengths = loader.measure([g[1] for g in good], [g[2] for g in good])
    for (at, number, sample), length in zip(good, lengths):
      resolution = loader.resolution(number)
      arrays["text"][at] = length - len(sample.images) * resolution.tokens_per_image
      if problem := loader.judge_length(number, sample, length):
        problems[at] = problem
      else:
        arrays["lengths"][at] = min(length, resolution.max_length)
      arrays["truncated"][at] = loader.config.truncate and length > resolution.max_length
    return arrays, [problems[at] for at in sorted(problems)]


_looker: _Looker | None = None  # of this process of the pool


def _set_looker(looker: _Looker) -> None:
  global _looker
  _looker = looker


def _look(span):
  return _looker(span)
