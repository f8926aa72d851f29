"""LLaVA files as records, and the check that finds bad samples before the first step."""
from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from mgjax.data.conversation import (
    GPT,
    HUMAN,
    IMAGE_TAG,
    Template,
    Turn,
    check_turns,
    drop_leading_reply,
    place_images,
)
from mgjax.data.images import ImageError, check_header, resolve_image


@dataclasses.dataclass(frozen=True)
class Sample:
  """One record of a data file; `index` is its place in that file, from 0."""

  index: int
  id: str
  images: tuple[str, ...]
  turns: tuple[Turn, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
  """Why a sample cannot be trained on.

  `kind` is one of: format, roles, empty_answer, plain_turns, image_count, control_token,
  path_escape, missing_image, broken_image, too_long, no_target.
  """

  kind: str
  file: str
  index: int
  id: str
  message: str

  def __str__(self) -> str:
    return f"{self.file} #{self.index} (id {self.id}): {self.kind}: {self.message}"


class DataError(Exception):
  """Samples that stop a run; `problems` lists them."""

  def __init__(self, message: str, problems: Sequence[Problem] = ()):
    super().__init__(message, tuple(problems))
    self.problems = tuple(problems)

  def __str__(self) -> str:
    return self.args[0]

  @classmethod
  def of(cls, problems: Sequence[Problem], total: int, way_out: str) -> DataError:
    """One error for all `problems` among `total` samples: counts, some of each kind, a way out."""
    kinds = collections.Counter(p.kind for p in problems)
    counts = ", ".join(f"{kind} {n}" for kind, n in kinds.most_common())
    seen: collections.Counter[str] = collections.Counter()
    shown = []
    for problem in problems:
      seen[problem.kind] += 1
      if seen[problem.kind] <= 2:
        shown.append(f"\n  {problem}")
    more = f"\n  ... and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
    return cls(f"{len(problems)} of {total} samples cannot be used ({counts}):"
               f"{''.join(shown)}{more}\n{way_out}", problems)


@dataclasses.dataclass(frozen=True)
class Scan:
  """What `scan` found: `kept` int64 [K] indices into the samples, and the rest by kind."""

  kept: np.ndarray
  problems: tuple[Problem, ...]
  checked_in_depth: int  # samples whose images and length were looked at as well
  truncated: int         # of those, the ones that will lose their end

  @property
  def counts(self) -> dict[str, int]:
    """Problems by kind."""
    return dict(collections.Counter(p.kind for p in self.problems))


def load_samples(path: str | os.PathLike) -> tuple[list[Sample], list[Problem]]:
  """Reads a LLaVA file: a JSON list, or JSON lines.

  A record that cannot be read as one keeps its place as an empty sample and is returned as a
  Problem of kind `format`.  Raises DataError where the file itself is not readable as JSON.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise DataError(f"{path}: no such data file; give a LLaVA .json or .jsonl file")
  samples, problems = [], []
  for index, record in enumerate(_read(path)):
    try:
      if isinstance(record, _BadLine):
        raise ValueError(record)
      sample = _to_sample(index, record)
    except ValueError as error:
      name = str(record.get("id", "?")) if isinstance(record, dict) else "?"
      sample = Sample(index, name, (), ())
      problems.append(Problem("format", str(path), index, name, str(error)))
    samples.append(sample)
  if not samples:
    raise DataError(f"{path}: no samples in it")
  return samples, problems


class _BadLine(str):
  """Stands for a line that is not JSON."""


def _read(path: pathlib.Path) -> list:
  with open(path, "rb") as file:
    head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    try:
      if head.startswith(b"["):
        return json.loads(file.read().decode("utf-8-sig"))
      if head.startswith(b"{"):
        lines = [_read_line(line, n) for n, line in enumerate(file, 1) if line.strip()]
        if isinstance(lines[0], _BadLine) and len(lines) > 1 and isinstance(lines[1], _BadLine):
          raise ValueError(f"{lines[0]}; one object over several lines is no list of samples")
        return lines
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, nested without end
      raise DataError(f"{path}: not valid JSON ({error}); was the download cut short?") from error
  raise DataError(f"{path}: starts with {head[:1]!r}; expected a JSON list or one JSON object a "
                  "line, in UTF-8")


def _read_line(line: bytes, number: int) -> object:
  try:
    return json.loads(line.decode("utf-8-sig"))
  except (ValueError, RecursionError) as error:
    return _BadLine(f"line {number} is not valid JSON ({error})")


def _to_sample(index: int, record: object) -> Sample:
  """ValueError where the record has not the shape of a LLaVA sample."""
  if not isinstance(record, dict):
    raise ValueError(f"a sample is a {type(record).__name__}, expected an object")
  if "images" in record and "image" not in record:
    raise ValueError('the key is "images", expected "image" (a path or a list of paths)')
  images = record.get("image")
  images = () if images is None else (images,) if isinstance(images, str) else images
  if not isinstance(images, list | tuple) or not all(isinstance(i, str) for i in images):
    raise ValueError(f"image is {images!r}, expected a path or a list of paths")
  turns = record.get("conversations")
  if not isinstance(turns, list) or not turns:
    raise ValueError("conversations is missing or empty, expected a list of {from, value}")
  for turn in turns:
    if not (isinstance(turn, dict) and isinstance(turn.get("from"), str)
            and isinstance(turn.get("value"), str)):
      raise ValueError(f"turn {turn!r:.80} is not of the form {{'from': ..., 'value': text}}")
    try:
      turn["value"].encode()
    except UnicodeEncodeError as error:
      raise ValueError(f"a turn holds half a character ({error}); write the text as UTF-8"
                       ) from error
  return Sample(index, str(record.get("id", index)), tuple(images),
                tuple((t["from"], t["value"]) for t in turns))


def prepare_turns(sample: Sample) -> list[Turn]:
  """The turns as they are trained: a leading reply dropped, image tags in front."""
  return place_images(drop_leading_reply(sample.turns), len(sample.images))


def check_structure(sample: Sample, template: Template, slots: int) -> tuple[str, str] | None:
  """(kind, message) of what is wrong with a sample by itself, files aside; None if nothing is.

  A first turn from gpt is dropped, as in the original; what is left must be a whole conversation.
  """
  turns = drop_leading_reply(sample.turns)
  for role, _ in sample.turns:
    if role not in (HUMAN, GPT):
      return "roles", f"a turn is from {role!r}, expected {HUMAN!r} or {GPT!r}"
  try:
    check_turns(turns)
  except ValueError as error:
    return "roles", str(error)
  if empty := [i for i, (_, text) in enumerate(turns) if i % 2 and not text.strip()]:
    return "empty_answer", f"the answer in turn {empty[0]} is empty"
  images = len(sample.images)
  if template.caption_only and (len(turns) != 2 or images != 1 or IMAGE_TAG in turns[1][1]):
    return "plain_turns", (f"template {template.name!r} takes one image, one question with its "
                           f"{IMAGE_TAG} and one answer; got {images} images and {len(turns)} "
                           "turns")
  if images > slots:
    return "image_count", f"{images} images, but a row has {slots} slots; raise images_per_row"
  tags = sum(text.count(IMAGE_TAG) for _, text in prepare_turns(sample))
  if tags != images:
    return "image_count", (f"{images} images but {tags} {IMAGE_TAG} tags; write one tag an image, "
                           'and name the file under "image"')
  return None


def scan(samples: Sequence[Sample], file: str, template: Template, *,
         image_root: str | os.PathLike = "", slots: int = 1, aspect: str = "pad", hr_size: int = 0,
         known: Sequence[Problem] = (), scan_limit: int = 50_000,
         measure: Callable[[Sample], tuple[bool, tuple[str, str] | None]] | None = None) -> Scan:
  """Looks at every sample before training.

  All samples are checked for structure and for their files being there; `scan_limit` of them,
  evenly spaced, also have their image headers opened and go through `measure` (which tokenises:
  it returns whether the sample is truncated, and a problem or None).
  """
  deep = set(np.linspace(0, len(samples) - 1, min(scan_limit, len(samples)), dtype=int).tolist())
  problems = {p.index: p for p in known}
  truncated = 0
  for place, sample in enumerate(samples):
    if sample.index in problems:
      continue
    found = check_structure(sample, template, slots)
    try:
      for image in () if found else sample.images:
        path = resolve_image(image_root, image)
        if place in deep:
          check_header(path, aspect, hr_size)
    except ImageError as error:
      found = error.kind, error.message
    if not found and place in deep and measure:
      cut, found = measure(sample)
      truncated += cut
    if found:
      problems[sample.index] = Problem(found[0], file, sample.index, sample.id, found[1])
  kept = np.array([i for i, s in enumerate(samples) if s.index not in problems], np.int64)
  return Scan(kept, tuple(problems[i] for i in sorted(problems)), len(deep), truncated)
