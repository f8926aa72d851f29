"""A record of a data file as a sample: what it must look like, and what can be wrong with it."""
from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

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
from mgjax.data.images import Picture

UNNAMED = "?"  # the id of a record that has none and is no sample


@dataclasses.dataclass(frozen=True)
class Sample:
  """One record of a data file; `index` is its place in that file, from 0.

  images: paths below the image folder.  pictures: what is at them, where the file holds it itself.
  """

  index: int
  id: str
  images: tuple[str, ...]
  turns: tuple[Turn, ...]
  pictures: tuple[Picture, ...] = ()


@dataclasses.dataclass(frozen=True)
class Problem:
  """Why a sample cannot be trained on.

  `kind` is one of: format, roles, empty_answer, plain_turns, image_count, control_token,
  path_escape, missing_image, broken_image, oversized_image, too_long, no_target.
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


Entry = tuple[object, tuple[Picture, ...]]  # a record (decoded JSON), its pictures if it has them


class BadRecord(str):
  """Stands for a record that cannot be read; says why."""


def to_sample(index: int, record: object, pictures: tuple[Picture, ...] = ()) -> Sample:
  """A LLaVA record (decoded JSON) as a Sample.  ValueError where it has not the shape of one."""
  if isinstance(record, BadRecord):
    raise ValueError(record)
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
                tuple((t["from"], t["value"]) for t in turns), pictures)


def name_of(record: object) -> str:
  """What identifies a record that may be no sample."""
  return str(record.get("id", UNNAMED)) if isinstance(record, dict) else UNNAMED


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
