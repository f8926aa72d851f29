"""What the commands in launch/ share."""
from __future__ import annotations

import re


def last_line(e: Exception) -> str:
  """What a config file raises comes inside a whole traceback: its last line tells."""
  text = str(e)
  if text[:1] == text[-1:] == "'":  # a KeyError quotes its message
    text = text[1:-1].replace("\\n", "\n")
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  return re.sub(r"^[a-zA-Z_.]*Error: ", "", lines[-1])
