"""Programs for the devices of a slice: lowered, and compiled ahead of time."""
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
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mgjax.checkpoint import abstract_params
from mgjax.config import ConfigError
from mgjax.data.mixtures import Fill, fill, of_data
from mgjax.data.packing import Format
from mgjax.data.pipeline import batch_arrays
from mgjax.infer.cache import BLOCK
from mgjax.infer.programs import Programs
from mgjax.infer.quantize import quantize
from mgjax.sharding import batch_shards, check_heads, mesh_context
from mgjax.tpu.slices import Slice, describe
from mgjax.train.compiled import CompiledSteps, check_batch, mesh_of
from mgjax.train.config import RunConfig
from mgjax.train.flops import Work, batch_flops, model_flops, pairs_seen
from mgjax.train.optimizer import make_optimizer
from mgjax.train.state import abstract_state, model_builder
from mgjax.xla import compiler_options

STEPS = 10_000  # of the schedule; what is compiled does not depend on it
PATIENCE = 600  # seconds that a sketch may take


@dataclasses.dataclass(frozen=True)
class Generation:
  """A program of the engine, "prefill" or "decode", with its weights quantised (a name in
  `infer.quantize.FORMATS`), and its cache of that dtype (in `infer.cache.CACHE_DTYPES`), or not."""

  program: str
  quantize: str | None = None
  cache_dtype: str | None = None

  def __str__(self) -> str:
    told = [f", {self.quantize} weights"] * bool(self.quantize)
    told += [f", {self.cache_dtype} cache"] * bool(self.cache_dtype)
    return self.program + "".join(told)


@dataclasses.dataclass(frozen=True)
class Request:
  """What is to be compiled: "train" with a format of batches, or a program of the engine with so
  many rows of so many positions (prefill) or cache slots (decode)."""

  what: str | Generation
  rows: int
  length: int
  shape: Format | None = None


