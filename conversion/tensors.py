"""Tensors in files as HuggingFace lays them out: headers first, then one tensor at a time.

Nothing that a file holds is executed: safetensors are bytes with a JSON header, and `.bin` files
are read by torch with `weights_only=True`.
"""
from __future__ import annotations

import dataclasses
import json
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np


class ConversionError(ValueError):
  """A folder or file that is not what it has to be; the message names it and the way out."""


DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_,
}
DTYPES = {name: np.dtype(dtype) for name, dtype in DTYPES.items()}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = tuple(DTYPES[name] for name in ("F32", "F16", "BF16"))

INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Header:
  """What is known of a tensor before it is read."""

  shape: tuple[int, ...]
  dtype: np.dtype
  file: Path

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Tensors:
  """Named tensors that lie somewhere: `headers` by name, and how one is read."""

  where: str
  headers: Mapping[str, Header]
  read: Callable[[str], np.ndarray]

  @property
  def nbytes(self) -> int:
    return sum(h.nbytes for h in self.headers.values())

  def renamed(self, rename: Callable[[str], str | None]) -> Tensors:
    """With other names; those that become None are left out."""
    old = {new: name for name in self.headers if (new := rename(name)) is not None}
    return Tensors(self.where, {new: self.headers[name] for new, name in old.items()},
                   lambda new: self.read(old[new]))

  def over(self, other: Tensors) -> Tensors:
    """These, and those of `other` that these lack."""
    headers = {**other.headers, **self.headers}
    return Tensors(f"{self.where} and {other.where}", headers,
                   lambda name: (self if name in self.headers else other).read(name))


def open_tensors(folder: Path, stems: tuple[str, str] = ("model", "pytorch_model"),
                 variants: Sequence[str] = ("",)) -> Tensors:
  """The tensors of a HuggingFace model folder, sharded or not, safetensors or `.bin`.

  stems: what names of files begin with, safetensors and `.bin`.
  variants: what may stand in names ("fp16": model.fp16.safetensors), the preferred one first.

  Raises ConversionError: no weights, a shard that is missing or cut off, an index that does not
  agree with its shards, a tensor that occurs twice.
  """
  for variant in variants:
    dot = f".{variant}" if variant else ""
    for stem, ending in zip(stems, ("safetensors", "bin")):
      index, single = folder / f"{stem}.{ending}.index{dot}.json", folder / f"{stem}{dot}.{ending}"
      if index.is_file():
        return _open_sharded(folder, index)
      if single.is_file():
        return open_file(single)
      shards = sorted(folder.glob(f"{stem}{dot}-*-of-*.{ending}"))
      if shards and ending == "safetensors":
        total = int(re.search(r"-of-(\d+)", shards[0].name).group(1))
        if len(shards) != total:
          raise ConversionError(f"{folder}: {total} shards expected, {len(shards)} found; download "
                                "the rest")
        return _together(str(folder), [open_file(shard) for shard in shards])
  dot = f".{variants[0]}" if variants[0] else ""
  raise ConversionError(f"{folder}: no weights found; expected {stems[0]}.safetensors.index"
                        f"{dot}.json with its shards, {stems[0]}{dot}.safetensors, or "
                        f"{stems[1]}{dot}.bin")


def open_file(path: Path) -> Tensors:
  """The tensors of one file; by its ending safetensors or a torch pickle."""
  if not path.is_file():
    raise ConversionError(f"{path}: no such file")
  return _open_safetensors(path) if path.suffix == ".safetensors" else _open_bin(path)


def _open_sharded(folder: Path, index: Path) -> Tensors:
  try:
    listed = json.loads(index.read_text())["weight_map"]
    files = sorted(set(listed.values()))
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ConversionError(f"{index}: not an index of shards ({type(e).__name__}: {e}); expected "
                          'JSON with "weight_map"') from e
  if bad := [f for f in files if Path(f).name != f]:
    raise ConversionError(f"{index}: shard {bad[0]!r} is not a file name; shards lie beside it")
  shards = [open_file(folder / f) for f in files]
  for shard, file in zip(shards, files):
    held, wanted = set(shard.headers), {n for n, f in listed.items() if f == file}
    if missing := sorted(wanted - held):
      raise ConversionError(f"{folder / file}: {missing[0]} is not in it, which {index.name} says "
                            f"({len(missing)} such)")
    if extra := sorted(held - wanted):
      raise ConversionError(f"{index}: no entry for {extra[0]}, which {file} holds ({len(extra)} "
                            "such); the index belongs to other shards")
  return _together(str(folder), shards)


