"""The records of a data file, read one at a time from where they lie.

Nothing here holds a data set in memory: a million records are a million numbers.
"""
from __future__ import annotations

import os
from typing import Protocol

from mgjax.config import ConfigError
from mgjax.data.json_records import index_json
from mgjax.data.samples import Entry
from mgjax.data.shards import open_shards
from mgjax.data.tfds_records import TFDS, open_tfds


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
