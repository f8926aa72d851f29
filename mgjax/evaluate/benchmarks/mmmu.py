"""MMMU: college exams, 30 subjects, choices and open answers (Yue et al., 2023).  R6.2.

As in the original only the first picture is shown, and `<image 1>` stays in the text.  Unlike it,
which samples from beams, the answer is the greedy one.  Where a choice cannot be read from an
answer, one is drawn: by random.Random(42) in the order of the questions, which is what the original
does in one process (on eight GPUs it begins anew every four subjects).
"""
from __future__ import annotations

import ast
import pathlib
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from mgjax.evaluate.benchmark import Answered, Benchmark, EvaluationError, Question, Score
from mgjax.evaluate.files import extra, percent, write_json, write_lines

SOURCE = "https://huggingface.co/datasets/MMMU/MMMU"
DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy", "Public_Health"),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics",
        "Energy_and_Power", "Materials", "Mechanical_Engineering")}
SUBJECTS = tuple(sorted(subject for subjects in DOMAINS.values() for subject in subjects))
COLUMNS = ("id", "question", "options", "answer", "question_type", "image_1")
CHOICE = "multiple-choice"
SEED = 42
_BATCH = 32  # rows in memory beside the questions
# What announces an answer; in the last line an equals sign does too.
_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = tuple(map(re.compile, (
    r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")))


def read(folder: pathlib.Path, split: str) -> list[Question]:
  """The split's questions, subject by subject."""
  return [_question(row, path, subject, split) for subject in SUBJECTS
          for path in _files(folder / subject, split) for row in _rows(path)]


def _files(folder, split):
  if paths := sorted(folder.glob(f"{split}-*.parquet")):
    return paths
  there = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
  raise EvaluationError(f"{folder}: no {split}-*.parquet, there is {there}; fetch the split from "
                        f"{SOURCE}")


def _rows(path):
  pyarrow, parquet = extra("pyarrow"), extra("pyarrow.parquet")
  try:
    with parquet.ParquetFile(path) as file:
      if lacks := [c for c in COLUMNS if c not in file.schema_arrow.names]:
        raise EvaluationError(f"{path}: no column {', '.join(lacks)}; it has "
                              f"{', '.join(file.schema_arrow.names)}; fetch it from {SOURCE}")
      for batch in file.iter_batches(_BATCH, columns=list(COLUMNS)):
        yield from batch.to_pylist()
  except (OSError, pyarrow.ArrowException) as error:
    raise EvaluationError(f"{path}: not a parquet file that can be read ({error}); fetch it again"
                          ) from error


def _question(row, path, subject, split):
  name, kind = row["id"], row["question_type"]
  if not name.startswith(f"{split}_{subject}_"):
    raise EvaluationError(f"{path}: question {name}, expected {split}_{subject}_...; is it another "
                          "split's or subject's file?")
  try:
    options = ast.literal_eval(row["options"])
    if not isinstance(options, list) or (kind == CHOICE and not options):
      raise ValueError("expected a list of options")
  except (SyntaxError, TypeError, ValueError) as error:
    raise EvaluationError(f"{path}: question {name} has the options {row['options']!r} ({error}); "
                          "fetch it again") from error
  letters = {chr(ord("A") + i): option for i, option in enumerate(options)}
  image = row["image_1"] and row["image_1"]["bytes"]
  if image is None:
    raise EvaluationError(f"{path}: question {name} has no picture in column image_1; fetch it "
                          f"from {SOURCE}")
  return Question(name, prompt(row["question"], letters if kind == CHOICE else None), image, {
      "subject": subject, "question_type": kind, "answer": row["answer"],
      "options": letters if kind == CHOICE else {}})


def prompt(question: str, options: Mapping[str, str] | None) -> str:
  """A question with the options by letter; None: an open one."""
  if options is None:
    return f"{question}\nAnswer the question using a single word or phrase."
  lines = "".join(f"({letter}) {option}\n" for letter, option in options.items())
  return f"{question}\n{lines}\nAnswer with the option's letter from the given choices directly."


def chosen(response: str, options: Mapping[str, str], draw: random.Random) -> str:
  """The letter that an answer means; drawn if it means none."""
  for mark in ",.!?;:'":
    response = response.strip(mark)
  said = f" {response} "
  for form in ("({})", " {} "):
    if places := {letter: said.rfind(form.format(letter)) for letter in options
                  if form.format(letter) in said}:
      return max(places, key=places.__getitem__)
  low = said.lower()
  if len(said.split()) > 5 and (places := {
      letter: low.rfind(text.lower()) for letter, text in options.items() if text.lower() in low}):
    return max(places, key=places.__getitem__)
  return draw.choice(list(options))


def phrases(response: str) -> list[str | float]:
  """What an open answer may mean: its key phrases, and the numbers in them, normalised."""
  response = response.strip().strip(".").lower()
  *lines, last = response.split("\n")
  found = [p for p in (*(_tail(line, _CUES) for line in lines), _tail(last, (*_CUES, "=")))
           if p and p not in (":", ",", ".", "!", "?", ";", "'")] or [response]
  numbers = [n for phrase in found for pattern in _NUMBERS for n in pattern.findall(phrase)]
  return list(dict.fromkeys(v for text in found + numbers for v in normalised(text)))


def _tail(line, cues):
  """The shortest of what follows the cues; "" is taken only for want of another."""
  shortest = ""
  for tail in (line.rsplit(cue, 1)[-1].strip() for cue in cues if cue in line):
    if not shortest or len(tail) < len(shortest):
      shortest = tail
  return shortest


def normalised(text: str) -> list[str | float]:
  """A number to two decimals, or lower case; a single character must stand beside a space."""
  text = text.strip()
  try:
    return [round(float(text.replace(",", "")), 2)]
  except ValueError:
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def right(kind: str, truth: str | Sequence[str], meant: str | Sequence[str | float]) -> bool:
  """Whether the letter, or one of an open answer's phrases, is as expected."""
  truths = [truth] if isinstance(truth, str) else list(truth)
  if kind == CHOICE:
    return meant in truths
  wanted = [v for t in truths for v in normalised(t)]
  return any(p in wanted if isinstance(p, float) else
             any(isinstance(w, str) and w in p for w in wanted) for p in meant)


def parsed(answered: Sequence[Answered]) -> list[str | list[str | float]]:
  """What each answer means, letter or phrases."""
  draw = random.Random(SEED)
  return [chosen(a.text.strip("\n"), a.question.record["options"], draw)
          if a.question.record["question_type"] == CHOICE else phrases(a.text.strip("\n"))
          for a in answered]


def score(answered: Sequence[Answered]) -> Score:
  """Accuracy in percent."""
  marks, groups, notes = {}, {"domain": defaultdict(list), "subject": defaultdict(list)}, ()
  for a, meant in zip(answered, parsed(answered), strict=True):
    r = a.question.record
    marks[a.question.key] = float(right(r["question_type"], r["answer"], meant))
    groups["subject"][r["subject"]].append(marks[a.question.key])
    domain = next(d for d, subjects in DOMAINS.items() if r["subject"] in subjects)
    groups["domain"][domain].append(marks[a.question.key])
  if lists := sum(a.question.record["question_type"] != CHOICE
                  and str(a.question.record["answer"]).startswith("[") for a in answered):
    notes = (f"{lists} open questions have a list of answers, which the original compares as one "
             "text: whatever the model says is wrong",)
  return Score({"MMMU val": percent(marks.values())},
               {name: {row: percent(rows[row]) for row in order if row in rows}
                for (name, rows), order in zip(groups.items(), (DOMAINS, SUBJECTS), strict=True)},
               marks, {a.question.key: str(a.question.record["answer"]) for a in answered}, notes)


def write(answered: Sequence[Answered], folder: pathlib.Path, model: str) -> list[pathlib.Path]:
  """The original's answers with what they mean, and what its `eval.py` makes of them."""
  figures = score(answered)
  judged = {key: "Correct" if mark else "Wrong" for key, mark in figures.marks.items()}
  right_ones = sum(figures.marks.values())
  judged["metric_dict"] = {"acc": right_ones / max(1, len(answered)), "num_example": len(answered)}
  return [_write_answers(answered, folder), write_json(folder / "val.json", judged, indent=4)]


def write_test(answered: Sequence[Answered], folder: pathlib.Path, model: str
               ) -> list[pathlib.Path]:
  """The original's answers with what they mean, and the upload to EvalAI (`convert_to_test.py`).

  Of an open answer's phrases that takes the first, as here; in the original they are in the order
  of a set, another one in each process.
  """
  upload = {a.question.key: meant if isinstance(meant, str) else str(meant[0])
            for a, meant in zip(answered, parsed(answered), strict=True)}
  return [_write_answers(answered, folder), write_json(folder / "test.json", upload, indent=4)]


def _write_answers(answered, folder):
  records = []
  for a, meant in zip(answered, parsed(answered), strict=True):
    r = a.question.record
    records.append({"id": a.question.key, "question_type": r["question_type"],
                    "answer": r["answer"], "response": a.text.strip("\n"), "parsed_pred": meant})
    if r["question_type"] == CHOICE:
      records[-1]["index2ans"] = r["options"]
  return write_lines(folder / "answers.jsonl", records)


_FILES = {subject: f"{SOURCE} (the folder {subject})" for subject in SUBJECTS}
BENCHMARKS = (
    Benchmark("mmmu", "MMMU, validation", "MMMU", _FILES, lambda f: read(f, "validation"), write,
              max_new_tokens=128, score=score),
    Benchmark("mmmu-test", "MMMU, test", "MMMU", _FILES, lambda f: read(f, "test"), write_test,
              max_new_tokens=128))
