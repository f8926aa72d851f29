"""Checkpoints: the only place that talks to orbax.

A run's folder holds `config.json` (the resolved run), `tokenizer/`, and `checkpoints/<step>/` with
the items `state` (step, params, frozen, opt_state) and `data` (the position in the data, the same
for all hosts).  A run with adapters saves no `frozen`: its `base.json` says where that lies.
`origin/`, where the weights came from a HuggingFace folder, holds what its config files said, for
the way back.
"""
from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import multihost as ocp_multihost
from orbax.checkpoint import v1 as ocp

from mgjax import trees
from mgjax.adapter_base import load_merged, read_base
from mgjax.config import CheckpointError, ModelConfig, build
from mgjax.models.lora import ADAPTER, LoraConfig
from mgjax.models.mini_gemini import MiniGemini
from mgjax.sharding import shardings_of

CONFIG, TOKENIZER, ORIGIN, STEPS = "config.json", "tokenizer", "origin", "checkpoints"
TOKENIZER_2 = "tokenizer_2"  # of SDXL's second text encoder
MGM, SDXL = "mgm", "sdxl"  # the kinds of model; a config.json that names none means the first
# Files of a HuggingFace folder that `origin` keeps beside its config.json.
SETTINGS = ("generation_config.json", "preprocessor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                   "chat_template.jinja")


class Checkpointer:
  """Saves and restores the training state of one run folder; saving does not hold up the step."""

  def __init__(self, workdir: Path, *, every: int, keep: int):
    self.directory = Path(workdir).absolute() / STEPS
    self._every, self._keep = every, keep
    self._open()

  def _open(self) -> None:
    policies = ocp.training
    self._inner = policies.Checkpointer(
        self.directory,
        save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(self._every),
        preservation_policy=policies.preservation_policies.LatestN(self._keep))
    # Orbax would ask jax, by the number of the step, whether this is where all hosts stop.  The run
    # asks by a count of its own (hosts.stop_notice); mixed up, the hosts never agree on a place.
    self._inner._manager.reached_preemption = lambda step: False

  @property
  def latest(self) -> int | None:
    """Step of the newest complete checkpoint."""
    return self._inner.latest.step if self._inner.latest else None

  def save(self, step: int, state: dict, data: dict, *, force: bool = False) -> None:
    """Saves in the background if the step is due (or `force`).

    data: the position in the data *behind this step's batch*, as plain numbers.
    """
    if step == self.latest:
      return
    with _saving():
      self._inner.save_checkpointables_async(step, dict(state=state, data=data), force=force)

  def restore(self, abstract_state: dict) -> tuple[dict, dict]:
    """The newest readable state, on the shardings of `abstract_state`, and its place in the data.

    A damaged checkpoint is put aside for the one before it, with a warning.  Raises CheckpointError
    if the checkpoint belongs to another model, or if none can be read.
    """
    steps = sorted((c.step for c in self._inner.checkpoints), reverse=True)
    for step in steps:
      folder = self.directory / str(step)
      try:
        saved = _saved_shapes(folder)
        _check_shapes(trees.flatten(abstract_state), saved, folder, all_of_it=True)
        got = self._inner.load_checkpointables(step, dict(state=abstract_state, data=None))
        self._put_aside([s for s in steps if s > step])
        return got["state"], got["data"]
      except DamagedCheckpoint as e:
        logging.warning("%s", e)
      except CheckpointError:
        raise
      # Broken files; an error of another kind (no memory, say) must not cost a good checkpoint.
      except (ValueError, KeyError, OSError) as e:
        logging.warning("%s: cannot be read (%s: %s)", folder, type(e).__name__, _first_line(e))
    raise CheckpointError(f"{self.directory}: none of the steps {steps} can be read; start in "
                          "another workdir, with init_from for what can be saved")

  def _put_aside(self, steps: list[int]) -> None:
    if not steps:
      return
    self._inner.close()
    if jax.process_index() == 0:
      aside = self.directory.parent / "damaged"
      aside.mkdir(exist_ok=True)
      for step in steps:
        (self.directory / str(step)).rename(aside / f"{step}-{time.time_ns()}")
    multihost_utils.sync_global_devices("damaged checkpoints are put aside")
    self._open()

  def close(self) -> None:
    """Waits until what is being saved is on disk."""
    self._inner.close()


CHUNK = 64 << 20  # bytes


def _saving() -> ocp.Context:
  """Large arrays are saved in pieces, stacks layer by layer, so that a layer can be read alone."""
  def storage(keypath, value):
    if getattr(value, "nbytes", 0) <= CHUNK:
      return None
    stacked = "/blocks/" in jax.tree_util.keystr(keypath, simple=True, separator="/")
    return ocp.options.ArrayOptions.Saving.StorageOptions(
        chunk_byte_size=CHUNK, shard_axes=(0,) if stacked else None)

  context = ocp.Context()
  context.array.saving.scoped_storage_options_creator = storage
  return context


class DamagedCheckpoint(CheckpointError):
  """Files of a checkpoint are missing or broken."""


def _first_line(e) -> str:
  return (str(e).splitlines() or [""])[0][:300]


def wait_for_hosts(name: str, seconds: float) -> None:
  """Returns when all hosts have come to this call, in whatever time each needed (collectives of the
  CPU wait half a minute for each other)."""
  ocp_multihost.get_barrier_sync_fn()(key=name, timeout_ms=int(1000 * seconds))


def resolve(path: str | Path) -> Path:
  """A run folder, its `checkpoints` folder or one step -> the folder of one step, the newest.

  Raises CheckpointError if there is none.
  """
  path = Path(path).absolute()
  for root in (path, path / STEPS):
    if (root / "state").is_dir():
      return root
    if root.is_dir():
      # A step that was being written when the run died has a temporary name.
      steps = [int(p.name) for p in root.iterdir() if p.name.isdigit() and (p / "state").is_dir()]
      if steps:
        return root / str(max(steps))
  raise CheckpointError(f"{path}: no checkpoint found; expected a run folder with "
                        f"{STEPS}/<step>, or one such step")


def _saved_shapes(folder: Path) -> dict[str, Any]:
  try:
    metadata = ocp.checkpointables_metadata(folder).metadata["state"]
  except Exception as e:
    raise DamagedCheckpoint(f"{folder}: not a readable checkpoint ({type(e).__name__}: "
                            f"{_first_line(e)})") from e
  if metadata is None:
    raise DamagedCheckpoint(f"{folder}: not a readable checkpoint; the list of its arrays is lost")
  return trees.flatten(metadata)


def _check_shapes(wanted: dict[str, Any], saved: dict[str, Any], folder: Path, *,
                  all_of_it: bool = False) -> None:
  missing = [k for k in wanted if k not in saved]
  if missing:
    raise CheckpointError(f"{folder}: {missing[0]} is not in it ({len(missing)} such); it belongs "
                          "to a model or a stage of another shape")
  extra = [k for k in saved if k not in wanted] if all_of_it else []
  if extra:
    raise CheckpointError(f"{folder}: it holds {extra[0]}, which this config has not ({len(extra)} "
                          "such); it belongs to a model or a stage of another shape")
  for k, v in wanted.items():
    if tuple(saved[k].shape) != tuple(v.shape):
      raise CheckpointError(f"{folder}: {k} has shape {tuple(saved[k].shape)} there and "
                            f"{tuple(v.shape)} in this config; it belongs to another model")


def load_params(path: str | Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """Model parameters by path, wherever in the state they lie, in the dtype and sharding wanted; of
  a run with adapters those of its base, with what the adapters learned merged into them.

  Raises CheckpointError if one is missing or has another shape.
  """
  folder = resolve(path)
  base = read_base(folder.parent.parent)
  if base is None:
    return _load_held(folder, wanted)
  _require(folder, wanted, held_parameters(folder))
  run = read_run(folder, None)[1]
  return load_merged(_load_held, folder, base, lora_of(run, folder), run["frozen_dtype"],
                     set(parameter_homes(folder)), wanted)


def lora_of(run: dict, where: Path) -> LoraConfig:
  """What a run's config.json says of adapters."""
  return build(LoraConfig, run.get("lora", {}), f"{where}: lora")


def _load_held(folder: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """As `load_params`, of what the folder of a step holds itself."""
  saved, home = _saved_shapes(folder), parameter_homes(folder)
  _require(folder, wanted, home)
  request = {home[k]: v for k, v in wanted.items()}
  if not request:
    return {}
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


def _require(folder: Path, wanted: Iterable[str], held: Container[str]) -> None:
  wanted = list(wanted)
  if missing := sorted(k for k in wanted if k not in held):
    raise CheckpointError(f"{folder}: {len(wanted)} parameters wanted, {len(missing)} not in it; "
                          f"the first is {missing[0]}; it belongs to another model")


def held_parameters(path: str | Path) -> set[str]:
  """Paths of the model parameters that `load_params` finds.  Raises CheckpointError."""
  folder = resolve(path)
  own, base = set(parameter_homes(folder)), read_base(folder.parent.parent)
  return own if base is None else {k for k in own if not ADAPTER.search(k)} | {*base.parameters}


def parameter_homes(path: str | Path) -> dict[str, str]:
  """Path of each model parameter that a checkpoint holds itself -> its path in the saved state."""
  homes = {}
  for key in _saved_shapes(resolve(path)):
    part, _, name = key.partition("/")
    if part in ("params", "frozen"):
      homes[name] = key
  return homes


def write_run(workdir: Path, config: dict, tokenizer_dir: str | Path | None,
              origin: Path | None = None) -> None:
  """Puts the resolved config and copies of the tokenizer and of `origin` beside the checkpoints."""
  workdir.mkdir(parents=True, exist_ok=True)
  if tokenizer_dir:
    names = TOKENIZER_FILES  # the folder may hold a whole model as well
    _copy_files([Path(tokenizer_dir) / n for n in names], workdir / TOKENIZER)
  if origin:
    _copy_files(list(origin.iterdir()), workdir / ORIGIN)
  unfinished = workdir / f"{CONFIG}.part"
  unfinished.write_text(json.dumps(config, indent=2) + "\n")
  unfinished.rename(workdir / CONFIG)


def _copy_files(files: list[Path], folder: Path) -> None:
  """Copies those that exist, unless `folder` is there already; it appears whole."""
  if folder.exists():
    return
  unfinished = folder.with_name(f"{folder.name}.part")
  shutil.rmtree(unfinished, ignore_errors=True)
  unfinished.mkdir()
  for file in files:
    if file.is_file():
      shutil.copy(file, unfinished)
  unfinished.rename(folder)


def read_run(path: str | Path, kind: str | None = MGM) -> tuple[Path, dict]:
  """A checkpoint (see `resolve`) -> the folder of its step, and the run's config.json.

  Raises CheckpointError where there is none, or one of another kind of model; None takes any.
  """
  step_dir = resolve(path)
  config = step_dir.parent.parent / CONFIG
  try:
    run = json.loads(config.read_text())
  except (OSError, ValueError) as e:
    raise CheckpointError(f"{config}: cannot be read ({_first_line(e)}); a checkpoint is a run's "
                          f"folder, or <run>/{STEPS}/<step> within it") from e
  if kind not in (None, held := run.get("kind", MGM)):
    uses = {SDXL: "SDXL, which draws pictures", MGM: "a Mini-Gemini, which answers in text"}
    raise CheckpointError(f"{config}: it holds {uses.get(held, held)}; expected {uses[kind]}")
  return step_dir, run


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """What inference needs of a checkpoint."""

  model: MiniGemini
  config: ModelConfig
  tokenizer_dir: Path
  template: str
  aspect: str
  stop_ids: tuple[int, ...]
  max_length: int


def load_model(path: str | Path, mesh: Mesh, *, dtype=jnp.bfloat16,
               leave: Callable[[str], bool] = lambda path: False) -> LoadedModel:
  """A trained model ready to answer, its parameters in `dtype` on `mesh`.  Call it inside
  `mesh_context(mesh)`.  Raises CheckpointError.

  leave: tells by their path which parameters are not read; they are ShapeDtypeStructs then.
  """
  step_dir, run = read_run(path)
  workdir = step_dir.parent.parent
  if run["objective"] != "language":
    raise CheckpointError(f"{workdir}: this run trained a tower alone ({run['objective']}); "
                          "it cannot answer")
  config = build(ModelConfig, run["model"], f"{workdir / CONFIG}: model")
  graphdef, abstract = abstract_params(lambda: MiniGemini(config, dtype=dtype, rngs=nnx.Rngs(0)),
                                       mesh)
  wanted = {k: jax.ShapeDtypeStruct(v.shape, dtype, sharding=v.sharding)
            for k, v in trees.flatten(abstract).items()}
  read = load_params(step_dir, {k: v for k, v in wanted.items() if not leave(k)})
  params = trees.unflatten(wanted | read)
  data = run["data"]
  return LoadedModel(
      model=nnx.merge(graphdef, params), config=config, tokenizer_dir=workdir / TOKENIZER,
      template=run["chat_template"] or data["template"],
      aspect=run["chat_aspect"] or data["aspect"],
      stop_ids=tuple(run.get("chat_stop_ids", ())), max_length=data["max_length"])


class NoKeys(nnx.Rngs):
  """For a model of which only shapes are wanted.  Traced, flax's own count of keys takes time that
  grows with the square of their number: 7 s for SDXL, against 2 s."""

  def __call__(self) -> jax.Array:
    return jax.random.key(0)


def abstract_params(build, mesh: Mesh) -> tuple[nnx.GraphDef, dict]:
  """Graph and parameters (ShapeDtypeStructs on their shardings) of a model that is not built.
  Call it inside the mesh."""
  graphdef, state = nnx.split(nnx.eval_shape(build))
  shapes = trees.pure(state)
  shardings = shardings_of(shapes, mesh)
  make = lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)
  return graphdef, jax.tree.map(make, shapes, shardings)
