"""From a data file to batches: one Grain chain, deterministic, resumable at any step."""
from __future__ import annotations

import collections
import dataclasses
import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from mgjax.config import ConfigError, at_least
from mgjax.data.conversation import control_tokens, get_template, render
from mgjax.data.images import ASPECTS, ImageError, load_image, resolve_image
from mgjax.data.sources import (
    DataError,
    Problem,
    Sample,
    Scan,
    load_samples,
    prepare_turns,
    scan,
)
from mgjax.data.tokenize import Expanded, expand, tokenize_conversation
from mgjax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
REPAIR = ("Repair or remove them, or train without them: --config.data.on_error=skip leaves them "
          "out and counts them.")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What to read and how.  `hr_size` and `tokens_per_image` come from the model's config."""

  path: str                       # LLaVA .json or .jsonl
  image_root: str = ""            # the folder that `image` paths are relative to
  template: str = "vicuna_v1"
  max_length: int = 2048          # L, visual tokens included
  aspect: str = "pad"             # 'pad' | 'square' (shorter side fitted, middle cut out)
  hr_size: int = 768              # H
  tokens_per_image: int = 576     # T
  images_per_row: int = 1         # S; 0 = a run without images
  batch_size: int = 256           # rows over all hosts
  seed: int = 0
  shuffle: bool = True
  on_error: str = "stop"          # 'stop' | 'skip': leave bad samples out, count them
  truncate: bool = False          # cut over-long samples on the right instead of refusing them
  workers: int = 0                # processes that load; 0 = threads of this one
  threads: int = 4                # per process
  scan_limit: int = 50_000        # samples whose images and length are checked before step 1

  def __post_init__(self):
    for name, value, allowed in (("aspect", self.aspect, ASPECTS),
                                 ("on_error", self.on_error, ("stop", "skip"))):
      if value not in allowed:
        raise ConfigError(f"data: {name} is {value!r}, expected one of {', '.join(allowed)}")
    at_least(self, 2, "max_length")
    at_least(self, 1, "hr_size", "tokens_per_image", "batch_size", "threads")
    at_least(self, 0, "images_per_row", "workers", "scan_limit")
    get_template(self.template)


