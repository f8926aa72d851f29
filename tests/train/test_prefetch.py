"""The thread that fetches batches: in order, errors in their place, and it ends."""
import threading

import pytest

from mgjax.train.prefetch import DEPTH, Prefetcher


class Batches:
  """Counts from 1; raises at `bad`; tells how far it was read."""

  def __init__(self, bad=None):
    self.read, self.bad, self.closed = 0, bad, False

  def __next__(self):
    if self.read + 1 == self.bad:
      raise KeyError("no more")
    self.read += 1
    return {"n": self.read}

  def get_state(self):
    return {"batch": self.read}

  def close(self):
    self.closed = True


def test_each_batch_comes_with_the_place_behind_it():
  fetched = Prefetcher(Batches(), lambda b: {"n": -b["n"]}, 5)
  for n in range(1, 6):
    item = next(fetched)
    assert (item.host, item.device, item.position) == ({"n": n}, {"n": -n}, {"batch": n})
    assert fetched.waited >= 0
  fetched.close()


def test_an_error_comes_behind_the_batches_before_it():
  batches = Batches(bad=3)
  fetched = Prefetcher(batches, lambda b: b, 9)
  assert [next(fetched).host["n"] for _ in range(2)] == [1, 2]
  for _ in range(2):
    with pytest.raises(KeyError, match="no more"):
      next(fetched)
  fetched.close()
  assert batches.closed


def test_no_more_is_read_than_asked_for_or_kept():
  batches, seen = Batches(), threading.Event()

  def put(batch):
    if batch["n"] == DEPTH + 1:
      seen.set()
    return batch
  fetched = Prefetcher(batches, put, 100)
  assert seen.wait(10)
  fetched.close()  # while the thread waits for room
  assert not fetched._thread.is_alive() and batches.closed
  assert batches.read <= DEPTH + 2
  few = Batches()
  fetched = Prefetcher(few, lambda b: b, 1)
  next(fetched)
  fetched._thread.join(10)
  assert few.read == 1 and not fetched._thread.is_alive()
