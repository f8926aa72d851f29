"""What the conversational commands write to a terminal."""
from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator

BOLD, DIM, RED = 1, 2, 31


def is_terminal(stream) -> bool:
  """Whether what is written there is looked at, and the cursor can be moved."""
  return stream.isatty() and os.environ.get("TERM") != "dumb"


def styled(text: str, style: int, stream) -> str:
  """The text in a style, where it is looked at and NO_COLOR does not forbid it."""
  coloured = is_terminal(stream) and not os.environ.get("NO_COLOR")
  return f"\033[{style}m{text}\033[0m" if coloured else text


def note(text: str) -> None:
  """A remark beside the conversation."""
  print(styled(f"[{text}]", DIM, sys.stderr), file=sys.stderr)


def complain(message: str) -> None:
  """What is wrong, on one line."""
  message = " ".join(message.split())
  print(f"{styled('error:', RED, sys.stderr)} {message}", file=sys.stderr)


def exit_code(body: Callable[[], None], *,
              expected: tuple[type[Exception], ...] = (ValueError, OSError)) -> int:
  """Runs a program's body: what wrong input raises becomes one line and 2, Ctrl-C 130."""
  try:
    body()
  except expected as error:
    complain(str(error))
    return 2
  except KeyboardInterrupt:
    return 130
  return 0


def cells(text: str) -> int:
  """Places that the text takes in a line of a terminal."""
  return sum(0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else
             2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


class Wrapped:
  """Breaks text between words although every piece of it is shown at once: a word that turns out
  too long for its line is taken back and begun again on the next."""

  def __init__(self, columns: int):
    self._columns = max(1, columns - 1)  # a cursor behind the last place is nowhere in particular
    self._word, self._column = "", 0     # the word that grows, and where the cursor is

  def feed(self, piece: str) -> str:
    """What to write to the terminal for that piece; control characters are left out."""
    return "".join(map(self._put, piece.replace("\t", "    ")))

  def _put(self, c):
    if c == "\n":
      return self._new_line()
    if unicodedata.category(c) == "Cc":
      return ""
    if self._column + cells(c) <= self._columns:
      broken = ""
    elif c == " ":
      return self._new_line()
    else:
      word = self._word if cells(self._word) < self._column else ""  # else it has a whole line
      broken = f"\033[{cells(word)}D\033[K" if word else ""
      broken += self._new_line() + word
      self._word, self._column = word, cells(word)
    # Between characters of two places a line may break anywhere.
    self._word = "" if c == " " or cells(c) == 2 else self._word + c
    self._column += cells(c)
    return broken + c

  def _new_line(self):
    self._word, self._column = "", 0
    return "\n"


def writer() -> Callable[[str], None]:
  """What shows the pieces of an answer, each at once."""
  shown = lambda text: print(text, end="", flush=True)
  if not is_terminal(sys.stdout):
    return shown
  wrapped = Wrapped(shutil.get_terminal_size().columns)
  return lambda piece: shown(wrapped.feed(piece))


@contextlib.contextmanager
def ticking(what: str) -> Iterator[None]:
  """Says what takes long, and in a terminal how many seconds it has taken so far."""
  if not is_terminal(sys.stderr):
    note(what)
    yield
    return
  ended, begun = threading.Event(), time.monotonic()

  def tick():
    while True:
      seconds = f" {time.monotonic() - begun:.0f} s"
      place = max(8, shutil.get_terminal_size().columns - len(seconds) - 3)
      text = styled(f"[{what[:place]}{seconds}]", DIM, sys.stderr)
      print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
      if ended.wait(1):
        return

  thread = threading.Thread(target=tick, daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    print("\r\033[K", end="", file=sys.stderr, flush=True)
