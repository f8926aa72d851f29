"""AdamW whose learning rate, weight decay and frozen parts are read off one table of paths."""
from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mgjax import trees
from mgjax.config import ConfigError, at_least


@dataclasses.dataclass(frozen=True)
class Row:
  """Parameters whose path matches `pattern` (re.search; the first row that matches counts).

  lr: multiplier of the learning rate; None freezes them.
  layers: (first, end) of a stacked array that train, the other layers staying as they are;
    negative numbers count from the end, None is open.  None: all.
  """

  pattern: str
  lr: float | None = 1.0
  layers: tuple[int | None, int | None] | None = None

  def __post_init__(self):
    try:
      re.compile(self.pattern)
    except re.error as error:
      raise ConfigError(f"optimizer: {self.pattern!r} is no regular expression ({error})"
                        ) from error
    at_least(self, 0, "lr")


# What the original never decays (R4.4): biases and the parameters of norms.
NO_DECAY = r"(/bias|norm[^/]*/scale)$"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW and its schedule; the defaults are the recipe's (R4.3)."""

  learning_rate: float = 1e-3
  table: tuple[Row, ...] = (Row(""),)
  schedule: str = "cosine"  # cosine | linear | constant
  warmup_ratio: float = 0.03
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float | None = None  # the published recipe does not clip (R4.3)
  no_decay: str = NO_DECAY  # pattern of the parameters that weight decay leaves alone

  def __post_init__(self):
    if self.schedule not in ("cosine", "linear", "constant"):
      raise ConfigError(f"optimizer: schedule {self.schedule!r}; one of cosine, linear, constant")
    at_least(self, 0, "learning_rate", "warmup_ratio", "b1", "b2", "eps", "weight_decay",
             "clip_norm")


def row_of(path: str, table: tuple[Row, ...]) -> Row:
  """The row that governs a parameter.  Raises ConfigError if none does."""
  for row in table:
    if re.search(row.pattern, path):
      return row
  raise ConfigError(f"optimizer: no row of the table covers {path!r}; add one (lr=None freezes)")


def check_table(shapes: dict[str, jax.ShapeDtypeStruct], table: tuple[Row, ...]) -> None:
  """Raises ConfigError for a parameter (by path) that no row covers, for a row that covers none,
  and for `layers` of what is no stack of so many layers."""
  used = set()
  for path, s in shapes.items():
    row = row_of(path, table)
    used.add(row.pattern)
    if row.layers is not None and ("/blocks/" not in path
                                   or not range(s.shape[0])[slice(*row.layers)]):
      depth = f"has {s.shape[0]} layers" if "/blocks/" in path else "is no stack of layers"
      raise ConfigError(f"optimizer: row {row.pattern!r} takes layers {row.layers}, but {path} "
                        f"{depth}; narrow the pattern, e.g. '^vision/blocks/'")
  idle = [row.pattern for row in table if row.pattern not in used]
  if idle:
    raise ConfigError(f"optimizer: rows {idle} cover no parameter (or stand behind rows that cover "
                     f"all they match); parameters start with "
                     f"{', '.join(sorted({p.split('/')[0] for p in shapes}))}")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Learning rate before multipliers at update 0, 1, ...: warm-up from 0, then to 0 (R4.5)."""
  warmup = 0 if config.schedule == "constant" else math.ceil(config.warmup_ratio * steps)

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    progress = jnp.clip((step - warmup) / max(1, steps - warmup), 0, 1)
    decay = {"cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)), "linear": 1 - progress,
             "constant": jnp.ones(())}[config.schedule]
    return config.learning_rate * jnp.where(step < warmup, step / max(1, warmup), decay)

  return schedule


class _Count(NamedTuple):
  count: jax.Array


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """The whole update; state is shaped like the parameters, so that it is sharded like them."""
  clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
  return optax.chain(*clip, adam, _scale_by_table(config, make_schedule(config, steps)))


def mask_layers(tree: Any, table: tuple[Row, ...]) -> Any:
  """Zeroes what belongs to layers that a row leaves out.  Applied to gradients and updates."""
  def leaf(path, x):
    row = row_of(path, table)
    if row.layers is None:
      return x
    chosen = jnp.zeros(x.shape[0], x.dtype).at[slice(*row.layers)].set(1)
    return x * chosen.reshape(-1, *[1] * (x.ndim - 1))
  return _map_paths(leaf, tree)


def _scale_by_table(config: OptimizerConfig, schedule) -> optax.GradientTransformation:
  """u -> -lr * multiplier * (u + weight_decay * p), decay decoupled from the moments (AdamW)."""
  def init(params):
    del params
    return _Count(jnp.zeros((), jnp.int32))

  def update(updates, state, params):
    lr = schedule(state.count)

    def leaf(path, u, p):
      decay = 0.0 if re.search(config.no_decay, path) else config.weight_decay
      return -lr * row_of(path, config.table).lr * (u + decay * p)

    updates = mask_layers(_map_paths(leaf, updates, params), config.table)
    return updates, _Count(state.count + 1)

  return optax.GradientTransformation(init, update)


def _map_paths(f, tree, *rest):
  return jax.tree.map_with_path(
      lambda kp, *leaves: f(jax.tree_util.keystr(kp, simple=True, separator="/"), *leaves),
      tree, *rest)


def split_frozen(params: dict, table: tuple[Row, ...]) -> tuple[dict, dict]:
  """Nested parameters -> (trained, frozen), by the table."""
  flat = trees.flatten(params)
  frozen = {k: v for k, v in flat.items() if row_of(k, table).lr is None}
  trained = {k: v for k, v in flat.items() if k not in frozen}
  return trees.unflatten(trained), trees.unflatten(frozen)
