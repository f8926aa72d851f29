"""GQA, test-dev balanced: questions made from scene graphs (Hudson & Manning, 2019).  R6.2."""
from __future__ import annotations

import collections
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from mgjax.evaluate.benchmark import Answered, Benchmark, Question, Score
from mgjax.evaluate.files import (
    LLAVA_EVAL,
    by_id,
    check_same,
    field,
    llava_answers,
    llava_questions,
    percent,
    read_json,
    write_json,
    write_lines,
)

QUESTIONS, ANNOTATIONS = "llava_gqa_testdev_balanced.jsonl", "data/testdev_balanced_questions.json"
SEMANTIC = {"attr": "attribute", "cat": "category", "global": "scene", "obj": "object",
            "rel": "relation"}
# Reasoning steps that the official scorer does not count.
_NO_STEP = ("exist", "query: name", "choose name")


def read(folder: pathlib.Path) -> list[Question]:
  """The questions with what GQA's own file knows of them."""
  path, annotations = folder / QUESTIONS, folder / ANNOTATIONS
  asked = by_id(llava_questions(path, folder / "data" / "images"), path)
  known = {name: q for name, q in read_json(annotations, dict).items()
           if field(q, "isBalanced", annotations)}
  check_same(asked, path, known, annotations, "of the balanced test-dev split, GQA 1.2")
  return [Question(q.key, q.text, q.image, q.record | _facts(known[name], annotations))
          for name, q in asked.items()]


def _facts(known: Mapping, path) -> dict:
  """The answer, and the classes in which it is counted."""
  types = field(known, "types", path)
  steps = [f"{step['operation']}: {step['argument']}" for step in field(known, "semantic", path)]
  return {"answer": field(known, "answer", path), "structural": field(types, "structural", path),
          "semantic": field(types, "semantic", path),
          "group": field(field(known, "groups", path), "global", path),
          "steps": sum(not any(part in step for part in _NO_STEP) for step in steps),
          "words": len(field(known, "question", path).split())}


def prediction(answer: str) -> str:
  """An answer as it is compared: lower case, without periods at its end."""
  return answer.rstrip(".").lower()


def score(answered: Sequence[Answered]) -> Score:
  """Accuracy in percent, of all and of each class."""
  records = [a.question.record for a in answered]
  marks = [float(prediction(a.text) == r["answer"]) for a, r in zip(answered, records)]
  kind = ["Open" if r["structural"] == "query" else "Binary" for r in records]
  overall = dict(sorted(_by_class(kind, marks).items()))
  apart = distribution((r["group"], r["answer"], prediction(a.text))
                       for a, r in zip(answered, records))
  if apart is not None:
    overall["Distribution (lower is better)"] = apart
  classes = {"structural type": [r["structural"] for r in records],
             "semantic type": [SEMANTIC.get(r["semantic"], r["semantic"]) for r in records],
             "steps": [r["steps"] for r in records], "words": [r["words"] for r in records]}
  return Score({"GQA": percent(marks)},
               {"GQA": overall} | {f"GQA, {name}": _by_class(values, marks)
                                   for name, values in classes.items()},
               {a.question.key: mark for a, mark in zip(answered, marks)},
               {a.question.key: r["answer"] for a, r in zip(answered, records)})


def _by_class(classes: Sequence, marks: Sequence[float]) -> dict[str, float]:
  """Accuracy of each class, sorted."""
  return {str(one): percent(m for c, m in zip(classes, marks) if c == one)
          for one in sorted(set(classes))}


def distribution(triples: Iterable[tuple[str | None, str, str]]) -> float | None:
  """How far the answers of each group of questions are from the true ones together, by the
  chi-square statistic, of (group, true, said).  None if no question is in a group."""
  true, said = collections.defaultdict(collections.Counter), collections.defaultdict(
      collections.Counter)
  for group, gold, answer in triples:
    if group is not None:
      true[group][gold] += 1
      said[group][answer] += 1
  total, weight = 0.0, 0
  for group, golds in true.items():
    apart = sum((said[group][gold] - n) ** 2 / n for gold, n in golds.items())
    total += apart * golds.total()
    weight += golds.total()
  return total / weight / 100 if weight else None


def write(answered: Sequence[Answered], folder: pathlib.Path, model: str) -> list[pathlib.Path]:
  """Answers as LLaVA has them, and the predictions that GQA's eval.py reads."""
  predictions = [{"questionId": a.question.record["question_id"], "prediction": prediction(a.text)}
                 for a in answered]
  return [write_lines(folder / "answers.jsonl", llava_answers(answered, model)),
          write_json(folder / "testdev_balanced_predictions.json", predictions, indent=None)]


_GQA = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
BENCHMARKS = (Benchmark(
    "gqa", "GQA", "gqa", {
        QUESTIONS: LLAVA_EVAL,
        ANNOTATIONS: f"questions of {_GQA}",
        "data/images": f"images of {_GQA}"},
    read=read, score=score, write=write, max_new_tokens=128),)
