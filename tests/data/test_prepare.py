"""Shards: made whole or not at all, and read as the files that they were made of."""
import dataclasses
import io
import json
import multiprocessing
import os
import resource
import signal
import time

import numpy as np
import pytest
from PIL import Image
from records import good

from mgjax.config import ConfigError
from mgjax.data.config import DataConfig
from mgjax.data.pipeline import make_pipeline
from mgjax.data.prepare import ShardConfig, shrink, write_shards
from mgjax.data.samples import DataError
from mgjax.data.shards import MANIFEST
from mgjax.data.sources import Source, open_sources


@pytest.fixture
def made(dataset, tmp_path):
  """(config of the JSON file, ShardConfig of the same with 4 records a shard)."""
  config = dataset(good(18), images_per_row=2, batching="packed", row_length=320, batch_size=2)
  return config, ShardConfig(config.path, config.image_root, str(tmp_path / "shards"), 4)


def batches(config, tokenizer, n=6):
  iterator = iter(make_pipeline(config, tokenizer))
  return [next(iterator) for _ in range(n)]


def files(folder):
  return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_give_the_same_batches(made, llama, tmp_path, workers):
  config, shards = made
  manifest = write_shards(dataclasses.replace(shards, workers=workers))
  assert manifest["records"] == 18 and manifest["pictures"] == 12 and len(manifest["shards"]) == 5
  from_shards = dataclasses.replace(config, path=shards.output, image_root="")
  for a, b in zip(batches(config, llama), batches(from_shards, llama), strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], err_msg=key)
  before = files(tmp_path / "shards")
  assert write_shards(shards) == manifest and files(tmp_path / "shards") == before


def test_what_was_begun_is_finished(made, tmp_path):
  _, shards = made
  folder = tmp_path / "shards"
  write_shards(shards)
  whole = files(folder)
  kept = folder / "full-00000-of-00005.array_record"
  stamp = kept.stat().st_mtime_ns
  (folder / MANIFEST).unlink()  # stopped before the end, with the third shard half written
  (folder / "done/00002.json").unlink()
  (folder / "full-00002-of-00005.part").write_bytes(b"half")
  (folder / "done/00003.json").write_text('{"number": 3')
  write_shards(shards)
  assert files(folder) == whole and kept.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("kind", ["full", "text"])
def test_a_shard_cut_short_is_named_and_made_again(made, tmp_path, kind):
  _, shards = made
  write_shards(shards)
  whole = files(tmp_path / "shards")
  cut = tmp_path / "shards" / f"{kind}-00001-of-00005.array_record"
  cut.write_bytes(cut.read_bytes()[:-100])
  with pytest.raises(DataError, match=f"{cut}: has .* bytes, expected .*shards again"):
    open_sources([Source(shards.output)])
  write_shards(shards)
  assert files(tmp_path / "shards") == whole
  cut.unlink()
  with pytest.raises(DataError, match="is missing"):
    open_sources([Source(shards.output)])


def test_damage_within_a_shard_is_a_bad_sample(made, llama, tmp_path):
  config, shards = made
  write_shards(shards)
  path = tmp_path / "shards" / "full-00001-of-00005.array_record"
  content = bytearray(path.read_bytes())
  for at in range(200, 40_000, 50):
    content[at] ^= 0xFF
  path.write_bytes(content)
  config = dataclasses.replace(config, path=shards.output, on_error="skip", scan_limit=0)
  pipeline = make_pipeline(config, llama)
  iterator = iter(pipeline)
  seen = [next(iterator) for _ in range(pipeline.steps_per_epoch)]
  numbers = np.concatenate([b["sample_index"].ravel() for b in seen])
  failed = iterator.counts["format"]
  assert 0 < failed <= 4 and (numbers >= 0).sum() == 18 - failed
  with pytest.raises(DataError, match="cannot be read .*; make the shard"):
    make_pipeline(dataclasses.replace(config, on_error="stop", scan_limit=100), llama)


def test_bad_samples_stop_or_are_counted(made, dataset, tmp_path):
  config, shards = made
  records = good(18)
  records[4]["image"], records[7]["image"] = "gone.png", "../data.json"
  del records[9]["conversations"]
  config = dataset(records)
  with pytest.raises(DataError, match=r"(?s)#4 \(id s4\): missing_image: .*--on-error skip"):
    write_shards(shards)
  assert not (tmp_path / "shards" / MANIFEST).exists()
  manifest = write_shards(dataclasses.replace(shards, on_error="skip"))
  assert manifest["skipped"] == {"missing_image": 1, "path_escape": 1, "format": 1}
  assert manifest["records"] == 15
  lines = (tmp_path / "shards/skipped.jsonl").read_text().splitlines()
  assert [json.loads(x)["index"] for x in lines] == [4, 7, 9]
  ids = [s.id for s in open_sources([Source(shards.output)])]
  assert ids == [f"s{i}" for i in range(18) if i not in (4, 7, 9)]
  with pytest.raises(DataError, match="None is left"):
    write_shards(dataclasses.replace(shards, image_root=str(tmp_path), on_error="skip",
                                     data=dataset([r for r in good(9) if "image" in r]).path,
                                     output=str(tmp_path / "other")))
  assert config


