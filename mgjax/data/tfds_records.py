"""Data sets of TFDS, as `tfds.data_source` reads them: without tensorflow."""
from __future__ import annotations

import dataclasses
import functools
import importlib
import zlib
from collections.abc import Callable
from typing import ClassVar

from mgjax.config import ConfigError
from mgjax.data.processes import Sendable
from mgjax.data.samples import BadRecord, DataError, Entry

TFDS = "tfds:"


@dataclasses.dataclass(frozen=True)
class TfdsRecords(Sendable):
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
