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
from mgjax.data.doctor.rows import Rows, rows_of, samples_of
from mgjax.data.pipeline import check_scan, make_planner
from mgjax.data.rows import Loader
from mgjax.data.samples import DataError
from mgjax.data.scan import Scan, hash_id, scan
from mgjax.data.sources import SampleSet, open_sources
from mgjax.data.tokenizer import Tokenizer

EXAMPLES = 3            # of each kind of problem in a report
BINS = 40               # of a histogram, about
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


def write_report(diagnosis: Diagnosis, folder: pathlib.Path) -> Report:
  """Writes the page, the lines and the summary into a folder; OSError where that fails."""
  from mgjax.data.doctor.page import page
  report = diagnosis.report()
  with open(folder / LINES, "w", encoding="utf-8") as file:
    file.writelines(json.dumps(vars(f)) + "\n" for f in diagnosis.findings())
  (folder / SUMMARY).write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")
  (folder / PAGE).write_bytes(page(report).encode(errors="replace"))
  return report