def test_another_data_set_is_not_mixed_in(made, dataset):
  _, shards = made
  write_shards(shards)
  with pytest.raises(ConfigError, match="records_per_shard was 4 and is 5.  Choose another folder"):
    write_shards(dataclasses.replace(shards, records_per_shard=5))
  dataset(good(19))
  with pytest.raises(ConfigError, match="data_records was 18 and is 19"):
    write_shards(shards)


def test_a_full_disk_loses_nothing(made, tmp_path):
  """In a process of its own, that may write no file of more than 100 kB."""
  _, shards = made
  write_shards(shards)
  whole = files(tmp_path / "shards")
  (tmp_path / "shards" / MANIFEST).unlink()
  (tmp_path / "shards/done/00004.json").unlink()
  context = multiprocessing.get_context("spawn")
  queue = context.Queue()
  process = context.Process(target=write_little, args=(shards, queue))
  process.start()
  message = queue.get(timeout=60)
  process.join(60)
  assert "cannot be written" in message and "bytes are free" in message
  assert "finished shards are kept" in message and "full-00004" in message
  assert not list((tmp_path / "shards").glob("*.part"))
  write_shards(shards)
  assert files(tmp_path / "shards") == whole


def write_little(shards, queue):
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
  try:
    write_shards(shards)
  except DataError as error:
    queue.put(str(error))


def test_a_killed_worker_is_told_of(dataset, tmp_path):
  config = dataset(good(3000))
  shards = ShardConfig(config.path, config.image_root, str(tmp_path / "shards"), 20, workers=1)
  context = multiprocessing.get_context("spawn")
  queue = context.Queue()
  process = context.Process(target=write_and_tell, args=(shards, queue))
  process.start()
  done = tmp_path / "shards/done"
  deadline = time.monotonic() + 60
  while not (done.is_dir() and any(done.iterdir())) and time.monotonic() < deadline:
    time.sleep(0.01)
  workers = [int(pid) for pid in os.listdir("/proc") if pid.isdigit()
             and _parent(pid) == process.pid and "spawn_main" in _command(pid)]
  assert workers
  for pid in workers:
    os.kill(pid, signal.SIGKILL)
  message = queue.get(timeout=60)
  process.join(60)
  assert "a worker was killed" in message and "run the same command again" in message
  assert write_shards(dataclasses.replace(shards, workers=0))["records"] == 3000


def write_and_tell(shards, queue):
  try:
    queue.put(str(write_shards(shards)["records"]))
  except DataError as error:
    queue.put(str(error))


def _parent(pid):
  try:
    return int(open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[1])
  except OSError:
    return 0


def _command(pid):
  try:
    return open(f"/proc/{pid}/cmdline").read()
  except OSError:
    return ""


@pytest.mark.parametrize("aspect, size, expected", [
    ("pad", 50, (50, 33)), ("square", 50, (75, 50)), ("pad", 90, None), ("square", 60, None)])
def test_pictures_are_shrunk_to_what_the_model_sees(tmp_path, aspect, size, expected):
  rng = np.random.default_rng(0)
  smooth = Image.fromarray(rng.integers(0, 255, (6, 9, 3), np.uint8)).resize((90, 60))
  smooth.save(tmp_path / "a.png")
  file = shrink(tmp_path / "a.png", size, aspect, quality=95)
  if expected is None:
    assert file == (tmp_path / "a.png").read_bytes()
    return
  small = Image.open(io.BytesIO(file))
  assert small.format == "JPEG" and small.size == expected
  difference = np.abs(np.asarray(small, int) - np.asarray(smooth.resize(expected), int))
  assert difference.mean() < 3


def test_resized_shards_are_smaller_and_say_so(made, llama, tmp_path):
  config, shards = made
  shards = dataclasses.replace(shards, resize=16, quality=80)
  manifest = write_shards(shards)
  assert (manifest["resize"], manifest["quality"]) == (16, 80)
  pictures = [p for s in range(18)
              for p in open_sources([Source(shards.output)]).read(s)[0].pictures]
  assert pictures and all(max(Image.open(io.BytesIO(p)).size) == 16 for p in pictures)
  assert make_pipeline(DataConfig(shards.output, template="v1", max_length=160, hr_size=32,
                                  tokens_per_image=4, batch_size=2), llama).steps_per_epoch == 9
  with pytest.raises(ConfigError, match="quality was 80 and is 95"):
    write_shards(dataclasses.replace(shards, quality=95))
