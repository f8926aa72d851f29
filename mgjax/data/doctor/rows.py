"""How well an epoch fills its rows, and how other settings would: what the doctor recommends."""
from __future__ import annotations

import dataclasses

import numpy as np

from mgjax.data.config import DataConfig
from mgjax.data.packing import WINDOW, Format, Plan, Planner, pack
from mgjax.data.sources import Source

SAMPLED = 4 * WINDOW    # samples that other settings of rows are tried on
SLOT_COST = 1 / 8       # what an empty picture costs of its tokens' cost in the decoder: about what
                        # the towers, forward, are beside a 2B to 7B decoder that trains
ATTENTION = 6 * 4096    # row length at which attention costs as much as the rest of a decoder that
                        # is 4096 wide: it is computed over whole rows, and other samples masked
NEARLY = 1.01           # settings that cost so little more than the least are as good
SLOTS = (0, 1, 2, 3, 4, 6, 8, 12)
LANES = 128             # of the TPU: row lengths are multiples of it


@dataclasses.dataclass(frozen=True)
class Option:
  """A way to make rows, tried on some samples.  Shares are of 1."""

  batching: str
  row_length: int
  images_per_row: int
  buckets: tuple[int, ...]
  batch_size: int        # that has about as many samples a step as the configured one
  samples_per_row: float
  padding: float         # positions that hold nothing
  empty_slots: float     # places of pictures that hold none
  work: float            # of an epoch; the configured way is 1
  configured: bool = False
  best: bool = False


@dataclasses.dataclass(frozen=True)
class Rows:
  """What the configured batching makes of the first epoch, at one resolution."""

  hr_size: int
  tokens_per_image: int
  samples: int
  batches: int
  rows: int              # that hold samples
  padding: float         # of all positions of all batches, rows without samples included
  empty_slots: float
  formats: tuple[dict, ...]      # batches, length, slots, padding of each shape
  tried: int             # samples that the options were tried on
  options: tuple[Option, ...]


def samples_of(planner: Planner, plan: Plan, r: int) -> np.ndarray:
  """The samples of an epoch that have resolution r, in the order of the epoch."""
  source = np.searchsorted(planner.starts, plan.samples, side="right") - 1
  return plan.samples[np.array(planner.resolution)[source] == r]


def rows_with_samples(plan: Plan) -> np.ndarray:
  """How many rows of each batch hold samples: int64 [batches]."""
  before = np.concatenate([[0], np.cumsum(np.diff(plan.row_starts) > 0)])
  return np.diff(before[plan.batch_starts])


def rows_of(config: DataConfig, planner: Planner, plan: Plan, r: int) -> Rows:
  """How an epoch fills the rows of a resolution, and how other settings would."""
  formats, numbers = planner.formats[r], samples_of(planner, plan, r)
  uses = [u for u in planner.use(0) if u.format in formats]
  batches, places, slots, filled, shown = 0, 0, 0, 0.0, 0.0
  for u in uses:
    f, room = u.format, u.batches * u.format.rows
    batches += u.batches
    places, filled = places + room * f.length, filled + room * f.length * u.tokens
    slots, shown = slots + room * f.slots, shown + room * f.slots * u.images
  first = planner.all_formats.index(formats[0])
  mine = (plan.batch_format >= first) & (plan.batch_format < first + len(formats))
  used = int(rows_with_samples(plan)[mine].sum())
  whole = formats[0]
  rng = np.random.default_rng(0)
  some = rng.permutation(numbers)[:SAMPLED]
  options = try_options(config, whole, planner.lengths[some], planner.images[some],
                        len(numbers) / batches)
  return Rows(whole.hr_size, whole.tokens_per_image, len(numbers), batches, used,
              1 - filled / places, 1 - shown / slots if slots else 0.0,
              tuple({"batches": u.batches, "rows": u.format.rows, "length": u.format.length,
                     "slots": u.format.slots, "padding": 1 - u.tokens,
                     "empty_slots": 1 - u.images} for u in uses), len(some), options)


