"""From sample numbers to one row of a batch: text tokenised, pictures opened, all in place."""
from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence

import numpy as np

from mgjax.data.config import DataConfig, Resolution
from mgjax.data.conversation import control_tokens, get_template, render
from mgjax.data.images import ImageError, load_image, resolve_image
from mgjax.data.packing import Format
from mgjax.data.processes import Sendable
from mgjax.data.samples import Problem, Sample, check_structure, prepare_turns
from mgjax.data.sources import SampleSet, Source
from mgjax.data.tokenize import Expanded, expand, text_pieces, tokenize_conversation
from mgjax.data.tokenizer import Tokenizer

Row = dict[str, np.ndarray]
TEXT_FIELDS = {"tokens": np.int32, "visual_index": np.int32, "segment_ids": np.int32,
               "positions": np.int32, "targets": np.int32, "loss_mask": np.bool_}


@dataclasses.dataclass(frozen=True)
class Loader(Sendable):
  """Reads samples by number.  What is wrong with one is returned, not raised: the caller has the
  policy.  Can be pickled, and used from several threads."""

  config: DataConfig
  tokenizer: Tokenizer
  samples: SampleSet

  def read(self, number: int, pictures: bool = True) -> tuple[Sample, Problem | None]:
    """A sample, and what is wrong with it by itself, its files and its length aside.  pictures:
    those that lie in the data file itself are read as well."""
    sample, problem = self.samples.read(number, pictures)
    if problem:
      return sample, problem
    found = check_structure(sample, self._template, self.resolution(number).images_per_row)
    for i, (_, turn) in enumerate(() if found else sample.turns):
      if said := [token for token in self._control if token in turn]:
        found = "control_token", (f"turn {i} holds {said[0]!r}, which ends or begins a turn; write "
                                  "it otherwise")
        break
    return sample, self._problem(number, sample, found)

  def measure(self, numbers: Sequence[int], samples: Sequence[Sample]) -> list[int]:
    """Positions that each sample takes, visual tokens included, before any cut."""
    split = [text_pieces(self._segments(sample), bool(sample.images)) for sample in samples]
    texts = list({text: None for pieces in split for text in pieces})  # many begin alike
    count = dict(zip(texts, self.tokenizer.count(texts)))
    return [self.tokenizer.adds_bos + sum(count[text] for text in pieces)
            + (len(pieces) - 1) * self.resolution(number).tokens_per_image
            for number, pieces in zip(numbers, split)]

  def judge_length(self, number: int, sample: Sample, length: int) -> Problem | None:
    """What is wrong with a sample of that length (see `measure`), given what may be cut off."""
    most, found = self.resolution(number).max_length, None
    if length > most and not self.config.truncate:
      found = "too_long", (f"{length} tokens with images expanded, at most {most} fit; raise "
                           "max_length or set truncate=True")
    elif length > most:
      _, found = self.text(number, sample)
    return self._problem(number, sample, found)

  def text(self, number: int, sample: Sample) -> tuple[Expanded | None, tuple[str, str] | None]:
    """The sample's text, expanded and cut to max_length; (kind, message) if it is of no use."""
    resolution = self.resolution(number)
    try:
      tokenized = tokenize_conversation(self.tokenizer, self._segments(sample), bool(sample.images))
    except ValueError as error:
      return None, ("format", str(error))
    text = expand(tokenized, resolution.tokens_per_image, filler=self.tokenizer.pad_id,
                  max_length=resolution.max_length)
    if not text.loss_mask.any():
      cut = " are left: the cut took the answer; raise max_length" if text.truncated else ""
      return None, ("no_target", f"no tokens to learn{cut}")
    return text, None

  def check_files(self, number: int, sample: Sample,
                  check: Callable | None = None) -> Problem | None:
    """Whether the sample's pictures are there and pass `check`: `images.check_header` or
    `check_pixels`.  Remembers where folders lie."""
    if self.samples.embeds(number):
      if not check:
        return None
      sample, problem = self.samples.read(number)
      if problem:
        return problem
    try:
      for source, name in self._pictures(number, sample, self._real):
        if check:
          check(source, self.config.aspect, self.resolution(number).hr_size, name)
    except ImageError as error:
      return self._problem(number, sample, (error.kind, error.message))
    return None

  def resolution(self, number: int) -> Resolution:
    """That of a sample's source."""
    return self._resolutions[self.samples.locate(number)[0]]

  def row(self, numbers: Sequence[int], shape: Format) -> Row:
    """Samples, one behind the other, as a row: int32 or bool [L] a field, `images` uint8
    [S, H, H, 3], and

      sample_index  int32 [k]: the samples of segments 1..k
      truncated     int32 []: how many of them lost their end
      problems      those that cannot be used, whose place stays empty
    """
    texts, problems, kept = [], [], []
    images = np.zeros((shape.slots, shape.hr_size, shape.hr_size, 3), np.uint8)
    slots, left = 0, shape.length
    for number in map(int, numbers):
      sample, problem = self.read(number)
      text = None
      if not problem:
        text, found = self.text(number, sample)
        if not found and (len(text.tokens) > left or slots + len(sample.images) > shape.slots):
          found = "format", ("it is not what it was when the data were looked at, and does not fit "
                             "its row: leave data files alone while a run reads them")
        problem = self._problem(number, sample, found)
      if not problem:
        try:
          for k, (source, name) in enumerate(self._pictures(number, sample)):
            images[slots + k] = load_image(source, shape.hr_size, self.config.aspect, name)
        except ImageError as error:
          problem = self._problem(number, sample, (error.kind, error.message))
      if problem:
        images[slots:] = 0
        problems.append(problem)
        continue
      visual = np.where(text.visual_index < 0, -1,
                        text.visual_index + slots * shape.tokens_per_image)
      texts.append(dataclasses.replace(text, visual_index=visual))
      slots, left = slots + len(sample.images), left - len(text.tokens)
      kept.append(number)
    return self._fields(texts, shape.length) | {
        "images": images, "sample_index": np.array(kept, np.int32),
        "truncated": np.int32(sum(t.truncated for t in texts)), "problems": tuple(problems)}

  def _fields(self, texts: list[Expanded], length: int) -> Row:
    pad = self.tokenizer.pad_id
    fill = {"tokens": pad, "visual_index": -1, "targets": pad}
    fields = {k: np.full(length, fill.get(k, 0), dtype) for k, dtype in TEXT_FIELDS.items()}
    at = 0
    for segment, text in enumerate(texts, 1):
      n = len(text.tokens)
      values = {"tokens": text.tokens, "visual_index": text.visual_index, "segment_ids": segment,
                "positions": np.arange(n), "targets": text.targets, "loss_mask": text.loss_mask}
      for key, value in values.items():
        fields[key][at:at + n] = value
      at += n
    return fields

  def _source(self, number: int) -> Source:
    return self.samples.sources[self.samples.locate(number)[0]]

  def _segments(self, sample: Sample):
    return render(self._template, prepare_turns(sample))

  def _pictures(self, number: int, sample: Sample, real=os.path.realpath):
    """(path or Picture, what errors call it) of each image."""
    if self.samples.embeds(number):
      if len(sample.images) != len(sample.pictures):
        raise ImageError("missing_image", f"{len(sample.images)} images are named, but the record "
                                          f"holds {len(sample.pictures)} pictures")
      return list(zip(sample.pictures, sample.images))
    root = self._source(number).image_root
    return [(resolve_image(root, image, real), "") for image in sample.images]

  def _problem(self, number: int, sample: Sample,
               found: tuple[str, str] | None) -> Problem | None:
    if not found:
      return None
    return Problem(found[0], self._source(number).label, sample.index, sample.id, found[1])

  @functools.cached_property
  def _real(self):
    return functools.lru_cache(65_536)(os.path.realpath)

  @functools.cached_property
  def _template(self):
    return get_template(self.config.template)

  @functools.cached_property
  def _control(self) -> tuple[str, ...]:
    return control_tokens(self._template, self.tokenizer.special, self.tokenizer.eos)

  @functools.cached_property
  def _resolutions(self):
    all_of_them = self.config.all_resolutions
    return [all_of_them[self.config.resolution_of(s)] for s in self.samples.sources]
