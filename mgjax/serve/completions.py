"""From a request's body to a job for the engine, and from its tokens to OpenAI's answers."""
from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from mgjax.data.conversation import HUMAN, Turn
from mgjax.data.drawing.texts import PROMPT_START
from mgjax.data.tokenize import encode_prompt
from mgjax.infer.assistant import Assistant
from mgjax.infer.drawing import asked_to_draw
from mgjax.infer.sampling import Sampling
from mgjax.infer.studio import Studio
from mgjax.infer.text import TextStream
from mgjax.serve.drawing import Draw, Drawn, read_draw
from mgjax.serve.errors import ApiError, as_json, error_body, wrong
from mgjax.serve.limits import Limits
from mgjax.serve.messages import ImageRef, read_messages
from mgjax.serve.parameters import Parameters, read_json, read_parameters
from mgjax.serve.pictures import check_url, decoded, fetched, is_remote
from mgjax.serve.worker import Job

T = TypeVar("T")
LONGEST_TOKEN = 256  # characters; no vocabulary has longer ones


@dataclasses.dataclass(frozen=True)
class Question:
  """What a body asks, checked as far as that goes without its pictures."""

  parameters: Parameters
  refs: list[ImageRef]
  tokens: np.ndarray        # as in `engine.Prompt`
  visual_index: np.ndarray
  sampling: Sampling
  draw: Draw | None = None  # None: no picture was asked for
  begun: str = ""           # what the answer begins with before the model goes on


@dataclasses.dataclass(frozen=True)
class Piece:
  """What has come of an answer: more text, that its picture is being painted, or what became of
  that."""

  text: str = ""
  paints: bool = False
  drawn: Drawn | None = None


def read_question(assistant: Assistant, limits: Limits, studio: Studio | None,
                  body: bytes) -> Question:
  """ApiError (4xx) naming what is wrong with it."""
  request = read_json(body)
  parameters = read_parameters(request, assistant.name)
  draw = read_draw(request, studio, limits)
  turns, refs = read_messages(request.get("messages"), limits.images, assistant.check_text,
                              assistant.sees)
  if draw:
    turns[-1] = (HUMAN, asked_to_draw(turns[-1][1]))
  if refs and not assistant.sees:
    raise wrong("this model cannot see pictures", refs[0].param, "no_vision")
  for ref in refs:
    check_url(ref, limits)
  begun = PROMPT_START if draw and draw.force else ""
  encoded = _encoded(assistant, turns, refs, begun)
  sampling = _sampling(assistant, limits, parameters, len(encoded.tokens))
  return Question(parameters, refs, encoded.tokens, encoded.visual_index, sampling, draw, begun)


def _encoded(assistant, turns: list[Turn], refs, begun):
  engine = assistant.engine
  letters, longest = sum(len(text) for _, text in turns), engine.max_length * LONGEST_TOKEN
  if letters > longest:  # before minutes are spent on cutting it into tokens
    raise _too_long(f"the messages have {letters:,} characters; more than {longest:,} never fit "
                    f"into the context of {engine.max_length} tokens")
  lengths = [engine.config.at(side_of(assistant, ref)).visual_tokens for ref in refs]
  try:
    return encode_prompt(assistant.tokenizer, assistant.template, turns, len(refs), lengths,
                         begun)
  except ValueError as error:
    raise wrong(str(error), "messages") from error


def side_of(assistant: Assistant, ref: ImageRef) -> int:
  """Side of the square that a picture becomes."""
  return assistant.engine.picture_sides[-1 if ref.hd else 0]


def _sampling(assistant, limits, parameters, length) -> Sampling:
  engine, asked = assistant.engine, parameters.new_tokens
  room = engine.max_length - length
  most = room if limits.new_tokens is None else min(room, limits.new_tokens)
  if asked and limits.new_tokens and asked > limits.new_tokens:
    raise wrong(f"max_tokens is {asked}; this server gives at most {limits.new_tokens}",
                "max_tokens")
  sampling = parameters.sampling(max(1, asked or most), assistant.ends)
  try:
    engine.check_length(length, sampling)
  except ValueError as error:
    raise _too_long(str(error)) from error
  return sampling


def _too_long(message) -> ApiError:
  return wrong(message, "messages", "context_length_exceeded")


