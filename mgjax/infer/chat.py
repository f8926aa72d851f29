"""A conversation: history and pictures in, an answer out piece by piece."""
from __future__ import annotations

import dataclasses
import os
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

import jax
from PIL import Image

from mgjax.data.conversation import GPT, HUMAN, IMAGE_TAG, Turn
from mgjax.data.drawing.texts import PROMPT_START
from mgjax.data.images import Picture
from mgjax.infer.drawing import asked_to_draw, drawing_prompt
from mgjax.infer.ocr import hint
from mgjax.infer.sampling import Sampling
from mgjax.infer.text import HALF, TextStream

if TYPE_CHECKING:
  from mgjax.infer.assistant import Assistant
  from mgjax.infer.engine import Engine


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
    self._before = None  # the last question, and turns, pictures and those that waited before it
    self.cut = False     # whether the last answer ended at its longest, not by itself
    self.drawing: str | None = None  # what the last answer tells to draw, if it was asked to

  @property
  def turns(self) -> tuple[Turn, ...]:
    """(role, text) of what was said, answers included."""
    return tuple(self._turns)

  @property
  def waiting(self) -> int:
    """Pictures that join with the next question."""
    return len(self._waiting)

  @property
  def engine(self) -> Engine:
    """What computes the answers."""
    return self._assistant.engine

  @property
  def sees(self) -> bool:
    """Whether pictures can be attached."""
    return self._assistant.sees

  def attach(self, picture: str | os.PathLike | Picture | Image.Image, *, hd: bool = True,
             texts: Sequence[str] = ()) -> None:
    """Adds a picture to the next question: a file's path, the file's bytes, pixels, or Pillow's.
    Raises ImageError, naming the file; ValueError for a model that cannot see.

    hd: as in `Assistant.pixels`.  texts: what was read in it (`ocr.read_text`), a hint behind every
    question from then on; what would be taken for a control token is left out.
    """
    visual = self._assistant.see(self._assistant.pixels(picture, hd))
    self._waiting += (_Picture(visual, tuple(filter(self._assistant.is_text, texts))),)

  def drop(self) -> None:
    """Forgets the pictures that wait for the next question."""
    self._waiting = ()

  def undo(self) -> str | None:
    """Takes back the last question, its answer and what was attached since; once, not further.

    Returns the question as it was asked; None, with nothing changed, if there is none.  Pictures
    that came with it wait again.
    """
    self._stop_answering()
    if self._before is None:
      return None
    question, self._turns, self._pictures, self._waiting = self._before
    self._before, self.cut, self.drawing = None, False, None
    return question

  def ask_again(self, *, draw: bool = False, force: bool = False) -> Iterator[str]:
    """Another answer to the last question; see `undo` and `ask`.  ValueError, with nothing changed,
    if there is none, or it does not fit."""
    self._stop_answering()
    now = (self._turns, self._pictures, self._waiting, self._before, self.cut, self.drawing)
    question = self.undo()
    if question is None:
      raise ValueError("there is no question to ask again")
    try:
      return self.ask(question, draw=draw, force=force)
    except ValueError:
      self._turns, self._pictures, self._waiting, self._before, self.cut, self.drawing = now
      raise

  def _stop_answering(self) -> None:
    if self._answering is not None:  # the next answer writes into the same cache
      self._answering.close()
    self._answering = None

  def ask(self, question: str, *, draw: bool = False, force: bool = False) -> Iterator[str]:
    """The answer in pieces, as they become certain; their sum is the answer.

    draw: asks for a picture too, with ` <GEN>`; `drawing` is then the prompt for the painter, if
    the model wrote one.  force: as `draw`, but the answer begins with `<h>` before the model goes
    on, so that there is one.

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
    asked = question
    question += hint([text for picture in pictures for text in picture.texts])
    draw, begun = draw or force, PROMPT_START if force else ""
    if draw:
      question = asked_to_draw(question)
    turns = [*self._turns, (HUMAN, f"{IMAGE_TAG}\n" * len(self._waiting) + question)]
    prompt = self._assistant.prompt(turns, [picture.visual for picture in pictures], begun)
    sampling = self._sampling
    engine = self._assistant.engine
    if self._fit:
      longest = max(1, min(sampling.max_new_tokens, engine.room(prompt)))
      sampling = dataclasses.replace(sampling, max_new_tokens=longest)
    stream = TextStream(self._assistant.tokenizer, self._assistant.template.stop, begun)
    ids = engine.generate(prompt, sampling)
    self._answering = self._answer(asked, ids, stream, turns, pictures, draw)
    return self._answering

  def _answer(self, asked: str, ids: Generator[int], stream: TextStream, turns: list[Turn],
              pictures: tuple[_Picture, ...], draw: bool) -> Generator[str]:
    before = asked, self._turns, self._pictures, self._waiting
    self._pictures, self._waiting, self.cut, self.drawing = pictures, (), False, None
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
      self._turns, self._before = [*turns, (GPT, said())], before
      if draw:
        self.drawing = drawing_prompt(said())
    except (GeneratorExit, KeyboardInterrupt):  # stopped on purpose: nothing is drawn
      self._turns, self._before = [*turns, (GPT, said())], before
      raise
    except Exception:  # out of memory, say: as if it had not been asked
      _, self._turns, self._pictures, self._waiting = before
      raise
    finally:
      ids.close()