def try_options(config: DataConfig, whole: Format, lengths: np.ndarray, images: np.ndarray,
                per_step: float) -> tuple[Option, ...]:
  """Ways to make rows of samples [n], the configured one among them, the least work first.

  whole: the configured format that takes every sample.  per_step: samples of a step.
  """
  longest = next(r.max_length for r in config.all_resolutions if r.hr_size == whole.hr_size)
  least = int(images.max())
  ours = (whole.length, whole.slots)
  tried = [_packed(whole, lengths, images, *pair, per_step)
           for pair in _pairs(longest, least, ours, lengths, images)]
  best_of: dict[int, Option] = {}  # the one or two of each number of slots that are worth showing
  for option in tried:
    mine = config.batching == "packed" and (option.row_length, option.images_per_row) == ours
    if mine:
      configured = option
    elif (before := best_of.get(option.images_per_row)) is None or option.work < before.work:
      best_of[option.images_per_row] = option
  loose = dataclasses.replace(whole, length=longest, slots=max(least, whole.slots)
                              if config.batching != "packed" else least)
  buckets = config.buckets if config.batching == "grouped" else tuple(sorted(
      {b for q in (1, 2, 3) if (b := _lanes(longest * q / 4)) < longest}))
  single = _unpacked(config, "single", loose, (), lengths, images, per_step)
  grouped = _unpacked(config, "grouped", loose, buckets, lengths, images, per_step)
  configured = {"single": single, "grouped": grouped}.get(config.batching) or configured
  everything = [configured, *best_of.values(),
                *(o for o in (single, grouped) if o is not configured)]
  least_work = min(o.work for o in everything)
  best = min((o for o in everything if o.work <= NEARLY * least_work),
             key=lambda o: (o is not configured, o.row_length, o.images_per_row, o.work))
  finished = [dataclasses.replace(o, work=o.work / configured.work, configured=o is configured,
                                  best=o is best, batch_size=whole.rows if o is configured
                                  else o.batch_size) for o in everything]
  return tuple(sorted(finished, key=lambda o: o.work))


def _pairs(longest: int, least: int, ours: tuple[int, int], lengths: np.ndarray,
           images: np.ndarray) -> list[tuple[int, int]]:
  """(row_length, images_per_row) to try: every sample fits, and positions and pictures run out
  about together; nothing much longer than four samples."""
  most = max(4 * longest, ours[0])
  pairs = {ours: None}
  for slots in (s for s in dict.fromkeys((*SLOTS, least, ours[1])) if s >= least):
    even = slots * lengths.sum() / max(images.sum(), 1)
    wanted = (_lanes(even), _lanes(1.06 * even)) if least and slots else tuple(
        _lanes(longest * f) for f in (1, 1.5, 2, 3, 4)) if not least and not slots else ()
    pairs |= {(max(length, longest), slots): None for length in wanted if length <= most}
  return list(pairs)


def _lanes(length: float) -> int:
  return -(-int(length) // LANES) * LANES


def _work(rows: float, length: int, slots: int, tokens_per_image: int) -> float:
  return rows * (length * (1 + length / ATTENTION) + SLOT_COST * slots * tokens_per_image)


def _packed(whole: Format, lengths, images, row_length, slots, per_step) -> Option:
  rows = sum(len(pack(lengths[at:at + WINDOW], images[at:at + WINDOW], row_length, slots))
             for at in range(0, len(lengths), WINDOW))
  per_row = len(lengths) / rows
  return Option("packed", row_length, slots, (), _round(per_step / per_row), per_row,
                1 - float(lengths.sum(dtype=np.int64)) / (rows * row_length),
                1 - float(images.sum(dtype=np.int64)) / (rows * slots) if slots else 0.0,
                _work(rows / len(lengths), row_length, slots, whole.tokens_per_image))


def _unpacked(config: DataConfig, batching, whole: Format, buckets, lengths, images,
              per_step) -> Option:
  """One sample a row.  Its shapes are those that DataConfig.formats would give."""
  size, n = _round(per_step), len(lengths)
  shape = dataclasses.replace(whole, rows=size if batching == "grouped" else 1)
  shapes = (shape,) if batching == "single" else tuple(
      dataclasses.replace(shape, length=length, slots=slots)
      for slots in dict.fromkeys((shape.slots, 0)) for length in (shape.length, *buckets))
  planner = Planner((Source(""),), (0, n), np.arange(n), lengths, images, (shapes,), (0,), batching,
                    config.seed, config.shuffle)
  plan = planner.plan(0)
  # Rows without samples, at the end, weigh more here than in the whole epoch: left out.
  used = [(int(rows), shapes[f]) for rows, f in zip(rows_with_samples(plan), plan.batch_format)]
  places = sum(rows * f.length for rows, f in used)
  slots = sum(rows * f.slots for rows, f in used)
  work = sum(_work(rows, f.length, f.slots, f.tokens_per_image) for rows, f in used)
  return Option(batching, whole.length, whole.slots, buckets, size, 1.0,
                1 - float(lengths.sum(dtype=np.int64)) / places,
                1 - float(images.sum(dtype=np.int64)) / slots if slots else 0.0, work / n)


def _round(rows: float) -> int:
  """A batch size near that."""
  return max(1, round(rows) if rows < 12 else 8 * round(rows / 8))
