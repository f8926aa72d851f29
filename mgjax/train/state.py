"""The state of a run: built abstractly first, then filled from random numbers and checkpoints."""
from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mgjax import trees
from mgjax.adapter_base import Base, read_base
from mgjax.checkpoint import (
    CheckpointError,
    abstract_params,
    held_parameters,
    load_params,
    read_run,
    resolve,
)
from mgjax.config import ConfigError
from mgjax.models.lora import ADAPTER, QUANTIZED_PART, LoraConfig, adapt, kept_parts
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

  def as_dict(self, *, base: bool = False) -> dict:
    """For checkpoints; without what is frozen if that lies in a `base`."""
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
            if not (base and f.name == "frozen")}


def model_builder(config: RunConfig, hr_size: int | None = None):
  """() -> the nnx module that the objective trains; hr_size: for pictures of another size than the
  model's own (the parameters are the same)."""
  dtype = jnp.dtype(config.dtype)
  if config.objective == "language":
    def build():
      rngs, shape = nnx.Rngs(config.seed), config.model.at(hr_size) if hr_size else config.model
      model = MiniGemini(shape, remat=config.remat, attention=config.attention, dtype=dtype,
                         rngs=rngs)
      adapt(model, config.lora, config.frozen_dtype, rngs=rngs)
      return model
    return build
  tower = config.objective.partition(":")[2]
  return lambda: Tagger(config.model, tower, remat_policy=config.remat.towers,
                        attention=config.attention, dtype=dtype, rngs=nnx.Rngs(config.seed))


def abstract_state(config: RunConfig, tx: optax.GradientTransformation,
                   mesh: Mesh) -> tuple[nnx.GraphDef, TrainState]:
  """Graph of the model and its TrainState as ShapeDtypeStructs on their shardings.

  Call it inside the mesh.  Raises ValueError if the optimizer table does not fit the parameters.
  """
  graphdef, shapes = abstract_params(model_builder(config), mesh)
  if not config.lora.rank and (rows := [r for r in config.optimizer.table if "lora_" in r.pattern]):
    raise ConfigError(f"config.lora.rank is 0, so that there are no adapters, but the row "
                      f"{rows[0].pattern!r} of config.optimizer.table trains them; give a rank, or "
                      "train without them (configs/stage2.py)")
  check_table(trees.flatten(shapes), config.optimizer.table)
  params, frozen = split_frozen(shapes, config.optimizer.table)
  check_adapters(config, trees.flatten(params))
  frozen = trees.unflatten({
      k: s if QUANTIZED_PART.search(k) else
      jax.ShapeDtypeStruct(s.shape, config.frozen_dtype, sharding=s.sharding)
      for k, s in trees.flatten(frozen).items()})
  whole = NamedSharding(mesh, P())
  opt_state = jax.eval_shape(tx.init, params)
  opt_state = optax.tree.map_params(
      lambda params: on_this_host(tx.init, params),
      lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p.sharding), opt_state, params,
      transform_non_params=lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole))
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
  return graphdef, TrainState(step, params, frozen, opt_state)


def check_adapters(config: RunConfig, trained: dict[str, jax.ShapeDtypeStruct]) -> None:
  """Raises ConfigError unless the optimizer's table trains adapters, and no layer that has some."""
  if not config.lora.used:
    return
  plain = dict.fromkeys(QUANTIZED_PART.sub("/kernel", k) for k in trained)
  if both := config.lora.changes(plain):
    raise ConfigError(f"config.optimizer.table trains {both[0]} whole, which config.lora keeps "
                      f"frozen ({len(both)} such); choose one: narrow config.lora.pattern, or "
                      "freeze them in the table (lr None)")
  if config.lora.rank and not any(ADAPTER.search(k) for k in trained):
    raise ConfigError("config.optimizer.table trains no adapter of config.lora; its first row may "
                      "be ('/lora_[ab]$', 1.0)")


def init_state(config: RunConfig, tx: optax.GradientTransformation,
               abstract: TrainState) -> tuple[TrainState, Base | None]:
  """The state at step 0: parameters from `config.init_from` where it names them, else random; and
  for a run with adapters the base that they are for.

  What is loaded is never drawn first.  Raises CheckpointError for a prefix that names nothing, and
  where a part of the base is in no checkpoint.
  """
  params, frozen = trees.flatten(abstract.params), trees.flatten(abstract.frozen)
  wanted = {k: v for k, v in params.items() if not ADAPTER.search(k)} | plain_frozen(
      config, abstract)
  homes = sources(config, wanted)
  drawn = {k: v for k, v in (params | frozen).items()
           if k not in homes and not QUANTIZED_PART.search(k)}
  if drawn:
    logging.info("starting from random numbers: %s", ", ".join(sorted(
        {"adapters" if ADAPTER.search(k) else _part(k) for k in drawn})))
  useless = {_part(k) for k in frozen} & {_part(k) for k in drawn if not ADAPTER.search(k)}
  if useless and config.data.images_per_row:
    logging.warning("%s: random and frozen; name a checkpoint that has it in config.init_from",
                    ", ".join(sorted(useless)))

  flat, base = {}, None
  if config.lora.used:
    base = base_of(homes, [k for k in wanted if k not in params])
    flat, base = load_frozen(config, abstract, base)
  rest = {k: home for k, home in homes.items() if k in params or not config.lora.used}
  for source in set(rest.values()):
    flat |= load_params(source, {k: wanted[k] for k, home in rest.items() if home == source})

  def draw():
    flat = trees.flatten(trees.pure(nnx.state(model_builder(config)())))
    return {k: flat[k].astype(v.dtype) for k, v in drawn.items()}

  flat |= jax.jit(draw, out_shardings={k: v.sharding for k, v in drawn.items()})()
  pick = lambda tree: trees.unflatten({k: flat[k] for k in trees.flatten(tree)})
  params, frozen = pick(abstract.params), pick(abstract.frozen)
  shardings = jax.tree.map(lambda s: s.sharding, abstract.opt_state)
  opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
  step = jax.device_put(jnp.zeros((), jnp.int32), abstract.step.sharding)
  return TrainState(step, params, frozen, opt_state), base


