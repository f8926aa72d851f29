"""What is compiled for the devices of a slice ahead of time: whole, or as far as the schedule."""
from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import os
import re
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import jax
from jax.sharding import Mesh

from mgjax.config import ConfigError
from mgjax.data.mixtures import Fill
from mgjax.tpu import hlo
from mgjax.tpu.slices import Slice, describe
from mgjax.xla import compiler_options

PATIENCE = 600  # seconds that a sketch may take


@dataclasses.dataclass(frozen=True)
class Program:
  """A program on its mesh, what its mathematics needs (FLOPs over all chips), and what it takes in
  a run: positions, images, and the bytes a chip of each part of its arguments (with weights of the
  model that it does not read, and that lie there all the same).

  reads: bytes a chip that a decode step must read, weights and full cache; 0: another program.
  loops: as in `roofline.estimate`, blocks of a full cache.
  steps: of a sampler, in one run; 0: another program.
  beside: bytes a chip of another model that lies there meanwhile.
  """

  what: str
  mesh: dict[str, int]
  model_flops: float
  positions: int
  images: int
  arguments: dict[str, int]
  fill: Fill | None = None  # of the rows, by the paper's mixture, where the config's data are that
  reads: int = 0
  loops: int = 1
  steps: int = 0
  beside: int = 0


@dataclasses.dataclass(frozen=True)
class Compiled:
  """The compiler's text of a program, its bytes of HBM a chip (temporary: made on the way), and the
  seconds that compiling took.

  read: bytes of the arguments as they are; `arguments` may be more, in the tiles of the memory.
  whole: compiled to the end, so that the text has the compiler's estimates; a sketch stops when the
    schedule and the memory are known.
  """

  text: str
  read: int
  arguments: int
  temporary: int
  code: int
  seconds: float
  whole: bool


class DoesNotFit(ConfigError):
  """The compiler refused a program for its memory: bytes a chip needed, and available."""

  def __init__(self, program: Program, needed: float, available: float):
    super().__init__(f"{program.what}: needs {needed / 2**30:.2f} GiB of HBM a chip, there are "
                     f"{available / 2**30:.2f}")
    self.program, self.needed, self.available = program, needed, available

  def __reduce__(self):  # it comes from another process
    return type(self), (self.program, self.needed, self.available)


class Job(Protocol):
  """Something that can be compiled for the devices of a slice.  It can be pickled."""

  def mesh(self, devices: Sequence) -> Mesh:
    """The devices as the program uses them.  Raises ConfigError."""

  def lower(self, devices: Sequence) -> tuple[Program, jax.stages.Lowered]:
    """The program as the compiler gets it.  Raises ConfigError."""


def compile_whole(job: Job, chosen: Slice) -> tuple[Program, Compiled]:
  """Compiles to the end: minutes.  Raises what `job.lower` raises, and DoesNotFit."""
  program, lowered = job.lower(describe(chosen))
  return program, _whole(program, lowered, job.mesh(describe(chosen)))


def _whole(program, lowered, mesh) -> Compiled:
  started = time.perf_counter()
  try:
    compiled = lowered.compile(compiler_options(mesh))
  except jax.errors.JaxRuntimeError as error:
    raise _explained(program, error) from error
  stats = compiled.memory_analysis()
  # Not what the sum of temporaries is, of which not all are there at one time.
  made = max(0, stats.peak_memory_in_bytes - stats.argument_size_in_bytes)
  seconds, text = time.perf_counter() - started, compiled.as_text()
  return Compiled(text, _read_bytes(text), stats.argument_size_in_bytes, made,
                  stats.generated_code_size_in_bytes, seconds, True)


def _explained(program: Program, error: Exception) -> ConfigError:
  """What the compiler's error means."""
  size = r"([\d.]+)([KMGT])"
  found = re.search(rf"Used {size} of {size} hbm|temporaries \({size}\) exceeds available HBM "
                    rf"\({size}\)", str(error))
  if not found:
    return ConfigError(f"{program.what}: the compiler failed: {str(error).splitlines()[0]}")
  needed, needed_unit, there, there_unit = (group for group in found.groups() if group)
  scaled = lambda number, unit: float(number) * 2 ** (10 * " KMGT".index(unit))
  return DoesNotFit(program, scaled(needed, needed_unit), scaled(there, there_unit))


def sketch(job: Job, chosen: Slice) -> tuple[Program, Compiled]:
  """Compiles until the schedule is made, in a process that is ended then: seconds instead of
  minutes.

  Raises what `job.lower` raises, DoesNotFit, and ConfigError where the compiler fails otherwise.
  """
  context, started = multiprocessing.get_context("spawn"), time.perf_counter()
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_sketch, args=(job, chosen, folder, theirs), daemon=True)
    child.start()
    try:
      theirs.close()
      if not ours.poll(PATIENCE):
        raise ConfigError(f"not even lowered within {PATIENCE} s")
      program = _received(ours)
      while not (text := _dumped(Path(folder))):
        if ours.poll(0.2) and _report_of(Path(folder)) is None:
          _received(ours)  # raises: before the dump it can only be an error
        if time.perf_counter() - started > PATIENCE:
          raise ConfigError(f"{program.what}: not scheduled within {PATIENCE} s")
    finally:
      child.kill()
      child.join()
    used = sum(int(n) for n in re.findall(
        r"Memory Space: default.*\nTotal bytes: (\d+)", _report_of(Path(folder)).read_text()))
  read = _read_bytes(text)
  return program, Compiled(text, read, read, max(0, used - read), 0,
                           time.perf_counter() - started, False)


def _read_bytes(text: str) -> int:
  """Bytes a chip of the arguments that a program reads."""
  module = hlo.parse(text)
  return int(sum(a.bytes for i in module.computations[module.entry].values()
                 if i.opcode == "parameter" for a in i.arrays if a.in_hbm))


def _sketch(job, chosen, folder, pipe):
  """Runs in the child, and ends with the parent, however that ends."""
  threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)),
                   daemon=True).start()
  program = None
  try:
    program, lowered = job.lower(describe(chosen))
    pipe.send(program)
    lowered.compile(compiler_options(job.mesh(describe(chosen))) | {
        "xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_as_long_text": True})
  except (ConfigError, jax.errors.JaxRuntimeError) as error:
    with contextlib.suppress(BrokenPipeError):  # nobody waits for the end of it any more
      pipe.send(error if isinstance(error, ConfigError) else _explained(program, error))


def _received(pipe):
  try:
    got = pipe.recv()
  except EOFError:
    raise ConfigError("the compiler ended without a word; compile it whole to see why") from None
  if isinstance(got, ConfigError):
    raise got
  return got


def _report_of(folder: Path) -> Path | None:
  return next(folder.glob("*jit_*.after_optimizations-memory-usage-report.txt"), None)


def _dumped(folder: Path) -> str | None:
  """The scheduled program, once it stands there whole: it is written before the report."""
  if _report_of(folder) is None:
    return None
  time.sleep(1)
  return next(folder.glob("*jit_*.after_optimizations.txt")).read_text()


def bytes_a_chip(tree) -> int:
  """What the arrays of a tree of ShapeDtypeStructs take on one chip."""
  return sum(math.prod(s.sharding.shard_shape(s.shape)) * jax.dtypes.itemsize_bits(s.dtype) // 8
             for s in jax.tree.leaves(tree))
