"""The records of a data file, read one at a time from where they lie.

Nothing here holds a data set in memory: a million records are a million numbers.
"""
from __future__ import annotations

import codecs
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol

import msgpack
import numpy as np

from mgjax.config import ConfigError
from mgjax.data.images import Picture
from mgjax.data.samples import BadRecord, DataError

CHUNK = 8 << 20           # bytes of a JSON file that are looked at together
LONGEST_RECORD = 64 << 20  # characters; what is longer is no list of samples
MANIFEST = "shards.json"
TFDS = "tfds:"

Entry = tuple[object, tuple[Picture, ...]]  # a record (decoded JSON), its pictures if it has them


class Records(Protocol):
  """Random access to records; can be pickled, and read from several threads.

  `records[i]` gives a record with its pictures, `records.text(i)` without them, which costs less.
  """

  fingerprint: int  # differs where the records, or their order, do
  embeds: bool      # whether pictures are part of the records

  def __len__(self) -> int:
    ...

  def __getitem__(self, index: int) -> Entry:
    ...

  def text(self, index: int) -> object:
    ...


def open_records(path: str, adapter: str = "", folder: str = "") -> Records:
  """What `path` means: a LLaVA .json or .jsonl, a folder of shards (`launch/prepare_data.py`), or
  `tfds:NAME[/CONFIG]:SPLIT` with `adapter` = "module:function" and TFDS's data_dir `folder` (its
  default if empty).

  Raises DataError where it is not there, or not what it should be.
  """
  if path.startswith(TFDS):
    return open_tfds(path, adapter, folder)
  if adapter:
    raise ConfigError(f"data: adapter {adapter!r} is for data sets of {TFDS}..., not for {path}")
  if "://" in path or os.path.isdir(path):
    return open_shards(path)
  return index_json(path)


@dataclasses.dataclass(frozen=True)
class JsonRecords:
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

  def __getstate__(self):
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


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


def pack_record(record: dict, pictures: tuple[bytes, ...]) -> bytes:
  """A record and its pictures' files, as shards hold them."""
  return msgpack.packb({"record": record, "pictures": list(pictures)})


@dataclasses.dataclass(frozen=True)
class ShardRecords:
  """ArrayRecord shards with pictures and conversations together."""

  full: tuple[str, ...]    # files with pictures
  bare: tuple[str, ...]    # the same records without
  counts: tuple[int, ...]  # records of each
  fingerprint: int
  embeds: ClassVar[bool] = True

  def __len__(self) -> int:
    return sum(self.counts)

  def __getitem__(self, index: int) -> Entry:
    return self._read(self._with_pictures, index)

  def text(self, index: int) -> object:
    return self._read(self._without, index)[0]

  def _read(self, source, index: int) -> Entry:
    try:
      packed = msgpack.unpackb(source[index])
      return packed["record"], tuple(packed["pictures"])
    except Exception as error:  # the libraries raise of all kinds at damaged bytes
      return BadRecord(f"record {index + 1} of the shards cannot be read ({error}); make the shard "
                       "again"), ()

  @functools.cached_property
  def _with_pictures(self):
    return _array_records(self.full, self.counts)

  @functools.cached_property
  def _without(self):
    return _array_records(self.bare, self.counts)

  def __getstate__(self):
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class _Whole:
  """Tells ArrayRecordDataSource how long a file is, so that it opens none before it is needed."""

  filename: str
  examples_in_shard: int
  take: int
  skip: int = 0


def _array_records(paths, counts):
  from array_record.python.array_record_data_source import ArrayRecordDataSource
  return ArrayRecordDataSource([_Whole(path, n, n) for path, n in zip(paths, counts) if n])


def open_shards(folder: str) -> ShardRecords:
  """The shards that the manifest of `folder` lists; a local folder, or a bucket that etils and
  array_record can read (gs://).

  Raises DataError where there is no manifest, or a shard is missing or not of its size.
  """
  from etils import epath
  folder = epath.Path(folder)
  try:
    text = (folder / MANIFEST).read_text()
  except (OSError, ImportError, ValueError) as error:  # epath: a bucket without its library
    raise DataError(f"{folder}: no {MANIFEST} can be read there ({error}); make the shards with "
                    "launch/prepare_data.py shards") from error
  try:
    shards = json.loads(text)["shards"]
    full, bare = ([(folder / s[kind], s[size]) for s in shards]
                  for kind, size in (("full", "bytes"), ("text", "text_bytes")))
    counts = tuple(int(s["records"]) for s in shards)
  except (ValueError, KeyError, TypeError) as error:
    raise DataError(f"{folder / MANIFEST}: is no list of shards ({type(error).__name__}: {error}); "
                    "remove it and run launch/prepare_data.py shards again") from error
  for path, size in [*full, *bare]:
    found = path.stat().length if path.exists() else None
    if found != size:
      told = "is missing" if found is None else f"has {found:,} bytes, expected {size:,}"
      raise DataError(f"{path}: {told}; fetch it again, or run "
                      "launch/prepare_data.py shards again: it makes what is not whole")
  if not sum(counts):
    raise DataError(f"{folder}: no samples in its shards")
  names = lambda files: tuple(str(path) for path, _ in files)
  return ShardRecords(names(full), names(bare), counts, zlib.crc32(text.encode()))


@dataclasses.dataclass(frozen=True)
class TfdsRecords:
  """A split of `tfds.data_source`; `adapter` makes a LLaVA record and pictures of an example."""

  name: str
  split: str
  adapter: str
  folder: str
  fingerprint: int
  embeds: ClassVar[bool] = True

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Entry:
    try:
      return self._adapt(self._source[index])  # one that fails is a bad record, whatever it raises
    except (KeyError, TypeError, ValueError, IndexError) as error:
      told = f"adapter {self.adapter} cannot use it ({type(error).__name__}: {error})"
      return BadRecord(told), ()

  def text(self, index: int) -> object:
    return self[index][0]

  @functools.cached_property
  def _adapt(self) -> Callable[[dict], Entry]:
    return find_adapter(self.adapter)

  @functools.cached_property
  def _source(self):
    try:
      import tensorflow_datasets as tfds
    except ImportError as error:
      raise ConfigError(f"data: {TFDS}{self.name} needs tensorflow-datasets: pip install -e "
                        f"'.[tfds]' ({error})") from error
    try:
      return tfds.data_source(self.name, split=self.split, data_dir=self.folder or None)
    except Exception as error:  # its own kinds, many
      raise DataError(f"{TFDS}{self.name}:{self.split} cannot be opened ({error}); prepare it in "
                      "the array_record format, see tfds.data_source") from error

  def __getstate__(self):
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def find_adapter(name: str) -> Callable[[dict], Entry]:
  """The function that "module:function" names.  Raises ConfigError."""
  module, _, function = name.partition(":")
  try:
    return getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError, ValueError) as error:
    raise ConfigError(f"data: adapter {name!r} cannot be used ({error}); expected "
                      "'module:function', e.g. 'mgjax.data.adapters:captions'") from error


def open_tfds(path: str, adapter: str, folder: str) -> TfdsRecords:
  """`tfds:NAME[/CONFIG]:SPLIT`."""
  name, _, split = path.removeprefix(TFDS).rpartition(":")
  if not name or not adapter:
    raise ConfigError(f"data: {path!r} with adapter {adapter!r}: expected {TFDS}NAME:SPLIT, and an "
                      "adapter 'module:function'")
  find_adapter(adapter)  # now, not in a worker
  records = TfdsRecords(name, split, adapter, folder, 0)
  return dataclasses.replace(records, fingerprint=zlib.crc32(f"{path} {len(records)}".encode()))