def resumed_state(config: RunConfig, abstract: TrainState, saved: dict,
                  workdir: Path) -> TrainState:
  """The state that a run saved, with what it left in its base.  Raises CheckpointError."""
  if not config.lora.used:
    return TrainState(**saved)
  frozen, _ = load_frozen(config, abstract, read_base(workdir))
  return TrainState(**saved, frozen=trees.unflatten(frozen))


def plain_frozen(config: RunConfig, abstract: TrainState) -> dict[str, jax.ShapeDtypeStruct]:
  """What is frozen, by path, with the matrices in place of what quantising makes of them."""
  frozen = trees.flatten(abstract.frozen)
  if not config.lora.base:
    return frozen
  plain = dataclasses.replace(config, lora=LoraConfig())
  shapes = trees.flatten(abstract_params(model_builder(plain), abstract.step.sharding.mesh)[1])
  return {k: jax.ShapeDtypeStruct(shapes[k].shape, config.frozen_dtype, sharding=shapes[k].sharding)
          for k in dict.fromkeys(QUANTIZED_PART.sub("/kernel", k) for k in frozen)}


def sources(config: RunConfig, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Path]:
  """Path of a parameter -> the folder of the step, of `config.init_from`, that it comes from.

  Raises CheckpointError for a prefix that names nothing, and for one of another model.
  """
  homes: dict[str, Path] = {}
  for prefix, source in config.init_from:
    chosen = [k for k in wanted if _starts(k, prefix) and k not in homes]
    if prefix == "":  # everything that the checkpoint has; what is new stays random
      held = held_parameters(source)
      parts = {_part(k) for k in held}
      if lost := [k for k in chosen if _part(k) in parts and k not in held]:
        raise CheckpointError(f"init_from: {source} has {_part(lost[0])}, but not {lost[0]} "
                              f"({len(lost)} such); it belongs to another model")
      chosen = [k for k in chosen if k in held]
    if not chosen:
      raise CheckpointError(f"init_from: {prefix!r} of {source} names no parameter that is still "
                            "to be set")
    check_same_parts(source, config, {_part(k) for k in chosen})
    homes |= dict.fromkeys(chosen, resolve(source))
  return homes


def base_of(homes: dict[str, Path], frozen: list[str]) -> Base:
  """The base, checksums not known yet, of what is frozen.  Raises CheckpointError."""
  if lost := [k for k in frozen if k not in homes]:
    raise CheckpointError(f"config.lora: {lost[0]} is frozen and comes from no checkpoint "
                          f"({len(lost)} such); name the base model in config.init_from")
  for run in {homes[k].parent.parent for k in frozen}:
    if read_base(run) is not None:
      raise CheckpointError(f"config.lora: {run} has adapters itself, it is no base for others; "
                            "merge it first: python -m conversion.to_hf, then conversion.from_hf")
  return Base({k: (homes[k], None) for k in frozen})


def load_frozen(config: RunConfig, abstract: TrainState, base: Base) -> tuple[dict, Base]:
  """What is frozen, by path, from its base; matrices are quantised as they come, the same of all
  layers at a time.  Also the base with all its checksums.  Raises CheckpointError."""
  frozen, plain = trees.flatten(abstract.frozen), plain_frozen(config, abstract)
  changed = config.lora.changes(plain) if config.lora.base else []
  flat, checksums = {}, {}
  for group in [[k for k in plain if k not in changed]] + [[k] for k in changed]:
    got, found = base.read(load_params, {k: plain[k] for k in group})
    checksums |= found
    for path, value in got.items():
      if path in changed:
        parts = {k: s.sharding for k, s in frozen.items() if k.startswith(path + "/")}
        flat |= zip(parts, _quantized(value, config.lora.base, tuple(parts.values())))
      else:
        flat[path] = value
  return flat, Base({k: (base.parameters[k][0], n) for k, n in checksums.items()})


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantized(w, name, shardings):
  return tuple(map(jax.lax.with_sharding_constraint, _quantized_layers(w, name), shardings))


def _quantized_layers(w, name):
  if w.ndim == 2:
    return kept_parts(w, name)
  return jax.lax.map(lambda layer: _quantized_layers(layer, name), w)


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
