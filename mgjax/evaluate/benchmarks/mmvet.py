"""MM-Vet: free answers that combine capabilities, marked by GPT-4 (Yu et al., 2023).  R6.2."""
from __future__ import annotations

import collections
import pathlib
from collections.abc import Sequence

import numpy as np

from mgjax.evaluate.benchmark import Answered, Benchmark, EvaluationError, Judging, Question, Score
from mgjax.evaluate.files import (
    LLAVA_EVAL,
    check_same,
    field,
    llava_answers,
    llava_questions,
    read_json,
    write_json,
    write_lines,
)

QUESTIONS, TRUTHS = "llava-mm-vet.jsonl", "mm-vet.json"
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
PROMPT = """\
Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in the ground truth means it is totally right only when all elements in the ground truth are present in the prediction, and <OR> means it is totally right when any one element in the ground truth is present in the prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Just complete the last space of the correctness score.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0
What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0
Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and Greenland are misleading. Despite its name, Iceland is known for its beautiful green landscapes, while Greenland is mostly covered in ice and snow. The meme is saying that the person has trust issues because the names of these countries do not accurately represent their landscapes. | The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not very icy and Greenland isn't very green. | 0.4
Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and Greenland are misleading. Despite its name, Iceland is known for its beautiful green landscapes, while Greenland is mostly covered in ice and snow. The meme is saying that the person has trust issues because the names of these countries do not accurately represent their landscapes. | The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, despite its name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This is why I have trust issues' is a playful way to suggest that these contradictions can lead to distrust or confusion. The humor in this meme is derived from the unexpected contrast between the names of the countries and their actual physical characteristics. | 1.0
"""  # noqa: E501
AGAIN = "\nPredict the correctness of the answer (digit): "


def read(folder: pathlib.Path) -> list[Question]:
  """The questions with their truths, in the truths' order."""
  path = folder / TRUTHS
  truths = read_json(path)
  if not isinstance(truths, dict):
    raise EvaluationError(f"{path}: expected an object of truths by id; fetch it again")
  asked = {f"v1_{q.record['question_id']}": q
           for q in llava_questions(folder / QUESTIONS, folder / "images")}
  check_same(asked, folder / QUESTIONS, truths, path, "of MM-Vet v1")
  return [Question(name, asked[name].text, asked[name].image, asked[name].record | {
      part: field(truth, part, path) for part in ("question", "answer", "capability")})
          for name, truth in truths.items()]


def prompt(answered: Answered, attempt: int) -> str:
  """What the judge is asked; from the second time on with a line that asks for a digit."""
  r = answered.question.record
  truth = r["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
  asked = f"{PROMPT}\n{r['question']} | {truth} | {answered.text} | "
  return asked + AGAIN if attempt else asked


def correctness(reply: str) -> float | None:
  """The judge's mark, 0 to 1; None if the reply does not begin with one."""
  try:
    mark = float(reply.split(" ")[0].strip())
  except ValueError:
    return None
  return mark if 0.0 <= mark <= 1.0 else None


def score(answered: Sequence[Answered]) -> Score:
  """Percent: all, by capability, by their combination; answers without a usable mark count 0."""
  marks = {a.question.key: correctness(a.verdict) or 0.0 for a in answered}
  single, joint = collections.defaultdict(list), collections.defaultdict(list)
  for a in answered:
    has = set(a.question.record["capability"])
    for capability in has:
      single[capability].append(marks[a.question.key])
    joint["_".join(sorted(has, key=_place))].append(marks[a.question.key])
  unmarked = sum(correctness(a.verdict) is None for a in answered)
  return Score(
      {"MM-Vet": _percent(list(marks.values()))},
      {"capability": _rows(single, _place),
       "capability integration": _rows(joint, lambda name: -len(joint[name]))},
      marks, {a.question.key: a.question.record["answer"] for a in answered},
      (f"{unmarked} answers have no mark that can be read from the judge, and count 0",)
      if unmarked else ())


def _place(capability):
  return (CAPABILITIES.index(capability) if capability in CAPABILITIES else len(CAPABILITIES),
          capability)


def _rows(marks, order):
  return {name: _percent(marks[name]) for name in sorted(marks, key=order)}


def _percent(marks):
  """To one decimal, the way NumPy rounds."""
  return float(np.round(sum(marks) / len(marks) * 100, 1)) if marks else 0.0


def write(answered: Sequence[Answered], folder: pathlib.Path, model: str) -> list[pathlib.Path]:
  """LLaVA's answers, and what MM-Vet's grader takes, its page on the web too."""
  return [write_lines(folder / "answers.jsonl", llava_answers(answered, model)),
          write_json(folder / "results.json", {a.question.key: a.text for a in answered})]


BENCHMARKS = (Benchmark(
    "mmvet", "MM-Vet", "mm-vet", {
        QUESTIONS: LLAVA_EVAL,
        TRUTHS: "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip",
        "images": "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"},
    read=read, score=score, write=write, max_new_tokens=1024,
    judging=Judging("gpt-4-0613", prompt, lambda reply: correctness(reply) is not None,
                    # The official grader raises it only after the second reply, and never looks at
                    # the sixth.
                    temperature=(0.0, 0.0, 0.5, 1.0, 1.5), max_tokens=3)),)
