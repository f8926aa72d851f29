"""Examines data before training: would it start, what is wrong with which sample, how long the
samples are, and how well they fill rows."""
from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from mgjax.data.config import DataConfig
from mgjax.data.packing import WINDOW, Format, Plan, Planner, pack
from mgjax.data.pipeline import check_scan, make_planner
from mgjax.data.rows import Loader
from mgjax.data.samples import DataError
from mgjax.data.scan import Scan, hash_id, scan
from mgjax.data.sources import SampleSet, Source, open_sources
from mgjax.data.tokenizer import Tokenizer

EXAMPLES = 3            # of each kind of problem in a report
BINS = 40               # of a histogram, about
SAMPLED = 4 * WINDOW    # samples that other settings of rows are tried on
SLOT_COST = 1 / 8       # what an empty picture costs of its tokens' cost in the decoder: about what
                        # the towers, forward, are beside a 2B to 7B decoder that trains
ATTENTION = 6 * 4096    # row length at which attention costs as much as the rest of a decoder that
                        # is 4096 wide: it is computed over whole rows, and other samples masked
NEARLY = 1.01           # settings that cost so little more than the least are as good
SLOTS = (0, 1, 2, 3, 4, 6, 8, 12)
LANES = 128             # of the TPU: row lengths are multiples of it
DUPLICATE, ELSEWHERE, TRUNCATED = "duplicate_id", "duplicate_elsewhere", "truncated"
FILES = PAGE, LINES, SUMMARY = "report.html", "problems.jsonl", "summary.json"


@dataclasses.dataclass(frozen=True)
class Lengths:
  """How a number is spread over samples: bin i counts those from starts[i] to below starts[i + 1],
  the last one all above."""

  count: int
  total: int
  p50: int
  p90: int
  p99: int
  longest: int
  starts: tuple[int, ...]
  counts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SourceReport:
  """What is in a source.  Lengths are those of the samples that could be measured."""

  name: str
  path: str
  samples: int
  images: int
  usable: int
  drawn: int                 # samples that the first epoch takes of it
  problems: dict[str, int]   # by kind: what a run finds before its first step
  late: dict[str, int]       # and what it would meet later, at pictures it has not opened before
  duplicates: int            # samples whose id an earlier one of the source has
  elsewhere: int             # samples whose id a sample of an earlier source has
  truncated: int             # usable samples that lose their end
  text: Lengths              # tokens, visual ones aside, before any cut
  visual: Lengths


@dataclasses.dataclass(frozen=True)
class Finding:
  """A line of problems.jsonl.  level: 'error', 'late' (see SourceReport) or 'warning'."""

  kind: str
  level: str
  source: str
  file: str
  index: int
  id: str
  message: str


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


@dataclasses.dataclass(frozen=True)
class Verdict:
  """ok: a run would start, and meet none of the samples that were found to be bad."""

  ok: bool
  headline: str
  details: str  # what the run would say


@dataclasses.dataclass(frozen=True)
class Report:
  """All that a check found; `summary.json` holds just this."""

  verdict: Verdict
  settings: dict[str, object]
  samples: int
  usable: int
  images: int
  steps_per_epoch: int
  sources: tuple[SourceReport, ...]
  kinds: dict[str, int]                  # findings by kind, warnings last
  examples: dict[str, tuple[Finding, ...]]
  notes: tuple[str, ...]
  text: Lengths
  visual: Lengths
  positions: Lengths                     # both together
  packing: tuple[Rows, ...]


def examine(config: DataConfig, tokenizer: Tokenizer, *, images: str = "headers",
            processes: int = 0,
            progress: Callable[[int, int], None] = lambda done, total: None) -> Diagnosis:
  """Opens the data and looks at every sample.

  images: what is done with pictures, see `scan`.  progress is called with samples done and all.
  Raises DataError or ConfigError where a data file cannot be read at all.
  """
  loader = Loader(config, tokenizer, open_sources(config.all_sources))
  total = len(loader.samples)
  progress(0, total)
  found = scan(loader, processes=processes, images=images,
               progress=lambda done: progress(done, total))
  return Diagnosis(loader, found, images)


