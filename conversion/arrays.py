"""Tensors of a folder <-> arrays of a checkpoint by a table of rows, one tensor at a time."""
from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from conversion import mapping
from conversion.config import read_json
from conversion.families import Json
from conversion.store import Array, Reader, Writer
from conversion.tensors import (
    FLOATS,
    ConversionError,
    Header,
    SafetensorsWriter,
    Tensors,
    first_nonfinite,
    open_file,
    plan_shards,
)
from conversion.transfer import Job, run_jobs
from mgjax.checkpoint import ORIGIN

_NOTES, _BUFFERS = "tensors.json", "buffers.safetensors"


def array_plan(tensors: Tensors, rows: list[mapping.Row],
               shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
  """What is written; a stack of tensors of several dtypes has the one that holds them all."""
  dtypes: dict[str, np.dtype] = {}
  for row in rows:
    header = tensors.headers[row.hf]
    if header.dtype not in FLOATS:
      raise ConversionError(f"{header.file}: {row.hf} is {header.dtype.name}; expected float32, "
                            "float16 or bfloat16")
    before = dtypes.setdefault(row.path, header.dtype)
    if before != header.dtype:  # float16 and bfloat16 both fit into float32
      dtypes[row.path] = np.dtype(np.float32)
  stacked = {row.path: len(row.at) for row in rows}
  return {path: Array(shapes[path], dtype, stacked[path]) for path, dtype in dtypes.items()}


def read_finite(tensors: Tensors, name: str) -> np.ndarray:
  """A tensor; ConversionError if it holds a nan or an infinity."""
  value = tensors.read(name)
  if (at := first_nonfinite(value)) is not None:
    raise ConversionError(f"{tensors.headers[name].file}: {name}{list(at)} is {value[at]}; the "
                          "weights are damaged")
  return value


def write_arrays(run: Path, tensors: Tensors, rows: list[mapping.Row],
                 arrays: Mapping[str, Array]) -> None:
  """Writes `run`/checkpoints/0, tensor by tensor."""
  writer = Writer(run, arrays)

  def job(row: mapping.Row) -> None:
    value = read_finite(tensors, row.hf)
    writer.write(row.path, row.at, row.form.load(value))

  run_jobs("reading", [Job(tensors.headers[r.hf].nbytes, lambda r=r: job(r)) for r in rows])


def write_notes(folder: Path, tensors: Tensors, rows: list[mapping.Row],
                arrays: Mapping[str, Array], **more) -> None:
  """What the way back needs beside the arrays: dtypes that a stack hides, buffers, and `more`."""
  dtypes = {r.hf: tensors.headers[r.hf].dtype.name for r in rows
            if tensors.headers[r.hf].dtype != arrays[r.path].dtype}
  (folder / _NOTES).write_text(json.dumps({"dtypes": dtypes, **more}) + "\n")
  buffers = sorted(n for n in tensors.headers if mapping.IGNORED.search(n))
  if buffers:
    headers = {n: (tensors.headers[n].shape, tensors.headers[n].dtype) for n in buffers}
    writer = SafetensorsWriter(folder / _BUFFERS, headers)
    for name in buffers:
      writer.write(name, tensors.read(name))
    writer.close()


def read_notes(run: Path) -> Json:
  """What `write_notes` wrote; no dtypes for a run that was never another's."""
  path = run / ORIGIN / _NOTES
  return read_json(path) if path.is_file() else {"dtypes": {}}


def with_buffers(tensors: Tensors, run: Path) -> Tensors:
  """With the buffers that the run's weights came with."""
  path = run / ORIGIN / _BUFFERS
  return tensors.over(open_file(path)) if path.is_file() else tensors


def held_parts(reader: Reader, shapes: Mapping[str, tuple[int, ...]],
               yet_to_come: Iterable[str] = ()) -> set[str]:
  """First words of the paths that a checkpoint holds.  Raises ConversionError unless it holds just
  what the model has, but for parts `yet_to_come`, which may be missing."""
  part = lambda path: path.split("/")[0]
  held = {part(path) for path in reader.arrays}
  for path, (shape, _) in reader.arrays.items():
    if shapes.get(path) != shape:
      raise ConversionError(f"{reader.step_dir}: {path} has shape {shape}, its config.json wants "
                            f"{shapes.get(path, 'none')}; they belong to different models")
  if missing := [p for p in shapes if p not in reader.arrays
                 and (part(p) in held or part(p) not in yet_to_come)]:
    raise ConversionError(f"{reader.step_dir}: {missing[0]} is not in it ({len(missing)} such)")
  return held


def as_original(reader: Reader, rows: list[mapping.Row], narrow: Mapping[str, str],
                dtype: np.dtype | None) -> Tensors:
  """A checkpoint's arrays by the original's names.

  narrow: dtypes of tensors whose stack is float32 because its tensors were of several dtypes.
  dtype: to write; None keeps what is saved.
  """
  headers, by_name, where = {}, {row.hf: row for row in rows}, str(reader.step_dir)
  for row in rows:
    shape, saved = reader.arrays[row.path]
    if dtype is None and saved == np.float32 and row.hf in narrow:
      saved = np.dtype(narrow[row.hf])
    headers[row.hf] = Header(row.form.there(shape[len(row.at):]), dtype or saved, reader.step_dir)

  def read(name: str) -> np.ndarray:
    row = by_name[name]
    value = row.form.save(reader.read(row.path, row.at))
    written = value.astype(headers[name].dtype, copy=False)
    if dtype is None and written is not value and not np.array_equal(
        written.astype(value.dtype), value):
      raise ConversionError(f"{where}: {name} was {written.dtype.name} and has been trained since; "
                            "name the type to write with --dtype")
    return written

  return Tensors(where, headers, read)


@dataclasses.dataclass(frozen=True)
class Shards:
  """The files of one folder: `stem`.safetensors, or several with their index.

  names: of the tensors in each file.
  """

  folder: Path
  stem: str
  tensors: Tensors
  names: Sequence[Sequence[str]]
  indexed: bool

  @property
  def files(self) -> list[str]:
    """Names of the files."""
    if not self.indexed:
      return [f"{self.stem}.safetensors"]
    count = len(self.names)
    return [f"{self.stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def in_shards(folder: Path, stem: str, tensors: Tensors, limit: int | None) -> Shards:
  """One file, or several of at most `limit` bytes."""
  sizes = {n: h.nbytes for n, h in tensors.headers.items()}
  names = list(plan_shards(sizes, limit or tensors.nbytes))
  return Shards(folder, stem, tensors, names, indexed=len(names) > 1)


def write_shards(folders: Sequence[Shards]) -> None:
  """Writes all files of all folders, tensor by tensor."""
  with contextlib.ExitStack() as stack:
    jobs: list[Job] = []
    for shards in folders:
      headers = shards.tensors.headers
      for file, names in zip(shards.files, shards.names):
        writer = stack.enter_context(contextlib.closing(SafetensorsWriter(
            shards.folder / file, {n: (headers[n].shape, headers[n].dtype) for n in names})))
        jobs += [Job(headers[n].nbytes, _copy(shards.tensors, writer, n)) for n in names]
      if shards.indexed:
        index = {"metadata": {"total_size": shards.tensors.nbytes}, "weight_map": {
            n: f for f, names in zip(shards.files, shards.names) for n in names}}
        (shards.folder / f"{shards.stem}.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n")
    run_jobs("writing", jobs)


def _copy(tensors: Tensors, writer: SafetensorsWriter, name: str) -> Callable[[], None]:
  return lambda: writer.write(name, tensors.read(name))
