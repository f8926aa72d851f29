"""MathVista, testmini: mathematics in pictures (Lu et al., 2023).  R6.2.

A language model finds the answer in the model's words; where it is not asked, or fails, nothing is
found, and the official scorer then takes the choice with the fewest characters.
"""
from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

from mgjax.evaluate.benchmark import Answered, Benchmark, EvaluationError, Judging, Question, Score
from mgjax.evaluate.files import extra, field, read_json, write_json, write_lines

PROBLEMS = "testmini.json"
GROUPS = ("question_type", "answer_type", "language", "source", "category", "task", "context",
          "grade", "skills")
_NUMBER = ("Hint: Please answer the question requiring {} and provide the final {}, e.g., {}, at "
           "the end.")
HINTS = {  # by answer type and precision
    ("text", None): "Hint: Please answer the question and provide the correct option letter, e.g., "
                    "A, B, C, D, at the end.",
    ("integer", None): _NUMBER.format("an integer answer", "value", "1, 2, 3"),
    ("float", 1): _NUMBER.format("a floating-point number with one decimal place", "value",
                                 "1.2, 1.3, 1.4"),
    ("float", 2): _NUMBER.format("a floating-point number with two decimal places", "value",
                                 "1.23, 1.34, 1.45"),
    ("list", None): _NUMBER.format("a Python list as an answer", "list",
                                   "[1, 2, 3], [1.2, 1.3, 1.4]")}
DEMO = """\
Please read the following example. Then extract the answer from the model response and type it at the end of the prompt.

Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.
Question: Which number is missing?

Model response: The number missing in the sequence is 14.

Extracted answer: 14

Hint: Please answer the question requiring a floating-point number with one decimal place and provide the final value, e.g., 1.2, 1.3, 1.4, at the end.
Question: What is the fraction of females facing the camera?

Model response: The fraction of females facing the camera is 0.6, which means that six out of ten females in the group are facing the camera.

Extracted answer: 0.6

Hint: Please answer the question requiring a floating-point number with two decimal places and provide the final value, e.g., 1.23, 1.34, 1.45, at the end.
Question: How much money does Luca need to buy a sour apple candy and a butterscotch candy? (Unit: $)

Model response: Luca needs $1.45 to buy a sour apple candy and a butterscotch candy.

Extracted answer: 1.45

Hint: Please answer the question requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.
Question: Between which two years does the line  graph saw its maximum peak?

Model response: The line graph saw its maximum peak between 2007 and 2008.

Extracted answer: [2007, 2008]

Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.
Question: What fraction of the shape is blue?\nChoices:\n(A) 3/11\n(B) 8/11\n(C) 6/11\n(D) 3/5

Model response: The correct answer is (B) 8/11.

Extracted answer: B"""  # noqa: E501


def read(folder: pathlib.Path) -> list[Question]:
  """The problems, in the file's order."""
  path = folder / PROBLEMS
  problems = read_json(path)
  if not isinstance(problems, dict) or not all(isinstance(p, dict) for p in problems.values()):
    raise EvaluationError(f"{path}: expected an object of problems by number; it is the file "
                          "data/testmini.json of lupantech/MathVista")
  for number, problem in problems.items():
    for name in ("pid", "question", "image", "choices", "unit", "precision", "answer",
                 "question_type", "answer_type", "metadata"):
      field(problem, name, path)
    if (split := problem["metadata"].get("split")) != "testmini":
      raise EvaluationError(f"{path}: problem {number} is of the split {split!r}, expected "
                            "'testmini'; the test split's answers are not published")
    if _kind(problem) not in HINTS:
      raise EvaluationError(f"{path}: problem {number} wants an answer of the kind "
                            f"{_kind(problem)}, expected one of {', '.join(map(str, HINTS))}; is "
                            "it another version?")
  return [Question(str(p["pid"]), query(p), folder / p["image"], p) for p in problems.values()]


def _kind(problem):
  kind = "text" if problem["question_type"] == "multi_choice" else problem["answer_type"]
  return kind, problem["precision"] if kind == "float" else None


def query(problem: Mapping) -> str:
  """What the model is asked."""
  unit = f" (Unit: {problem['unit']})" if problem["unit"] else ""
  choices = [f"({chr(ord('A') + i)}) {c}" for i, c in enumerate(problem["choices"] or ())]
  return "\n".join([HINTS[_kind(problem)], f"Question: {problem['question']}{unit}",
                    *(["Choices:"] if choices else []), *choices]).strip()