def _together(where: str, parts: Iterable[Tensors]) -> Tensors:
  home: dict[str, Tensors] = {}
  for part in parts:
    for name in part.headers:
      if name in home:
        raise ConversionError(f"{where}: {name} occurs twice, in {home[name].headers[name].file} "
                              f"and {part.headers[name].file}")
      home[name] = part
  return Tensors(where, {n: p.headers[n] for n, p in home.items()}, lambda n: home[n].read(n))


def _open_safetensors(path: Path) -> Tensors:
  size = path.stat().st_size
  with open(path, "rb") as f:
    length = int.from_bytes(f.read(8), "little")
    if size < 8 or length > size - 8:
      raise ConversionError(f"{path}: cut off in its header ({size} bytes); download it again")
    try:
      entries = json.loads(f.read(length))
      entries.pop("__metadata__", None)
      spans = {}
      for name, entry in entries.items():
        begin, end = map(operator.index, entry["data_offsets"])
        shape = tuple(map(operator.index, entry["shape"]))
        spans[name] = str(entry["dtype"]), shape, begin, end
    except (ValueError, KeyError, TypeError, AttributeError) as e:
      raise ConversionError(f"{path}: not a safetensors file ({type(e).__name__}: {e})") from e
  start, headers, at = 8 + length, {}, 0
  for name, (dtype, shape, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
    if dtype not in DTYPES:
      raise ConversionError(f"{path}: {name} has dtype {dtype}, expected one of "
                            f"{', '.join(DTYPES)}; convert quantised weights back first")
    headers[name] = Header(shape, DTYPES[dtype], path)
    if end - begin != headers[name].nbytes or begin != at or min(shape, default=0) < 0:
      raise ConversionError(f"{path}: {name} lies at bytes {begin} to {end}, expected {at} to "
                            f"{at + headers[name].nbytes} for {shape} of {dtype}; the file is "
                            "damaged")
    at = end
    if start + end > size:
      raise ConversionError(f"{path}: cut off; {name} ends at byte {start + end}, the file has "
                            f"{size}; download it again")
  if start + at != size:
    raise ConversionError(f"{path}: {size - start - at} bytes behind the last tensor; the file is "
                          "damaged")

  def read(name: str) -> np.ndarray:
    # Read, not mapped: mapped pages would count as memory until the file is closed.
    out = np.empty(headers[name].shape, headers[name].dtype)
    with open(path, "rb", buffering=0) as f:
      f.seek(start + spans[name][2])
      view, done = memoryview(out.reshape(-1).view(np.uint8)), 0
      while done < len(view):
        n = f.readinto(view[done:])
        if not n:
          raise ConversionError(f"{path}: cut off while {name} was read")
        done += n
    return out

  return Tensors(str(path), headers, read)


def _open_bin(path: Path) -> Tensors:
  try:
    import torch
  except ImportError as e:
    raise ConversionError(f"{path}: .bin files are read by torch, which is not installed: "
                          "pip install -e '.[torch]'") from e
  try:
    try:
      held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as e:
      if "mmap" not in str(e):
        raise
      held = torch.load(path, map_location="cpu", weights_only=True)  # written by an old torch
  except Exception as e:  # torch's own kinds
    raise ConversionError(f"{path}: not a file of tensors alone ({type(e).__name__}: "
                          f"{str(e).splitlines()[0][:200]}); nothing else is loaded") from e
  for wrapper in ("model", "state_dict"):  # trainers wrap what they save
    if isinstance(held, Mapping) and isinstance(held.get(wrapper), Mapping):
      held = held[wrapper]
  if not isinstance(held, Mapping) or not all(isinstance(v, torch.Tensor) for v in held.values()):
    raise ConversionError(f"{path}: expected a dictionary of tensors by name")
  known = {getattr(torch, str(d)): d for d in map(str, FLOATS)} | {
      getattr(torch, d): d for d in ("float64", "int64", "int32", "int16", "int8", "uint8", "bool")}
  for name, tensor in held.items():
    if tensor.dtype not in known:
      raise ConversionError(f"{path}: {name} has dtype {tensor.dtype}, which is not supported")

  def read(name: str) -> np.ndarray:
    tensor = held[name].detach().contiguous()
    if tensor.dtype == torch.bfloat16:
      return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return tensor.numpy().copy()

  headers = {n: Header(tuple(t.shape), np.dtype(known[t.dtype]), path) for n, t in held.items()}
  return Tensors(str(path), headers, read)


def first_nonfinite(x: np.ndarray) -> tuple[int, ...] | None:
  """Index of the first nan or infinity of a float array, None if there is none."""
  if x.dtype not in FLOATS:
    return None
  # By the bits: an exponent of all ones.  In pieces that stay in the processor's cache.
  bits, exponent = {2: (np.uint16, 0x7C00 if x.dtype == np.float16 else 0x7F80),
                    4: (np.uint32, 0x7F800000)}[x.dtype.itemsize]
  flat = np.ascontiguousarray(x).reshape(-1).view(bits)
  for at in range(0, flat.size, 1 << 18):
    piece = flat[at:at + (1 << 18)] & exponent
    if piece.max() == exponent:
      return tuple(int(i) for i in np.unravel_index(at + int(piece.argmax()), x.shape))
  return None


def contiguous(x: np.ndarray) -> np.ndarray:
  """The same array in C order.  A transposed matrix is copied 16 of its columns at a time: their
  cache lines stay in reach, which is four times faster than NumPy's own order."""
  if x.ndim != 2 or x.flags.c_contiguous or x.strides[0] != x.itemsize:
    return np.ascontiguousarray(x)
  out = np.empty(x.shape, x.dtype)
  for at in range(0, x.shape[1], 16):
    out[:, at:at + 16] = x[:, at:at + 16]
  return out


class SafetensorsWriter:
  """Writes one file, its tensors in any order, from any thread.

  headers: name -> (shape, dtype), known before the first byte.
  """

  def __init__(self, path: Path, headers: Mapping[str, tuple[tuple[int, ...], np.dtype]]):
    entries, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in headers.items():
      end = at + math.prod(shape) * dtype.itemsize
      entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
      at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    self._path, self._entries, self._start = path, entries, 8 + len(text)
    self._file = open(path, "wb", buffering=0)
    self._file.write(len(text).to_bytes(8, "little") + text)

  def write(self, name: str, value: np.ndarray) -> None:
    """One tensor of the header, perhaps a transposed view."""
    entry = self._entries[name]
    if [*value.shape] != entry["shape"] or _NAMES.get(value.dtype) != entry["dtype"]:
      raise ConversionError(f"{self._path}: {name} became {value.dtype.name} {value.shape}; "
                            f"expected {entry['dtype']} {entry['shape']}")
    data = memoryview(contiguous(value).reshape(-1).view(np.uint8))
    at, done = self._start + entry["data_offsets"][0], 0
    try:
      while done < len(data):
        done += os.pwrite(self._file.fileno(), data[done:], at + done)
    except OSError as e:
      raise ConversionError(f"{self._path}: {name} cannot be written ({e.strerror}); "
                            f"{len(data) - done} bytes of it are left") from e

  def close(self) -> None:
    """Ends the file, its bytes on the disk."""
    try:
      os.fsync(self._file.fileno())
    except OSError as e:
      raise ConversionError(f"{self._path}: cannot be written ({e.strerror})") from e
    finally:
      self._file.close()


def plan_shards(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
  """Names for each file, from name -> bytes.  A file holds at most `limit` bytes, unless one tensor
  is larger."""
  names, size = [], 0
  for name, nbytes in sizes.items():
    if names and size + nbytes > limit:
      yield names
      names, size = [], 0
    names.append(name)
    size += nbytes
  if names:
    yield names
