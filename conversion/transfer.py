"""What both directions share: bounded parallel work, output that appears whole, plain errors."""
from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import jax
from tqdm import tqdm

from conversion.tensors import ConversionError

IN_FLIGHT = 128 << 20  # bytes of tensors worked on at once, unless a single one is larger
_THREADS = 4
_LOCK = ".being-written"  # in a folder that is not whole yet


@dataclasses.dataclass(frozen=True)
class Job:
  """One tensor's way: its bytes, and what to do."""

  nbytes: int
  run: Callable[[], None]


def run_jobs(what: str, jobs: Sequence[Job]) -> None:
  """Runs all, a few at a time, with a progress bar; tells bytes, speed and peak memory at the end.

  Small tensors share IN_FLIGHT bytes; a larger one has the memory to itself.  The first error stops
  the rest and is raised.
  """
  started, free = time.perf_counter(), _Budget(IN_FLIGHT)
  total = sum(job.nbytes for job in jobs)
  bar = tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None)
  failed = threading.Event()

  def one(job: Job) -> None:
    try:
      if not failed.is_set():
        job.run()
        bar.update(job.nbytes)
    except BaseException:
      failed.set()
      raise
    finally:
      free.give(job.nbytes)

  with bar, ThreadPoolExecutor(_THREADS) as pool:
    futures = []
    for job in jobs:
      free.take(job.nbytes)
      if failed.is_set():
        break
      futures.append(pool.submit(one, job))
    wait(futures)
  if errors := [f.exception() for f in futures if f.exception()]:
    raise errors[0]
  seconds = time.perf_counter() - started
  speed = total / 1e6 / max(seconds, 1e-9)
  print(f"{len(jobs)} tensors, {total / 1e9:.3f} GB in {seconds:.1f} s ({speed:.0f} MB/s), peak "
        f"memory {peak_memory() / 2**30:.2f} GiB")


class _Budget:
  """Bytes that may be in flight."""

  def __init__(self, limit: int):
    self._limit, self._used, self._changed = limit, 0, threading.Condition()

  def take(self, n: int) -> None:
    with self._changed:
      self._changed.wait_for(lambda: not self._used or self._used + n <= self._limit)
      self._used += n

  def give(self, n: int) -> None:
    with self._changed:
      self._used -= n
      self._changed.notify_all()


def peak_memory() -> int:
  """Most memory that this process has held, in bytes."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def finished_folder(output: Path) -> Iterator[Path]:
  """A folder beside `output` that takes its place when the body is done, and goes if it fails.

  Raises ConversionError if `output` exists, or another process is writing it.
  """
  if output.exists():
    raise ConversionError(f"{output}: exists already; remove it or choose another --output")
  part = output.with_name(output.name + ".part")
  output.parent.mkdir(parents=True, exist_ok=True)
  if part.exists() and not (part / _LOCK).exists():
    raise ConversionError(f"{part}: is in the way, and no conversion left it; move it away")
  part.mkdir(exist_ok=True)
  with open(part / _LOCK, "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise ConversionError(f"{part}: another conversion is writing it; wait for that, or choose "
                            "another --output") from e
    for left in part.iterdir():  # by a run that was killed
      if left.is_dir():
        shutil.rmtree(left)
      elif left.name != _LOCK:
        left.unlink()
    try:
      yield part
      (part / _LOCK).unlink()
      part.rename(output)
    except BaseException:
      shutil.rmtree(part, ignore_errors=True)
      raise


def needs_space(output: Path, nbytes: int) -> None:
  """Raises ConversionError if the disk of `output` has less than nbytes free."""
  place = output.absolute()
  while not place.exists():
    place = place.parent
  free = shutil.disk_usage(place).free
  if free < nbytes * 1.01:
    raise ConversionError(f"{output}: {nbytes / 1e9:.2f} GB are to be written, {place} has "
                          f"{free / 1e9:.2f} GB free")


@dataclasses.dataclass
class Outcome:
  """How a program ended."""

  code: int = 0


@contextlib.contextmanager
def tool() -> Iterator[Outcome]:
  """Runs a program's body: what wrong input raises becomes one line and exit code 2."""
  outcome = Outcome()
  jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy, and is not needed
  try:
    yield outcome
  except (ValueError, OSError) as e:
    # tensorstore wraps what the disk says into a ValueError of many lines.
    print(f"error: {' '.join(str(e).split())[:2000]}", file=sys.stderr)
    outcome.code = 2
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    outcome.code = 130
