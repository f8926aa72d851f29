"""A conversation: history and pictures in, an answer out piece by piece."""
from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

import jax

from mgjax.data.conversation import GPT, HUMAN, IMAGE_TAG, Turn
from mgjax.infer.ocr import hint
from mgjax.infer.sampling import Sampling
from mgjax.infer.text import HALF, TextStream

if TYPE_CHECKING:
  from mgjax.infer.assistant import Assistant


@dataclasses.dataclass(frozen=True)
class _Picture:
  visual: jax.Array        # [T, D]
  texts: tuple[str, ...]   # what was read in it


class Chat:
  """A conversation with a model: pictures may join at any turn and stay.

  Args:
    assistant: the model.
    sampling: how to generate; its `stop_ids` are filled in here.
    fit: whether an answer may be shorter than `max_new_tokens` where the conversation nears the
      engine's max_length, instead of being refused; `cut` then tells.
  """

  def __init__(self, assistant: Assistant, sampling: Sampling, *, fit: bool = False):
    self._assistant, self._fit = assistant, fit
    self._sampling = dataclasses.replace(sampling, stop_ids=assistant.ends)
    self._answering: Generator[str] | None = None
    self.clear()

  def clear(self) -> None:
    """Forgets the turns and the pictures."""
    self._stop_answering()
    self._turns: list[Turn] = []
    self._pictures: tuple[_Picture, ...] = ()
    self._waiting: tuple[_Picture, ...] = ()
    self.cut = False  # whether the last answer ended at its longest, not by itself

  @property
  def turns(self) -> tuple[Turn, ...]:
    """(role, text) of what was said, answers included."""
    return tuple(self._turns)

  @property
  def waiting(self) -> int:
    """Pictures that join with the next question."""
    return len(self._waiting)

  def attach(self, path: str | pathlib.Path, *, hd: bool = True,
             texts: Sequence[str] = ()) -> None:
    """Adds the picture at `path` to the next question.  Raises ImageError, naming the file.

    hd: as in `Assistant.pixels`.  texts: what was read in it (`ocr.read_text`), a hint behind every
    question from then on; what would be taken for a control token is left out.
    """
    visual = self._assistant.see(self._assistant.pixels(path, hd))
    self._waiting += (_Picture(visual, tuple(filter(self._assistant.is_text, texts))),)

  def drop(self) -> None:
    """Forgets the pictures that wait for the next question."""
    self._waiting = ()

  def _stop_answering(self) -> None:
    if self._answering is not None:  # the next answer writes into the same cache
      self._answering.close()
    self._answering = None

  def ask(self, question: str) -> Iterator[str]:
    """The answer in pieces, as they become certain; their sum is the answer.

    Closing the iterator, or the next question, stops the answer; what was said of it stays in the
    history.  Raises ValueError at the call, with nothing changed, if the question is empty, holds
    `<image>` or a control token, or does not fit into the length that the engine was made for.
    """
    self._stop_answering()
    question = question.strip()
    if not question:
      raise ValueError("the question is empty")
    self._assistant.check_text(question)
    pictures = self._pictures + self._waiting
    question += hint([text for picture in pictures for text in picture.texts])
    turns = [*self._turns, (HUMAN, f"{IMAGE_TAG}\n" * len(self._waiting) + question)]
    prompt = self._assistant.prompt(turns, [picture.visual for picture in pictures])
    sampling = self._sampling
    engine = self._assistant.engine
    if self._fit:
      longest = max(1, min(sampling.max_new_tokens, engine.room(prompt)))
      sampling = dataclasses.replace(sampling, max_new_tokens=longest)
    self._answering = self._answer(engine.generate(prompt, sampling), turns, pictures)
    return self._answering

  def _answer(self, ids: Generator[int], turns: list[Turn],
              pictures: tuple[_Picture, ...]) -> Generator[str]:
    stream = TextStream(self._assistant.tokenizer, self._assistant.template.stop)
    before = self._turns, self._pictures, self._waiting
    self._pictures, self._waiting, self.cut = pictures, (), False
    # What the model said is text: a tag in it is no picture.
    said = lambda: stream.text.rstrip(HALF).rstrip().replace(IMAGE_TAG, "")
    try:
      for token in ids:
        if token in self._sampling.stop_ids:
          break
        if piece := stream.feed(token):
          yield piece
        if stream.stopped:
          break
      else:
        self.cut = True
      if piece := stream.finish():
        yield piece
      self._turns = [*turns, (GPT, said())]
    except (GeneratorExit, KeyboardInterrupt):  # stopped on purpose
      self._turns = [*turns, (GPT, said())]
      raise
    except Exception:  # out of memory, say: as if it had not been asked
      self._turns, self._pictures, self._waiting = before
      raise
    finally:
      ids.close()
