"""A run, told in order: data, mesh, state, compiled step, loop."""
from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mgjax import trees
from mgjax.checkpoint import (
    ORIGIN,
    TOKENIZER,
    Checkpointer,
    abstract_params,
    read_run,
    resolve,
    write_run,
)
from mgjax.config import ConfigError
from mgjax.data.packing import Format
from mgjax.data.pipeline import Pipeline, batch_arrays, make_pipeline
from mgjax.data.samples import DataError
from mgjax.data.tokenizer import Tokenizer, load_tokenizer
from mgjax.sharding import batch_sharding, batch_shards, check_heads, make_mesh, mesh_context
from mgjax.train import metrics as metrics_lib
from mgjax.train.config import RunConfig
from mgjax.train.optimizer import make_optimizer
from mgjax.train.prefetch import Prefetcher
from mgjax.train.state import TrainState, abstract_state, init_state, model_builder
from mgjax.train.step import make_train_step


class TrainingError(RuntimeError):
  """The run cannot go on; the message says at which step, on what, and what to do."""


def train(config: RunConfig, workdir: str | Path, *, name: str = "train") -> int:
  """Runs, or resumes, one training run in `workdir` and returns the step it stands at.

  SIGTERM saves and returns early.  Raises TrainingError when the loss is no longer finite (before
  the update); ConfigError, DataError, CheckpointError for what does not fit together.
  """
  if "://" in str(workdir):
    raise ConfigError(f"workdir {workdir}: only folders of the file system; mount the bucket")
  workdir = Path(workdir).absolute()
  with stop_signal() as stop:
    checkpointer = Checkpointer(workdir, every=config.checkpoint.every, keep=config.checkpoint.keep)
    try:
      return _train(config, workdir, name, stop, checkpointer)
    finally:
      checkpointer.close()


def _train(config: RunConfig, workdir: Path, name: str, stop: threading.Event,
           checkpointer: Checkpointer) -> int:
  resuming = checkpointer.latest is not None
  if resuming:
    check_same_run(workdir, config)
    if config.steps and checkpointer.latest >= config.steps:
      return checkpointer.latest
  config = dataclasses.replace(config, tokenizer=str(tokenizer_folder(config, workdir)),
                               chat_stop_ids=config.chat_stop_ids or inherited_stop_ids(config))
  tokenizer = load_tokenizer(config.tokenizer)
  check_vocabulary(tokenizer, config)
  mesh = make_mesh(dataclasses.astuple(config.mesh))
  check_heads(config.model.decoder, mesh)
  check_batch(config, mesh)
  data = make_pipeline(config.data, tokenizer, host=jax.process_index(),
                       hosts=jax.process_count())
  batches, main_host = iter(data), jax.process_index() == 0
  steps = config.steps or data.steps(config.epochs)
  with mesh_context(mesh), contextlib.closing(batches):
    tx = make_optimizer(config.optimizer, steps)
    abstract = abstract_state(config, tx, mesh)[1]
    if resuming:
      saved, position = checkpointer.restore(abstract.as_dict())
      state = TrainState(**saved)
      batches.set_state(position)
      logging.info("%s: resuming %s at step %d", name, workdir, state.step)
    else:
      state = init_state(config, tx, abstract)
    start = int(state.step)
    if start >= steps:
      return start
    if main_host:
      write_run(workdir, dataclasses.asdict(config), config.tokenizer, origin_folder(config))
      metrics_lib.truncate_after(workdir / "metrics.jsonl", start)
      write_problems(workdir / "skipped.jsonl", data)
      describe(config, abstract, data, steps)
    compiled = CompiledSteps(config, tx, steps, abstract, mesh)
    compiled.prepare(data.formats_of_epoch(0))
    log = metrics_lib.Metrics(workdir, name=name, start=start, steps=steps, enabled=main_host)
    fetched = Prefetcher(batches, lambda batch: put(batch, mesh), steps - start)
    with contextlib.closing(log), contextlib.closing(fetched):
      if agreed(stop.is_set()):
        return start
      batch, bad = next(fetched), None
      log.restart_clock()
      for step in range(start + 1, steps + 1):
        shape, done = data.format_of(batch.host), batch
        state, metrics = compiled[shape](state, batch.device)
        metrics = jax.device_get(metrics)  # meanwhile a thread fetches what comes next
        if not metrics.pop("finite"):
          raise TrainingError(explain_nonfinite(step, metrics, done.host, data))
        batch = None
        if step < steps:
          try:
            batch = next(fetched)
          except DataError as error:
            bad = error  # what this step learnt is saved first
        stopping = agreed(stop.is_set() or bad is not None)
        due = step == steps or stopping
        checkpointer.save(step, state.as_dict(), done.position, force=due)
        log.write(step, metrics | skipped(done.position), usage(done.host, shape),
                  waited=fetched.waited if batch else 0.0,
                  show=step % config.log_every == 0 or due)
        if bad is not None:
          raise bad
        if stopping:
          logging.warning("%s: stop signal; saved step %d of %d", name, step, steps)
          return step
  return steps