class Diagnosis:
  """What a scan found, told by source and by kind."""

  def __init__(self, loader: Loader, found: Scan, images: str):
    self._loader, self._scan, self._images = loader, found, images
    samples, config = loader.samples, loader.config
    self._source = np.repeat(np.arange(len(samples.sources)), np.diff(samples.starts))  # [N]
    resolutions = [config.all_resolutions[config.resolution_of(s)] for s in samples.sources]
    per_image = np.array([r.tokens_per_image for r in resolutions])
    longest = np.array([r.max_length for r in resolutions])
    self._visual = found.images.astype(np.int64) * per_image[self._source]
    self._measured = np.flatnonzero(found.text)
    cut = found.text + self._visual > longest[self._source]
    self._truncated = found.kept[cut[found.kept]]
    self._within, self._elsewhere = find_duplicates(samples, found.ids, self._source)

  def report(self) -> Report:
    """Counts, lengths, rows, and the verdict."""
    found, samples, config = self._scan, self._loader.samples, self._loader.config
    planner = make_planner(self._loader, found)
    plan = planner.plan(0)
    kinds = dict(collections.Counter(p.kind for p in found.problems + found.late).most_common())
    warnings = collections.Counter({DUPLICATE: len(self._within[0]),
                                    ELSEWHERE: len(self._elsewhere[0]),
                                    TRUNCATED: len(self._truncated)})
    kinds |= {kind: count for kind, count in warnings.most_common() if count}
    examples: dict[str, list[Finding]] = {kind: [] for kind in kinds}
    for finding in self.findings(EXAMPLES):
      if len(examples[finding.kind]) < EXAMPLES:
        examples[finding.kind].append(finding)
    measured, positions = self._measured, found.text + self._visual
    text_bins, visual_bins = bins(found.text[measured]), bins(self._visual[measured], exact=True)
    drawn = np.bincount(self._source[plan.samples], minlength=len(samples.sources))
    sources = tuple(self._source_report(k, int(n), text_bins, visual_bins)
                    for k, n in enumerate(drawn))
    return Report(
        judge(config, found, self._images), self._settings(), len(samples), len(found.kept),
        int(found.images.sum()), plan.batches, sources, kinds,
        {kind: tuple(some) for kind, some in examples.items()}, tuple(self._notes()),
        spread(found.text[measured], text_bins), spread(self._visual[measured], visual_bins),
        spread(positions[measured], bins(positions[measured], reach=config.max_length)),
        tuple(rows_of(config, planner, plan, r) for r in range(len(config.all_resolutions))
              if len(samples_of(planner, plan, r))))

  def _source_report(self, k: int, drawn: int, text_bins, visual_bins) -> SourceReport:
    found, samples = self._scan, self._loader.samples
    source, (begin, end) = samples.sources[k], samples.starts[k:k + 2]

    def mine(numbers):
      return numbers[(numbers >= begin) & (numbers < end)]

    def kinds(numbers, problems):
      first, last = np.searchsorted(numbers, (begin, end))
      return dict(collections.Counter(p.kind for p in problems[first:last]).most_common())

    measured = mine(self._measured)
    return SourceReport(
        source.label, source.path, end - begin, int(found.images[begin:end].sum()),
        len(mine(found.kept)), drawn, kinds(found.numbers, found.problems),
        kinds(found.late_numbers, found.late), len(mine(self._within[0])),
        len(mine(self._elsewhere[0])), len(mine(self._truncated)),
        spread(found.text[measured], text_bins), spread(self._visual[measured], visual_bins))

  def findings(self, most: int | None = None) -> Iterator[Finding]:
    """Everything that was found, sample by sample; of warnings at most `most` of a kind."""
    found = self._scan
    for level, numbers, problems in (("error", found.numbers, found.problems),
                                     ("late", found.late_numbers, found.late)):
      for number, p in zip(numbers, problems):
        source = self._loader.samples.sources[self._source[number]]
        yield Finding(p.kind, level, source.label, source.path, p.index, p.id, p.message)
    for kind, (again, first) in ((DUPLICATE, self._within), (ELSEWHERE, self._elsewhere)):
      for number, one in zip(again[:most], first[:most]):
        where = f"#{self._loader.samples.locate(int(one))[1]}"
        if kind == ELSEWHERE:
          where += f" of {self._loader.samples.sources[self._source[one]].label}"
        yield self._warning(kind, int(number), f"{where} has the same id")
    for number in self._truncated[:most]:
      length = int(self._scan.text[number] + self._visual[number])
      most_of = self._loader.resolution(int(number)).max_length
      yield self._warning(TRUNCATED, int(number), f"{length:,} tokens with images expanded, the "
                          f"last {length - most_of:,} are cut off")

  def _warning(self, kind: str, number: int, message: str) -> Finding:
    samples = self._loader.samples
    source, sample = samples.sources[self._source[number]], samples[number]
    return Finding(kind, "warning", source.label, source.path, sample.index, sample.id, message)

  def _settings(self) -> dict[str, object]:
    c, found = self._loader.config, self._scan
    return {"template": c.template, "tokenizer": self._loader.tokenizer.name,
            "max_length": c.max_length, "batching": c.batching, "on_error": c.on_error,
            "truncate": c.truncate, "aspect": c.aspect, "images": self._images,
            "samples_with_pictures_opened": found.checked_in_depth}

  def _notes(self) -> Iterator[str]:
    """What a reader of the numbers should know."""
    config, samples = self._loader.config, self._loader.samples
    total = len(samples)
    if self._images == "none":
      yield ("Pictures were not looked for: whether they are there and can be read is open; "
             "--images=headers tells.")
    elif total > config.scan_limit:
      yield (f"A run itself opens the pictures of {config.scan_limit:,} samples before its first "
             f"step (config.data.scan_limit); here those of all {total:,} were opened.")
    if self._images == "headers":
      yield ("Only the headers of pictures were read; --images=decode finds files that are cut "
             "short.")
    for path, left, size in left_out(samples):
      yield f"{left:,} of the {size:,} records of {path} are picked by no source."
    for k, source in enumerate(samples.sources):
      if samples.starts[k] == samples.starts[k + 1]:
        yield f"Source {source.label} has no samples: its pick {source.pick!r} leaves none."
    if self._scan.problems:
      yield "Rows are made of the samples that can be used, whatever on_error says."
    if len(self._within[0]) + len(self._elsewhere[0]):
      yield ("Samples that share an id are trained on all the same; a record that is there twice "
             "counts twice.")


