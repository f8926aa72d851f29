"""Checkpoints: the only place that talks to orbax.

A run's folder holds `config.json` (the resolved run), `tokenizer/`, and `checkpoints/<step>/` with
the items `state` (step, params, frozen, opt_state) and `data` (the position in the data).
"""
from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from mgjax import trees
from mgjax.config import ModelConfig, build
from mgjax.models.mini_gemini import MiniGemini
from mgjax.sharding import shardings_of

CONFIG, TOKENIZER, STEPS = "config.json", "tokenizer", "checkpoints"


class CheckpointError(ValueError):
  """A checkpoint that is missing, damaged, or of another model."""


class Checkpointer:
  """Saves and restores the training state of one run folder; saving does not hold up the step."""

  def __init__(self, workdir: Path, *, every: int, keep: int):
    self.directory = Path(workdir).absolute() / STEPS
    policies = ocp.training
    self._inner = policies.Checkpointer(
        self.directory,
        save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(every),
        preservation_policy=policies.preservation_policies.LatestN(keep))

  @property
  def latest(self) -> int | None:
    """Step of the newest complete checkpoint."""
    return self._inner.latest.step if self._inner.latest else None

  def save(self, step: int, state: dict, data: Any, *, force: bool = False) -> None:
    """Saves in the background if the step is due (or `force`).  Call it *before* the next batch is
    taken from `data`: the position saved is that of the iterator now."""
    if step == self.latest:
      return
    self._inner.save_checkpointables_async(step, dict(state=state, data=data), force=force)

  def restore(self, abstract_state: dict, data: Any) -> dict:
    """The newest state on the shardings of `abstract_state`; `data` is moved to its position.

    Raises CheckpointError if the checkpoint belongs to another model or is damaged.
    """
    folder = self.directory / str(self.latest)
    _check_shapes(trees.flatten(abstract_state), _saved_shapes(folder), folder)
    try:
      return self._inner.load_checkpointables(
          None, dict(state=abstract_state, data=data))["state"]
    except Exception as e:
      raise CheckpointError(f"{folder}: cannot be read ({type(e).__name__}: {_first_line(e)}); "
                            f"delete that folder to go on from the step before") from e

  def close(self) -> None:
    """Waits until what is being saved is on disk."""
    self._inner.close()


def _first_line(e) -> str:
  return (str(e).splitlines() or [""])[0][:300]


def resolve(path: str | Path) -> Path:
  """A run folder, its `checkpoints` folder or one step -> the folder of one step, the newest.

  Raises CheckpointError if there is none.
  """
  path = Path(path).absolute()
  for root in (path, path / STEPS):
    if (root / "state").is_dir():
      return root
    if root.is_dir():
      # A step that was being written when the run died has no commit mark, or a temporary name.
      steps = [int(p.name) for p in root.iterdir() if p.name.isdigit() and (p / "state").is_dir()]
      if steps:
        return root / str(max(steps))
  raise CheckpointError(f"{path}: no checkpoint found; expected a run folder with "
                        f"{STEPS}/<step>, or one such step")


def _saved_shapes(folder: Path) -> dict[str, Any]:
  try:
    metadata = ocp.pytree_metadata(folder / "state").metadata
  except Exception:
    try:
      metadata = ocp.checkpointables_metadata(folder).metadata["state"]
    except Exception as e:
      raise CheckpointError(f"{folder}: not a readable checkpoint ({_first_line(e)})") from e
  return trees.flatten(metadata)


def _check_shapes(wanted: dict[str, Any], saved: dict[str, Any], folder: Path) -> None:
  missing = [k for k in wanted if k not in saved]
  if missing:
    raise CheckpointError(f"{folder}: {missing[0]} is not in it ({len(missing)} such); it belongs "
                          "to a model or a stage of another shape")
  for k, v in wanted.items():
    if tuple(saved[k].shape) != tuple(v.shape):
      raise CheckpointError(f"{folder}: {k} has shape {tuple(saved[k].shape)} there and "
                            f"{tuple(v.shape)} in this config; it belongs to another model")