def make_pipeline(config: DataConfig, tokenizer: Tokenizer, *, host: int = 0,
                  hosts: int = 1) -> Pipeline:
  """Reads the data file, checks it, and gives the batches of this host.

  Raises DataError for bad samples (on_error='stop'), or when none is left; ValueError where
  batch_size does not divide among the hosts.
  """
  if config.batch_size % hosts:
    raise ConfigError(f"data: batch_size {config.batch_size} does not divide among {hosts} hosts; "
                     f"use a multiple of {hosts}")
  if not 0 <= host < hosts:
    raise ConfigError(f"data: host {host} is outside 0..{hosts - 1}")
  template = get_template(config.template)
  samples, unread = load_samples(config.path)
  loader = Loader(config, tokenizer, samples)
  report = scan(samples, config.path, template, image_root=config.image_root,
                slots=config.images_per_row, aspect=config.aspect, hr_size=config.hr_size,
                known=unread, scan_limit=config.scan_limit, measure=loader.measure)
  if report.problems and (config.on_error == "stop" or not len(report.kept)):
    raise DataError.of(report.problems, len(samples), REPAIR if config.on_error == "stop" else
                       "None is left to train on: is config.data.image_root the right folder?")
  return Pipeline(config, loader, report, host, hosts)


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Batches without end: `iter(pipeline)` starts at step 0, its state goes into checkpoints.

  A batch holds, with B = batch_size / hosts rows: `tokens, visual_index, segment_ids, positions,
  targets` int32 [B, L], `loss_mask` bool [B, L], `images` uint8 [B, S, H, H, 3] and `sample_index`
  int32 [B].  Rows are padded on the right with segment 0; one sample a row, as segment 1.
  """

  config: DataConfig
  loader: Loader
  report: Scan
  host: int
  hosts: int

  def __iter__(self) -> BatchIterator:
    return BatchIterator(self)

  @property
  def samples(self) -> Sequence[Sample]:
    """All records of the file, the unusable ones included."""
    return self.loader.samples

  @property
  def fingerprint(self) -> int:
    """Differs where the samples, and so their order, do."""
    return zlib.crc32(self.report.kept.tobytes(), len(self.samples))

  @property
  def steps_per_epoch(self) -> int:
    """Steps until every usable sample has been seen (the stream runs on across epochs)."""
    return math.ceil(len(self.report.kept) / self.config.batch_size)

  def describe(self, sample_indices: Sequence[int]) -> list[str]:
    """`file #index (id ...)` for each `sample_index` of a batch."""
    return [f"{self.config.path} #{i} (id {self.samples[i].id})" for i in sample_indices]

  def stream(self, start: int) -> grain.IterDataset:
    """This host's examples from its number `start` on, in order, bad ones as Problems."""
    c, rows = self.config, self.config.batch_size // self.hosts
    ds = grain.MapDataset.source(self.report.kept)
    if c.shuffle:
      ds = ds.shuffle(seed=c.seed)  # every epoch in an order of its own
    ds = ds.repeat()[self.host + start * self.hosts::self.hosts]
    ds = ds.map(self.loader)
    buffer = max(c.threads, rows // max(c.workers, 1))  # examples are large: no more than a batch
    ds = ds.to_iter_dataset(grain.ReadOptions(num_threads=c.threads, prefetch_buffer_size=buffer))
    if c.workers:
      if not flags.FLAGS.is_parsed():  # Grain reads its own; a notebook has no absl main
        flags.FLAGS.mark_as_parsed()
      # Before batching: a batch then does not depend on how many workers there are.
      ds = ds.mp_prefetch(grain.MultiprocessingOptions(num_workers=c.workers,
                                                       per_worker_buffer_size=buffer))
    return ds


@dataclasses.dataclass(frozen=True)
class Loader:
  """Turns an index into an example, or into the Problem that prevents it."""

  config: DataConfig
  tokenizer: Tokenizer
  samples: Sequence[Sample]

  def __call__(self, index: int) -> Batch | Problem:
    sample, c = self.samples[index], self.config
    text, problem = self._read(sample)
    if not problem:
      images = self._no_images()
      try:
        for slot, image in enumerate(sample.images):
          images[slot] = load_image(resolve_image(c.image_root, image), c.hr_size, c.aspect)
      except ImageError as error:
        problem = error.kind, error.message
    if problem:
      return Problem(problem[0], c.path, sample.index, sample.id, problem[1])
    return self._row(text) | {"images": images, "sample_index": np.int32(index),
                              "truncated": np.bool_(text.truncated)}

  def empty_row(self, index: int) -> Batch:
    """What stands in a batch for a sample that failed: padding alone, nothing to learn."""
    none = np.zeros(0, np.int32)
    return self._row(Expanded(none, none, none, none.astype(bool))) | {
        "images": self._no_images(), "sample_index": np.int32(index), "truncated": np.bool_(False)}

  def tokenize(self, sample: Sample) -> Expanded:
    """The sample's text, expanded and, where that is allowed, cut to max_length."""
    c = self.config
    segments = render(get_template(c.template), prepare_turns(sample))
    tokenized = tokenize_conversation(self.tokenizer, segments, bool(sample.images))
    return expand(tokenized, c.tokens_per_image, filler=self.tokenizer.pad_id,
                  max_length=c.max_length if c.truncate else None)

  def measure(self, sample: Sample) -> tuple[bool, tuple[str, str] | None]:
    """(is it truncated, (kind, message) or None) from the text alone."""
    text, problem = self._read(sample)
    return bool(text and text.truncated), problem

  @functools.cached_property
  def _control(self) -> tuple[str, ...]:
    return control_tokens(get_template(self.config.template), self.tokenizer.special,
                          self.tokenizer.eos)

  def _read(self, sample: Sample) -> tuple[Expanded | None, tuple[str, str] | None]:
    """The sample's text, and what is wrong with it."""
    for i, (_, turn) in enumerate(sample.turns):
      if found := [token for token in self._control if token in turn]:
        return None, ("control_token", f"turn {i} holds {found[0]!r}, which ends or begins a turn; "
                                       "write it otherwise")
    try:
      text = self.tokenize(sample)
    except ValueError as error:
      return None, ("format", str(error))
    return text, self._judge(text)

  def _judge(self, text: Expanded) -> tuple[str, str] | None:
    if len(text.tokens) > self.config.max_length:
      return "too_long", (f"{len(text.tokens)} tokens with images expanded, at most "
                          f"{self.config.max_length} fit; raise max_length or set truncate=True")
    if not text.loss_mask.any():
      cut = " are left: the cut took the answer; raise max_length" if text.truncated else ""
      return "no_target", f"no tokens to learn{cut}"
    return None

  def _no_images(self) -> np.ndarray:
    c = self.config
    return np.zeros((c.images_per_row, c.hr_size, c.hr_size, 3), np.uint8)  # [S, H, H, 3]

  def _row(self, text: Expanded) -> Batch:
    """One sample's text as a row: [N] -> [L]."""
    n, pad_id = len(text.tokens), self.tokenizer.pad_id

    def row(values, fill, dtype=np.int32):
      return np.pad(np.asarray(values, dtype), (0, self.config.max_length - n),
                    constant_values=fill)
    return {"tokens": row(text.tokens, pad_id), "visual_index": row(text.visual_index, -1),
            "segment_ids": row(np.ones(n), 0), "positions": row(np.arange(n), 0),
            "targets": row(text.targets, pad_id), "loss_mask": row(text.loss_mask, False, bool)}


class BatchIterator:
  """Batches in an order that depends on the seed and the data alone.

  The state is the number of samples of the whole stream read so far, so that a run resumes at the
  right one with any number of workers, and of hosts as long as they divide batch_size.  A sample
  that fails only now (a picture whose end is missing) leaves its row empty: every host stands at
  the same sample whatever the others met.  Such and truncated samples are counted in `counts`,
  which is part of the state.
  """

  def __init__(self, pipeline: Pipeline):
    self._pipeline = pipeline
    self._read = 0  # examples of this host, failed ones included
    self._examples = None
    self._barren = 0  # rows since the last that was of use
    self.counts: collections.Counter[str] = collections.Counter()

  def __iter__(self) -> BatchIterator:
    return self

  def __next__(self) -> Batch:
    p, c = self._pipeline, self._pipeline.config
    if self._examples is None:
      self._examples = iter(p.stream(self._read))
    rows, failed = [], []
    for _ in range(c.batch_size // p.hosts):
      example = next(self._examples)
      if isinstance(example, Problem):
        failed.append(example)
        example = p.loader.empty_row(example.index)
      rows.append(example)
    if failed and c.on_error == "stop":
      self.close()  # the position stays before this batch
      raise DataError.of(failed, len(p.samples), REPAIR)
    self._barren = self._barren + len(failed) if len(failed) == len(rows) else 0
    if self._barren > len(p.report.kept):
      raise DataError.of(failed, len(p.samples), "No sample of the whole set can be used.")
    for problem in failed:
      logging.warning("left out: %s", problem)
      self.counts[problem.kind] += 1
    self._read += len(rows)
    batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    self.counts["truncated"] += int(batch.pop("truncated").sum())
    return batch

  def get_state(self) -> dict[str, Any]:
    """What a checkpoint keeps."""
    return {"samples": self._read * self._pipeline.hosts, "counts": dict(self.counts),
            "fingerprint": self._pipeline.fingerprint}

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues where `state` was taken."""
    read, rest = divmod(int(state["samples"]), self._pipeline.hosts)
    if rest:
      raise ConfigError(f"data: the checkpoint stands at sample {state['samples']}, which "
                        f"{self._pipeline.hosts} hosts cannot share; use a divisor of it")
    if state["fingerprint"] != self._pipeline.fingerprint:
      logging.warning("%s: its usable samples are others than at sample %d, where the checkpoint "
                      "was saved; from here on they come in another order",
                      self._pipeline.config.path, state["samples"])
    self.close()
    self._read, self.counts = read, collections.Counter(state["counts"])

  def close(self) -> None:
    """Ends threads and worker processes; a further batch would start new ones."""
    if self._examples is not None:
      self._examples.close()
    self._examples = None
