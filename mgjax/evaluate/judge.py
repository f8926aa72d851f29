"""A language model that marks answers where the official way is one.

Replies are kept as they come: a judge that was stopped goes on where it was, and never marks the
same answer twice.
"""
from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Sequence

from mgjax.data.journal import Journal
from mgjax.endpoint.client import Endpoint, EndpointConfig, Refused
from mgjax.endpoint.pacing import Clock
from mgjax.evaluate.benchmark import Answered, EvaluationError, Judging

AT_ONCE = 8    # requests under way
_REFUSALS = 8  # of the first requests: then the endpoint takes none


def judged(judging: Judging, answered: Sequence[Answered], endpoint: EndpointConfig,
           folder: pathlib.Path, *, report: Callable[[str], None] = print,
           clock: Clock = Clock()) -> list[Answered]:  # noqa: B008
  """The same with the judge's replies, asked for where `folder`/judged.jsonl has none yet.

  An answer to which no reply was acceptable keeps the last one.  Raises EndpointError and Stopped
  (of mgjax.endpoint), JournalError, or EvaluationError for answers that the endpoint refuses; what
  came before is kept.
  """
  endpoint = dataclasses.replace(endpoint, max_tokens=judging.max_tokens)
  with contextlib.closing(Journal(folder / "judged.jsonl")) as journal:
    todo = [a for a in _without(answered, journal, endpoint.model) if judging.prompt(a, 0)]
    if todo:
      report(f"{endpoint.model} judges {len(todo):,} answers")
      asyncio.run(_Judge(judging, Endpoint(endpoint, folder / "judge.json", clock), journal
                         ).all(todo))
    replies = {_name(entry): entry["reply"] for entry in journal.entries}
  return [dataclasses.replace(a, verdict=replies.get(_said(a, endpoint.model), ""))
          for a in answered]


def _without(answered, journal, model) -> Iterator[Answered]:
  """Those that have no reply in the journal."""
  there = {_name(entry) for entry in journal.entries}
  return (a for a in answered if _said(a, model) not in there)


def _name(entry: dict) -> tuple:
  return entry.get("key"), entry.get("answer"), entry.get("model")


def _said(answered: Answered, model: str) -> tuple[str, str, str]:
  """A reply belongs to one answer of one question, by one judge."""
  return answered.question.key, hashlib.sha256(answered.text.encode()).hexdigest()[:16], model


class _Judge:
  """One event loop's worth of asking."""

  def __init__(self, judging: Judging, endpoint: Endpoint, journal: Journal):
    self._judging, self._endpoint, self._journal = judging, endpoint, journal
    self._refused: list[tuple[Answered, str]] = []
    self._replies = 0

  async def all(self, answered: Sequence[Answered]) -> None:
    queue = iter(answered)
    async with self._endpoint:
      workers = [asyncio.create_task(self._work(queue))
                 for _ in range(min(AT_ONCE, len(answered)))]
      try:
        await asyncio.gather(*workers)
      finally:  # what one raises ends them all
        for worker in workers:
          worker.cancel()
    if self._refused:
      first, why = self._refused[0]
      raise EvaluationError(f"the judge refuses {len(self._refused)} of {len(answered)} answers, "
                            f"first that to question {first.question.key}: {why}")

  async def _work(self, queue: Iterator[Answered]) -> None:
    for answered in queue:
      try:
        reply = await self._ask(answered)
      except Refused as error:
        self._refused.append((answered, str(error)))
        if not self._replies and len(self._refused) >= _REFUSALS:
          return
        continue
      key, said, model = _said(answered, self._endpoint.config.model)
      self._journal.append({"key": key, "answer": said, "model": model, "reply": reply})
      self._replies += 1

  async def _ask(self, answered: Answered) -> str:
    """The first reply that is accepted, or the last."""
    reply = ""
    for attempt, temperature in enumerate(self._judging.temperature):
      prompt = self._judging.prompt(answered, attempt)
      messages = [{"role": "user", "content": prompt}]
      reply = (await self._endpoint.ask(messages, seed=attempt, temperature=temperature)).text
      if self._judging.accepts(reply):
        break
    return reply
