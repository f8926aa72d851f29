"""A conversation of the page: what is asked, what the model is given, and what is shown."""
from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mgjax.infer.assistant import Assistant
from mgjax.infer.drawing import asked_to_draw, without_tags
from mgjax.infer.ocr import hint, read_text
from mgjax.serve.drawing import Drawn
from mgjax.serve.errors import ApiError, wrong
from mgjax.serve.service import Service

EVERY = 0.1  # seconds between two looks at an answer that grows
ANYWAY = "Draw it anyway"
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
  draw_size: str = "auto"
  draw_steps: int = 50
  draw_guidance: float = 5.0


@dataclasses.dataclass(frozen=True)
class Turn:
  """A question, and as much as there is of its answer."""

  question: str
  pictures: tuple[str, ...] = ()      # paths of their files
  hd: bool = True                     # whether the model sees them as fine as it can
  read: tuple[str, ...] | None = None  # the words in them; None: nobody looked
  answer: str = ""
  ended: str | None = None            # "stop", or "length" if it was cut; None while it grows
  draw: bool = False                  # whether a picture is asked for
  force: bool = False                 # whether the answer begins with its prompt
  painted_for: int | None = None      # seconds that it has taken so far; None: nothing is painted
  drawn: str | None = None            # path of the file that was painted
  note: str = ""                      # what there is to say about it, in Markdown
  refused: bool = False               # whether the model wrote no prompt
  halted: bool = False                # whether the user stopped it

  def fresh(self) -> Turn:
    """The question alone."""
    return Turn(self.question, self.pictures, self.hd, self.read, draw=self.draw,
                force=self.force)

  def stopped(self) -> Turn:
    """As it stays if its user wants no more of it."""
    note = self.note if self.painted_for is None else "*Stopped; there is no picture.*"
    return dataclasses.replace(self, halted=True, painted_for=None, note=note)


async def answers(service: Service, assistant: Assistant, pool: ThreadPoolExecutor,
                  before: Sequence[Turn], turn: Turn, settings: Settings,
                  folder: pathlib.Path) -> AsyncIterator[Turn]:
  """The turn that follows `before` while its answer grows, several times a second.

  Closing it stops the answer.  ApiError or ImageError.  pool: what reads words in pictures;
  folder: where pictures are saved that are painted.
  """
  # Looked at in turn even if nothing has changed: only then is it noticed that a window was closed.
  grown = [turn]
  growing = asyncio.ensure_future(
      _grow(service, assistant, pool, before, grown, settings, folder))
  try:
    while not growing.done():
      yield grown[0]
      await asyncio.wait([growing], timeout=EVERY)
    growing.result()
    yield grown[0]
  finally:
    growing.cancel()
    await asyncio.gather(growing, return_exceptions=True)


async def _grow(service, assistant, pool, before, grown: list[Turn], settings, folder):
  turn = dataclasses.replace(grown[0], hd=settings.hd)
  if not settings.ocr:
    turn = dataclasses.replace(turn, read=None)
  elif turn.pictures and turn.read is None:
    words = await asyncio.get_running_loop().run_in_executor(pool, _words, assistant, turn)
    turn = dataclasses.replace(turn, read=words)
  grown[0], begun = turn, None
  # Asked for less than the settings say where the conversation leaves less.
  for longest in (settings.max_tokens, None):
    try:
      request = await asyncio.to_thread(_request, [*before, turn], settings, longest)
      async with contextlib.aclosing(service.stream(request)) as stream:
        async for piece, ended in stream:
          turn = dataclasses.replace(turn, answer=turn.answer + piece.text, ended=ended)
          if piece.paints:
            begun = begun or time.monotonic()
            turn = dataclasses.replace(turn, painted_for=int(time.monotonic() - begun))
          elif piece.drawn:
            turn = await asyncio.to_thread(_with_picture, turn, piece.drawn, folder)
          grown[0] = turn
      return
    except ApiError as error:
      if longest is None or error.code != "context_length_exceeded":
        raise


def _with_picture(turn: Turn, drawn: Drawn, folder: pathlib.Path) -> Turn:
  """The turn with what came of its drawing, the picture saved where nobody can guess."""
  turn = dataclasses.replace(turn, painted_for=None)
  if drawn.prompt is None:
    return dataclasses.replace(turn, refused=True, note="*The model wrote no drawing prompt.*")
  if drawn.error:
    return dataclasses.replace(turn, note=f"*No picture:* {literal(drawn.error)}")
  path = folder / secrets.token_hex(16) / "picture.png"
  path.parent.mkdir()
  path.write_bytes(drawn.file)
  note = f"*The painter does not read so much; left out:* {literal(drawn.cut)}" if drawn.cut else ""
  return dataclasses.replace(turn, drawn=str(path), note=note)


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
    text = turn.question + hint(words)
    parts.append({"type": "text", "text": asked_to_draw(text) if turn.draw else text})
    parts += [_image_part(path, turn.hd) for path in turn.pictures]
    if turn is turns[-1] or turn.answer.strip():
      messages.append({"role": "user", "content": parts})
      messages.append({"role": "assistant", "content": turn.answer,
                       "images": [_image_part(turn.drawn, False)] if turn.drawn else None})
      parts = []
  draw = {"size": settings.draw_size, "steps": settings.draw_steps,
          "guidance": settings.draw_guidance, "force": turns[-1].force}
  return {"messages": messages[:-1], "temperature": settings.temperature, "top_p": settings.top_p,
          "top_k": settings.top_k, "seed": None if settings.seed < 0 else settings.seed,
          "max_tokens": longest, "draw": draw if turns[-1].draw else None}


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
    content = _text(without_tags(turn.answer) if turn.draw else turn.answer)
    if turn.drawn:
      content.append({"path": turn.drawn})
    if turn.painted_for is not None:
      content += _marked(f"*Painting ... {turn.painted_for} s*")
    if turn.note:
      content += _marked(turn.note)
    if turn.ended == "length":
      content += _marked("*The answer was cut here: it reached its longest length.*")
    elif turn.ended and not turn.answer:
      content += _marked("*The model gave no answer.*")
    if content:
      again = [{"label": ANYWAY, "value": ANYWAY}] if turn.refused and turn is turns[-1] else []
      messages.append({"role": "assistant", "content": content, "options": again})
  return messages


def _text(text: str) -> list[dict[str, Any]]:
  return _marked(literal(text)) if text else []


def _marked(text: str) -> list[dict[str, Any]]:
  # Not as a mere string: Gradio would take the indentation of its lines away.
  return [{"type": "text", "text": text}]


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
