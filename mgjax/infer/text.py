"""Ids to text while they come."""
from __future__ import annotations

from collections.abc import Sequence

from mgjax.data.conversation import Template
from mgjax.data.tokenizer import Tokenizer

HALF = "\ufffd"  # what decoding makes of a character whose bytes are not all there


def end_ids(tokenizer: Tokenizer, template: Template,
            stop_ids: Sequence[int] = ()) -> tuple[int, ...]:
  """eos, the checkpoint's `stop_ids`, and the stop strings of the template that are one token each;
  others are found in the text (`TextStream`)."""
  ids = {tokenizer.eos_id, *stop_ids}
  for stop in template.stop:
    written = tokenizer.encode(stop, add_bos=False)
    if len(written) == 1:
      ids.add(written[0])
  return tuple(sorted(ids))


class TextStream:
  """Ids in, text out, as soon as no later id can change it.

  Held back are half characters, spaces at the end, and what may be the start of a stop string.  The
  text of a whole answer has no spaces around it.

  begun: text that the answer begins with, given out with its first piece.
  """

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), begun: str = ""):
    self._tokenizer, self._stops = tokenizer, tuple(s for s in stops if s)
    self._ids: list[int] = tokenizer.encode(begun, add_bos=False) if begun else []
    self._shown = 0     # characters given out
    self.text = begun   # everything so far, up to the first stop string
    self.stopped = False  # a stop string was met; further ids are ignored

  def feed(self, token: int) -> str:
    """The text that this id makes certain; often empty."""
    if self.stopped:
      return ""
    self._ids.append(token)
    # All ids every time: only the tokenizer knows how pieces join, and it is fast.
    self.text = self._tokenizer.decode(self._ids, skip_special=True).lstrip()
    if met := [at for stop in self._stops if (at := self.text.find(stop)) >= 0]:
      self.text, self.stopped = self.text[:min(met)].rstrip(), True
      return self._show(self.text)
    certain = self.text.rstrip(HALF).rstrip()
    if self._tokenizer.takes_spaces_back:
      certain = certain[:max(certain.rfind(" "), self._shown)]
    held = max((_overlap(certain, stop) for stop in self._stops), default=0)
    return self._show(certain[:len(certain) - held].rstrip())

  def finish(self) -> str:
    """What was held back, once no more ids come."""
    self.text = self.text.rstrip(HALF).rstrip()
    return self._show(self.text)

  def _show(self, text: str) -> str:
    new = text[self._shown:]
    self._shown = max(self._shown, len(text))
    return new


def _overlap(text: str, stop: str) -> int:
  """Length of the longest end of `text` that `stop` begins with."""
  return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])),
              0)


def finished_text(tokenizer: Tokenizer, template: Template, ids: Sequence[int],
                  ends: Sequence[int]) -> str:
  """The text of a whole answer, up to what ends it (`ends` from `end_ids`)."""
  stream = TextStream(tokenizer, template.stop)
  for token in ids:
    if token in ends or stream.stopped:
      break
    stream.feed(token)
  stream.finish()
  return stream.text
