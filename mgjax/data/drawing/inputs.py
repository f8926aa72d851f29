"""What prompts are made of: files of captions, of conversations, of example prompts."""
from __future__ import annotations

import pathlib

from mgjax.data.conversation import GPT, TEMPLATES
from mgjax.data.drawing.texts import IN_CONTEXT, RECAPTION, TAGS, Job, conversation_text
from mgjax.data.json_records import index_json
from mgjax.data.samples import DataError, Problem, check_structure, name_of, to_sample


def read_inputs(captions: str = "", contexts: str = "") -> tuple[list[Job], list[Problem]]:
  """The inputs of two files ("" = none) in order, captions first, and those that cannot be used.

  Raises DataError where a file is not there or no JSON.
  """
  jobs, problems = [], []
  for path, read in (captions, _caption_job), (contexts, _context_job):
    places: dict[str, int] = {}
    records = index_json(path) if path else ()
    for index in range(len(records)):
      record = records.text(index)
      try:
        job = read(path, index, record)
        job.id.encode()  # half a character is a ValueError
        if (first := places.setdefault(job.id, index)) != index:
          raise _Unusable("duplicate_id", f"#{first} has the same id; give every record its own")
        jobs.append(job)
      except ValueError as error:
        kind = error.kind if isinstance(error, _Unusable) else "format"
        problems.append(Problem(kind, path, index, name_of(record), str(error)))
  return jobs, problems


class _Unusable(ValueError):
  """An input of the wrong kind."""

  def __init__(self, kind: str, message: str):
    super().__init__(message)
    self.kind = kind


def _caption_job(path: str, index: int, record: object) -> Job:
  if isinstance(record, dict) and "conversations" not in record:
    text, name = record.get("caption"), record.get("id", index)
    if not isinstance(text, str):
      raise ValueError(f"caption is {text!r:.80}, expected {{'id': ..., 'caption': text}} or a "
                       "LLaVA record")
    text.encode()
  else:
    sample = to_sample(index, record)
    answers = [text for role, text in sample.turns if role == GPT]
    if len(answers) != 1:
      raise _Unusable("roles", f"{len(answers)} answers from {GPT}, expected one, the caption")
    text, name = answers[0], sample.id
  if not text.strip():
    raise _Unusable("empty_answer", "the caption is empty")
  return Job(RECAPTION, str(name), path, index, text.strip())


def _context_job(path: str, index: int, record: object) -> Job:
  sample = to_sample(index, record)
  if sample.images:
    raise _Unusable("image_count", "it has a picture; conversations must be text only")
  if found := next((tag for tag in TAGS if any(tag in text for _, text in sample.turns)), None):
    raise _Unusable("control_token", f"a turn holds {found}, which means something in the records")
  if problem := check_structure(sample, TEMPLATES["vicuna_v1"], slots=1):
    raise _Unusable(*problem)
  return Job(IN_CONTEXT, sample.id, path, index, conversation_text(sample.turns), sample.turns)


def read_examples(path: str) -> tuple[str, ...]:
  """The prompts in a file, one a line; DataError if it has none, or one holds a tag."""
  try:
    lines = pathlib.Path(path).read_text("utf-8-sig").splitlines()
  except (OSError, ValueError) as error:
    raise DataError(f"{path}: cannot be read as example prompts ({error}); expected a text file "
                    "with one prompt a line") from error
  prompts = tuple(" ".join(line.split()) for line in lines if line.strip())
  if not prompts:
    raise DataError(f"{path}: no example prompts in it; expected one a line")
  if bad := next((p for p in prompts if any(tag in p for tag in TAGS)), None):
    raise DataError(f"{path}: the example {bad!r:.60} holds one of {', '.join(TAGS)}; take it out")
  return prompts