def judge(config: DataConfig, found: Scan, images: str) -> Verdict:
  """What a run with this data would do.  images: how its pictures were looked at."""
  total, kept, late = len(found.lengths), len(found.kept), len(found.late)
  try:
    check_scan(config, found)
  except DataError as error:
    why = (f"{len(found.problems):,} of {total:,} samples cannot be used" if kept
           else "no sample is left to train on")
    more = (f"\n{late:,} more samples have pictures that cannot be read; it would meet them later."
            if late else "")
    return Verdict(False, f"Training would stop before its first step: {why}", f"{error}{more}")
  without = f", without {total - kept:,} of {total:,} samples" if kept < total else ""
  counts = ", ".join(f"{kind} {n:,}" for kind, n in found.counts.items())
  if late and (config.on_error == "stop" or late == kept):
    which = "all of its samples have" if late == kept else f"{late:,} samples have"
    return Verdict(False, f"Training would start{without}, and stop later: {which} pictures that "
                   "cannot be read", str(DataError.of(found.late, total, "Repair or remove them, "
                   "or train without them: --config.data.on_error=skip.")))
  lost = f"{late:,} more will be left out when their pictures are read." if late else ""
  open_question = (", if their pictures are there and can be read"
                   if images == "none" and found.images.any() else "")
  return Verdict(True, f"Training would start{without or f' with all {total:,} samples'}"
                 f"{open_question}",
                 " ".join(filter(None, [f"Left out: {counts}." if counts else "", lost])))


