"""A data set as ArrayRecord shards: pictures and conversations together, in few large files.

A shard is two files: `full-*` holds each record with its pictures, `text-*` the record alone, so
that lengths can be measured without reading a picture.  `shards.json` lists them, and is written
last.
"""
from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from mgjax.config import ConfigError, at_least
from mgjax.data.images import (
  ASPECTS,
  DECODING_ERRORS,
  ImageError,
  check_header,
  open_image,
  resolve_image,
)
from mgjax.data.journal import sole_user, write_whole
from mgjax.data.processes import end_with_parent
from mgjax.data.samples import DataError, Problem
from mgjax.data.shards import MANIFEST, pack_record
from mgjax.data.sources import SampleSet, Source, open_sources

SETTINGS, DONE, VERSION = "settings.json", "done", 1


@dataclasses.dataclass(frozen=True)
class ShardConfig:
  """What to write.  Everything but `workers` and `on_error` belongs to the result."""

  data: str                     # LLaVA .json or .jsonl
  image_root: str = ""
  output: str = ""              # folder; made where it is missing
  records_per_shard: int = 4096
  resize: int = 0               # H: larger pictures than the model sees are shrunk; 0: kept
  aspect: str = "pad"           # how the model will see them: 'pad' | 'square'
  quality: int = 95             # of the JPEGs that are written where a picture is shrunk
  workers: int = 0              # processes; 0 = this one
  on_error: str = "stop"        # 'stop' | 'skip'

  def __post_init__(self):
    at_least(self, 1, "records_per_shard")
    at_least(self, 0, "resize", "workers")
    if not 1 <= self.quality <= 100:
      raise ConfigError(f"quality is {self.quality}; expected 1 to 100")
    for name, value, allowed in (("aspect", self.aspect, ASPECTS),
                                 ("on_error", self.on_error, ("stop", "skip"))):
      if value not in allowed:
        raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")


@dataclasses.dataclass(frozen=True)
class Written:
  """One finished shard."""

  number: int
  records: int
  pictures: int
  bytes: int        # of the file with the pictures
  text_bytes: int   # of the one without
  problems: tuple[Problem, ...] = ()


