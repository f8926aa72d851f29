"""The state of a run: built abstractly first, then filled from random numbers and checkpoints."""
from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mgjax import trees
from mgjax.checkpoint import (
    CheckpointError,
    abstract_params,
    load_params,
    parameter_homes,
    read_run,
)
from mgjax.models.mini_gemini import MiniGemini
from mgjax.models.tagger import Tagger
from mgjax.sharding import on_this_host
from mgjax.train.config import RunConfig
from mgjax.train.optimizer import check_table, split_frozen


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  """step: updates done.  params train (float32), frozen do not; opt_state mirrors params."""

  step: jax.Array
  params: dict
  frozen: dict
  opt_state: Any

  def as_dict(self) -> dict:
    """For checkpoints."""
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def model_builder(config: RunConfig, hr_size: int | None = None):
  """() -> the nnx module that the objective trains; hr_size: for pictures of another size than the
  model's own (the parameters are the same)."""
  dtype = jnp.dtype(config.dtype)
  if config.objective == "language":
    model = config.model.at(hr_size) if hr_size else config.model
    return lambda: MiniGemini(model, remat=config.remat, attention=config.attention, dtype=dtype,
                              rngs=nnx.Rngs(config.seed))
  tower = config.objective.partition(":")[2]
  return lambda: Tagger(config.model, tower, remat_policy=config.remat.towers,
                        attention=config.attention, dtype=dtype, rngs=nnx.Rngs(config.seed))


def abstract_state(config: RunConfig, tx: optax.GradientTransformation,
                   mesh: Mesh) -> tuple[nnx.GraphDef, TrainState]:
  """Graph of the model and its TrainState as ShapeDtypeStructs on their shardings.

  Call it inside the mesh.  Raises ValueError if the optimizer table does not fit the parameters.
  """
  graphdef, shapes = abstract_params(model_builder(config), mesh)
  check_table(trees.flatten(shapes), config.optimizer.table)
  params, frozen = split_frozen(shapes, config.optimizer.table)
  frozen = jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape, config.frozen_dtype, sharding=s.sharding), frozen)
  whole = NamedSharding(mesh, P())
  opt_state = jax.eval_shape(tx.init, params)
  opt_state = optax.tree.map_params(
      lambda params: on_this_host(tx.init, params),
      lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p.sharding), opt_state, params,
      transform_non_params=lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole))
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
  return graphdef, TrainState(step, params, frozen, opt_state)


def init_state(config: RunConfig, tx: optax.GradientTransformation,
               abstract: TrainState) -> TrainState:
  """The state at step 0: parameters from `config.init_from` where it names them, else random.

  What is loaded is never drawn first.  Raises CheckpointError for a prefix that names nothing.
  """
  wanted = trees.flatten(abstract.params) | trees.flatten(abstract.frozen)
  loaded: dict[str, jax.Array] = {}
  for prefix, source in config.init_from:
    chosen = {k: v for k, v in wanted.items() if _starts(k, prefix) and k not in loaded}
    if prefix == "":  # everything that the checkpoint has; what is new stays random
      held = parameter_homes(source)
      parts = {_part(k) for k in held}
      if lost := [k for k in chosen if _part(k) in parts and k not in held]:
        raise CheckpointError(f"init_from: {source} has {_part(lost[0])}, but not {lost[0]} "
                              f"({len(lost)} such); it belongs to another model")
      chosen = {k: v for k, v in chosen.items() if k in held}
    if not chosen:
      raise CheckpointError(f"init_from: {prefix!r} of {source} names no parameter that is still "
                            "to be set")
    check_same_parts(source, config, {_part(k) for k in chosen})
    loaded |= load_params(source, chosen)

  drawn = {k: v for k, v in wanted.items() if k not in loaded}
  if drawn:
    logging.info("starting from random numbers: %s", ", ".join(sorted({_part(k) for k in drawn})))
  useless = {_part(k) for k in trees.flatten(abstract.frozen)} & {_part(k) for k in drawn}
  if useless and config.data.images_per_row:
    logging.warning("%s: random and frozen; name a checkpoint that has it in config.init_from",
                    ", ".join(sorted(useless)))

  def draw():
    flat = trees.flatten(trees.pure(nnx.state(model_builder(config)())))
    return {k: flat[k].astype(v.dtype) for k, v in drawn.items()}

  flat = loaded | jax.jit(draw, out_shardings={k: v.sharding for k, v in drawn.items()})()
  pick = lambda tree: trees.unflatten({k: flat[k] for k in trees.flatten(tree)})
  params, frozen = pick(abstract.params), pick(abstract.frozen)
  shardings = jax.tree.map(lambda s: s.sharding, abstract.opt_state)
  opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
  step = jax.device_put(jnp.zeros((), jnp.int32), abstract.step.sharding)
  return TrainState(step, params, frozen, opt_state)


def check_same_parts(source: str, config: RunConfig, parts: set[str]) -> None:
  """Raises CheckpointError where a part of the source differs in what its shapes do not show."""
  theirs, ours = read_run(source)[1]["model"], dataclasses.asdict(config.model)
  for part in parts & ours.keys():
    for name, value in ours[part].items():
      value = list(value) if isinstance(value, tuple) else value
      if name != "drop_path" and (there := (theirs[part] or {}).get(name)) != value:
        raise CheckpointError(f"init_from: {source} has model.{part}.{name} = {there}, this config "
                              f"{value}; they belong to different models")


def _part(path: str) -> str:
  return path.split("/")[0]


def _starts(path: str, prefix: str) -> bool:
  return prefix == "" or path == prefix or path.startswith(prefix + "/")
