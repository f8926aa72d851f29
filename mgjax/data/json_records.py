"""LLaVA JSON and JSON lines: the file is read once, then each record from its range of bytes."""
from __future__ import annotations

import codecs
import dataclasses
import functools
import json
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from mgjax.data.processes import Sendable
from mgjax.data.samples import BadRecord, DataError, Entry

CHUNK = 8 << 20            # bytes of a JSON file that are looked at together
LONGEST_RECORD = 64 << 20  # characters; what is longer is no list of samples


@dataclasses.dataclass(frozen=True)
class JsonRecords(Sendable):
  """A JSON list, or JSON lines: where each record starts and ends in the file (int64 [N])."""

  path: str
  starts: np.ndarray
  ends: np.ndarray
  fingerprint: int
  embeds: ClassVar[bool] = False

  def __len__(self) -> int:
    return len(self.starts)

  def __getitem__(self, index: int) -> Entry:
    return self.text(index), ()

  def text(self, index: int) -> object:
    start, end = int(self.starts[index]), int(self.ends[index])
    try:
      return json.loads(os.pread(self._file, end - start, start).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
      return BadRecord(f"the record at byte {start} is not valid JSON ({error})")

  @functools.cached_property
  def _file(self) -> int:
    return os.open(self.path, os.O_RDONLY)  # for as long as the process lives


def index_json(path: str | os.PathLike) -> JsonRecords:
  """Reads a file once, and remembers where its records are.

  Raises DataError where it is missing, empty, or not JSON.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise DataError(f"{path}: no such data file; give a LLaVA .json or .jsonl file, or a folder of "
                    "shards")
  with open(path, "rb") as file:
    head = file.read(4096)
    bom = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    first = head[bom:].lstrip()
    file.seek(0)
    crc = _Crc(file)
    try:
      if first.startswith(b"["):
        spans = np.fromiter(_elements(crc, bom), np.dtype((np.int64, 2)))
      elif first.startswith(b"{"):
        spans = np.fromiter(_lines(crc), np.dtype((np.int64, 2)))
        _refuse_one_object(path, spans)
      else:
        raise DataError(f"{path}: starts with {first[:1]!r}; expected a JSON list or one JSON "
                        "object a line, in UTF-8")
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, nested without end
      raise DataError(f"{path}: not valid JSON ({error}); was the download cut short?") from error
  if not len(spans):
    raise DataError(f"{path}: no samples in it")
  return JsonRecords(str(path), spans[:, 0].copy(), spans[:, 1].copy(), crc.value)


class _Crc:
  """A file that sums up what is read of it."""

  def __init__(self, file):
    self._file, self.value = file, 0

  def read(self, size: int) -> bytes:
    data = self._file.read(size)
    self.value = zlib.crc32(data, self.value)
    return data

  def __iter__(self) -> Iterator[bytes]:
    for line in self._file:
      self.value = zlib.crc32(line, self.value)
      yield line


def _lines(file) -> Iterator[tuple[int, int]]:
  at = 0
  for line in file:
    if line.strip():
      yield at, at + len(line)
    at += len(line)


def _refuse_one_object(path: pathlib.Path, spans: np.ndarray) -> None:
  """ValueError if the first two lines are no JSON: one object over several lines."""
  lines = JsonRecords(str(path), spans[:2, 0], spans[:2, 1], 0)
  if len(lines) == 2 and all(isinstance(lines[i][0], BadRecord) for i in (0, 1)):
    raise ValueError(f"{lines[0][0]}; one object over several lines is no list of samples")


def _elements(file, at: int) -> Iterator[tuple[int, int]]:
  """Byte ranges of the elements of a JSON list.  Raises ValueError at what is not JSON."""
  text = _Text(file, at)
  parse = json.JSONDecoder().raw_decode
  if text.skip() != "[":
    raise ValueError("expected a list")
  text.advance(1)
  if text.skip() == "]":
    text.advance(1)
    text.finish()
    return
  while True:
    text.skip()
    while True:
      try:
        _, end = parse(text.buffer, text.position)
        if text.buffer[end:end + 1] in tuple(" \t\r\n,]") or not text.more():
          break  # else a number could go on behind the buffer's end
      except ValueError:
        if len(text.buffer) - text.position > LONGEST_RECORD or not text.more():
          raise
    start = text.byte
    text.advance(end - text.position)
    yield start, text.byte
    mark = text.skip()
    if mark not in (",", "]"):
      raise ValueError(f"expected ',' or ']' at byte {text.byte}, found {mark!r}")
    text.advance(1)
    if mark == "]":
      text.finish()
      return


class _Text:
  """UTF-8 text seen through a buffer, with the byte at which the position stands."""

  def __init__(self, file, skip: int):
    self._file, self._decode = file, codecs.getincrementaldecoder("utf-8")().decode
    file.read(skip)
    self.buffer, self.position, self.byte = "", 0, skip
    self._ended = False

  def more(self) -> bool:
    """Reads on; False at the end of the file, where nothing changes."""
    new = ""
    while not (new or self._ended):
      data = self._file.read(CHUNK)
      self._ended = not data
      new = self._decode(data, final=self._ended)
    if new:
      self.buffer, self.position = self.buffer[self.position:] + new, 0
    return bool(new)

  def advance(self, characters: int) -> None:
    passed = self.buffer[self.position:self.position + characters]
    self.byte += len(passed) if passed.isascii() else len(passed.encode())
    self.position += characters

  def skip(self) -> str:
    """The next character that is not white; "" at the end."""
    while True:
      while self.position < len(self.buffer):
        if (c := self.buffer[self.position]) not in " \t\r\n":
          return c
        self.position += 1
        self.byte += 1
      if not self.more():
        return ""

  def finish(self) -> None:
    if rest := self.skip():
      raise ValueError(f"{rest!r} behind the end of the list, at byte {self.byte}")
