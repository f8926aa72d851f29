"""A run, told in order: data, mesh, state, compiled step, loop."""
from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import logging

from mgjax import trees
from mgjax.checkpoint import (
    ORIGIN,
    TOKENIZER,
    Checkpointer,
    read_run,
    resolve,
    wait_for_hosts,
    write_run,
)
from mgjax.config import ConfigError
from mgjax.data.packing import Format
from mgjax.data.pipeline import Pipeline, make_pipeline
from mgjax.data.samples import DataError
from mgjax.data.tokenizer import Tokenizer, load_tokenizer
from mgjax.models.lora import LoraConfig
from mgjax.sharding import check_heads, mesh_context
from mgjax.train import heldout
from mgjax.train import metrics as metrics_lib
from mgjax.train.compiled import CompiledSteps, check_batch, mesh_of
from mgjax.train.config import RunConfig
from mgjax.train.flops import Work, batch_flops, model_flops
from mgjax.train.hosts import STARTING, Watch, stop_notice, watched, word
from mgjax.train.optimizer import make_optimizer
from mgjax.train.prefetch import Prefetcher, put
from mgjax.train.profile import Profiler
from mgjax.train.state import TrainState, abstract_state, init_state, resumed_state


class TrainingError(RuntimeError):
  """The run cannot go on; the message says at which step, on what, and what to do."""


def train(config: RunConfig, workdir: str | Path, *, name: str = "train") -> int:
  """Runs, or resumes, one training run in `workdir` and returns the step it stands at.

  SIGTERM saves and returns early.  Raises TrainingError when the loss is no longer finite (before
  the update); ConfigError, DataError, CheckpointError for what does not fit together.  Over several
  hosts, one that is lost or hangs ends this process (see `watched`).
  """
  if "://" in str(workdir):
    raise ConfigError(f"workdir {workdir}: only folders of the file system; mount the bucket")
  workdir = Path(workdir).absolute()
  with stop_notice() as stop, watched(config.hang_timeout) as watch:
    checkpointer = Checkpointer(workdir, every=config.checkpoint.every, keep=config.checkpoint.keep)
    try:
      return _train(config, workdir, name, stop, watch, checkpointer)
    except BaseException as e:
      watch.failed(e)  # before anything that may wait for the other hosts
      raise
    finally:
      watch.at("finish the last checkpoint", limit=STARTING)
      checkpointer.close()


def _train(config: RunConfig, workdir: Path, name: str, stop: Callable[[], bool], watch: Watch,
           checkpointer: Checkpointer) -> int:
  resuming = checkpointer.latest is not None
  stop()  # hosts that agree on a place to stop at count from here
  if resuming:
    check_same_run(workdir, config)
    if config.steps and checkpointer.latest >= config.steps:
      return checkpointer.latest
  config = dataclasses.replace(config, tokenizer=str(tokenizer_folder(config, workdir)),
                               chat_stop_ids=config.chat_stop_ids or inherited_stop_ids(config))
  tokenizer = load_tokenizer(config.tokenizer)
  check_vocabulary(tokenizer, config)
  mesh = mesh_of(config)
  check_heads(config.model.decoder, mesh)
  check_batch(config, mesh)
  watch.at("read the data", limit=STARTING)
  data = make_pipeline(config.data, tokenizer, host=jax.process_index(),
                       hosts=jax.process_count())
  held_out = heldout.read(config, tokenizer) if config.heldout.path else None
  batches, main_host = iter(data), jax.process_index() == 0
  steps = config.steps or data.steps(config.epochs)
  check_profile(config, steps)
  with mesh_context(mesh), contextlib.closing(batches):
    tx = make_optimizer(config.optimizer, steps)
    abstract = abstract_state(config, tx, mesh)[1]
    watch.at("place the state", limit=STARTING)
    if resuming:
      saved, position = checkpointer.restore(abstract.as_dict(base=config.lora.used))
      state, base = resumed_state(config, abstract, saved, workdir), None
      batches.set_state(position)
      logging.info("%s: resuming %s at step %d", name, workdir, state.step)
    else:
      state, base = init_state(config, tx, abstract)
    start = int(state.step)
    if start >= steps:
      return start
    if main_host:
      write_run(workdir, dataclasses.asdict(config), config.tokenizer, origin_folder(config))
      if base is not None:
        base.write(workdir)
      metrics_lib.truncate_after(workdir / "metrics.jsonl", start)
      write_problems(workdir / "skipped.jsonl", data)
      describe(config, abstract, data, steps)
    compiled = CompiledSteps(config, tx, steps, abstract, mesh)
    watch.at("compile", step=start, limit=STARTING)
    compiled.prepare(data.formats_of_epoch(0))
    measure = heldout.compile_for(held_out, config, abstract, mesh) if held_out else None
    wait_for_hosts("compiled", STARTING)
    log = metrics_lib.Metrics(workdir, name=name, start=start, steps=steps, enabled=main_host)
    fetched = Prefetcher(batches, lambda batch: put(batch, mesh), steps - start)
    profiler = Profiler(workdir / "profile", config.profile.span())
    with contextlib.closing(log), contextlib.closing(fetched), contextlib.closing(profiler):
      if stop():
        return start
      watch.at("load the first batch", limit=STARTING)
      batch, bad = next(fetched), None
      log.restart_clock()
      for step in range(start + 1, steps + 1):
        shape, done, batch = data.format_of(batch.host), batch, None
        if step < steps:
          watch.at(f"load the batch behind step {step}")
          try:
            batch = next(fetched)
          except DataError as error:
            bad = error  # the others hear of it with this step, and what it learns is saved
        watch.at(f"step {step}")
        with profiler.step(step):
          state, metrics = compiled[shape](state, done.device, word(mesh, bad is not None))
          metrics = jax.device_get(metrics)  # meanwhile a thread fetches what comes next
        if not metrics.pop("finite"):
          raise TrainingError(explain_nonfinite(step, metrics, done.host, data))
        failed = int(metrics.pop("failed"))
        due = step == steps or stop() or failed > 0
        watch.at(f"save step {step}", step=step)
        checkpointer.save(step, state.as_dict(base=config.lora.used), done.position, force=due)
        figures = {}
        if measure and (step == steps or step % config.heldout.every == 0 and not due):
          with log.aside():
            figures = measure(state, step, watch, stop if step < steps else lambda: False)
          if figures is None:  # a stop signal came, and may leave little time
            due, figures = True, {}
            checkpointer.save(step, state.as_dict(base=config.lora.used), done.position, force=True)
        log.write(step, metrics | skipped(done.position) | figures,
                  usage(done.host, shape, config), waited=fetched.waited if batch else 0.0,
                  show=step % config.log_every == 0 or due or bool(figures))
        if bad is not None:
          raise bad
        if failed:
          raise TrainingError(f"host {failed - 1} could not load its next batch: see what it says; "
                              f"step {step} is saved")
        if due and step < steps:
          logging.warning("%s: stop signal; saved step %d of %d", name, step, steps)
          return step
  return steps


