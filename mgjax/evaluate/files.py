"""Files that several benchmarks share: JSON, lines of JSON, LLaVA's questions and answers."""
from __future__ import annotations

import hashlib
import importlib
import json
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence

from mgjax.evaluate.benchmark import Answered, EvaluationError, Question

LLAVA_EVAL = ("eval.zip of LLaVA (docs/Evaluation.md of haotian-liu/LLaVA), whose folders go below "
              "the data folder")


def read_json(path: pathlib.Path, kind: type = object):
  """EvaluationError naming the file, and the place where it is broken, or if it is not a `kind`."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise EvaluationError(f"{path}: not JSON that can be read ({error}); fetch it again") from error
  if not isinstance(value, kind):
    raise EvaluationError(f"{path}: it holds a {type(value).__name__}, expected a {kind.__name__}; "
                          "is it another file?")
  return value


def read_lines(path: pathlib.Path) -> list[dict]:
  """The records of a file with one JSON object a line."""
  records = []
  try:
    with path.open(encoding="utf-8") as file:
      for number, line in enumerate(file, 1):  # noqa: B007 (the error names it)
        if line.strip():
          record = json.loads(line)
          if not isinstance(record, dict):
            raise ValueError(f"{type(record).__name__}, expected an object")
          records.append(record)
  except OSError as error:
    raise EvaluationError(f"{path}: cannot be read ({error}); fetch it again") from error
  except ValueError as error:
    raise EvaluationError(f"{path}: line {number} is no record ({error}); fetch it again"
                          ) from error
  if not records:
    raise EvaluationError(f"{path}: it holds no record; fetch it again")
  return records


def write_lines(path: pathlib.Path, records: Iterable[Mapping]) -> pathlib.Path:
  """The file, one JSON object a line."""
  path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
  return path


def write_json(path: pathlib.Path, value, indent: int | None = 2) -> pathlib.Path:
  """The file."""
  path.write_text(json.dumps(value, indent=indent), encoding="utf-8")
  return path


def field(record: Mapping, name: str, path: pathlib.Path):
  """A field of a record; EvaluationError if it has none of that name."""
  if not isinstance(record, Mapping) or name not in record:
    has = ", ".join(map(str, record)) if isinstance(record, Mapping) else repr(record)
    raise EvaluationError(f"{path}: a record has {has[:500]}, expected {name!r} among them; is it "
                          "another split, or another version?")
  return record[name]


def llava_questions(path: pathlib.Path, images: pathlib.Path) -> list[Question]:
  """Questions of a file {question_id, image, text, ...}; `key` is the line's number, for ids may
  be there several times (MME and TextVQA have one for each picture)."""
  return [Question(str(n), str(field(record, "text", path)),
                   images / str(field(record, "image", path)),
                   {**record, "question_id": field(record, "question_id", path)})
          for n, record in enumerate(read_lines(path))]


def by_id(questions: Iterable[Question], path: pathlib.Path) -> dict:
  """Questions by their `question_id`; EvaluationError if two have the same, for then the official
  scorer knows one answer only."""
  found = {}
  for question in questions:
    name = question.record["question_id"]
    if found.setdefault(name, question) is not question:
      raise EvaluationError(f"{path}: question {name!r} is there twice; fetch it again")
  return found


def check_same(asked: Collection, asked_in: pathlib.Path, known: Collection,
               known_in: pathlib.Path, expected: str) -> None:
  """EvaluationError unless the questions that are asked are those whose answers are known.

  expected: what both files must be.
  """
  for these, here, others, there in ((asked, asked_in, known, known_in),
                                     (known, known_in, asked, asked_in)):
    others = set(others)
    if lost := [name for name in these if name not in others]:
      raise EvaluationError(f"{there}: {len(lost):,} of {len(these):,} questions of {here} are not "
                            f"there, first {lost[0]!r}; both must be {expected}")


def llava_answers(answered: Sequence[Answered], model: str) -> list[dict]:
  """Lines of LLaVA's answer files: {question_id, prompt, text, answer_id, model_id, metadata}."""
  return [{"question_id": a.question.record["question_id"], "prompt": a.question.text,
           "text": a.text, "answer_id": answer_id(a, model), "model_id": model, "metadata": {}}
          for a in answered]


def answer_id(answered: Answered, model: str) -> str:
  """22 characters as LLaVA's ids have; the same for the same answer."""
  said = "\0".join((model, answered.question.key, answered.text))
  return hashlib.sha256(said.encode()).hexdigest()[:22]


def percent(marks: Iterable[float]) -> float:
  """The mean in percent, to the last bit as the official scorers have it; 0 of nothing."""
  marks = list(marks)
  return sum(marks) / len(marks) * 100 if marks else 0.0


def extra(module: str):
  """A module of a package that only some benchmarks need; EvaluationError if it is missing."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise EvaluationError(f"the package {module.split('.')[0]} is needed and not installed: "
                          "pip install -e '.[evaluate]'") from error
