"""TextVQA 0.5.1, validation: words in photographs (Singh et al., 2019).  R6.2, R App. B."""
from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence

from mgjax.evaluate.benchmark import Answered, Benchmark, EvaluationError, Question, Score
from mgjax.evaluate.evalai import normalise
from mgjax.evaluate.files import (
    LLAVA_EVAL,
    field,
    llava_answers,
    llava_questions,
    percent,
    read_json,
    write_lines,
)

QUESTIONS, ANNOTATIONS = "llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json"
HINT = "Reference OCR token:"  # the line that says which words an OCR system has read
_OLDER = "OCR tokens: "         # how prompts of one line begin


def read(folder: pathlib.Path, hints: bool) -> list[Question]:
  """The questions with their ten answers; without `hints` the line of OCR tokens is left out."""
  path = folder / ANNOTATIONS
  truths = {(field(a, "image_id", path), field(a, "question", path).lower()):
            field(a, "answers", path) for a in field(read_json(path, dict), "data", path)}
  questions, lost = [], []
  for asked in llava_questions(folder / QUESTIONS, folder / "train_images"):
    words = bare_question(asked.text)
    answers = truths.get((asked.record["question_id"], words.lower()))
    if answers is None:
      lost.append(f"{asked.record['question_id']}: {words!r}")
      continue
    if len(answers) != 10:
      raise EvaluationError(f"{path}: {len(answers)} answers to {words!r}, expected 10; fetch it "
                            "again")
    if not hints and asked.text.startswith(_OLDER):
      raise EvaluationError(f"{folder / QUESTIONS}: the OCR tokens of {asked.text!r} are not on a "
                            f"line of their own; only a file where {HINT!r} begins it can be asked "
                            "without them")
    text = asked.text if hints else "\n".join(
        line for line in asked.text.split("\n") if not line.startswith(HINT))
    questions.append(Question(asked.key, text, asked.image, asked.record | {"answers": answers}))
  if lost:
    raise EvaluationError(f"{path}: {len(lost)} questions of {folder / QUESTIONS} have no answers "
                          f"there, first {lost[0]}; both must be of the validation split, 0.5.1")
  return questions


def bare_question(prompt: str) -> str:
  """The question in one of the prompts that LLaVA's file can have.  EvaluationError if in none."""
  lines = prompt.split("\n")
  if prompt.startswith(_OLDER) and (
      found := re.search("Question: (.*?) Short answer:", prompt, re.DOTALL)):
    return found[1]
  if f"{HINT} " in prompt and len(lines) == 3:
    return lines[1] if prompt.startswith(HINT) else lines[0]
  if len(lines) == 2:
    return lines[0]
  raise EvaluationError(f"{QUESTIONS}: no question is found in {prompt!r}; expected on a line of "
                        "its own, with or without a line of OCR tokens")


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
  """An answer's worth, 0 to 1: the mean over all but one of the truths of min(1, matches / 3)."""
  said, truths = normalise(answer), [normalise(t) for t in truths]
  others = [[t for j, t in enumerate(truths) if j != i] for i in range(len(truths))]
  matches = [min(1.0, rest.count(said) / 3) for rest in others]
  return sum(matches) / len(matches) if said in truths else 0.0


def score(answered: Sequence[Answered]) -> Score:
  """Accuracy in percent."""
  marks = {a.question.key: vqa_accuracy(a.text, a.question.record["answers"]) for a in answered}
  truths = {a.question.key: " | ".join(dict.fromkeys(a.question.record["answers"]))
            for a in answered}
  return Score({"TextVQA": percent(marks.values())}, marks=marks, truths=truths)


def write(answered: Sequence[Answered], folder: pathlib.Path, model: str) -> list[pathlib.Path]:
  """What the original's `eval_textvqa --result-file` reads."""
  return [write_lines(folder / "answers.jsonl", llava_answers(answered, model))]


def benchmark(name: str, title: str, hints: bool) -> Benchmark:
  """With OCR hints, as the paper's figures are, or without."""
  return Benchmark(
      name, title, "textvqa", {
          QUESTIONS: LLAVA_EVAL,
          ANNOTATIONS: "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json",
          "train_images": "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"},
      read=lambda folder: read(folder, hints), score=score, write=write, max_new_tokens=128)


BENCHMARKS = (benchmark("textvqa", "TextVQA", hints=True),
              benchmark("textvqa-no-ocr", "TextVQA without OCR hints", hints=False))
