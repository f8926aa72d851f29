"""What goes to worker processes, and that these do not outlive the run they work for."""
from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import multiprocessing.connection
import os
import threading


class Sendable:
  """A dataclass that goes to workers as its fields alone: what it has cached (open files, locks)
  stays here."""

  def __getstate__(self):
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@functools.cache
def end_with_parent() -> None:
  """In a worker: ends it when its parent is gone, even if that was killed.  Elsewhere: nothing.

  Else each run that is killed would leave its workers behind, waiting for ever, with their memory.
  """
  parent = multiprocessing.parent_process()
  if parent is None:
    return

  def watch():
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
  threading.Thread(target=watch, name="end_with_parent", daemon=True).start()