@dataclasses.dataclass(frozen=True)
class Program:
  """A program on its mesh, what its mathematics needs (FLOPs over all chips), and what it takes in
  a run: positions, images, and the bytes a chip of each part of its arguments.

  reads: bytes a chip that a decode step must read, weights and full cache; 0: another program.
  loops: as in `roofline.estimate`, blocks of a full cache.
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


@dataclasses.dataclass(frozen=True)
class Compiled:
  """The compiler's text of a program, its bytes of HBM a chip (temporary: made on the way), and the
  seconds that compiling took.  whole: compiled to the end, so that the text has the compiler's
  estimates; a sketch stops when the schedule and the memory are known."""

  text: str
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


def requests(config: RunConfig, what: str | Generation, rows: int = 0,
             length: int = 0) -> list[Request]:
  """What of a config can be compiled: `what` is "train" (one program for each resolution), or a
  `Generation` (rows 0: one for each batch shard; length 0: config.data.max_length)."""
  if what == "train":
    return [Request(what, formats[0].rows, formats[0].length, formats[0])
            for formats in config.data.formats]
  return [Request(what, rows, length or config.data.max_length)]


def lower(config: RunConfig, request: Request, mesh: Mesh) -> tuple[Program, jax.stages.Lowered]:
  """The program as the compiler gets it.

  Raises ConfigError if config, request and mesh do not fit together.
  """
  check_heads(config.model.decoder, mesh)
  if request.what == "train":
    check_batch(config, mesh)
    return _train_step(config, request.shape, mesh)
  return _generation(config, request, mesh)


def _train_step(config, shape, mesh):
  with mesh_context(mesh):
    tx = make_optimizer(config.optimizer, STEPS)
    abstract = abstract_state(config, tx, mesh)[1]
    lowered = CompiledSteps(config, tx, STEPS, abstract, mesh).lower(shape)
  batch = sum(math.prod(dims) * np.dtype(dtype).itemsize
              for dims, dtype in batch_arrays(shape).values())
  arguments = {"params": bytes_a_chip(abstract.params), "frozen": bytes_a_chip(abstract.frozen),
               "optimizer": bytes_a_chip(abstract.opt_state), "batch": batch // batch_shards(mesh)}
  what = f"train step, {shape.rows} rows of {shape.length} with {shape.slots} images"
  mixture = of_data(config.data) if config.data.batching == "packed" else None
  filled = fill(mixture, shape, config.data.max_length) if mixture else None
  return Program(what, dict(mesh.shape), batch_flops(config, shape), shape.rows * shape.length,
                 shape.rows * shape.slots, arguments, filled), lowered


def _generation(config, request, mesh):
  rows, length = request.rows or batch_shards(mesh), request.length
  if rows % batch_shards(mesh):
    raise ConfigError(f"--rows={rows} does not divide among data x fsdp x expert = "
                      f"{batch_shards(mesh)}; use a multiple of it, or a larger "
                      "--config.mesh.tensor")
  with mesh_context(mesh):
    graphdef, shapes = abstract_params(model_builder(config), mesh)
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, config.dtype, sharding=s.sharding), shapes)
    model, wanted = nnx.merge(graphdef, params), request.what
    if wanted.quantize:
      quantize(model, wanted.quantize)
    programs = Programs(model, mesh, rows, length, wanted.cache_dtype)
    if wanted.program == "prefill":
      lowered, told = programs.lower_prefill(length), f"a prompt of {length}, {rows} rows"
      positions, pairs = length, pairs_seen(length)
    else:
      lowered, told = programs.lower_decode(), f"{rows} rows, {length} slots"
      positions, pairs = rows, rows * length
  flops = model_flops(config, Work(positions, pairs, 0, config.model.hr_size))
  weights, cache = bytes_a_chip(nnx.state(model)), bytes_a_chip(programs.shapes()[1])
  return Program(f"{wanted}, {told}", dict(mesh.shape), sum(flops.forward.values()), positions, 0,
                 {"params": weights, "batch": cache},
                 reads=_read_weights(model.decoder) + cache if wanted.program == "decode" else 0,
                 loops=-(-length // BLOCK)), lowered


def _read_weights(decoder) -> int:
  """Bytes a chip that one token needs; of a table that is not the head as well, next to none."""
  table = decoder.embedding.get_value() if decoder.head is not None else ()
  return bytes_a_chip(nnx.state(decoder)) - bytes_a_chip(table)


def compile_whole(program: Program, lowered: jax.stages.Lowered, mesh: Mesh) -> Compiled:
  """Compiles to the end: minutes.  Raises DoesNotFit."""
  started = time.perf_counter()
  try:
    compiled = lowered.compile(compiler_options(mesh))
  except jax.errors.JaxRuntimeError as error:
    raise _explained(program, error) from error
  stats = compiled.memory_analysis()
  # Not what the sum of temporaries is, of which not all are there at one time.
  made = max(0, stats.peak_memory_in_bytes - stats.argument_size_in_bytes)
  return Compiled(compiled.as_text(), stats.argument_size_in_bytes, made,
                  stats.generated_code_size_in_bytes, time.perf_counter() - started, True)


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


def sketch(config: RunConfig, request: Request, chosen: Slice) -> tuple[Program, Compiled]:
  """Compiles until the schedule is made, in a process that is ended then: seconds instead of
  minutes.

  Raises what `lower` raises, DoesNotFit, and ConfigError where the compiler fails otherwise.
  """
  context, started = multiprocessing.get_context("spawn"), time.perf_counter()
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_sketch, args=(config, request, chosen, folder, theirs),
                            daemon=True)
    child.start()
    try:
      theirs.close()
      if not ours.poll(PATIENCE):
        raise ConfigError(f"{request.what}: not even lowered within {PATIENCE} s")
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
    arguments = sum(program.arguments.values())
  return program, Compiled(text, arguments, max(0, used - arguments), 0,
                           time.perf_counter() - started, False)


def _sketch(config, request, chosen, folder, pipe):
  """Runs in the child, and ends with the parent, however that ends."""
  threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)),
                   daemon=True).start()
  program = None
  try:
    mesh = mesh_of(config, describe(chosen))
    program, lowered = lower(config, request, mesh)
    pipe.send(program)
    lowered.compile(compiler_options(mesh) | {
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