def find_duplicates(samples: SampleSet, ids: np.ndarray, source: np.ndarray):
  """((numbers, firsts) within a source, (numbers, firsts) elsewhere): samples whose id came before,
  and where it first did; int64, by number.  ids uint64 [N], 0 = none; source int [N]."""
  named = np.flatnonzero(ids)
  again, first = _repeats(np.stack([source[named].astype(np.uint64), ids[named]]))
  within = named[again], named[first]
  # A record that two sources read is one; and where a file gives no ids, they are its numbers.
  files = {id(r): i for i, r in enumerate(samples.records)}
  place = np.concatenate([
      np.stack([np.full(end - begin, files[id(records)]),
                np.arange(end - begin) if taken is None else taken])
      for records, taken, begin, end in zip(samples.records, samples.taken, samples.starts,
                                            samples.starts[1:])], axis=1).astype(np.uint64)
  once = np.ones(len(ids), bool)
  once[_repeats(place)[0]] = once[within[0]] = False
  once = np.flatnonzero(once & (ids != 0))
  again, first = _repeats(ids[None, once])
  counted = np.array([hash_id(str(int(place[1, n]))) != ids[n] for n in once[again].tolist()], bool)
  return within, (once[again[counted]], once[first[counted]])


def _repeats(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """keys [k, n]: places of columns that were there before, rising, and where they first were."""
  n = keys.shape[1]
  order = np.lexsort(keys[::-1])
  same = np.zeros(n, bool)
  same[1:] = (keys[:, order][:, 1:] == keys[:, order][:, :-1]).all(axis=0)
  group = np.maximum.accumulate(np.where(same, 0, np.arange(n)))
  again, first = order[same], order[group[same]]
  rising = np.argsort(again)
  return again[rising], first[rising]


def left_out(samples: SampleSet) -> Iterator[tuple[str, int, int]]:
  """(path, records that no source picks, all records) of each file that has such."""
  keys = [(s.path, s.adapter) for s in samples.sources]
  for key, records in dict(zip(keys, samples.records)).items():
    takes = [taken for other, taken in zip(keys, samples.taken) if other == key]
    if all(taken is not None for taken in takes):
      if left := len(records) - sum(map(len, takes)):
        yield key[0], left, len(records)


def bins(values: np.ndarray, exact: bool = False, reach: int = 0) -> tuple[int, ...]:
  """Round starts of about BINS bins, so that few values lie above; exact: a bin for each value,
  where there are not too many.  Where values lie above `reach`, bins do as well."""
  if exact and len(single := np.unique(values)) <= BINS:
    return tuple(single.tolist()) or (0,)
  top = float(np.quantile(values, 0.995)) if len(values) else 0
  if len(values) and values.max() > reach:
    top = max(top, 1.1 * reach)
  step = next(s * 10**k for k in range(18) for s in (1, 2, 5) if s * 10**k * BINS > top)
  return tuple(range(0, int(top) + 1, step))


def spread(values: np.ndarray, starts: tuple[int, ...]) -> Lengths:
  """The spread of values [n], counted in bins."""
  counts = np.histogram(values, [*starts, np.inf])[0]
  p50, p90, p99, most = (np.quantile(values, (0.5, 0.9, 0.99, 1), method="lower").tolist()
                         if len(values) else (0, 0, 0, 0))
  return Lengths(len(values), int(values.sum(dtype=np.int64)), int(p50), int(p90), int(p99),
                 int(most), starts, tuple(counts.tolist()))


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


def write_report(diagnosis: Diagnosis, folder: pathlib.Path) -> Report:
  """Writes the page, the lines and the summary into a folder; OSError where that fails."""
  from mgjax.data.doctor_report import page
  report = diagnosis.report()
  with open(folder / LINES, "w", encoding="utf-8") as file:
    file.writelines(json.dumps(vars(f)) + "\n" for f in diagnosis.findings())
  (folder / SUMMARY).write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")
  (folder / PAGE).write_bytes(page(report).encode(errors="replace"))
  return report