class Preparer:
  """Reads questions and decodes their pictures, off the event loop and a few at a time."""

  def __init__(self, assistant: Assistant, limits: Limits, studio: Studio | None = None):
    self._assistant, self._limits, self._studio = assistant, limits, studio
    # Two, so that two huge pictures are in memory at most; hosts may be slow, so they have others.
    self._pool = ThreadPoolExecutor(2, "prepare")
    self._fetchers = ThreadPoolExecutor(8, "fetch")

  def close(self) -> None:
    """Waits for nothing."""
    self._pool.shutdown(wait=False, cancel_futures=True)
    self._fetchers.shutdown(wait=False, cancel_futures=True)

  async def question(self, body: bytes) -> Question:
    """As `read_question`."""
    return await self.run(read_question, self._assistant, self._limits, self._studio, body)

  async def run(self, work: Callable[..., T], *args) -> T:
    """What `work` gives, in one of the threads."""
    return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

  def size(self, question: Question) -> int:
    """Bytes that its pictures take, decoded."""
    return sum(3 * side_of(self._assistant, ref)**2 for ref in question.refs)

  async def job(self, question: Question, begun: float) -> Job:
    """What the engine's thread is given.  ApiError where a picture cannot be used."""
    loop, pixels = asyncio.get_running_loop(), []
    for ref in question.refs:  # one after another: of one request, one file is in memory at a time
      file = None
      if is_remote(ref):
        file = await loop.run_in_executor(self._fetchers, fetched, ref, self._limits)
      pixels.append(await loop.run_in_executor(self._pool, decoded, self._assistant, ref, file))
    return Job(question.tokens, question.visual_index, pixels, question.sampling, loop, begun)


class Reply:
  """An answer while it comes: text, why it ended, and what it took."""

  def __init__(self, assistant: Assistant, question: Question, job: Job):
    self._job, self._ends, self._prompt = job, assistant.ends, len(question.tokens)
    self._stream = TextStream(assistant.tokenizer,
                              (*assistant.template.stop, *question.parameters.stop),
                              question.begun)
    self.draw = question.draw
    self._written = self._reused = 0
    self.finish_reason: str | None = None
    self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()),
                 "model": assistant.name}

  async def pieces(self) -> AsyncIterator[str]:
    """Its text piece by piece, some of them empty.  ApiError if the engine fails."""
    while self.finish_reason is None:
      news = await self._job.news.get()
      if news.error:
        raise news.error
      self._reused = news.reused
      yield self._take(news.tokens, news.ended)

  def _take(self, tokens, ended) -> str:
    text = ""
    for token in tokens:
      self._written += 1
      if token not in self._ends:
        text += self._stream.feed(token)
      if token in self._ends or self._stream.stopped:
        ended = "stop"
        break
    if ended:
      text += self._stream.finish()
      self.finish_reason = ended
    return text

  @property
  def text(self) -> str:
    """The whole text so far."""
    return self._stream.text

  @property
  def usage(self) -> dict:
    """Tokens read and written so far."""
    return {"prompt_tokens": self._prompt, "completion_tokens": self._written,
            "total_tokens": self._prompt + self._written,
            "prompt_tokens_details": {"cached_tokens": self._reused}}

  def whole(self, pieces: Sequence[Piece]) -> dict:
    """The response that is not streamed, of all pieces."""
    message = {"role": "assistant", "content": "".join(p.text for p in pieces), "refusal": None}
    for piece in pieces:
      message |= _picture(piece)
    return self.head | {"object": "chat.completion", "usage": self.usage, "choices": [
        {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish_reason}]}

  def _chunk(self, delta: dict, finish_reason: str | None = None, **more) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return _event(self.head | {"object": "chat.completion.chunk", "choices": [choice]} | more)

  async def events(self, pieces: AsyncIterator[Piece], include_usage: bool) -> AsyncIterator[str]:
    """The response that is streamed, as server-sent events; an error becomes the last but one."""
    usage = {"usage": None} if include_usage else {}
    yield self._chunk({"role": "assistant", "content": ""}, **usage)
    try:
      async for piece in pieces:
        if piece.paints:
          yield ": painting\n\n"  # a comment, so that nobody takes the connection for dead
        elif delta := ({"content": piece.text} if piece.text else {}) | _picture(piece):
          yield self._chunk(delta, **usage)
      yield self._chunk({}, self.finish_reason, **usage)
      if include_usage:
        yield _event(self.head | {"object": "chat.completion.chunk", "choices": [],
                                  "usage": self.usage})
    except ApiError as error:
      yield _event(error_body(error))
    yield "data: [DONE]\n\n"


def _picture(piece: Piece) -> dict:
  """What a message has besides its text; the images are OpenRouter's way."""
  return {"images": piece.drawn.parts(), "drawing": piece.drawn.about()} if piece.drawn else {}


def _event(content: dict) -> str:
  return f"data: {as_json(content)}\n\n"
