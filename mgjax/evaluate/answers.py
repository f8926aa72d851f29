"""A model's answers to many questions, a stream that keeps every row of its cache busy."""
from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from mgjax.data.conversation import HUMAN
from mgjax.data.images import ImageError
from mgjax.evaluate.benchmark import EvaluationError, Question
from mgjax.infer.assistant import Assistant
from mgjax.infer.engine import Answer
from mgjax.infer.sampling import Sampling
from mgjax.infer.text import finished_text

THREADS = 8  # that decode pictures


def answers(assistant: Assistant, questions: Iterable[Question], *,
            max_new_tokens: int) -> Iterator[tuple[Question, str]]:
  """Each question with the model's greedy answer, in the order in which they are finished.

  As many as the engine has rows grow at once, and pictures are decoded ahead of them.  An answer
  may be cut short where the prompt leaves less room than `max_new_tokens`.
  Raises EvaluationError naming the question that cannot be asked; answers given before stand.
  """
  engine, rest = assistant.engine, iter(questions)
  growing: list[tuple[Question, Answer]] = []
  loading: collections.deque[tuple[Question, Future | None]] = collections.deque()
  with ThreadPoolExecutor(THREADS) as pool:
    try:
      while True:
        for question in itertools.islice(rest, 2 * engine.rows + THREADS - len(loading)):
          loading.append((question, None if question.image is None else
                          pool.submit(assistant.pixels, question.image)))
        while loading and len(growing) < 2 * engine.rows:
          few = [loading.popleft() for _ in range(min(len(loading), engine.pictures_together))]
          growing += zip((question for question, _ in few),
                         _submit(assistant, few, max_new_tokens))
        if not growing:
          return
        engine.step()
        for question, answer in [pair for pair in growing if pair[1].ended]:
          text = finished_text(assistant.tokenizer, assistant.template, answer.tokens,
                               assistant.ends)
          yield question, text.strip()
        growing = [pair for pair in growing if not pair[1].ended]
    finally:
      for _, answer in growing:
        engine.cancel(answer)
      for _, pixels in loading:
        if pixels is not None:
          pixels.cancel()


def _submit(assistant: Assistant, asked: Sequence[tuple[Question, Future | None]],
            max_new_tokens: int) -> list[Answer]:
  """The answers that begin to grow, their pictures encoded together."""
  engine, prompts = assistant.engine, []
  for question, pixels in asked:
    with _named(question):
      assistant.check_text(question.text)
      pixels and pixels.result()
  tokens = iter(assistant.see_all([pixels.result() for _, pixels in asked if pixels]))
  for question, pixels in asked:
    with _named(question):
      prompt = assistant.prompt([(HUMAN, question.text)], [next(tokens)] if pixels else [])
      if (room := engine.room(prompt)) < 1:
        raise ValueError(f"its {len(prompt)} tokens leave no room for an answer in max_length "
                         f"{engine.max_length}; --max-length gives more")
      prompts.append((prompt, Sampling(max_new_tokens=min(max_new_tokens, room),
                                       stop_ids=assistant.ends)))
  return [engine.submit(prompt, sampling) for prompt, sampling in prompts]


@contextlib.contextmanager
def _named(question: Question) -> Iterator[None]:
  try:
    yield
  except (ValueError, ImageError) as error:
    raise EvaluationError(f"question {question.key}: {error}") from error
