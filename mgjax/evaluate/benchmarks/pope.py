"""POPE: does the model see objects that are not in the picture? (Li et al., 2023).  R6.2."""
from __future__ import annotations

import pathlib
from collections.abc import Sequence

from mgjax.evaluate.benchmark import Answered, Benchmark, EvaluationError, Question, Score
from mgjax.evaluate.files import (
    LLAVA_EVAL,
    by_id,
    field,
    llava_answers,
    llava_questions,
    read_lines,
    write_lines,
)

QUESTIONS = "llava_pope_test.jsonl"
CATEGORIES = ("random", "popular", "adversarial")  # how the objects that are not there are chosen
_POPE = ("https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/"
         "coco (this commit: later ones ask other questions)")


def read(folder: pathlib.Path) -> list[Question]:
  """The questions with their labels, which belong to them by the order in each category."""
  path = folder / QUESTIONS
  asked = llava_questions(path, folder / "val2014")
  by_id(asked, path)
  labels: dict[str, str] = {}
  for category in CATEGORIES:
    labels |= _labels([q for q in asked if field(q.record, "category", path) == category],
                      path, folder / labels_of(category))
  if strange := next((q for q in asked if q.key not in labels), None):
    raise EvaluationError(f"{path}: category {strange.record['category']!r}; expected "
                          f"{', '.join(CATEGORIES)}")
  return [Question(q.key, q.text, q.image, q.record | {"label": labels[q.key]}) for q in asked]


def labels_of(category: str) -> str:
  """The file of a category's labels."""
  return f"coco/coco_pope_{category}.json"


def _labels(asked, asked_in, path):
  """Labels by the questions' keys.  EvaluationError if the files are not in the same order."""
  known = read_lines(path)
  if len(known) != len(asked):
    raise EvaluationError(f"{path}: it has {len(known):,} labels, and {asked_in} "
                          f"{len(asked):,} questions of this category; fetch it from {_POPE}")
  for n, (question, label) in enumerate(zip(asked, known), 1):
    if label.get("image", question.image.name) != question.image.name:
      raise EvaluationError(f"{path}: label {n} is for {label['image']}, and question {n} of this "
                            f"category in {asked_in} shows {question.image.name}; fetch it from "
                            f"{_POPE}")
  return {q.key: "no" if field(label, "label", path) == "no" else "yes"
          for q, label in zip(asked, known)}


def says(answer: str) -> str:
  """"no" if a word of the first sentence is "No", "no" or "not", else "yes"."""
  words = answer.split(".")[0].replace(",", "").split(" ")
  return "yes" if not {"No", "no", "not"}.intersection(words) else "no"


def score(answered: Sequence[Answered]) -> Score:
  """F1 and accuracy, the mean over the categories as LLaVA's paper has it, in percent."""
  groups, notes = {}, []
  for category in CATEGORIES:
    pairs = [(says(a.text), a.question.record["label"]) for a in answered
             if a.question.record["category"] == category]
    if pairs:
      groups[f"POPE {category}"], told = figures(pairs)
      notes += [f"{category}: {note}" for note in told]
    else:
      notes.append(f"{category}: no question was asked, the means are over the others")
  mean = lambda name: sum(rows[name] for rows in groups.values()) / len(groups) if groups else 0.0
  truths = {a.question.key: a.question.record["label"] for a in answered}
  return Score({"POPE F1": mean("F1 score"), "POPE accuracy": mean("Accuracy")}, groups,
               {a.question.key: float(says(a.text) == truths[a.question.key]) for a in answered},
               truths, tuple(notes))


def figures(pairs: Sequence[tuple[str, str]]) -> tuple[dict[str, float], list[str]]:
  """Figures in percent of (what was said, what is true), and what is to be noted of them."""
  count = {(said, true): pairs.count((said, true)) for said in ("yes", "no")
           for true in ("yes", "no")}
  hits, notes = count["yes", "yes"], []

  def ratio(name: str, part: float, whole: float) -> float:
    if not whole:
      notes.append(f"{name} is not defined, 0 stands for it")
      return 0.0
    return part / whole

  precision = ratio("precision", hits, hits + count["yes", "no"])
  recall = ratio("recall", hits, hits + count["no", "yes"])
  f1 = ratio("F1 score", 2 * precision * recall, precision + recall)
  accuracy = (hits + count["no", "no"]) / len(pairs)
  said_yes = (hits + count["yes", "no"]) / len(pairs)
  return {"Accuracy": 100 * accuracy, "Precision": 100 * precision, "Recall": 100 * recall,
          "F1 score": 100 * f1, "Yes ratio": 100 * said_yes}, notes


def write(answered: Sequence[Answered], folder: pathlib.Path, model: str) -> list[pathlib.Path]:
  """What the original's `eval_pope --result-file` reads."""
  return [write_lines(folder / "answers.jsonl", llava_answers(answered, model))]


BENCHMARKS = (Benchmark(
    "pope", "POPE", "pope", {
        QUESTIONS: LLAVA_EVAL,
        **{labels_of(category): _POPE for category in CATEGORIES},
        "val2014": "http://images.cocodataset.org/zips/val2014.zip"},
    read=read, score=score, write=write, max_new_tokens=128),)