def load_params(path: str | Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """Model parameters by path, wherever in the state they lie, in the dtype and sharding wanted.

  Raises CheckpointError if one is missing or has another shape.
  """
  folder = resolve(path)
  saved = _saved_shapes(folder)
  home = {}  # path of a parameter -> its path in the saved state
  for key in saved:
    part, _, name = key.partition("/")
    if part in ("params", "frozen"):
      home[name] = key
  missing = sorted(set(wanted) - set(home))
  if missing:
    raise CheckpointError(f"{folder}: {len(wanted)} parameters wanted, {len(missing)} not in it; "
                          f"the first is {missing[0]}; it belongs to another model")
  request = {home[k]: v for k, v in wanted.items()}
  _check_shapes(request, saved, folder)
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  try:
    with context:
      got = ocp.load_checkpointables(folder, dict(state=trees.unflatten(request)))["state"]
  except Exception as e:
    raise CheckpointError(f"{folder}: cannot be read ({type(e).__name__}: {_first_line(e)})") from e
  got = trees.flatten(got)
  return {k: got[home[k]] for k in wanted}


def parameter_paths(path: str | Path) -> list[str]:
  """Paths of the model parameters that a checkpoint holds."""
  parts = (k.partition("/") for k in _saved_shapes(resolve(path)))
  return [name for part, _, name in parts if part in ("params", "frozen")]


def write_run(workdir: Path, config: dict, tokenizer_dir: str | Path) -> None:
  """Puts the resolved config and a copy of the tokenizer beside the checkpoints."""
  workdir = Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
  if not (workdir / TOKENIZER).exists():
    shutil.copytree(tokenizer_dir, workdir / TOKENIZER)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """What inference needs of a checkpoint."""

  model: MiniGemini
  config: ModelConfig
  tokenizer_dir: Path
  template: str
  aspect: str
  max_length: int
  step: int


def load_model(path: str | Path, mesh: Mesh, *, dtype=jnp.bfloat16) -> LoadedModel:
  """A trained model ready to answer, its parameters in `dtype` on `mesh`.  Call it inside
  `mesh_context(mesh)`.  Raises CheckpointError."""
  step_dir = resolve(path)
  workdir = step_dir.parent.parent if step_dir.parent.name == STEPS else step_dir.parent
  if not (workdir / CONFIG).is_file():
    raise CheckpointError(f"{workdir}: {CONFIG} is missing; expected a run folder")
  run = json.loads((workdir / CONFIG).read_text())
  if run["objective"] != "language":
    raise CheckpointError(f"{workdir}: this run trained a tower alone ({run['objective']}); "
                          "it cannot answer")
  config = build(ModelConfig, run["model"], f"{workdir / CONFIG}: model")
  graphdef, abstract = abstract_params(lambda: MiniGemini(config, dtype=dtype, rngs=nnx.Rngs(0)),
                                       mesh)
  wanted = {k: jax.ShapeDtypeStruct(v.shape, dtype, sharding=v.sharding)
            for k, v in trees.flatten(abstract).items()}
  params = trees.unflatten(load_params(step_dir, wanted))
  data = run["data"]
  return LoadedModel(
      model=nnx.merge(graphdef, params), config=config, tokenizer_dir=workdir / TOKENIZER,
      template=run["chat_template"] or data["template"],
      aspect=run["chat_aspect"] or data["aspect"],
      max_length=data["max_length"], step=int(step_dir.name))


def abstract_params(build, mesh: Mesh) -> tuple[nnx.GraphDef, dict]:
  """Graph and parameters (ShapeDtypeStructs on their shardings) of a model that is not built.
  Call it inside the mesh."""
  graphdef, state = nnx.split(nnx.eval_shape(build))
  shapes = trees.pure(state)
  shardings = shardings_of(shapes, mesh)
  make = lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)
  return graphdef, jax.tree.map(make, shapes, shardings)
