"""What the commands in launch/ share."""
from __future__ import annotations

import re
import sys
from collections.abc import Callable

from absl import flags


def parser(status: int = 1) -> Callable[[list[str]], list[str]]:
  """For `app.run(main, flags_parser=...)`: flags and config file; what does not fit is one line on
  stderr and this exit status."""
  def parse(argv):
    try:
      return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError) as e:
      print(f"error: {last_line(e)}", file=sys.stderr)
      sys.exit(status)
  return parse


def last_line(e: Exception) -> str:
  """What a config file raises comes inside a whole traceback: its last line tells."""
  text = str(e)
  if text[:1] == text[-1:] == "'":  # a KeyError quotes its message
    text = text[1:-1].replace("\\n", "\n")
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  if bare := re.fullmatch(r"['\"]*(\w+)['\"]*", lines[-1]):
    return f"the config has no key {bare[1]!r} (its keys stand in the file that --config names)"
  return re.sub(r"^[a-zA-Z_.]*Error: ", "", lines[-1])
