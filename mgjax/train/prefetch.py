"""Batches loaded, and put on the device, while the device works on the one before."""
from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from mgjax.data.pipeline import Batch, BatchIterator
from mgjax.sharding import batch_sharding

DEPTH = 2  # batches that wait on the device


def put(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
  """This host's rows onto its devices; what only the host needs stays behind."""
  sharding = batch_sharding(mesh)
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()
          if k != "sample_index"}


@dataclasses.dataclass(frozen=True)
class Fetched:
  """A batch as the host has it and on the device, and the place in the data behind it."""

  host: Batch
  device: dict[str, jax.Array]
  position: dict[str, Any]


class Prefetcher:
  """`count` batches of an iterator, in order, by a thread of its own.

  What the iterator raises comes at its place in the order.  `waited` is the time in seconds that
  the last `next` spent waiting: the device had nothing to do.
  """

  def __init__(self, batches: BatchIterator, put: Callable[[Batch], dict[str, jax.Array]],
               count: int):
    self._batches, self._put, self._count = batches, put, count
    self._queue: queue.Queue = queue.Queue(DEPTH)
    self._closed = threading.Event()
    self._error: BaseException | None = None
    self.waited = 0.0
    self._thread = threading.Thread(target=self._fetch, name="prefetch", daemon=True)
    self._thread.start()

  def _fetch(self) -> None:
    try:
      for _ in range(self._count):
        batch = next(self._batches)
        self._offer(Fetched(batch, self._put(batch), self._batches.get_state()))
        if self._closed.is_set():
          return
    except BaseException as error:  # whoever asks for that batch shall see it
      self._offer(error)

  def _offer(self, item) -> None:
    while not self._closed.is_set():
      try:
        return self._queue.put(item, timeout=0.1)
      except queue.Full:
        continue

  def __next__(self) -> Fetched:
    started = time.perf_counter()
    if self._error is None:
      item = self._queue.get()
      if isinstance(item, Fetched):
        self.waited = time.perf_counter() - started
        return item
      self._error = item
    raise self._error

  def close(self) -> None:
    """Ends the thread, behind the batch that it is loading, and the iterator's own."""
    self._closed.set()
    self._thread.join(timeout=60)
    self._batches.close()
