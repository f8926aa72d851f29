"""A data set with one of every fault in it, from end to end: counted exactly, or stopped."""
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from records import talk
from test_images import bomb

from mgjax.data.pipeline import make_pipeline
from mgjax.data.prepare import ShardConfig, write_shards
from mgjax.data.samples import DataError

# Pictures that are read all the same, as the original reads them.
FINE = ("cmyk.jpg", "16bit.png", "palette.png", "turned.jpg", "moving.gif", "one.png", "thin.png")
# What shows before the first step, by kind; and what only shows when the picture is decoded.
EARLY = {"empty.jpg": "broken_image", "text.jpg": "broken_image", "bomb.png": "oversized_image",
         "gone.png": "missing_image", "link.png": "path_escape", "../secret.png": "path_escape"}
LATE = {"cut.jpg": "broken_image", "cut.png": "broken_image"}


@pytest.fixture
def faulty(dataset, tmp_path):
  """240 samples, every picture above once, good ones between; makes a config."""
  folder = dataset.images
  rgb = Image.new("RGB", (30, 20), (10, 200, 30))
  rgb.convert("CMYK").save(folder / "cmyk.jpg")
  Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(folder / "16bit.png")
  rgb.convert("P").save(folder / "palette.png", transparency=0)
  exif = Image.Exif()
  exif[0x0112] = 6
  rgb.save(folder / "turned.jpg", exif=exif)
  rgb.save(folder / "moving.gif", save_all=True, append_images=[Image.new("RGB", (30, 20))])
  Image.new("RGB", (1, 1)).save(folder / "one.png")
  Image.new("RGB", (1, 20_000)).save(folder / "thin.png")
  noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
  for name, cut in (("cut.jpg", 900), ("cut.png", 500)):
    noise.save(folder / name)
    (folder / name).write_bytes((folder / name).read_bytes()[:-cut])
  (folder / "empty.jpg").touch()
  (folder / "text.jpg").write_text("404 not found")
  bomb(folder / "bomb.png", 30_000)
  rgb.save(tmp_path / "secret.png")
  (folder / "link.png").symlink_to(tmp_path / "secret.png")
  records = [{"id": f"s{i}", "image": f"{i % 4}.png",
              "conversations": talk(f"<image>\nQ {i}?", f"A {i}")} for i in range(240)]
  for k, name in enumerate((*FINE, *EARLY, *LATE)):
    records[7 + 15 * k]["image"] = name
  return dataset(records, batching="packed", row_length=400, images_per_row=4, batch_size=2,
                 on_error="skip")


def numbers(batches):
  return np.concatenate([b["sample_index"].ravel() for b in batches])


@pytest.mark.parametrize("shards", [False, True])
def test_skip_counts_every_kind_and_trains_on_the_rest(faulty, llama, tmp_path, shards):
  config = faulty
  if shards:  # what shows early stays out of the shards, what shows late goes in
    manifest = write_shards(ShardConfig(config.path, config.image_root, str(tmp_path / "shards"),
                                        50, on_error="skip"))
    kinds = list(EARLY.values())
    assert manifest["skipped"] == {kind: kinds.count(kind) for kind in kinds}
    config = dataclasses.replace(config, path=str(tmp_path / "shards"))
  pipeline = make_pipeline(config, llama)
  if not shards:
    assert pipeline.report.counts == {kind: list(EARLY.values()).count(kind)
                                      for kind in EARLY.values()}
  batches = iter(pipeline)
  seen = numbers([next(batches) for _ in range(pipeline.steps_per_epoch)])
  seen = seen[seen >= 0].tolist()
  assert batches.counts["broken_image"] == len(LATE) and batches.counts.total() == len(LATE)
  assert len(seen) == len(set(seen)) == 240 - len(EARLY) - len(LATE)
  used = {pipeline.samples[n].images[0] for n in seen}
  assert used >= set(FINE) and not used & {*EARLY, *LATE}
  # the second epoch is whole too: data do not end silently
  again = numbers([next(batches) for _ in range(pipeline.planner.plan(1).batches)])
  assert sorted(again[again >= 0]) == sorted(seen)
  assert batches.counts["broken_image"] == 2 * len(LATE)


def test_a_failed_sample_leaves_its_place_empty(faulty, llama):
  """The others of the row are what they are without it."""
  pipeline = make_pipeline(faulty, llama)
  plan = pipeline.planner.plan(0)
  bad = {n for n in range(240) if pipeline.samples[n].images[0] in LATE}
  row = next(r for r in range(plan.rows) if set(plan.row(r)) & bad)
  good = [n for n in plan.row(row) if n not in bad]
  got = pipeline.loader.row(plan.row(row), faulty.formats[0][0])
  expected = pipeline.loader.row(good, faulty.formats[0][0])
  assert len(got.pop("problems")) >= 1 and not expected.pop("problems")
  assert got.keys() == expected.keys()
  for key in got:
    np.testing.assert_array_equal(got[key], expected[key], err_msg=key)


def test_stop_names_them_all(faulty, llama):
  with pytest.raises(DataError) as caught:
    make_pipeline(dataclasses.replace(faulty, on_error="stop"), llama)
  assert len(caught.value.problems) == len(EARLY)
  assert all(f"#{p.index} (id s{p.index})" in str(p) for p in caught.value.problems)


def test_a_bomb_costs_no_memory(faulty, tmp_path):
  """In a process of its own: what the operating system saw."""
  script = f"""
import json, resource
from mgjax.data.images import ImageError, check_header, load_image
load_image({str(tmp_path / "images/0.png")!r}, 32, "pad")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kinds = []
for look in (check_header, lambda p: load_image(p, 768, "pad")):
  try:
    look({str(tmp_path / "images/bomb.png")!r})
  except ImageError as error:
    kinds.append(error.kind)
print(json.dumps([kinds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""
  told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
  kinds, kilobytes = json.loads(told.stdout)
  assert kinds == ["oversized_image"] * 2 and kilobytes < 50_000, told.stderr


def test_a_sample_that_outgrew_its_row_is_left_out(dataset, llama, tmp_path):
  """The data file is another one than at the start of the run."""
  records = [{"id": f"s{i}", "conversations": talk(f"Q {i}?", "word " * 8)} for i in range(6)]
  config = dataset(records, batching="packed", row_length=340, batch_size=1, on_error="skip",
                   shuffle=False)
  pipeline = make_pipeline(config, llama)
  text = (tmp_path / "data.json").read_text()
  longer = text.replace("word ", "zq~7#")  # as many bytes, more tokens
  assert len(longer) == len(text)
  (tmp_path / "data.json").write_text(longer)
  batches = iter(pipeline)
  seen = [next(batches) for _ in range(pipeline.steps_per_epoch)]
  kept = numbers(seen)
  assert batches.counts["format"] > 0 and batches.counts["format"] + (kept >= 0).sum() == 6
  row = pipeline.loader.row(range(6), config.formats[0][0])
  assert all("not what it was" in problem.message for problem in row["problems"])
