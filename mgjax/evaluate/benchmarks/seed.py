"""SEED-Bench 1: 12 kinds of multiple choice, on pictures and the middle frames of videos (Li et
al., 2023).  R6.2."""
from __future__ import annotations

import collections
import pathlib
from collections.abc import Iterable, Sequence

from mgjax.evaluate.benchmark import Answered, Benchmark, Question, Score
from mgjax.evaluate.files import (
    LLAVA_EVAL,
    check_same,
    field,
    llava_answers,
    llava_questions,
    percent,
    read_json,
    write_lines,
)

QUESTIONS, ANNOTATIONS = "llava-seed-bench.jsonl", "SEED-Bench.json"
IMAGES, FRAMES = "SEED-Bench-image", "SEED-Bench-video-image"


def read(folder: pathlib.Path, videos: bool) -> list[Question]:
  """The questions with what is known of them; without `videos` those on pictures only."""
  path, annotations = folder / QUESTIONS, folder / ANNOTATIONS
  asked = [q for q in llava_questions(path, folder)
           if videos or not str(q.record["image"]).startswith(f"{FRAMES}/")]
  data, known = read_json(annotations, dict), collections.defaultdict(list)
  kinds = {number: name for name, number in field(data, "question_type", annotations).items()}
  for place, record in enumerate(field(data, "questions", annotations)):
    get = lambda name, record=record: field(record, name, annotations)
    if videos or get("data_type") == "image":
      known[_as_asked(get("question_id"))].append({
          "place": place, "official_id": get("question_id"), "answer": get("answer"),
          "type": get("question_type_id"), "data_type": get("data_type"),
          "kind": field(kinds, get("question_type_id"), annotations)})
  check_same([q.record["question_id"] for q in asked], path, known, annotations,
             "of the first SEED-Bench, 14,233 questions on pictures" + (
                 " and 5,009 on videos (later versions have fewer; seed-image asks those on "
                 "pictures alone)" if videos else ""))
  return [Question(q.key, q.text, q.image, q.record | {"known": known[q.record["question_id"]]})
          for q in asked]


def _as_asked(name: str | int) -> str | int:
  """An id as LLaVA's file has it: a number where it can be."""
  try:
    return int(name)
  except ValueError:
    return name


def counted(answered: Iterable[Answered]) -> list[tuple[Answered, dict]]:
  """The answers that count, each with what it is the answer to, in the official order.

  49914 is the id of two questions: the last answer to it is taken for both, as officially.
  """
  last = {a.question.record["question_id"]: a for a in answered}
  return sorted(((a, known) for a in last.values() for known in a.question.record["known"]),
                key=lambda pair: pair[1]["place"])


def score(answered: Sequence[Answered]) -> Score:
  """Accuracy in percent; right is the letter, and nothing else."""
  right, marks, truths = [], {}, {}
  for a, known in counted(answered):
    right.append((known, float(a.text == known["answer"])))
    marks.setdefault(a.question.key, []).append(right[-1][1])
    truths.setdefault(a.question.key, []).append(known["answer"])
  of = lambda name, value: percent(m for known, m in right if known[name] == value)
  present = {known["data_type"] for known, _ in right}
  headline = {f"SEED {kind}": of("data_type", kind) for kind in ("image", "video")
              if kind in present}
  if "video" in present:
    headline = {"SEED": percent(m for _, m in right)} | headline
  kinds = dict(sorted((known["type"], known["kind"]) for known, _ in right))
  return Score(headline, {"SEED": {kind: of("type", n) for n, kind in kinds.items()}},
               {key: sum(m) / len(m) for key, m in marks.items()},
               {key: " | ".join(dict.fromkeys(t)) for key, t in truths.items()})


def write(answered: Sequence[Answered], folder: pathlib.Path, model: str) -> list[pathlib.Path]:
  """Answers as LLaVA has them, and what the leader board takes."""
  upload = [{"question_id": known["official_id"], "prediction": a.text}
            for a, known in counted(answered)]
  return [write_lines(folder / "answers.jsonl", llava_answers(answered, model)),
          write_lines(folder / "upload.jsonl", upload)]


_SEED = "https://github.com/AILab-CVC/SEED-Bench/blob/main/DATASET.md"
_FILES = {
    QUESTIONS: LLAVA_EVAL,
    ANNOTATIONS: "https://huggingface.co/datasets/AILab-CVC/SEED-Bench (the version with all "
                 "19,242 questions is in its history)",
    IMAGES: _SEED}
BENCHMARKS = (
    Benchmark("seed", "SEED-Bench", "seed_bench",
              _FILES | {FRAMES: f"videos of {_SEED}, their middle frames made by "
                                f"extract_video_frames.py of {LLAVA_EVAL}"},
              read=lambda folder: read(folder, videos=True), score=score, write=write,
              max_new_tokens=128),
    Benchmark("seed-image", "SEED-Bench, pictures only", "seed_bench", _FILES,
              read=lambda folder: read(folder, videos=False), score=score, write=write,
              max_new_tokens=128))
