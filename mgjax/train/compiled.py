"""The train step as executables, on the mesh that the config asks for."""
from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from jax.sharding import Mesh

from mgjax.checkpoint import abstract_params
from mgjax.config import ConfigError
from mgjax.data.packing import Format
from mgjax.data.pipeline import batch_arrays
from mgjax.sharding import batch_sharding, batch_shards, fit_mesh, make_mesh
from mgjax.train.config import RunConfig
from mgjax.train.state import TrainState, model_builder
from mgjax.train.step import make_train_step
from mgjax.xla import compiler_options


def mesh_of(config: RunConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh that config.mesh asks for, on these devices (None: all that there are).

  Raises ConfigError if it does not cover them.
  """
  devices = list(jax.devices() if devices is None else devices)
  rows = [r.batch_size // config.accumulate for r in config.data.all_resolutions]
  return make_mesh(fit_mesh(dataclasses.astuple(config.mesh), len(devices), rows), devices)


def check_batch(config: RunConfig, mesh: Mesh) -> None:
  """Raises ConfigError if the rows of a micro-batch do not divide among the batch axes, or these
  among the hosts."""
  shards = batch_shards(mesh)
  for batch_size in (r.batch_size for r in config.data.all_resolutions):
    rows = batch_size // config.accumulate
    if rows % shards:
      raise ConfigError(
          f"config.data: batch_size {batch_size} / accumulate {config.accumulate} = {rows} rows, "
          f"which mesh {dict(mesh.shape)} cannot share among data x fsdp x expert = {shards}; use "
          f"a multiple of {shards * config.accumulate}")
  if shards % jax.process_count():
    raise ConfigError(
        f"mesh {dict(mesh.shape)}: data x fsdp x expert = {shards} does not divide among "
        f"{jax.process_count()} hosts, each of which reads its own rows; use a smaller tensor axis")


def abstract_batch(shape: Format, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """A batch of this format on the mesh, as the compiler wants to know it."""
  sharding = batch_sharding(mesh)
  return {k: jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)
          for k, (dims, dtype) in batch_arrays(shape).items()}


class CompiledSteps:
  """The train step as an executable for each format of a batch, made when it is first asked for.

  An executable is for just its shapes: it cannot recompile.
  """

  def __init__(self, config: RunConfig, tx: optax.GradientTransformation, steps: int,
               abstract: TrainState, mesh: Mesh):
    self._config, self._tx, self._steps = config, tx, steps
    self._abstract, self._mesh = abstract, mesh
    self._made: dict[Format, Any] = {}

  def prepare(self, formats: Iterable[Format]) -> None:
    """Makes those of `formats`."""
    for shape in formats:
      self[shape]

  def __getitem__(self, shape: Format):
    if shape not in self._made:
      started = time.perf_counter()
      self._made[shape] = self.lower(shape).compile(compiler_options(self._mesh))
      logging.info("compiled the step for %s in %.0f s", shape, time.perf_counter() - started)
    return self._made[shape]

  def lower(self, shape: Format) -> jax.stages.Lowered:
    """The step for a format as the compiler gets it."""
    graphdef, _ = abstract_params(model_builder(self._config, shape.hr_size), self._mesh)
    batch = abstract_batch(shape, self._mesh)
    shardings = jax.tree.map(lambda s: s.sharding, self._abstract)
    train_step = make_train_step(self._config, graphdef, self._tx, self._steps)

    def step(state, batch, failed):
      state, metrics = train_step(state, batch)
      # Needing `finite` puts it behind all other communication: the CPU's gets mixed up between
      # hosts where nothing orders it.
      return state, metrics | {"failed": jnp.where(metrics["finite"], failed, -1).max()}

    words = jax.ShapeDtypeStruct((batch_shards(self._mesh),), jnp.int32,
                                 sharding=batch_sharding(self._mesh))
    # The shardings out are pinned: left free, small ones drift and the next step would not fit.
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return jitted.lower(self._abstract, batch, words)