def write_shards(config: ShardConfig) -> dict:
  """Makes what is missing in `config.output`, and returns its manifest.

  A run that was stopped goes on with the shards that are not there yet; one that is whole is left
  alone.  Raises DataError for bad samples (on_error='stop') or where the disk is full, ConfigError
  where the folder holds something else, JournalError where another process writes there.
  """
  output = Path(config.output).absolute()
  with sole_user(output):
    samples = open_sources([Source(config.data, config.image_root)])
    settings = _settings(config, samples)
    _check_folder(output, settings)
    count = -(-len(samples) // config.records_per_shard)
    done = [w for k in range(count) if (w := _finished(output, k, count))]
    missing = sorted(set(range(count)) - {w.number for w in done})
    if not missing and (manifest := _read(output / MANIFEST)):
      return manifest
    for stale in [*output.glob("*.part"), output / MANIFEST]:
      stale.unlink(missing_ok=True)
    (output / DONE).mkdir(exist_ok=True)
    _write(output / SETTINGS, settings)
    with tqdm(total=len(samples), initial=sum(w.records + len(w.problems) for w in done),
              unit="record") as bar:
      started, made = time.perf_counter(), 0
      for written in _make_all(config, samples, output, missing, count):
        done.append(written)
        bar.update(written.records + len(written.problems))
        made += written.bytes
        bar.set_postfix_str(f"{made / 1e6 / (time.perf_counter() - started):,.0f} MB/s")
    return _finish(config, settings, output, sorted(done, key=lambda w: w.number), count)


def _settings(config: ShardConfig, samples: SampleSet) -> dict:
  """What makes two runs the same."""
  shrunk = {"resize": config.resize, "aspect": config.aspect, "quality": config.quality}
  return {"version": VERSION, "data": os.path.basename(config.data),
          "fingerprint": samples.fingerprint, "data_records": len(samples),
          "records_per_shard": config.records_per_shard} | (shrunk if config.resize else {})


def _check_folder(output: Path, settings: dict) -> None:
  before = _read(output / SETTINGS)
  if before and before != settings and list((output / DONE).glob("*.json")):
    changed = [f"{k} was {before.get(k)} and is {settings.get(k)}"
               for k in sorted(before.keys() | settings.keys()) if before.get(k) != settings.get(k)]
    raise ConfigError(f"{output} holds shards of something else: {'; '.join(changed)}.  Choose "
                      "another folder, or remove it")


def _make_all(config, samples, output, missing, count) -> Iterator[Written]:
  make = _Maker(config, samples, output, count)
  if not config.workers:
    yield from map(make, missing)
    return
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(
      config.workers, context, initializer=end_with_parent) as pool:
    try:
      for future in concurrent.futures.as_completed([pool.submit(make, k) for k in missing]):
        yield future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
      raise DataError("a worker was killed (out of memory?); run the same command again, it goes "
                      "on from the shards that are finished") from error
    finally:
      pool.shutdown(cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class _Maker:
  config: ShardConfig
  samples: SampleSet
  output: Path
  count: int

  def __call__(self, number: int) -> Written:
    full, text = (self.output / name for name in _names(number, self.count))
    parts = [path.with_suffix(".part") for path in (full, text)]
    try:
      written = self._write_parts(number, *parts)
      for part, path in zip(parts, (full, text)):
        part.rename(path)
      _write(_done(self.output, number), dataclasses.asdict(written))
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError where C++ fails
      free = shutil.disk_usage(self.output).free
      raise DataError(f"{full}: cannot be written ({error}); {free:,} bytes are free there.  Make "
                      "room and run the same command again: finished shards are kept") from error
    finally:
      for part in parts:
        part.unlink(missing_ok=True)
    return written

  def _write_parts(self, number: int, full: Path, text: Path) -> Written:
    from array_record.python.array_record_module import ArrayRecordWriter
    config, size = self.config, self.config.records_per_shard
    problems, records, pictures = [], 0, 0
    # Pictures are compressed already; one record a chunk, for random access.
    with (_closing(ArrayRecordWriter(str(full), "group_size:1,uncompressed")) as whole,
          _closing(ArrayRecordWriter(str(text), "group_size:1")) as bare):
      for i in range(number * size, min(len(self.samples), (number + 1) * size)):
        sample, problem = self.samples.read(i)
        files = []
        try:
          for image in () if problem else sample.images:
            path = resolve_image(config.image_root, image)
            check_header(path)
            files.append(shrink(path, config.resize, config.aspect, config.quality)
                         if config.resize else path.read_bytes())
        except ImageError as error:
          problem = Problem(error.kind, config.data, sample.index, sample.id, error.message)
        if problem and config.on_error == "stop":
          raise DataError.of([problem], len(self.samples), "Repair or remove it, or leave such "
                             "records out with --on-error skip.")
        if problem:
          problems.append(problem)
          continue
        record = {"id": sample.id, "conversations": [
            {"from": role, "value": said} for role, said in sample.turns]}
        if sample.images:
          record["image"] = list(sample.images)
        whole.write(pack_record(record, tuple(files)))
        bare.write(pack_record(record, ()))
        records, pictures = records + 1, pictures + len(files)
    return Written(number, records, pictures, full.stat().st_size, text.stat().st_size,
                   tuple(problems))


@contextlib.contextmanager
def _closing(writer):
  try:
    yield writer
  finally:
    writer.close()


def shrink(path: Path, size: int, aspect: str, quality: int) -> bytes:
  """The picture's file, or a smaller JPEG of it where it is larger than the model sees.

  aspect 'pad': the longer side becomes `size`; 'square': the shorter one.  Raises ImageError.
  """
  with open_image(path, aspect, size) as image:
    side = (max if aspect == "pad" else min)(image.size)
    if side <= size:
      return path.read_bytes()
    new = tuple(max(1, round(s * size / side)) for s in image.size)
    buffer = io.BytesIO()
    try:
      image.convert("RGB").resize(new, Image.Resampling.BICUBIC).save(
          buffer, "JPEG", quality=quality, subsampling=0)
    except DECODING_ERRORS as error:
      raise ImageError("broken_image", f"{path}: cannot be decoded ({error}); fetch the file again "
                                       "or remove the sample") from error
    return buffer.getvalue()


def _names(number: int, count: int) -> tuple[str, str]:
  return tuple(f"{kind}-{number:05d}-of-{count:05d}.array_record" for kind in ("full", "text"))


def _done(output: Path, number: int) -> Path:
  return output / DONE / f"{number:05d}.json"


def _finished(output: Path, number: int, count: int) -> Written | None:
  """A shard of an earlier run, if it is whole."""
  said = _read(_done(output, number))
  if not said:
    return None
  sizes = [path.stat().st_size if path.exists() else -1
           for path in (output / name for name in _names(number, count))]
  if sizes != [said["bytes"], said["text_bytes"]]:
    return None
  return Written(**said | {"problems": tuple(Problem(**p) for p in said["problems"])})


def _finish(config, settings, output, done: list[Written], count: int) -> dict:
  problems = [p for w in done for p in w.problems]
  if problems and config.on_error == "stop":  # left out by an earlier run that was told to
    raise DataError.of(problems, settings["data_records"], "Repair them and choose another folder, "
                       "or leave such records out with --on-error skip.")
  if not any(w.records for w in done):
    raise DataError.of(problems, settings["data_records"], "None is left: is --image-root the "
                       "right folder?")
  with open(output / "skipped.jsonl", "w") as file:
    file.writelines(json.dumps(dataclasses.asdict(p)) + "\n" for p in problems)
  shards = [{"full": full, "text": text, "records": w.records, "bytes": w.bytes,
             "text_bytes": w.text_bytes}
            for w in done for full, text in [_names(w.number, count)]]
  manifest = settings | {
      "shards": shards, "records": sum(w.records for w in done),
      "pictures": sum(w.pictures for w in done), "bytes": sum(w.bytes for w in done),
      "skipped": dict(collections.Counter(p.kind for p in problems))}
  _write(output / MANIFEST, manifest)
  return manifest


def _read(path: Path) -> dict | None:
  try:
    return json.loads(path.read_text())
  except (FileNotFoundError, ValueError):  # not there, or cut short when the machine went
    return None


def _write(path: Path, value: dict) -> None:
  write_whole(path, json.dumps(value, indent=1))


