"""The programs of a training config, lowered for the devices of a slice: its step, and those of the
engine."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mgjax.checkpoint import abstract_params
from mgjax.config import ConfigError
from mgjax.data.mixtures import fill, of_data
from mgjax.data.packing import Format
from mgjax.data.pipeline import batch_arrays
from mgjax.infer.cache import BLOCK
from mgjax.infer.programs import Programs
from mgjax.infer.quantize import quantize
from mgjax.models.lora import LoraConfig
from mgjax.sharding import batch_shards, check_heads, mesh_context
from mgjax.tpu.compiler import Program, bytes_a_chip
from mgjax.train.compiled import CompiledSteps, check_batch, mesh_of
from mgjax.train.config import RunConfig
from mgjax.train.flops import Work, batch_flops, model_flops, pairs_seen
from mgjax.train.optimizer import make_optimizer
from mgjax.train.state import abstract_state, model_builder

STEPS = 10_000  # of the schedule; what is compiled does not depend on it


@dataclasses.dataclass(frozen=True)
class Generation:
  """A program of the engine, "encode", "prefill" or "decode", with its weights quantised (a name in
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
  """What of a config is to be compiled: "train" with a format of batches, or a program of the
  engine with so many rows of so many positions (prefill) or cache slots (decode), or for so many
  pictures (encode).  A `Job`."""

  config: RunConfig
  what: str | Generation
  rows: int
  length: int
  shape: Format | None = None

  def mesh(self, devices: Sequence) -> Mesh:
    """See `compiler.Job`."""
    return mesh_of(self.config, devices)

  def lower(self, devices: Sequence) -> tuple[Program, jax.stages.Lowered]:
    """See `compiler.Job`.  Raises ConfigError if config, request and devices do not fit together.
    """
    config, mesh = self.config, self.mesh(devices)
    check_heads(config.model.decoder, mesh)
    if self.what == "train":
      check_batch(config, mesh)
      return _train_step(config, self.shape, mesh)
    return _generation(config, self, mesh)


def requests(config: RunConfig, what: str | Generation, rows: int = 0,
             length: int = 0) -> list[Request]:
  """What of a config can be compiled: `what` is "train" (one program for each resolution), or a
  `Generation` (rows 0: one for each batch shard; length 0: config.data.max_length)."""
  if what == "train":
    return [Request(config, what, formats[0].rows, formats[0].length, formats[0])
            for formats in config.data.formats]
  return [Request(config, what, rows, length or config.data.max_length)]


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
  config = dataclasses.replace(config, lora=LoraConfig())  # adapters are merged when it is loaded
  if request.what.program == "encode" and config.model.vision is None:
    raise ConfigError("--encode: this model sees no pictures; use --prefill or --decode")
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
    if wanted.program == "encode":
      return _encode(config, programs, rows)
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


def _encode(config, programs, pictures):
  side = config.model.hr_size
  work = Work(0, 0, pictures, side)
  return Program(f"encode, {pictures} pictures of {side} pixels", dict(programs.mesh.shape),
                 sum(model_flops(config, work).forward.values()), 0, pictures,
                 {"params": bytes_a_chip(nnx.state(programs.model))}
                 ), programs.lower_encode(pictures, side)


def _read_weights(decoder) -> int:
  """Bytes a chip that one token needs; of a table that is not the head as well, next to none."""
  table = decoder.embedding.get_value() if decoder.head is not None else ()
  return bytes_a_chip(nnx.state(decoder)) - bytes_a_chip(table)