# What may differ when a run goes on; everything else makes it another run.
_MAY_CHANGE = ("tokenizer", "init_from", "mesh", "remat", "attention", "checkpoint", "profile",
               "heldout", "log_every", "steps", "epochs", "accumulate", "chat_template",
               "chat_aspect", "chat_stop_ids", "hang_timeout")
_DATA_MAY_CHANGE = ("image_root", "on_error", "workers", "threads", "scan_limit")


def check_same_run(workdir: Path, config: RunConfig) -> None:
  """Raises ConfigError if the run in `workdir` was of another model; warns of other differences."""
  # Runs from before there were adapters say nothing of them.
  before = trees.flatten(_plain({"lora": dataclasses.asdict(LoraConfig())} | read_run(workdir)[1]))
  now = trees.flatten(_plain(dataclasses.asdict(config)))
  changed = [k for k in before.keys() | now.keys() if before.get(k) != now.get(k)]
  tell = lambda k: f"{k.replace('/', '.')} was {before.get(k)} and is {now.get(k)}"
  for key in sorted(changed):
    if key.split("/")[0] in ("model", "objective", "lora") and key != "lora/dropout":
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


def check_profile(config: RunConfig, steps: int) -> None:
  """Raises ConfigError if the run ends before the steps to trace do."""
  if config.profile.steps and config.profile.span()[-1] > steps:
    raise ConfigError(f"config.profile.steps is {config.profile.steps}, but the run has only "
                      f"{steps} steps; trace earlier ones")


def usage(batch: dict[str, np.ndarray], shape: Format, config: RunConfig) -> metrics_lib.Usage:
  """What a batch holds, and what it has room for, over all hosts (as if all were like this one)."""
  slots = (batch["visual_index"] // shape.tokens_per_image).max(axis=1) + 1
  hosts, window = jax.process_count(), config.model.decoder.sliding_window
  real = batch["segment_ids"] > 0
  seen = np.minimum(batch["positions"] + 1, window or shape.length)  # by a position, in its sample
  useful = Work(hosts * int(real.sum()), hosts * int(seen[real].sum()), hosts * int(slots.sum()),
                shape.hr_size)
  return metrics_lib.Usage(
      tokens=useful.positions, positions=shape.rows * shape.length,
      images=useful.images, slots=shape.rows * shape.slots,
      samples=hosts * int((batch["sample_index"] >= 0).sum()),
      flops=batch_flops(config, shape),
      useful_flops=model_flops(config, useful).total)


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
