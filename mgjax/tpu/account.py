"""A program on a slice: compiled, estimated, and if it does not fit, what would."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from mgjax.config import ConfigError
from mgjax.tpu.aot import Generation, Request, requests
from mgjax.tpu.compiler import DoesNotFit, Job, compile_whole, sketch
from mgjax.tpu.report import Report, report
from mgjax.tpu.slices import SLICES, Slice, describe, parse_slice
from mgjax.train.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Refusal:
  """A program that the slice's memory is too small for: bytes a chip."""

  program: str
  slice: str
  needed: float
  available: float
  job: Job
  fits: bool = False

  def as_text(self) -> str:
    """For people."""
    return (f"{self.program}: DOES NOT FIT on {self.slice}: needs {self.needed / 2**30:.2f} GiB of "
            f"HBM a chip, there are {self.available / 2**30:.2f}, "
            f"{(self.needed - self.available) / 2**30:.2f} too few")

  def as_json(self) -> dict[str, Any]:
    """All numbers."""
    return {"program": self.program, "slice": self.slice, "needed": self.needed,
            "available": self.available, "fits": self.fits}


def of_config(config: RunConfig, what: str | Generation, chosen: Slice, *, rows: int = 0,
              length: int = 0, sketched: bool = False) -> list[Report | Refusal]:
  """The programs of a config on a slice; see `aot.requests` for what, rows and length.

  Raises ConfigError if config and slice do not fit together otherwise.
  """
  return [of_job(job, chosen, sketched=sketched) for job in requests(config, what, rows, length)]


def of_job(job: Job, chosen: Slice, *, sketched: bool = False) -> Report | Refusal:
  """What is to be compiled on a slice.  Raises ConfigError if they do not fit together otherwise
  than for memory."""
  try:
    found = sketch(job, chosen) if sketched else compile_whole(job, chosen)
    made = report(*found, job.mesh(describe(chosen)), chosen)
  except DoesNotFit as error:
    return Refusal(error.program.what, chosen.name, error.needed + error.program.beside,
                   error.available, job)
  if made.fits:
    return made
  return Refusal(made.program, chosen.name, made.memory.peak, made.memory.available, job)


def kept(config: RunConfig, what: Generation, chosen: Slice, *, rows: int = 0,
         length: int = 0) -> int:
  """Bytes a chip of the weights and the cache of a language model that waits."""
  [job] = requests(config, what, rows, length)
  return sum(job.lower(describe(chosen))[0].arguments.values())


def nearest(request: Request, chosen: Slice) -> str:
  """The smallest change with which the program fits, found by sketches."""
  for told, changed, on in _changes(request.config, request, chosen):
    try:
      wanted = next(r for r in requests(changed, request.what, request.rows, request.length)
                    if request.shape is None or r.shape.hr_size == request.shape.hr_size)
      if of_job(wanted, on, sketched=True).fits:
        return f"it fits with {told}"
    except ConfigError:
      continue
  return "none of less remat, smaller micro-batches and larger slices fits"


def _changes(config: RunConfig, request: Request, chosen: Slice) -> Iterator[
    tuple[str, RunConfig, Slice]]:
  """(what it is, config, slice), the smallest change first."""
  if request.what == "train":
    lean = dataclasses.replace(config.remat, decoder="nothing_saveable", mining="nothing_saveable")
    if lean != config.remat:
      config = dataclasses.replace(config, remat=lean)
      yield "--config.remat.decoder=nothing_saveable", config, chosen
    for times in (2, 4):
      try:
        cut = dataclasses.replace(config, accumulate=times * config.accumulate)
        yield f"--config.accumulate={cut.accumulate}", cut, chosen
      except ConfigError:
        break
  for number in SLICES[chosen.generation]:
    on = parse_slice(f"{chosen.generation}-{number}", chosen.count)
    if chosen.chips < on.chips <= 8 * chosen.chips:
      yield f"--topology={on.topology} ({on.name})", config, on
