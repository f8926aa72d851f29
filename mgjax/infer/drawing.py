"""Reasoning, then drawing: the language model writes a prompt, and SDXL paints it (R3.9, R5.1).

A question that ends in ` <GEN>` asks for a picture; the answer holds the prompt between `<h>` and
`</h>`.  All three are ordinary text to the tokenizer.
"""
from __future__ import annotations

import re

from mgjax.data.drawing.texts import GEN_TAG

GEN = f" {GEN_TAG}"

_OPEN, _CLOSE = r"<\s*h\s*>", r"<\s*/\s*h\s*>"
_TAG = re.compile(f"({_OPEN})|{_CLOSE}", re.IGNORECASE)
_HALF_CLOSE = re.compile(r"<\s*(/\s*h?\s*)?$", re.IGNORECASE)


def asked_to_draw(question: str) -> str:
  """The question with ` <GEN>` behind it, once.

  >>> asked_to_draw("draw a cat"), asked_to_draw("draw a cat <GEN>")
  ('draw a cat <GEN>', 'draw a cat <GEN>')
  """
  return question if question.rstrip().endswith(GEN_TAG) else question + GEN


def drawing_prompt(answer: str) -> str | None:
  """What an answer tells to draw, in one line; None: nothing.

  That is the last pair of tags with something between them, the innermost where pairs are nested.
  Without such a pair it is what follows the last `<h>`: the answer was cut, or its end forgotten.
  Tags may be written in capitals and with spaces in them.

  >>> drawing_prompt("Sure. <h>a red cat</h> Do you like it?"), drawing_prompt("I cannot draw.")
  ('a red cat', None)
  >>> drawing_prompt("<h>one</h> <h>two</h>"), drawing_prompt("<h>a red cat on a</h")
  ('two', 'a red cat on a')
  """
  pairs, begun = [], None
  for tag in _TAG.finditer(answer):
    if tag[1]:
      begun = tag.end()
    elif begun is not None:
      pairs.append(_one_line(answer[begun:tag.start()]))
      begun = None
  if found := [pair for pair in pairs if pair]:
    return found[-1]
  if begun is None:
    return None
  return _one_line(_HALF_CLOSE.sub("", answer[begun:])) or None


def _one_line(text: str) -> str:
  return " ".join(text.split())


def without_tags(answer: str) -> str:
  """An answer as it is shown: each prompt on a line of its own, in place of its tags.

  >>> without_tags("Here it is. <h>a red cat</h>")
  'Here it is.\\n\\nPrompt: a red cat'
  """
  text = re.sub(rf"\s*{_OPEN}\s*", "\n\nPrompt: ", answer, flags=re.IGNORECASE)
  return re.sub(rf"\s*{_CLOSE}[^\S\n]*", "\n\n", text, flags=re.IGNORECASE).strip()
