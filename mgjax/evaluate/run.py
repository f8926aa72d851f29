"""One benchmark from its files to its figures: check, ask, judge, write, score.

Nothing is lost: answers are on the disk as they come, and the same command goes on where it was
stopped.  Over several hosts each asks its share with the whole model on its own devices, and the
first one scores; they meet in the output folder, which all must see.
"""
from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from mgjax.checkpoint import wait_for_hosts
from mgjax.data.journal import Journal, sole_user, write_whole
from mgjax.endpoint.client import EndpointConfig
from mgjax.evaluate.answers import answers
from mgjax.evaluate.benchmark import Answered, Benchmark, EvaluationError, Question, Score
from mgjax.evaluate.judge import judged
from mgjax.infer.assistant import Assistant

PARTS = "parts"  # answers as they came, a folder for each host
_TOLD = 10       # missing files that a message names
_WAIT = 24 * 3600.0  # seconds for the slowest host


@dataclasses.dataclass(frozen=True)
class Host:
  """Which of the hosts this is."""

  index: int = 0
  count: int = 1


@dataclasses.dataclass(frozen=True)
class Asked:
  """What is written beside the answers: those of another model, or to other questions, do not mix.

  questions: a digest of them all.
  """

  checkpoint: str
  questions: str
  settings: dict


def read_questions(benchmark: Benchmark, data: pathlib.Path, limit: int = 0) -> list[Question]:
  """The benchmark's questions, the first `limit` if not 0; no picture is decoded.

  Raises EvaluationError listing the files and pictures that are missing, and where to put them.
  """
  folder = data / benchmark.folder
  if missing := [name for name in benchmark.files if not (folder / name).exists()]:
    listed = "".join(f"\n  {folder / name}\n    from {benchmark.files[name]}" for name in missing)
    raise EvaluationError(f"{benchmark.name}: {len(missing)} of {len(benchmark.files)} files are "
                          f"missing in {data} (--data):{listed}")
  questions = benchmark.read(folder)[:limit or None]
  files = dict.fromkeys(q.image for q in questions if isinstance(q.image, pathlib.Path))
  if missing := [str(path) for path in files if not path.is_file()]:
    listed = "".join(f"\n  {path}" for path in missing[:_TOLD])
    more = f"\n  and {len(missing) - _TOLD:,} more" if len(missing) > _TOLD else ""
    raise EvaluationError(f"{benchmark.name}: {len(missing):,} of {len(files):,} pictures are "
                          f"missing:{listed}{more}")
  return questions


def ask(benchmark: Benchmark, questions: Sequence[Question], output: pathlib.Path, asked: Asked,
        load: Callable[[], Assistant], host: Host = Host(),  # noqa: B008
        progress: Callable[[Iterable, int], Iterable] = lambda answers, total: answers) -> None:
  """Answers this host's share of the questions that have no answer in `output` yet.

  load: makes the model, called only if there is something to ask.  progress: shows how far it is.
  Raises EvaluationError if the answers there belong to another model, JournalError if another
  process works there.
  """
  own = output / PARTS / str(host.index)
  with sole_user(own), contextlib.closing(Journal(own / "answers.jsonl")) as journal:
    check_same(output / "asked.json", asked)
    done = _answers_in(output)
    mine = [q for q in questions[host.index::host.count] if q.key not in done]
    if mine:
      stream = answers(load(), mine, max_new_tokens=benchmark.max_new_tokens)
      for question, text in progress(stream, len(mine)):
        journal.append({"key": question.key, "text": text})


def collect(benchmark: Benchmark, questions: Sequence[Question], output: pathlib.Path, model: str,
            judge: EndpointConfig | None = None, host: Host = Host(),  # noqa: B008
            report: Callable[[str], None] = print) -> tuple[list[Answered], Score | None] | None:
  """Waits for all hosts; then the first has the answers judged, writes the official files and
  scores.  None on the others.

  The score is None where the truth is not published, or only a judge can tell and there is none.
  Raises EvaluationError, and what `judged` does.
  """
  wait_for_hosts(f"evaluated {benchmark.name}", _WAIT)
  if host.index:
    return None
  texts = _answers_in(output)
  if missing := [q.key for q in questions if q.key not in texts]:
    raise EvaluationError(f"{output}: {len(missing):,} of {len(questions):,} questions have no "
                          f"answer, first {missing[0]}; all hosts must write to one folder "
                          "(--output) that all see, or one of them has failed: run them again")
  answered = [Answered(q, texts[q.key]) for q in questions]
  judging = benchmark.judging
  if judging and judge:
    answered = judged(judging, answered, judge, output, report=report)
  for path in benchmark.write(answered, output, model):
    report(f"{path}")
  if benchmark.score is None or (judging and judging.required and not judge):
    return answered, None
  return answered, benchmark.score(answered)


def digest(questions: Sequence[Question]) -> str:
  """Differs where a question does."""
  sha = hashlib.sha256()
  for q in questions:
    image = q.image if isinstance(q.image, bytes) else str(q.image and q.image.name).encode()
    for part in (q.key.encode(), q.text.encode(), image):
      sha.update(len(part).to_bytes(8) + part)
  return sha.hexdigest()[:32]


def check_same(path: pathlib.Path, asked: Asked) -> None:
  """Writes what is asked, or EvaluationError if something else was asked there before."""
  now = json.loads(json.dumps(dataclasses.asdict(asked)))
  if not path.exists():
    write_whole(path, json.dumps(now, indent=2))
    return
  before = json.loads(path.read_text())
  if before == now:
    return
  name = next(name for name in now if before.get(name) != now[name])
  what = ("other questions" if name == "questions" else
          f"{name} {before.get(name)}, and this is {now[name]}")
  raise EvaluationError(f"{path.parent} holds answers of {what}; give another --output, or remove "
                        "that folder")


def _answers_in(output: pathlib.Path) -> dict[str, str]:
  """All hosts' answers by key; a line that is being written is left out."""
  found: dict[str, str] = {}
  for path in sorted((output / PARTS).glob("*/answers.jsonl")):
    for entry in _whole_lines(path):
      found.setdefault(entry["key"], entry["text"])
  return found


def _whole_lines(path: pathlib.Path) -> Iterator[dict]:
  with path.open(encoding="utf-8") as file:
    for number, line in enumerate(file, 1):
      if line.endswith("\n"):
        try:
          yield json.loads(line)
        except ValueError as error:
          raise EvaluationError(f"{path}: line {number} is damaged ({error}); delete that line, "
                                "its question will be asked again") from error
