"""From data files to batches: a plan, one Grain chain, resumable at any step."""
from __future__ import annotations

import collections
import dataclasses
import functools
import math
import sys
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from mgjax.config import ConfigError
from mgjax.data.config import DataConfig
from mgjax.data.packing import Format, Planner
from mgjax.data.processes import end_with_parent
from mgjax.data.rows import TEXT_FIELDS, Loader, Row
from mgjax.data.samples import DataError
from mgjax.data.scan import Scan, scan
from mgjax.data.sources import SampleSet, open_sources
from mgjax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
REPAIR = ("Repair or remove them, or train without them: --config.data.on_error=skip leaves them "
          "out and counts them.")
RESTARTS = 3  # of worker processes that were killed, without a batch between


def make_pipeline(config: DataConfig, tokenizer: Tokenizer, *, host: int = 0,
                  hosts: int = 1) -> Pipeline:
  """Opens the data, checks every sample, and gives the batches of this host.

  Raises DataError for bad samples (on_error='stop'), or when none is left; ConfigError where
  a batch size does not divide among the hosts.
  """
  for resolution in config.all_resolutions:
    if resolution.batch_size % hosts:
      raise ConfigError(f"data: batch_size {resolution.batch_size} does not divide among {hosts} "
                        f"hosts; use a multiple of {hosts}")
  if not 0 <= host < hosts:
    raise ConfigError(f"data: host {host} is outside 0..{hosts - 1}")
  loader = Loader(config, tokenizer, open_sources(config.all_sources))
  report = scan(loader, processes=config.workers)
  check_scan(config, report)
  return Pipeline(config, loader, report, make_planner(loader, report), host, hosts)


def check_scan(config: DataConfig, report: Scan) -> None:
  """Raises DataError where a run would not start with what a scan found."""
  if report.problems and (config.on_error == "stop" or not len(report.kept)):
    raise DataError.of(report.problems, len(report.lengths), REPAIR if config.on_error == "stop"
                       else "None is left to train on: is config.data.image_root the right folder?")
  if not len(report.kept):
    raise DataError("no sample is left to train on: what do the sources' `pick` leave?")


