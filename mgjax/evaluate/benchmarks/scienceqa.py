"""ScienceQA, test: school questions, half of them with a picture (Lu et al., 2022).  R6.2."""
from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

from mgjax.evaluate.benchmark import Answered, Benchmark, Question, Score
from mgjax.evaluate.files import (
    LLAVA_EVAL,
    by_id,
    check_same,
    field,
    llava_answers,
    percent,
    read_json,
    write_lines,
)

QUESTIONS, SPLITS, PROBLEMS = "llava_test_CQM-A.json", "pid_splits.json", "problems.json"
LETTER = "Answer with the option's letter from the given choices directly."
OPTIONS = "ABCDE"
# The classes of the ScienceQA paper's table; a question is in one of each three or two.
_GRADES = lambda first, last: {f"grade{n}" for n in range(first, last + 1)}
CLASSES: dict[str, Callable[[Mapping], bool]] = {
    "natural science": lambda r: r["subject"] == "natural science",
    "social science": lambda r: r["subject"] == "social science",
    "language science": lambda r: r["subject"] == "language science",
    "text context": lambda r: r["hint"],
    "image context": lambda r: r["picture"],
    "no context": lambda r: not r["hint"] and not r["picture"],
    "grades 1-6": lambda r: r["grade"] in _GRADES(1, 6),
    "grades 7-12": lambda r: r["grade"] in _GRADES(7, 12)}


def read(folder: pathlib.Path) -> list[Question]:
  """The questions of the test split, with LLaVA's prompt for the letter alone."""
  path, split, problems = folder / QUESTIONS, folder / SPLITS, folder / PROBLEMS
  asked = by_id([_question(str(n), record, path, folder)
                 for n, record in enumerate(read_json(path, list))], path)
  test, known = field(read_json(split), "test", split), read_json(problems, dict)
  check_same(asked, path, test, split, "of the test split")
  for name in asked:
    field(known, name, problems)
  return [Question(q.key, q.text, q.image, q.record | _facts(known[name], problems))
          for name, q in asked.items()]


def _question(key, record, path, folder):
  turns = field(record, "conversations", path)
  text = field(turns[0] if turns else {}, "value", path).replace("<image>", "").strip()
  image = folder / "images" / "test" / record["image"] if "image" in record else None
  return Question(key, f"{text}\n{LETTER}", image, {"question_id": field(record, "id", path)})


def _facts(problem: Mapping, path) -> dict:
  """The answer's index, how many choices there are, and the classes."""
  return {"answer": field(problem, "answer", path),
          "choices": len(field(problem, "choices", path)),
          "subject": field(problem, "subject", path), "grade": field(problem, "grade", path),
          "hint": bool(field(problem, "hint", path)),
          "picture": bool(field(problem, "image", path))}


def choice(answer: str, choices: int) -> int:
  """The index of the choice that an answer names; -1 if it names none.

  >>> choice("B", 2), choice("B. a whale", 2), choice("The answer is B.", 2), choice("C", 2)
  (1, 1, 1, -1)
  """
  letter = ""
  if len(answer) == 1 or (answer[1:3] == ". " and answer[0] in OPTIONS):
    letter = answer[0]
  elif len(found := re.findall(r"The answer is ([A-Z]).", answer)) == 1:
    letter = found[0]
  return OPTIONS[:choices].index(letter) if letter and letter in OPTIONS[:choices] else -1


def score(answered: Sequence[Answered]) -> Score:
  """Accuracy in percent, of all and of the questions with a picture."""
  marks = {a.question.key: float(choice(a.text, a.question.record["choices"])
                                 == a.question.record["answer"]) for a in answered}
  of = lambda kept: [marks[a.question.key] for a in answered if kept(a.question)]
  headline = {"ScienceQA": percent(marks.values())}
  if shown := of(lambda q: q.image is not None):
    headline["ScienceQA image"] = percent(shown)
  classes = {name: of(lambda q, member=member: member(q.record))
             for name, member in CLASSES.items()}
  return Score(headline, {"ScienceQA": {name: percent(m) for name, m in classes.items() if m}},
               marks, {a.question.key: OPTIONS[a.question.record["answer"]] for a in answered})


def write(answered: Sequence[Answered], folder: pathlib.Path, model: str) -> list[pathlib.Path]:
  """What the original's `eval_science_qa --result-file` reads; it knows the questions with a
  picture by the image tag in the prompt."""
  lines = [line | {"prompt": f"<image>\n{line['prompt']}"} if a.question.image else line
           for a, line in zip(answered, llava_answers(answered, model))]
  return [write_lines(folder / "answers.jsonl", lines)]


_SCIENCEQA = "https://github.com/lupantech/ScienceQA/tree/main/data/scienceqa"
BENCHMARKS = (Benchmark(
    "scienceqa", "ScienceQA", "scienceqa", {
        QUESTIONS: LLAVA_EVAL,
        SPLITS: _SCIENCEQA,
        PROBLEMS: _SCIENCEQA,
        "images/test": "https://scienceqa.s3.us-west-1.amazonaws.com/images/test.zip"},
    read=read, score=score, write=write, max_new_tokens=1024),)
