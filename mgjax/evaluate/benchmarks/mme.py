"""MME: yes or no, twice a picture, in 14 categories (Fu et al., 2023).  R6.2.

Its own `calculation.py` reads an answer by its first four characters; lmms-eval, which drops full
stops and takes "y" for yes, gives other figures.
"""
from __future__ import annotations

import pathlib
from collections import defaultdict
from collections.abc import Sequence

from mgjax.evaluate.benchmark import Answered, Benchmark, EvaluationError, Question, Score
from mgjax.evaluate.files import LLAVA_EVAL, llava_answers, llava_questions, write_lines

QUESTIONS, RELEASE = "llava_mme.jsonl", "MME_Benchmark_release_version"
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation",
             "code_reasoning")
LLAVA_SUFFIX = "Answer the question using a single word or phrase."
OWN_SUFFIX = "Please answer yes or no."
_SHOWN = 4  # characters of an answer that count


def read(folder: pathlib.Path) -> list[Question]:
  """The questions with the truth, which is in a text file beside each picture."""
  questions, lost = [], []
  truths: dict[tuple[str, str], dict[str, str]] = {}
  for asked in llava_questions(folder / QUESTIONS, folder / RELEASE):
    category, file = _place(str(asked.record["question_id"]))
    if category not in PERCEPTION + COGNITION:
      raise EvaluationError(f"{folder / QUESTIONS}: question {asked.record['question_id']} is of "
                            "no category of MME, expected <category>/<picture>")
    if (category, file) not in truths:
      truths[category, file] = _truths(folder / RELEASE / category, file)
    known = truths[category, file]
    sentence = next((s for s in _sentences(asked.text) if s in known), "")
    if not sentence:
      lost.append(f"{asked.record['question_id']}: {asked.text!r}")
      continue
    record = {"category": category, "file": file, "sentence": sentence, "truth": known[sentence]}
    questions.append(Question(asked.key, asked.text, asked.image, asked.record | record))
  if lost:
    raise EvaluationError(f"{folder / RELEASE}: {len(lost)} questions of {folder / QUESTIONS} have "
                          f"no answer there, first {lost[0]}; fetch the release again, all of it")
  for category, number in _counts(questions).items():
    if number % 2 or not number:
      raise EvaluationError(f"{folder / QUESTIONS}: {number} questions of category {category}, "
                            "expected two for each picture; fetch it again")
  return questions


def _place(question_id):
  """<category>/.../<picture> -> the category, and the picture's text file."""
  parts = question_id.split("/")
  return parts[0], parts[-1].split(".")[0] + ".txt"


def _truths(folder, file):
  """Question -> Yes or No."""
  path = folder / ("questions_answers_YN" if (folder / "images").exists() else ".") / file
  truths, number = {}, 0
  try:
    for line in path.read_text(encoding="utf-8").strip().split("\n"):
      number += 1
      question, truth = line.strip().split("\t")
      if truth.lower() not in ("yes", "no"):
        raise ValueError(f"{truth!r}, expected Yes or No")
      truths[question] = truth
  except OSError as error:
    raise EvaluationError(f"{path}: cannot be read ({error}); expected MME's release as it is "
                          f"unpacked, {RELEASE}/<category>/") from error
  except ValueError as error:
    raise EvaluationError(f"{path}: line {number} is no question and answer ({error}); fetch the "
                          "release again") from error
  return truths


def _sentences(text):
  """What LLaVA's question may be in MME's files."""
  if LLAVA_SUFFIX in text:
    text = text.replace(LLAVA_SUFFIX, "").strip()
  if OWN_SUFFIX in text:
    return (text,)
  return f"{text} {OWN_SUFFIX}", f"{text}  {OWN_SUFFIX}"


def _counts(questions):
  counts = dict.fromkeys(PERCEPTION + COGNITION, 0)
  for q in questions:
    counts[q.record["category"]] += 1
  return counts


def said(answer: str) -> str:
  """yes, no or other."""
  start = one_line(answer)[:_SHOWN].lower()
  return next((word for word in ("yes", "no") if word in start), "other")


def one_line(answer: str) -> str:
  """An answer as the official files can hold it."""
  return " ".join(answer.replace("\t", " ").splitlines())


def score(answered: Sequence[Answered]) -> Score:
  """Each category: the percentage of right answers, plus that of pictures with both right."""
  marks = {a.question.key: float(said(a.text) == a.question.record["truth"].lower())
           for a in answered}
  by_category = defaultdict(list)
  for a in answered:
    by_category[a.question.record["category"]].append(marks[a.question.key])
  figures = {kind: {c: _category(by_category[c]) for c in categories if c in by_category}
             for kind, categories in (("MME perception", PERCEPTION), ("MME cognition", COGNITION))}
  return Score({kind: sum(rows.values()) for kind, rows in figures.items()}, figures, marks,
               {a.question.key: a.question.record["truth"] for a in answered})


def _category(marks):
  pairs = [marks[i:i + 2] for i in range(0, len(marks), 2)]
  return sum(marks) / len(marks) * 100 + sum(sum(p) == 2 for p in pairs) / len(pairs) * 100


def write(answered: Sequence[Answered], folder: pathlib.Path, model: str) -> list[pathlib.Path]:
  """LLaVA's answers, and the folder that the official `calculation.py --results_dir` reads."""
  results = folder / "eval_tool" / "answers" / (pathlib.PurePath(model).name or "model")
  results.mkdir(parents=True, exist_ok=True)
  lines = defaultdict(list)
  for a in answered:
    r = a.question.record
    lines[r["category"]].append(
        f"{r['file']}\t{r['sentence']}\t{r['truth']}\t{one_line(a.text)}\n")
  paths = [write_lines(folder / "answers.jsonl", llava_answers(answered, model))]
  for category, text in lines.items():
    paths.append(results / f"{category}.txt")
    paths[-1].write_text("".join(text), encoding="utf-8")
  return paths


BENCHMARKS = (Benchmark(
    "mme", "MME", "MME", {
        QUESTIONS: LLAVA_EVAL,
        RELEASE: "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch "
                 "Evaluation (the authors send it on request)"},
    read=read, score=score, write=write, max_new_tokens=128),)
