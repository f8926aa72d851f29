"""A painter beside a language model."""
from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence

import numpy as np

from mgjax.diffusion.painter import Painter, PaintError, Painting
from mgjax.infer.engine import Engine

MEMORY = ("keep", "swap")


class Studio:
  """A painter and a language model on the same devices.

  Args:
    memory: "keep" has the weights of both there.  "swap" those of one at a time: while a picture
      is painted the engine is set aside, afterwards the painter's weights are given up and read
      from disk again for the next.
    name: what the painter is called.
  """

  def __init__(self, painter: Painter, engine: Engine, *, memory: str = "keep",
               name: str = "painter"):
    if memory not in MEMORY:
      raise ValueError(f"memory: {memory!r} does not exist; one of {', '.join(MEMORY)}")
    self.painter, self.memory, self.name = painter, memory, name
    self._engine = engine

  def open(self) -> None:
    """Brings the painter's weights to the devices if they stay there."""
    if self.memory == "keep":
      self.painter.load()

  def paint(self, prompts: Sequence[str], painting: Painting) -> np.ndarray:
    """As `Painter.paint`: uint8 [N, H, W, 3].  The engine is as before, whatever happens.

    Raises PaintError, one where the devices have too little memory included, or CheckpointError.
    """
    self.painter.check(painting, len(prompts))
    with self._room(), explained():
      return self.painter.paint(prompts, painting)

  @contextlib.contextmanager
  def _room(self) -> Iterator[None]:
    if self.memory == "keep":
      yield
      return
    with self._engine.set_aside():
      try:
        yield
      except BaseException as error:
        _let_go(error)
        raise
      finally:  # before the engine comes back
        self.painter.free()


def _let_go(error: BaseException | None) -> None:
  """Empties the frames that failed: their arrays would stay on the devices as long as the error."""
  while error is not None:
    traceback.clear_frames(error.__traceback__)
    error = error.__cause__ or error.__context__


def out_of_memory(error: BaseException) -> bool:
  """Whether the devices, or this machine, had too little memory."""
  return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


@contextlib.contextmanager
def explained() -> Iterator[None]:
  """PaintError in place of what the devices say when their memory is full."""
  try:
    yield
  except Exception as error:
    if not out_of_memory(error):
      raise
    raise PaintError("the memory of the devices is too small for this picture; paint a smaller "
                     "one, or fewer at once, or keep only one model there at a time (memory: swap)"
                     ) from error
