"""ArrayRecord shards with pictures and conversations together; `prepare.py` writes them."""
from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from typing import ClassVar

import msgpack

from mgjax.data.processes import Sendable
from mgjax.data.samples import BadRecord, DataError, Entry

MANIFEST = "shards.json"


def pack_record(record: dict, pictures: tuple[bytes, ...]) -> bytes:
  """A record and its pictures' files, as shards hold them."""
  return msgpack.packb({"record": record, "pictures": list(pictures)})


@dataclasses.dataclass(frozen=True)
class ShardRecords(Sendable):
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
