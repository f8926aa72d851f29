"""What a benchmark is: official files in, questions, answers, a score and official files out.

Each one is a value of `Benchmark` in its own file of `benchmarks/`; nothing here knows their names.
"""
from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence


class EvaluationError(ValueError):
  """Files that are missing or do not fit together; the message says which, and the way out."""


@dataclasses.dataclass(frozen=True)
class Question:
  """One question as the benchmark asks it.

  key: unique in the benchmark; answers are known by it.
  text: what is asked, the image tag left out; the picture goes in front.
  image: the picture's file, or its bytes; None: none is shown.
  record: what scoring and answer files need of the official record.
  """

  key: str
  text: str
  image: pathlib.Path | bytes | None = None
  record: Mapping = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Answered:
  """A question with the model's answer, and with the judge's reply where one was asked for.

  verdict: "" if no judge was asked.
  """

  question: Question
  text: str
  verdict: str = ""


@dataclasses.dataclass(frozen=True)
class Score:
  """What the answers are worth.

  headline: the figures of the paper's table, by column.
  groups: finer figures: table -> row -> figure, all as the official scorer gives them.
  marks: by question key, 0 (wrong) to 1 (right); questions that no scorer could mark are absent.
  truths: by question key, what was expected.
  notes: what a reader of the figures must know.
  """

  headline: Mapping[str, float]
  groups: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
  marks: Mapping[str, float] = dataclasses.field(default_factory=dict)
  truths: Mapping[str, str] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Judging:
  """What a benchmark asks a judge, an OpenAI-compatible endpoint.

  model: the official one.
  prompt: (answered, attempt from 0) -> what to ask, or "" where the answer needs no judge.
  temperature: of each attempt; as many are made until a reply is accepted.
  accepts: whether a reply can be used.
  required: without the judge there is no score; else the answers that need one count as wrong.
  """

  model: str
  prompt: Callable[[Answered, int], str]
  accepts: Callable[[str], bool]
  temperature: tuple[float, ...] = (0.0,)
  max_tokens: int = 256
  required: bool = True


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """One benchmark.

  name: on the command line; title: in tables.
  folder: below the folder of all benchmarks, as in the original's layout.
  files: what `read` opens below `folder` -> where it comes from.
  read: folder -> questions.  Raises EvaluationError.
  score: all questions answered -> figures; None where the truth is not published.
  write: (answered, folder, model's name) -> the official answer files written there.
  max_new_tokens: of an answer.
  """

  name: str
  title: str
  folder: str
  files: Mapping[str, str]
  read: Callable[[pathlib.Path], list[Question]]
  write: Callable[[Sequence[Answered], pathlib.Path, str], list[pathlib.Path]]
  max_new_tokens: int
  score: Callable[[Sequence[Answered]], Score] | None = None
  judging: Judging | None = None