def make_planner(loader: Loader, report: Scan) -> Planner:
  """Plans the epochs of what a scan found."""
  config, samples = loader.config, loader.samples
  return Planner(samples.sources, tuple(samples.starts), report.kept, report.lengths, report.images,
                 config.formats, tuple(map(config.resolution_of, samples.sources)),
                 config.batching, config.seed, config.shuffle)


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Batches without end: `iter(pipeline)` starts at step 0, its state goes into checkpoints.

  A batch has one of `config.formats`, with B = rows / hosts of this host: `tokens, visual_index,
  segment_ids, positions, targets` int32 [B, L], `loss_mask` bool [B, L], `images` uint8
  [B, S, H, H, 3], and `sample_index` int32 [B, K]: the samples of segments 1..K, -1 = none.  Rows
  are padded on the right with segment 0.
  """

  config: DataConfig
  loader: Loader
  report: Scan
  planner: Planner
  host: int
  hosts: int

  def __iter__(self) -> BatchIterator:
    return BatchIterator(self)

  @property
  def samples(self) -> SampleSet:
    """All records of all sources, the unusable ones included."""
    return self.loader.samples

  @functools.cached_property  # sums up arrays of all samples, and every step asks for it
  def fingerprint(self) -> int:
    """Differs where the samples, and so the plans, do."""
    return self.samples.fingerprint ^ self.planner.fingerprint

  @property
  def steps_per_epoch(self) -> int:
    """Steps of the first epoch; packing may give another one a step more or less."""
    return self.planner.plan(0).batches

  def steps(self, epochs: float) -> int:
    """Steps of so many epochs, the last one perhaps in part."""
    whole = math.floor(epochs)
    steps = sum(self.planner.plan(e).batches for e in range(whole))
    rest = epochs - whole
    return steps + (math.ceil(rest * self.planner.plan(whole).batches) if rest else 0)

  def formats_of_epoch(self, epoch: int) -> list[Format]:
    """The formats that its batches have."""
    used = np.unique(self.planner.plan(epoch).batch_format)
    return [self.planner.all_formats[f] for f in used]

  def format_of(self, batch: Batch) -> Format:
    """That of one of the batches."""
    length, (slots, size) = batch["tokens"].shape[1], batch["images"].shape[1:3]
    return next(f for f in self.planner.all_formats
                if (f.length, f.slots, f.hr_size) == (length, slots, size))

  def describe(self, sample_index: np.ndarray) -> list[str]:
    """`file #index (id ...)` for each sample of a batch's `sample_index`."""
    told = []
    for number in np.asarray(sample_index).ravel().tolist():
      if number >= 0:
        source = self.samples.sources[self.samples.locate(number)[0]]
        sample = self.samples[number]
        told.append(f"{source.label} #{sample.index} (id {sample.id})")
    return told

  def stream(self, epoch: int, row: int) -> grain.IterDataset:
    """This host's rows, in order, from the first of its rows at or behind `row` of an epoch on."""
    c = self.config
    ds = grain.MapDataset.range(self.host, 2**40, self.hosts)
    ds = ds.map(RowReader(self.loader, self.planner, epoch, row))
    rows = c.batch_size // self.hosts
    buffer = max(c.threads, rows // max(c.workers, 1))  # rows are large: no more than a batch
    ds = ds.to_iter_dataset(grain.ReadOptions(num_threads=c.threads, prefetch_buffer_size=buffer))
    if c.workers:
      if not flags.FLAGS.is_parsed():  # Grain reads its own; a notebook has no absl main
        flags.FLAGS.mark_as_parsed()
      # Before batching: a batch then does not depend on how many workers there are.
      ds = ds.mp_prefetch(grain.MultiprocessingOptions(num_workers=c.workers,
                                                       per_worker_buffer_size=buffer))
    return ds


@dataclasses.dataclass(frozen=True)
class RowReader:
  """i -> the i-th row from a place in the plans on, through all epochs behind it."""

  loader: Loader
  planner: Planner
  epoch: int
  first: int

  def __call__(self, i: int) -> Row:
    end_with_parent()
    epoch, row = self.epoch, self.first + int(i)
    while row >= (rows := self.planner.rows(epoch)):
      epoch, row = epoch + 1, row - rows
    plan = self.planner.plan(epoch)
    batch = int(np.searchsorted(plan.batch_starts, row, side="right")) - 1
    shape = self.planner.all_formats[plan.batch_format[batch]]
    return self.loader.row(plan.row(row), shape)


class _Buffers:
  """Memory for the pictures of a batch, used again once nobody holds the batch any more: fresh
  memory costs a page fault every 4 KiB, up to a quarter of the time to decode what goes there."""

  def __init__(self):
    self._buffers: list[np.ndarray] = []

  def take(self, shape: Format, rows: int) -> np.ndarray:
    """uint8 [rows, S, H, H, 3], with anything in it."""
    wanted = (rows, shape.slots, shape.hr_size, shape.hr_size, 3)
    held = 3  # by the list, by the variable, by the argument of getrefcount
    for buffer in self._buffers:
      if buffer.shape == wanted and sys.getrefcount(buffer) == held:
        return buffer
    fresh = np.empty(wanted, np.uint8)
    self._buffers = [b for b in self._buffers if sys.getrefcount(b) > held] + [fresh]
    return fresh


class BatchIterator:
  """Batches in an order that depends on the seed and the data alone.

  The state is (epoch, batch): a run resumes at the right one with any number of workers, and of
  hosts as long as they divide the batch sizes.  A sample that fails only now (a picture whose end
  is missing) leaves its place empty: every host stands at the same batch whatever the others met.
  Such and truncated samples are counted in `counts`, which is part of the state.
  """

  def __init__(self, pipeline: Pipeline):
    self._pipeline = pipeline
    self._epoch = self._batch = 0  # the next one
    self._rows = None
    self._buffers = _Buffers()
    self._barren = 0  # samples that failed since the last that was of use
    self.counts: collections.Counter[str] = collections.Counter()

  def __iter__(self) -> BatchIterator:
    return self

  def __next__(self) -> Batch:
    p = self._pipeline
    shape = self._next_format()
    rows = self._take(shape.rows // p.hosts)
    failed = [problem for row in rows for problem in row.pop("problems")]
    if failed and p.config.on_error == "stop":
      self.close()  # the position stays before this batch
      raise DataError.of(failed, len(p.samples), REPAIR)
    used = sum(len(row["sample_index"]) for row in rows)
    self._barren = 0 if used else self._barren + len(failed)
    if self._barren > len(p.report.kept):
      raise DataError.of(failed, len(p.samples), "No sample of the whole set can be used.")
    for problem in failed:
      logging.warning("left out: %s", problem)
      self.counts[problem.kind] += 1
    self._batch += 1
    self.counts["truncated"] += int(sum(row.pop("truncated") for row in rows))
    widest = max(1, *(len(row["sample_index"]) for row in rows))
    for row in rows:
      row["sample_index"] = np.pad(row["sample_index"], (0, widest - len(row["sample_index"])),
                                   constant_values=-1)
    batch = {key: np.stack([row[key] for row in rows]) for key in rows[0] if key != "images"}
    pictures = [row["images"] for row in rows]
    return batch | {"images": np.stack(pictures, out=self._buffers.take(shape, len(rows)))}

  def _next_format(self) -> Format:
    plan = self._pipeline.planner.plan(self._epoch)
    if self._batch >= plan.batches:
      self._epoch, self._batch = self._epoch + 1, 0
      plan = self._pipeline.planner.plan(self._epoch)
    return self._pipeline.planner.all_formats[plan.batch_format[self._batch]]

  def _take(self, count: int) -> list[Row]:
    """The next rows; killed workers are replaced, at the row where they were."""
    for attempt in range(RESTARTS + 1):
      if self._rows is None:
        first = int(self._pipeline.planner.plan(self._epoch).batch_starts[self._batch])
        self._rows = iter(self._pipeline.stream(self._epoch, first))
      try:
        return [next(self._rows) for _ in range(count)]
      except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):  # how Grain tells of a dead worker
          raise
        self.close()
        if attempt == RESTARTS:
          raise DataError(f"workers were killed {attempt + 1} times at the same batch ({error}): "
                          "too little memory?  Use fewer: --config.data.workers") from error
        logging.warning("a worker was killed (%s); starting them again", error)
    raise AssertionError  # not reached

  def get_state(self) -> dict[str, Any]:
    """What a checkpoint keeps."""
    return {"epoch": self._epoch, "batch": self._batch, "counts": dict(self.counts),
            "fingerprint": self._pipeline.fingerprint}

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues where `state` was taken.  Raises ConfigError where it is none."""
    if not {"epoch", "batch"} <= state.keys():
      raise ConfigError(f"data: the checkpoint's position is {state}; expected epoch and batch.  "
                        "It is of an older version: start a new run from it with config.init_from")
    if state["fingerprint"] != self._pipeline.fingerprint:
      logging.warning("the data are not what they were at epoch %d, batch %d, where the checkpoint "
                      "was saved (other usable samples, or other rows): from here on they come in "
                      "another order", state["epoch"], state["batch"])
    self.close()
    self._epoch, self._batch = int(state["epoch"]), int(state["batch"])
    self.counts = collections.Counter(state["counts"])

  def close(self) -> None:
    """Ends threads and worker processes; a further batch would start new ones."""
    if self._rows is not None:
      self._rows.close()
    self._rows = None


def batch_arrays(shape: Format) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """Shape and dtype, over all hosts, of what a batch of this format brings to the device."""
  arrays = {k: ((shape.rows, shape.length), np.dtype(t)) for k, t in TEXT_FIELDS.items()}
  arrays["images"] = ((shape.rows, shape.slots, shape.hr_size, shape.hr_size, 3),
                      np.dtype(np.uint8))
  return arrays
