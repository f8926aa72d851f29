"""A trace of a few steps, for xprof or TensorBoard's profile tab."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import logging


class Profiler:
  """Writes what this host and its devices do in `steps` into `folder`; every host has one.

  A run that goes on behind the first of them traces those that are left.  Close it: a run that
  stops early keeps the steps traced so far.
  """

  def __init__(self, folder: Path, steps: range):
    self._folder, self._steps = folder, steps
    self._running = False

  @contextlib.contextmanager
  def step(self, number: int) -> Iterator[None]:
    """Around the work of a step, until its results are on the host: "train NUMBER" in the trace."""
    if number not in self._steps:
      yield
      return
    if not self._running:
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # every call of Python: slow, and it hides the rest
      jax.profiler.start_trace(self._folder, profiler_options=options)
      self._running = True
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield
    if number == self._steps[-1]:
      self.close()

  def close(self) -> None:
    """Ends and writes the trace, if one is under way."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()
      logging.info("wrote a trace; to look at it: pip install xprof; xprof --logdir=%s",
                   self._folder)
