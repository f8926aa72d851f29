"""A config on a slice: compiled, estimated, and if it does not fit, what would."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from mgjax.config import ConfigError
from mgjax.tpu.aot import DoesNotFit, Generation, Request, compile_whole, lower, requests, sketch
from mgjax.tpu.report import Report, report
from mgjax.tpu.slices import SLICES, Slice, describe, parse_slice
from mgjax.train.compiled import mesh_of
from mgjax.train.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Refusal:
  """A program that the slice's memory is too small for: bytes a chip."""

  program: str
  slice: str
  needed: float
  available: float
  request: Request
  fits: bool = False

  def as_text(self) -> str:
    """For people."""
    return (f"{self.program}: DOES NOT FIT on {self.slice}: needs {self.needed / 2**30:.2f} GiB of "
            f"HBM a chip, there are {self.available / 2**30:.2f}, "
            f"{(self.needed - self.available) / 2**30:.2f} too few")

  def as_json(self) -> dict[str, Any]:
    """All fields."""
    return dataclasses.asdict(self)


def of_config(config: RunConfig, what: str | Generation, chosen: Slice, *, rows: int = 0,
              length: int = 0, sketched: bool = False) -> list[Report | Refusal]:
  """The programs of a config on a slice; see `aot.requests` for what, rows and length.

  Raises ConfigError if config and slice do not fit together otherwise.
  """
  mesh = mesh_of(config, describe(chosen))
  results = []
  for request in requests(config, what, rows, length):
    try:
      if sketched:
        found = sketch(config, request, chosen)
      else:
        program, lowered = lower(config, request, mesh)
        found = program, compile_whole(program, lowered, mesh)
      made = report(*found, mesh, chosen)
      refused = None if made.fits else (made.program, made.memory.peak, made.memory.available)
    except DoesNotFit as error:
      refused = error.program.what, error.needed, error.available
    results.append(made if refused is None else
                   Refusal(refused[0], chosen.name, *refused[1:], request))
  return results


def nearest(config: RunConfig, request: Request, chosen: Slice) -> str:
  """The smallest change with which the program fits, found by sketches."""
  for told, changed, on in _changes(config, request, chosen):
    try:
      mesh = mesh_of(changed, describe(on))
      wanted = next(r for r in requests(changed, request.what, request.rows, request.length)
                    if request.shape is None or r.shape.hr_size == request.shape.hr_size)
      if report(*sketch(changed, wanted, on), mesh, on).fits:
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
