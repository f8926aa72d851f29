"""MMBench, dev, English and Chinese: choices, asked in every rotation (Liu et al., 2023).  R6.2.

A question counts if it is right in all rotations ("circular").  The files hold them as rows of
their own, the index raised by a million each time; of a file that has none, every row is asked in
all its rotations, as the original's --all-rounds does.  Reading an answer goes by lmms-eval's rules
(`mmbench_evals.py`), and by a judge where no rule applies.
"""
from __future__ import annotations

import base64
import csv
import dataclasses
import pathlib
import random
import sys
from collections.abc import Iterator, Mapping, Sequence

from mgjax.evaluate.benchmark import Answered, Benchmark, EvaluationError, Judging, Question, Score
from mgjax.evaluate.files import extra, llava_answers, percent, write_lines

SOURCE = "https://download.openmmlab.com/mmclassification/datasets/mmbench/"
LETTERS = "ABCD"
# What the upload leaves out, and what else must be there.
DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
NEEDED = ("index", "question", *LETTERS, "answer")
PREDICTION = 6  # the column of the upload where the answer goes
ROTATION = 1_000_000  # is added to the index of each further rotation
# Cells that pandas takes for missing, in whose way the original reads the file.
MISSING = frozenset((
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"))
# What may stand before and after a letter that is an answer.
WRAPS = (("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
         (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."))
NO_REPLY = "Failed to obtain answer via API"
SEED = 2680  # of the letters drawn where the judge's reply cannot be read
_EXAMPLE = ("Question: What is the main object in image?\nOptions: A. teddy bear B. rabbit C. cat "
            "D. dog\nAnswer: {}\nYour output: {}\n")
JUDGE = (
    "You are an AI assistant who will help me to match an answer with several options of a "
    "single-choice question. You are provided with a question, several options, and an answer, "
    "and you need to find which option is most similar to the answer. If the meaning of all "
    "options are significantly different from the answer, output E. Your should output a single "
    "uppercase character in A, B, C, D (if they are valid options), and E. \n"
    f"Example 1: \n{_EXAMPLE.format('a cute teddy bear', 'A')}"
    f"Example 2: \n{_EXAMPLE.format('Spider', 'E')}"
    "Example 3: \nQuestion: {}?\nOptions: {}\nAnswer: {}\nYour output: ")


def read(path: pathlib.Path, instruction: str) -> list[Question]:
  """The file's rows as questions; of a file without rotations, each row in all of them."""
  rows = list(_rows(path))
  if not rows or len({row["index"] for row in rows}) < len(rows):
    raise EvaluationError(f"{path}: {len(rows)} rows, expected several, each with an index of its "
                          f"own; fetch it again from {SOURCE}{path.name}")
  circular = any(row["index"] >= ROTATION for row in rows)
  return [question for row in rows
          for question in _rotations(row, path, instruction, 1 if circular else len(LETTERS))]


def _rows(path) -> Iterator[dict]:
  """Column -> cell, None where pandas would see a missing one."""
  csv.field_size_limit(sys.maxsize)
  number = 0
  try:
    with path.open(encoding="utf-8-sig", newline="") as file:
      reader = csv.reader(file, delimiter="\t")
      names = next(reader, [])
      if lacks := [c for c in (*NEEDED, *DROPPED) if c not in names]:
        raise EvaluationError(f"{path}: no column {', '.join(lacks)}; it has {', '.join(names)}; "
                              "is it the test split, which has no answers, or another version?")
      for cells in filter(None, reader):
        number += 1
        if len(cells) > len(names):
          raise ValueError(f"{len(cells)} cells, expected {len(names)}")
        row = dict.fromkeys(names) | {n: None if c in MISSING else c
                                      for n, c in zip(names, cells, strict=False)}
        if lacks := [c for c in ("question", "answer", "image") if row[c] is None]:
          raise ValueError(f"no {', '.join(lacks)}")
        yield row | {"index": int(row["index"] or "")}
  except (OSError, ValueError, csv.Error) as error:
    if isinstance(error, EvaluationError):
      raise
    raise EvaluationError(f"{path}: row {number} cannot be read ({error}); fetch it again from "
                          f"{SOURCE}{path.name}") from error


def _rotations(row, path, instruction, most) -> Iterator[Question]:
  options = []
  for letter in LETTERS:
    if is_none(row[letter]):
      break
    options.append(row[letter])
  letters = list(LETTERS[:len(options)])
  try:
    image = base64.b64decode(row["image"])
  except ValueError as error:
    raise EvaluationError(f"{path}: the picture of row {row['index']} is no base64 ({error}); "
                          f"fetch it again from {SOURCE}{path.name}") from error
  head = row["question"] if is_none(row["hint"]) else f"{row['hint']}\n{row['question']}"
  rest = {name: cell for name, cell in row.items() if name != "image"}
  for turn in range(min(most, max(1, len(options)))):
    text = "".join([head, *(f"\n{a}. {o}" for a, o in zip(LETTERS, options, strict=False))])
    truth = row["answer"]
    if turn:
      truth = LETTERS[letters.index(truth)] if truth in letters else ""
    record = {"question_id": row["index"], "round_id": turn, "rounds": most, "prompt": text,
              "options": options, "option_char": letters, "truth": truth, "row": rest,
              "choices": (dict(zip(LETTERS, options, strict=False)) if turn else
                          {k: row[k] for k in LETTERS if row[k] is not None})}
    key = f"{row['index']}#{turn}" if turn else f"{row['index']}"
    yield Question(key, f"{text}\n{instruction}", image, record)
    options, letters = options[1:] + options[:1], letters[1:] + letters[:1]


def is_none(cell: str | None) -> bool:
  """Whether the original takes it for missing."""
  return cell is None or cell.lower() in ("nan", "none")


def letter_in(text: str) -> str:
  """The one letter that stands alone in a text, A to E; "" if there is none, or several."""
  if NO_REPLY in text:
    return ""
  words = text.split()
  for before, after in WRAPS:
    found = [c for c in "ABCDE" if f"{before}{c}{after}" in words]
    article = not before and not after and "A" in found and len(words) > 3
    if len(found) == 1 and not article:
      return found[0]
  return ""


def meant(text: str, choices: Mapping[str, str]) -> str:
  """The letter that a text means, by letter or by the one option in it; "" if no rule applies."""
  within = [k for k, choice in choices.items() if choice.lower() in text.lower()]
  return letter_in(text) or (within[0] if len(within) == 1 else "")


def prompt(answered: Answered, attempt: int) -> str:
  """What the judge is asked, where no rule applies."""
  r = answered.question.record
  if meant(answered.text, r["choices"]):
    return ""
  options = []
  for letter in LETTERS:
    if letter not in r["choices"]:
      break
    options.append(f"{letter}. {r['choices'][letter]}\n")
  return JUDGE.format(r["row"]["question"], "There are several options: \n" + "".join(options),
                      answered.text)


def score(answered: Sequence[Answered], title: str) -> Score:
  """Percent: of questions right in all rotations; beside it, of rows."""
  marks, unread, of_question = {}, 0, {}
  for a in answered:
    r = a.question.record
    letter = meant(a.text, r["choices"])
    unread += not letter and not a.verdict
    letter = letter or meant(a.verdict, r["choices"])
    marks[a.question.key] = float(bool(letter) and letter == r["truth"])
    of_question.setdefault(r["question_id"] % ROTATION, []).append(a)
  draw = random.Random(SEED)
  hits, rows = {}, {}
  for index in sorted(of_question):
    group = sorted(of_question[index], key=lambda a: (a.question.record["question_id"],
                                                      a.question.record["round_id"]))
    if group[0].question.record["question_id"] == index:
      hits[index], rows[index] = _all_right(group, draw), group[0].question.record["row"]
  groups = {"rows": {"accuracy": percent(marks.values())}}
  for kind in ("category", "l2-category"):
    names = sorted({row[kind] for row in rows.values() if row[kind] is not None})
    groups[kind] = {name: percent(hits[i] for i, row in rows.items() if row[kind] == name)
                    for name in names}
  notes = []
  if any(a.question.record["rounds"] > 1 for a in answered):
    notes.append("the file has no rotations: each row was asked in all of them")
  elif len(hits) == len(answered):
    notes.append("no question was asked in its rotations: the figure is not the circular one")
  if unread:
    notes.append(f"{unread} of {len(answered)} answers can be read by no rule, and no judge has "
                 "read them: they count as wrong")
  return Score({title: percent(hits.values())}, groups, marks,
               {a.question.key: _truth(a) for a in answered}, tuple(notes))


def _all_right(group, draw):
  """1 or 0; the judge's replies matter only if no answer is wrong by the rules."""
  letters = [meant(a.text, a.question.record["choices"]) for a in group]
  truths = [a.question.record["truth"] for a in group]
  if any(letter not in ("", truth) for letter, truth in zip(letters, truths, strict=True)):
    return 0
  for letter, truth, a in zip(letters, truths, group, strict=True):
    if not letter and (not a.verdict or truth != (
        meant(a.verdict, a.question.record["choices"]) or "ABCDE"[draw.randint(0, 4)])):
      return 0
  return 1


def _truth(answered):
  r = answered.question.record
  return f"{r['truth']}. {r['choices'].get(r['truth'], '')}"


def write(answered: Sequence[Answered], folder: pathlib.Path, model: str, stem: str
          ) -> list[pathlib.Path]:
  """The original's answers, and the sheet that the OpenCompass server takes."""
  told = [dataclasses.replace(a, question=dataclasses.replace(
      a.question, text=a.question.record["prompt"])) for a in answered]
  order = ("question_id", "round_id", "prompt", "text", "options", "option_char", "answer_id",
           "model_id", "metadata")
  lines = [line | {n: a.question.record[n] for n in ("round_id", "options", "option_char")}
           for line, a in zip(llava_answers(told, model), answered, strict=True)]
  return [write_lines(folder / "answers.jsonl", ({n: line[n] for n in order} for line in lines)),
          _write_sheet(answered, folder / f"{stem}.xlsx")]


def _write_sheet(answered, path):
  """First rounds only, for the server knows but the file's own rows."""
  book = extra("openpyxl").Workbook()
  illegal = extra("openpyxl.cell.cell").ILLEGAL_CHARACTERS_RE
  book.active.title = "Sheet1"
  for number, a in enumerate(a for a in answered if not a.question.record["round_id"]):
    kept = {n: c for n, c in a.question.record["row"].items() if n not in DROPPED}
    names, cells = list(kept), list(kept.values())
    names.insert(PREDICTION, "prediction")
    cells.insert(PREDICTION, a.text)
    for line in (cells,) if number else (names, cells):
      book.active.append([c if isinstance(c, int) else illegal.sub("", c or "") for c in line])
  book.save(path)
  return path


def benchmark(name: str, title: str, file: str, instruction: str) -> Benchmark:
  """In one of the languages."""
  return Benchmark(
      name, f"{title}, dev", "mmbench", {f"{file}.tsv": f"{SOURCE}{file}.tsv"},
      read=lambda folder: read(folder / f"{file}.tsv", instruction),
      score=lambda answered: score(answered, title),
      write=lambda answered, folder, model: write(answered, folder, model, file),
      max_new_tokens=1024,
      judging=Judging("gpt-3.5-turbo-0613", prompt, lambda reply: bool(reply.strip()),
                      temperature=(0.0, 0.0, 0.0), required=False))


BENCHMARKS = (
    benchmark("mmbench", "MMBench", "mmbench_dev_20230712",
              "Answer with the option's letter from the given choices directly."),
    benchmark("mmbench-cn", "MMBench-CN", "mmbench_dev_cn_20231003", "请直接回答选项字母。"))
