"""A conversation of the page: what is asked, what the model is given, and what is shown."""
from __future__ import annotations

import asyncio
import base64
import dataclasses
import importlib.util
import os
import pathlib
import re
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mgjax.infer.assistant import Assistant
from mgjax.infer.ocr import hint, read_text
from mgjax.serve.app import Service
from mgjax.serve.errors import ApiError, wrong

EVERY = 0.1  # seconds between two looks at an answer that grows
HAS_OCR = importlib.util.find_spec("rapidocr_onnxruntime") is not None
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to answer; the names are those of a request.  seed: -1 for another answer each time."""

  temperature: float
  top_p: float
  top_k: int
  max_tokens: int
  seed: int
  hd: bool
  ocr: bool


@dataclasses.dataclass(frozen=True)
class Turn:
  """A question, and as much as there is of its answer."""

  question: str
  pictures: tuple[str, ...] = ()      # paths of their files
  hd: bool = True                     # whether the model sees them as fine as it can
  read: tuple[str, ...] | None = None  # the words in them; None: nobody looked
  answer: str = ""
  ended: str | None = None            # "stop", or "length" if it was cut; None while it grows


async def answers(service: Service, assistant: Assistant, pool: ThreadPoolExecutor,
                  before: Sequence[Turn], turn: Turn, settings: Settings) -> AsyncIterator[Turn]:
  """The turn that follows `before` while its answer grows, several times a second.

  Closing it stops the answer.  ApiError or ImageError.  pool: what reads words in pictures.
  """
  # Looked at in turn even if nothing has changed: only then is it noticed that a window was closed.
  grown = [turn]
  growing = asyncio.ensure_future(_grow(service, assistant, pool, before, grown, settings))
  try:
    while not growing.done():
      yield grown[0]
      await asyncio.wait([growing], timeout=EVERY)
    growing.result()
    yield grown[0]
  finally:
    growing.cancel()
    await asyncio.gather(growing, return_exceptions=True)


async def _grow(service, assistant, pool, before, grown: list[Turn], settings):
  turn = dataclasses.replace(grown[0], hd=settings.hd)
  if not settings.ocr:
    turn = dataclasses.replace(turn, read=None)
  elif turn.pictures and turn.read is None:
    words = await asyncio.get_running_loop().run_in_executor(pool, _words, assistant, turn)
    turn = dataclasses.replace(turn, read=words)
  grown[0] = turn
  # Asked for less than the settings say where the conversation leaves less.
  for longest in (settings.max_tokens, None):
    try:
      async for text, ended in service.stream(
          await asyncio.to_thread(_request, [*before, turn], settings, longest)):
        grown[0] = turn = dataclasses.replace(turn, answer=turn.answer + text, ended=ended)
      return
    except ApiError as error:
      if longest is None or error.code != "context_length_exceeded":
        raise


def _words(assistant: Assistant, turn: Turn) -> tuple[str, ...]:
  """The words in its pictures, but for what would be taken for a control token."""
  lines = (line for path in turn.pictures for line in read_text(path))
  return tuple(filter(assistant.is_text, lines))


def _request(turns: Sequence[Turn], settings: Settings, longest: int | None) -> dict[str, Any]:
  """The body of a request for the answer of the last turn.

  What has no answer (it was stopped before its first word, say) is asked with what follows.
  """
  messages, words, parts = [], [], []
  for turn in turns:
    words += turn.read or ()
    parts.append({"type": "text", "text": turn.question + hint(words)})
    parts += [_image_part(path, turn.hd) for path in turn.pictures]
    if turn is turns[-1] or turn.answer.strip():
      messages.append({"role": "user", "content": parts})
      messages.append({"role": "assistant", "content": turn.answer})
      parts = []
  return {"messages": messages[:-1], "temperature": settings.temperature, "top_p": settings.top_p,
          "top_k": settings.top_k, "seed": None if settings.seed < 0 else settings.seed,
          "max_tokens": longest}


def _image_part(path: str, hd: bool) -> dict[str, Any]:
  try:
    file = base64.b64encode(pathlib.Path(path).read_bytes()).decode()
  except FileNotFoundError as error:  # it came too long ago
    raise wrong(f"the picture {os.path.basename(path)} is no longer here; begin a new chat with it"
                ) from error
  return {"type": "image_url", "image_url": {"url": f"data:image/any;base64,{file}",
                                             "detail": "high" if hd else "low"}}


def shown(turns: Sequence[Turn]) -> list[dict[str, Any]]:
  """The turns as messages of Gradio's chatbot."""
  messages = []
  for turn in turns:
    files = [{"path": path} for path in turn.pictures]
    messages.append({"role": "user", "content": files + _text(turn.question)})
    if turn.read is not None and turn.pictures:
      title = "Words read in the picture" if turn.read else "No words were found in the picture"
      messages.append({"role": "assistant", "content": _text("\n".join(turn.read) or " "),
                       "metadata": {"title": title, "status": "done"}})
    content = _text(turn.answer)
    if turn.ended == "length":
      content += _text("*The answer was cut here: it reached its longest length.*")
    elif turn.ended and not turn.answer:
      content += _text("*The model gave no answer.*")
    if content:
      messages.append({"role": "assistant", "content": content})
  return messages


def _text(text: str) -> list[dict[str, Any]]:
  # Not as a mere string: Gradio would take the indentation of its lines away.
  return [{"type": "text", "text": literal(text)}] if text else []


def literal(text: str) -> str:
  """Markdown in which HTML, and pictures from elsewhere, are shown as they are written.

  Gradio removes what is dangerous in any case; this shows it.

  >>> literal("**a** <b> `<b>` ![x](http://x)")
  '**a** &lt;b> `<b>` !&#91;x](http://x)'
  """
  parts = _CODE.split(text)
  parts[::2] = [re.sub(r"&(?=[#\w]+;)", "&amp;", part).replace("<", "&lt;").replace("![", "!&#91;")
                for part in parts[::2]]
  return "".join(parts)