# What may differ when a run goes on; everything else makes it another run.
_MAY_CHANGE = ("tokenizer", "init_from", "mesh", "remat", "checkpoint", "log_every", "steps",
               "epochs", "accumulate", "chat_template", "chat_aspect", "chat_stop_ids")
_DATA_MAY_CHANGE = ("image_root", "on_error", "workers", "threads", "scan_limit")


def check_same_run(workdir: Path, config: RunConfig) -> None:
  """Raises ConfigError if the run in `workdir` was of another model; warns of other differences."""
  before = trees.flatten(_plain(read_run(workdir)[1]))
  now = trees.flatten(_plain(dataclasses.asdict(config)))
  changed = [k for k in before.keys() | now.keys() if before.get(k) != now.get(k)]
  tell = lambda k: f"{k.replace('/', '.')} was {before.get(k)} and is {now.get(k)}"
  for key in sorted(changed):
    if key.split("/")[0] in ("model", "objective"):
      raise ConfigError(f"workdir {workdir} holds another run: {tell(key)}; choose another workdir")
  free = lambda k: k.split("/")[0] in _MAY_CHANGE or k.removeprefix("data/") in _DATA_MAY_CHANGE
  if told := [tell(k) for k in sorted(changed) if not free(k)]:
    logging.warning("%s goes on with other settings: %s", workdir, "; ".join(told))


def _plain(tree):
  """Dicts down to strings; sequences and None as text, which is all that a comparison needs."""
  if isinstance(tree, dict):
    return {k: _plain(v) for k, v in tree.items()}
  return json.dumps(tree)


def tokenizer_folder(config: RunConfig, workdir: Path) -> Path:
  """That of the run being resumed, else `config.tokenizer`, else what came with the checkpoint to
  start from."""
  if (workdir / TOKENIZER).is_dir():
    return workdir / TOKENIZER
  if config.tokenizer:
    return Path(config.tokenizer)
  for _, source in config.init_from:
    if (folder := resolve(source).parent.parent / TOKENIZER).is_dir():
      return folder
  raise ConfigError("config.tokenizer is empty and config.init_from brings none; give the folder "
                    "that holds tokenizer.json or tokenizer.model: --config.tokenizer=FOLDER")


def check_vocabulary(tokenizer: Tokenizer, config: RunConfig) -> None:
  """Raises ConfigError if the tokenizer has entries that the model has not."""
  if tokenizer.vocab_size > config.model.decoder.vocab_size:
    raise ConfigError(f"tokenizer {config.tokenizer or tokenizer.name} has "
                      f"{tokenizer.vocab_size} entries, the model "
                      f"{config.model.decoder.vocab_size}; they belong to different models")


def language_sources(config: RunConfig) -> list[Path]:
  """The runs that the language model starts from."""
  return [resolve(source).parent.parent for prefix, source in config.init_from
          if prefix in ("", "decoder")]


def inherited_stop_ids(config: RunConfig) -> tuple[int, ...]:
  """The stop ids that the language model came with."""
  runs = [read_run(folder)[1] for folder in language_sources(config)]
  return tuple(next((run["chat_stop_ids"] for run in runs if run.get("chat_stop_ids")), ()))


def origin_folder(config: RunConfig) -> Path | None:
  """What the language model's checkpoint says of the HuggingFace folder that it came from."""
  folders = [folder / ORIGIN for folder in language_sources(config)]
  return next((folder for folder in folders if folder.is_dir()), None)