def found(answered: Answered) -> str | None:
  """The answer, where it needs no looking for; None where a judge has to."""
  problem, response = answered.question.record, answered.text
  if not response or (problem["question_type"] == "multi_choice"
                      and response in problem["choices"]):
    return response
  numbers: dict[str, Callable] = {"integer": int, "float": float}
  try:
    return str(numbers[problem["answer_type"]](response))
  except (KeyError, ValueError):
    return None


def prompt(answered: Answered, attempt: int) -> str:
  """What the judge is asked, if it is."""
  if found(answered) is not None:
    return ""
  return f"{DEMO}\n\n{answered.question.text}\n\n{answered.text}\n\nExtracted answer: "


def extraction(answered: Answered) -> str:
  """The answer in the model's words; "" if none was found."""
  here = found(answered)
  return answered.verdict.strip() if here is None else here


def prediction(extracted: str, problem: Mapping) -> str | None:
  """An extracted answer in the form in which the truth is."""
  if problem["question_type"] == "multi_choice":
    return _choice(extracted.strip(), problem["choices"])
  try:
    if problem["answer_type"] == "integer":
      return str(int(float(extracted)))
    if problem["answer_type"] == "float":
      return str(round(float(extracted), int(problem["precision"])))
  except (OverflowError, ValueError):
    return None
  return extracted


def _choice(extracted, choices):
  """By the first letter in parentheses, or a lone letter, else the choice it is nearest to."""
  if letter := re.search(r"\(([a-zA-Z])\)", extracted):
    extracted = letter[1].upper()
  letters = [chr(ord("A") + i) for i in range(len(choices))]
  if extracted in letters:
    return choices[letters.index(extracted)]
  distance = extra("rapidfuzz.distance").Levenshtein.distance
  return min(choices, key=lambda choice: distance(extracted, choice))


def score(answered: Sequence[Answered]) -> Score:
  """Accuracy in percent, to two decimals as the official scorer gives it."""
  marks = {a.question.key: float(prediction(extraction(a), a.question.record)
                                 == a.question.record["answer"]) for a in answered}
  figures = _figures(answered, marks)
  groups = {name: {row: float(f["accuracy"]) for row, f in rows.items()}
            for name, rows in figures.items() if name != "average"}
  unread = sum(found(a) is None and not a.verdict.strip() for a in answered)
  notes = (f"{unread} of {len(answered)} answers are not a bare number or choice, and no judge has "
           "read them: they count as the official scorer counts failures, wrong but for lucky "
           "choices, so that the figure is about a lower bound",) if unread else ()
  return Score({"MathVista": float(figures["average"]["accuracy"])}, groups, marks,
               {a.question.key: a.question.record["answer"] for a in answered}, notes)


def _figures(answered, marks):
  """The official score file."""
  def figure(rows, digits):
    right = int(sum(rows))
    return {"accuracy": digits(right / max(1, len(rows)) * 100), "correct": right,
            "total": len(rows)}

  figures = {"average": figure(marks.values(), lambda p: str(round(p, 2)))}
  for name in GROUPS:
    rows: dict[str, list[float]] = {}
    for a in answered:
      values = (a.question.record | a.question.record["metadata"])[name]
      for value in dict.fromkeys(values if name == "skills" else [values]):
        rows.setdefault(value, []).append(marks[a.question.key])
    parts = {value: figure(of, "{:.2f}".format) for value, of in rows.items()}
    figures[name] = dict(sorted(parts.items(), key=lambda i: -float(i[1]["accuracy"])))
  return figures


def write(answered: Sequence[Answered], folder: pathlib.Path, model: str) -> list[pathlib.Path]:
  """The original's answers; the same with the extracted answers as `extract_answer.py` leaves
  them; the figures as `calculate_score.py` gives them."""
  said = [{**a.question.record, "query": a.question.text, "response": a.text} for a in answered]
  extracted = {a.question.key: record | {"extraction": extraction(a)}
               for a, record in zip(answered, said, strict=True)}
  return [write_lines(folder / "answers.jsonl", said),
          write_json(folder / "extracted.json", extracted, indent=4),
          write_json(folder / "scores.json", _figures(answered, score(answered).marks), indent=4)]


BENCHMARKS = (Benchmark(
    "mathvista", "MathVista, testmini", "MathVista", {
        PROBLEMS: "https://github.com/lupantech/MathVista, data/testmini.json",
        "images": "https://huggingface.co/datasets/AI4Math/MathVista, images.zip"},
    read=read, score=score, write=write, max_new_tokens=1024,
    judging=Judging("gpt-4-0613", prompt, lambda reply: bool(reply.strip()),
                    temperature=(0.0, 0.0, 0.0), required=False)),)
