"""Files that survive a stop: lines that are only ever added, and files written as a whole."""
from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator


class JournalError(Exception):
  """A journal, or its folder, cannot be used; says why and what to do."""


class Journal:
  """JSON objects, one a line.  What `append` has returned from is on the disk.

  A last line that was being written when the process ended is taken away; any other damage raises
  JournalError.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
      self.entries = self._read()
    except BaseException:
      self.close()
      raise

  def _read(self) -> list[dict]:
    entries, end = [], 0
    with open(self.path, "rb") as file:
      for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):  # append writes the newline last
          os.ftruncate(self._file, end)
          break
        end += len(line)
        try:
          entries.append(json.loads(line))
          if not isinstance(entries[-1], dict):
            raise ValueError("no object")
        except ValueError as error:
          raise JournalError(f"{self.path}: line {number} is damaged ({error}); delete that line, "
                             "what it held will be made again") from error
    return entries

  def append(self, entry: dict) -> None:
    """Adds a line.  OSError leaves the journal as it was."""
    data = memoryview((json.dumps(entry, ensure_ascii=False) + "\n").encode())
    end = os.fstat(self._file).st_size
    try:
      while data:
        data = data[os.write(self._file, data):]
      os.fsync(self._file)
    except OSError as error:
      os.ftruncate(self._file, end)
      raise OSError(error.errno, f"{error.strerror}; what was done before is kept",
                    str(self.path)) from error
    self.entries.append(entry)

  def close(self) -> None:
    os.close(self._file)


def write_whole(path: str | os.PathLike, text: str) -> None:
  """Writes a file that is there whole or not at all; OSError leaves what was there."""
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.new")
  try:
    with open(temporary, "w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise OSError(error.errno, f"{error.strerror}; what was done before is kept", str(path)
                  ) from error


@contextlib.contextmanager
def sole_user(folder: str | os.PathLike) -> Iterator[None]:
  """Makes the folder, and holds it for this process.  JournalError if another has it."""
  os.makedirs(folder, exist_ok=True)
  handle = os.open(folder, os.O_RDONLY)
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise JournalError(f"{folder}: another run is at work there; wait for it, or give another "
                         "folder") from error
    yield
  finally:
    os.close(handle)