def check_batch(config: RunConfig, mesh: Mesh) -> None:
  """Raises ConfigError if the rows of a micro-batch do not divide among the batch axes, or these
  among the hosts."""
  shards = batch_shards(mesh)
  for batch_size in (r.batch_size for r in config.data.all_resolutions):
    rows = batch_size // config.accumulate
    if rows % shards:
      raise ConfigError(
          f"config.data: batch_size {batch_size} / accumulate {config.accumulate} = {rows} rows, "
          f"which mesh {dict(mesh.shape)} cannot share among data x fsdp = {shards}; use a "
          f"multiple of {shards * config.accumulate}")
  if shards % jax.process_count():
    raise ConfigError(
        f"mesh {dict(mesh.shape)}: data x fsdp = {shards} does not divide among "
        f"{jax.process_count()} hosts, each of which reads its own rows; use a smaller tensor axis")


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
      self._made[shape] = self._compile(shape)
      logging.info("compiled the step for %s in %.0f s", shape, time.perf_counter() - started)
    return self._made[shape]

  def _compile(self, shape: Format):
    graphdef, _ = abstract_params(model_builder(self._config, shape.hr_size), self._mesh)
    sharding = batch_sharding(self._mesh)
    batch = {k: jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)
             for k, (dims, dtype) in batch_arrays(shape).items()}
    shardings = jax.tree.map(lambda s: s.sharding, self._abstract)
    step = make_train_step(self._config, graphdef, self._tx, self._steps)
    # The shardings out are pinned: left free, small ones drift and the next step would not fit.
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return jitted.lower(self._abstract, batch).compile()


def put(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This host's rows onto its devices; what only the host needs stays behind."""
  sharding = batch_sharding(mesh)
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()
          if k != "sample_index"}


def usage(batch: dict[str, np.ndarray], shape: Format) -> metrics_lib.Usage:
  """What a batch holds, and what it has room for, over all hosts (as if all were like this one)."""
  slots = (batch["visual_index"] // shape.tokens_per_image).max(axis=1) + 1
  hosts = jax.process_count()
  return metrics_lib.Usage(
      tokens=hosts * int((batch["segment_ids"] > 0).sum()), positions=shape.rows * shape.length,
      images=hosts * int(slots.sum()), slots=shape.rows * shape.slots,
      samples=hosts * int((batch["sample_index"] >= 0).sum()))


def skipped(position: dict) -> dict[str, int]:
  """Samples left out or cut so far, by kind."""
  return {f"data/{kind}": count for kind, count in position["counts"].items() if count}


def write_problems(path: Path, data: Pipeline) -> None:
  """One line for each sample that the scan left out."""
  if data.report.problems:
    path.write_text("".join(json.dumps(dataclasses.asdict(p)) + "\n"
                            for p in data.report.problems))


def explain_nonfinite(step: int, metrics: dict, batch: dict, data: Pipeline) -> str:
  """The message for a loss or gradient that is not finite."""
  names = data.describe(batch["sample_index"])
  return (f"step {step}: loss {float(metrics['loss'])}, gradient norm "
          f"{float(metrics['grad_norm'])}: not finite, the update was not made.  Samples: "
          f"{'; '.join(names[:16])}{' ...' if len(names) > 16 else ''}.  Lower the learning rate, "
          "or look at these samples; the last checkpoint is from before this step")


def describe(config: RunConfig, abstract: TrainState, data: Pipeline, steps: int) -> None:
  """Logs what is about to run."""
  count = lambda tree: sum(int(np.prod(s.shape)) for s in jax.tree.leaves(tree))
  by_part: dict[str, int] = {}
  for path, s in trees.flatten(abstract.params).items():
    part = path.split("/")[0]
    by_part[part] = by_part.get(part, 0) + int(np.prod(s.shape))
  parts = ", ".join(f"{k} {v / 1e6:.2f} M" for k, v in sorted(by_part.items()))
  if data.report.problems:
    kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(data.report.counts.items()))
    logging.warning("%d samples left out (%s); skipped.jsonl lists them",
                    len(data.report.problems), kinds)
  logging.info("the pictures of %d of %d samples were opened before the start; %d samples are "
               "longer than max_length and will be cut", data.report.checked_in_depth,
               len(data.samples), data.report.truncated)
  for use in data.planner.use(0):
    logging.info("an epoch has %d batches of %s: %.1f %% of the positions filled, %.1f %% of the "
                 "image slots", use.batches, use.format, 100 * use.tokens, 100 * use.images)
    if use.images < 0.6:
      logging.warning("most image slots are empty, and cost as much as full ones: lower "
                      "images_per_row; launch/check_data.py shows what fits")
  logging.info("training %s; frozen %.2f M; %d samples, %d steps", parts,
               count(abstract.frozen) / 1e6, len(data.report.kept), steps)


def agreed(stop: bool) -> bool:
  """Whether any host was told to stop: all save the same step, whenever the signal reached them."""
  if jax.process_count() == 1:
    return stop
  return bool(multihost_utils.process_allgather(np.array(stop)).any())


@contextlib.contextmanager
def stop_signal() -> Any:
  """An event that SIGTERM sets, so that the loop can end between two steps."""
  event = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield event  # a notebook's worker thread: nobody sends it signals
    return
  before = signal.signal(signal.SIGTERM, lambda *_: event.set())
  try:
    yield event
  finally:
    signal.signal(signal.SIGTERM, before)
