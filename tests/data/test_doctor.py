"""The data check: what is planted is found, and it says what a run then does."""
import collections
import dataclasses
import html.parser
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from records import good, talk

from mgjax.config import ConfigError
from mgjax.data.config import Resolution
from mgjax.data.doctor import examine as doctor
from mgjax.data.doctor import page as doctor_report
from mgjax.data.doctor import rows as doctor_rows
from mgjax.data.doctor.examine import FILES, PAGE, examine, write_report
from mgjax.data.packing import pack
from mgjax.data.pipeline import make_pipeline
from mgjax.data.prepare import ShardConfig, write_shards
from mgjax.data.samples import DataError
from mgjax.data.sources import Source

REPO = pathlib.Path(__file__).parents[2]
SCRIPT = "<script>alert(1)</script>"
pytestmark = pytest.mark.filterwarnings("ignore:Image size")


def plant(folder, records, kind, i):
  """Makes records[i], which has a picture, bad in one way."""
  record, question = records[i], "<image>\nQ"
  if kind in ("missing_image", "path_escape"):
    record["image"] = "gone.png" if kind == "missing_image" else "../../etc/passwd"
  elif kind in ("broken_image", "oversized_image", "cut"):
    record["image"] = f"{kind}.png"
    if kind == "broken_image":
      (folder / record["image"]).write_text("404")
    elif kind == "cut":  # its header is whole
      whole = (folder / "1.png").read_bytes()
      (folder / record["image"]).write_bytes(whole[:len(whole) // 2])
    else:
      Image.new("1", (12_000, 12_000)).save(folder / record["image"])
  elif kind == "format":
    record["conversations"] = SCRIPT
  else:
    record["conversations"] = {
        "roles": [{"from": "user", "value": "<image>"}, *talk("", "A")[1:]],
        "empty_answer": talk(question, " "), "image_count": talk("no tag", "A"),
        "control_token": talk(question, "up to </s> here"),
        "too_long": talk(question, "long " * 200), "truncated": talk(question, "long " * 200),
        "no_target": talk(question + " long" * 200, "A"),
        "plain_turns": talk(question, "A", "Q", "A")}[kind]


def write(path, n, folder, planted):
  """n records, `planted` {kind: how many} of them bad; those with ids s0, s3, ... have no picture.

  Returns them, and the places of each kind.
  """
  records, places = good(n), {}
  free = [i for i in range(n) if i % 3]
  for kind, count in planted.items():
    places[kind] = [free.pop() for _ in range(count)]
    for i in places[kind]:
      plant(folder, records, kind, i)
  for record in records:
    record["id"] = f"{path.stem}-{record['id']}"
  path.write_text(json.dumps(records))
  return records, places


@pytest.fixture
def two(tmp_path, dataset):
  """two(first, second, **config): a config of two sources with planted findings."""
  def make(first, second, **overrides):
    config = dataset(good(1), **overrides)
    for name, planted in (("a", first), ("b", second)):
      write(tmp_path / f"{name}.json", 60, dataset.images, planted)
    sources = tuple(Source(str(tmp_path / f"{name}.json"), str(dataset.images), name.upper())
                    for name in "ab")
    return dataclasses.replace(config, path="", sources=sources)
  return make


FIRST = {"format": 2, "roles": 3, "empty_answer": 1, "image_count": 2, "control_token": 1,
         "path_escape": 2, "missing_image": 4, "broken_image": 2, "oversized_image": 1}
SECOND = {"missing_image": 1, "too_long": 3, "roles": 1}


def test_what_is_planted_is_found_source_by_source(two, llama, tmp_path):
  config = two(FIRST, SECOND, on_error="skip")
  report = write_report(examine(config, llama), tmp_path)
  a, b = report.sources
  assert (a.problems, b.problems) == (FIRST, SECOND) and a.name == "A"
  assert (a.samples, a.usable, b.usable) == (60, 60 - sum(FIRST.values()), 55)
  assert report.usable == a.usable + b.usable == report.sources[0].drawn + report.sources[1].drawn
  assert (a.images, a.duplicates, a.elsewhere, a.truncated, a.late) == (38, 0, 0, 0, {})
  both = collections.Counter(FIRST) + collections.Counter(SECOND)
  assert report.kinds == dict(both)
  assert set(report.kinds) < set(doctor_report.KINDS)


def test_lines_agree_with_the_summary_and_name_the_record(two, llama, tmp_path):
  write_report(examine(two(FIRST, SECOND), llama), tmp_path)
  lines = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert collections.Counter(line["kind"] for line in lines) == summary["kinds"]
  for source in summary["sources"]:
    mine = [line["kind"] for line in lines if line["source"] == source["name"]]
    assert collections.Counter(mine) == source["problems"]
  for line in lines:
    record = json.loads(pathlib.Path(line["file"]).read_text())[line["index"]]
    assert line["id"] == record["id"] and line["message"] and line["level"] == "error"
  assert [line["index"] for line in lines if line["source"] == "B"] == sorted(
      line["index"] for line in lines if line["source"] == "B")
  for kind, examples in summary["examples"].items():
    assert 0 < len(examples) <= doctor.EXAMPLES and all(e in lines for e in examples), kind


def test_cut_samples_are_warnings_and_lost_answers_errors(two, llama):
  config = two({"truncated": 4, "no_target": 2}, {"truncated": 1}, truncate=True)
  diagnosis = examine(config, llama)
  report = diagnosis.report()
  assert [s.truncated for s in report.sources] == [4, 1]
  assert [s.problems for s in report.sources] == [{"no_target": 2}, {}]
  assert report.kinds == {"no_target": 2, "truncated": 5}
  lines = [f for f in diagnosis.findings() if f.kind == "truncated"]
  assert len(lines) == 5 and {f.level for f in lines} == {"warning"}
  length = len(llama.encode("long " * 200)) + 4
  cut = int(re.search(r"last (\d+)", lines[0].message)[1])
  assert length < int(lines[0].message.split()[0]) == cut + config.max_length


def test_pictures_count_for_the_cut(dataset, llama):
  config = dataset(good(12), truncate=True)
  longest = examine(config, llama).report().positions.longest
  config = dataclasses.replace(config, max_length=longest - 2)  # the picture takes 4
  loader = make_pipeline(config, llama).loader
  cut = [i for i, sample in enumerate(loader.samples) if loader.text(i, sample)[0].truncated]
  lines = [f for f in examine(config, llama).findings() if f.kind == "truncated"]
  assert [f.index for f in lines] == cut and 0 < len(cut) < 12


def test_captions_need_the_plain_shape(two, llama):
  report = examine(two({"plain_turns": 3}, {}, template="plain", on_error="skip"), llama).report()
  assert report.sources[0].problems == {"plain_turns": 23}  # 20 have no picture at all


def test_pictures_are_looked_at_as_closely_as_asked(two, llama):
  planted = {"cut": 3, "broken_image": 2, "missing_image": 1}
  config = two(planted, {}, scan_limit=0)
  found = {}
  for images in ("none", "headers", "decode"):
    report = examine(config, llama, images=images).report()
    assert ("if their pictures are there" in report.verdict.headline) == (images == "none")
    found[images] = report.sources[0].problems, report.sources[0].late
  missing = {"missing_image": 1}
  assert found == {"none": ({}, {}), "headers": (missing, {"broken_image": 2}),
                   "decode": (missing, {"broken_image": 5})}
  # A run with a limit opens these before its first step.
  headers = examine(dataclasses.replace(config, scan_limit=1000), llama).report().sources[0]
  assert (headers.problems, headers.late) == ({"broken_image": 2, "missing_image": 1}, {})
  with pytest.raises(ConfigError, match="images is 'all'"):
    examine(config, llama, images="all")


def test_processes_change_nothing(two, llama, monkeypatch):
  config = two(FIRST | {"cut": 2}, SECOND)
  alone = examine(config, llama, images="decode")
  monkeypatch.setattr("mgjax.data.scan.CHUNK", 37)
  several = examine(config, llama, images="decode", processes=2)
  assert several.report() == alone.report()
  assert [*several.findings()] == [*alone.findings()]


def test_ids_that_are_there_twice(tmp_path, dataset, llama):
  config = dataset(good(1))
  first, second = good(10), good(10)
  for i in (4, 7, 8):
    first[i]["id"] = "s2"
  for k, record in enumerate(second):
    record["id"] = f"t{k}" if k > 2 else f"s{k}"  # s2 is there in the first as well
  second[9]["id"] = "t5"
  bare = [{"image": r["image"], "conversations": r["conversations"]} if "image" in r else
          {"conversations": r["conversations"]} for r in good(6)]
  sources = []
  for name, records in (("a", first), ("b", second), ("c", bare), ("d", bare)):
    (tmp_path / f"{name}.json").write_text(json.dumps(records))
    sources.append(Source(str(tmp_path / f"{name}.json"), str(dataset.images), name))
  # The same records by another source are not other records.
  sources.append(dataclasses.replace(sources[0], name="again"))
  diagnosis = examine(dataclasses.replace(config, path="", sources=tuple(sources)), llama)
  report = diagnosis.report()
  assert [s.duplicates for s in report.sources] == [3, 1, 0, 0, 3]
  assert [s.elsewhere for s in report.sources] == [0, 3, 0, 0, 0]
  assert report.kinds == {"duplicate_id": 7, "duplicate_elsewhere": 3}
  told = [(f.source, f.index, f.id, f.message) for f in diagnosis.findings()
          if f.kind == "duplicate_id"]
  assert told[:4] == [("a", i, "s2", "#2 has the same id") for i in (4, 7, 8)] + [
      ("b", 9, "t5", "#5 has the same id")]
  told = [(f.source, f.index, f.id, f.message) for f in diagnosis.findings()
          if f.kind == "duplicate_elsewhere"]
  assert told == [("b", k, f"s{k}", f"#{k} of a has the same id") for k in range(3)]
  assert report.verdict.ok


def test_records_that_cannot_be_read_share_no_id(tmp_path, dataset, llama):
  config = dataset(good(1), on_error="skip")
  path = tmp_path / "a.jsonl"
  path.write_text("\n".join([json.dumps(good(1)[0]), "{]", "{]", "[1]"]))
  report = examine(dataclasses.replace(config, path=str(path)), llama).report()
  assert report.kinds == {"format": 3}


def test_histograms_count_every_measured_sample(two, llama):
  config = two(FIRST, SECOND, on_error="skip")
  report = examine(config, llama).report()
  unmeasured = {"A": sum(FIRST.values()), "B": 2}  # too long ones were measured
  for s in report.sources:
    expected = 60 - unmeasured[s.name]
    assert sum(s.text.counts) == s.text.count == sum(s.visual.counts) == expected
    assert list(s.text.starts) == sorted(set(s.text.starts)) and s.text.starts == report.text.starts
  for spread in (report.text, report.visual, report.positions):
    assert sum(spread.counts) == spread.count == 120 - sum(unmeasured.values())
  assert report.text.total + report.visual.total == report.positions.total
  assert report.visual.starts == (0, 4)  # tokens_per_image is 4
  assert report.visual.counts[1] == sum(s.visual.counts[1] for s in report.sources)
  assert report.visual.counts[0] == 40   # one in three has no picture
  pipeline = make_pipeline(config, llama)
  sizes = [len(pipeline.loader.text(n, sample)[0].tokens) - 4 * len(sample.images)
           for n in pipeline.report.kept.tolist() if n < 60 for sample in [pipeline.samples[n]]]
  assert report.sources[0].text.counts == tuple(
      np.histogram(sizes, [*report.text.starts, 10**9])[0])
  assert (report.sources[0].text.longest, report.sources[0].text.total) == (max(sizes), sum(sizes))


@pytest.mark.parametrize("values, exact, reach", [
    ([], False, 0), ([0], False, 0), ([5] * 9, False, 0), (range(1000), False, 0),
    ([0, 576, 576, 1152], True, 0), (range(100), True, 0), ([1, 2, 10**9], False, 0),
    (range(1000), False, 990)])
def test_bins(values, exact, reach):
  values = np.array(values, np.int64)
  starts = doctor.bins(values, exact, reach)
  spread = doctor.spread(values, starts)
  assert sum(spread.counts) == len(values) and len(starts) <= 50
  assert not reach or starts[-1] >= reach
  doctor_report.histogram(spread, reach or None)


DATA = {  # overrides of the config, what is planted, whether it is a run
    "clean": ({}, {}), "bad": ({}, {"roles": 2}), "left out": ({"on_error": "skip"}, {"roles": 2}),
    "all bad": ({"on_error": "skip"}, {"format": 40}),
    "long": ({}, {"too_long": 1}), "long, cut": ({"truncate": True}, {"too_long": 1}),
    "no answer": ({"truncate": True}, {"no_target": 1}),
    "missing": ({"scan_limit": 0}, {"missing_image": 1}),
    "broken": ({}, {"broken_image": 1}), "huge": ({}, {"oversized_image": 1}),
    "packed": ({"batching": "packed", "row_length": 300, "images_per_row": 2}, {}),
    "no slots": ({"images_per_row": 0}, {}),
}


@pytest.mark.parametrize("name", DATA)
def test_the_verdict_is_what_a_run_does(name, two, llama):
  overrides, planted = DATA[name]
  config = two(planted, {}, **overrides)
  if name == "all bad":
    config = dataclasses.replace(config, sources=tuple(
        dataclasses.replace(s, pick="png$") for s in config.sources[:1]))
  report = examine(config, llama).report()
  try:
    make_pipeline(config, llama)
    starts, said = True, ""
  except DataError as error:
    starts, said = False, str(error)
  assert report.verdict.ok == starts
  assert starts or report.verdict.details == said
  assert report.verdict.headline.startswith("Training would " + ("start" if starts else "stop"))


def test_a_run_would_stop_later(two, llama):
  config = two({"cut": 2}, {})
  make_pipeline(config, llama)  # starts
  verdict = examine(config, llama, images="decode").report().verdict
  assert not verdict.ok and "stop later: 2 samples" in verdict.headline
  assert "cut.png" in verdict.details
  skipping = dataclasses.replace(config, on_error="skip")
  verdict = examine(skipping, llama, images="decode").report().verdict
  assert verdict.ok and "2 more will be left out" in verdict.details
  only = dataclasses.replace(skipping, sources=tuple(
      dataclasses.replace(s, pick="cut") for s in config.sources))
  verdict = examine(only, llama, images="decode").report().verdict
  assert not verdict.ok and "all of its samples" in verdict.headline
  none = dataclasses.replace(skipping, sources=(dataclasses.replace(config.sources[0],
                                                                    pick="^$"),))
  assert any("40 of the 60 records" in note for note in examine(none, llama).report().notes)


@pytest.mark.parametrize("changes", [
    dict(batching="packed", row_length=400, images_per_row=3, batch_size=4),
    dict(batching="grouped", buckets=(48, 80), batch_size=8), dict(batch_size=8),
    dict(batching="packed", row_length=200, batch_size=4, seed=5, shuffle=False)])
def test_rows_are_those_of_the_pipeline(two, llama, changes):
  config = two({"roles": 3}, {"missing_image": 2}, on_error="skip", **changes)
  config = dataclasses.replace(config, sources=(
      dataclasses.replace(config.sources[0], epochs=1.5), config.sources[1]))
  (rows,) = examine(config, llama).report().packing
  pipeline = make_pipeline(config, llama)
  plan, uses = pipeline.planner.plan(0), pipeline.planner.use(0)
  assert rows.batches == plan.batches == pipeline.steps_per_epoch
  assert rows.samples == len(plan.samples) == round(1.5 * 57) + 58
  assert rows.rows == sum(len(plan.row(r)) > 0 for r in range(plan.rows))
  assert [(f["batches"], f["length"], f["slots"]) for f in rows.formats] == [
      (u.batches, u.format.length, u.format.slots) for u in uses]
  places = filled = 0
  batches = iter(pipeline)
  for _ in range(plan.batches):
    segments = next(batches)["segment_ids"]
    places, filled = places + segments.size, filled + int((segments > 0).sum())
  assert rows.padding == pytest.approx(1 - filled / places, abs=1e-9)
  (ours,) = [o for o in rows.options if o.configured]
  assert (ours.batching, ours.work, ours.batch_size) == (config.batching, 1, config.batch_size)
  assert ours.buckets == config.buckets


def test_options_are_what_packing_gives(two, llama):
  config = two({}, {}, batching="packed", row_length=400, images_per_row=3, batch_size=4)
  diagnosis = examine(config, llama)
  (rows,) = diagnosis.report().packing
  assert rows.tried == 120 and sum(o.best for o in rows.options) == 1
  lengths, images = diagnosis._scan.lengths, diagnosis._scan.images
  kinds = collections.Counter(o.batching for o in rows.options)
  assert kinds["single"] == kinds["grouped"] == 1 and kinds["packed"] >= 3
  for o in rows.options:
    if o.batching == "packed":
      made = len(pack(lengths, images, o.row_length, o.images_per_row))
      assert made == pytest.approx(120 / o.samples_per_row, rel=0.1)  # pack sees another order
      assert o.padding == pytest.approx(1 - lengths.sum() / (120 / o.samples_per_row
                                                             * o.row_length))
      assert o.row_length >= config.max_length
  single = next(o for o in rows.options if o.batching == "single")
  assert single.padding == pytest.approx(1 - lengths.sum() / (120 * config.max_length))
  assert [o.work for o in rows.options] == sorted(o.work for o in rows.options)
  best = next(o for o in rows.options if o.best)
  assert best.work <= rows.options[0].work * doctor_rows.NEARLY + 1e-9
  assert best.configured == (1 <= rows.options[0].work * doctor_rows.NEARLY)
  # What it advises is a config that makes such rows.
  again = dataclasses.replace(config, batching="packed", row_length=best.row_length,
                              images_per_row=best.images_per_row, batch_size=best.batch_size)
  (rows,) = examine(again, llama).report().packing
  assert next(o for o in rows.options if o.configured).samples_per_row == best.samples_per_row


def test_no_option_is_too_narrow_and_as_good_is_good_enough(dataset):
  config = dataset(good(1), batching="packed", max_length=128, row_length=256, images_per_row=3)
  whole, n = config.formats[0][0], 50
  options = doctor_rows.try_options(config, whole, np.full(n, 128), np.full(n, 2, np.int16), 4.0)
  assert {o.images_per_row for o in options} >= {2, 3, 4}
  assert min(o.images_per_row for o in options) == 2 and all(o.padding >= 0 for o in options)
  config = dataclasses.replace(config, images_per_row=0)
  options = doctor_rows.try_options(config, config.formats[0][0], np.full(n, 128),
                                    np.zeros(n, int), 4.0)
  assert options[0].row_length == 128  # less attention, by half a percent
  (best,) = [o for o in options if o.best]
  assert best.configured and best.row_length == 256 and best.work == 1


def test_resolutions_have_rows_of_their_own(two, llama, tmp_path):
  config = two({}, {}, batching="packed", row_length=400, images_per_row=2)
  large = Resolution(64, 16, 200, 500, 2, 2)
  config = dataclasses.replace(config, resolutions=(large,), sources=(
      config.sources[0], dataclasses.replace(config.sources[1], hr_size=64)))
  report = write_report(examine(config, llama), tmp_path)
  assert [(r.hr_size, r.tokens_per_image, r.samples) for r in report.packing] == [
      (32, 4, 60), (64, 16, 60)]
  assert report.visual.starts == (0, 4, 16)
  assert "Rows at 64 pixels" in (tmp_path / PAGE).read_text()


def test_text_alone(two, llama):
  config = two({}, {}, images_per_row=0, batching="packed", row_length=400)
  config = dataclasses.replace(config, sources=tuple(
      dataclasses.replace(s, pick="^$") for s in config.sources))
  (rows,) = examine(config, llama).report().packing
  assert rows.empty_slots == 0 and all(o.images_per_row == 0 for o in rows.options)
  assert {o.batching for o in rows.options} == {"packed", "grouped", "single"}


def test_shards_are_looked_at_as_well(dataset, llama, tmp_path):
  config = dataset(good(12))
  write_shards(ShardConfig(config.path, config.image_root, str(tmp_path / "shards")))
  config = dataclasses.replace(config, path=str(tmp_path / "shards"))
  report = examine(config, llama, images="decode").report()
  assert report.verdict.ok and report.usable == 12 and report.images == 8


class Page(html.parser.HTMLParser):
  """Collects a page; its tags must nest."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.words, self.attributes = [], collections.Counter(), [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attributes):
    self.tags[tag] += 1
    self.attributes += attributes
    if tag not in ("meta", "br"):
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.tags[tag] += 1
    self.attributes += attributes

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.words.append(data)


def test_the_page_is_whole_and_escapes_what_it_shows(two, llama, tmp_path):
  config = two(FIRST, SECOND)
  path = pathlib.Path(config.sources[0].path)
  records = json.loads(path.read_text())
  bad = next(r for r in records if isinstance(r["conversations"], str))
  bad["id"] = SCRIPT + "\x1b[2J\u202e\ud83d\"'>"
  path.write_text(json.dumps(records))
  config = dataclasses.replace(config, sources=(
      dataclasses.replace(config.sources[0], name=f"<b onclick=x>{SCRIPT}"), config.sources[1]))
  report = write_report(examine(config, llama), tmp_path)
  text = (tmp_path / PAGE).read_text()
  page = Page(text)
  assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "<script" not in text
  assert not {"script", "iframe", "img", "link", "object", "b onclick"} & set(page.tags)
  assert not any(name.startswith("on") for name, _ in page.attributes)
  assert not re.search(r"https?:|url\(|@import|src=", text)  # nothing is fetched
  assert "\x1b" not in text and "\u202e" not in text
  words = "".join(page.words)
  assert report.verdict.headline in words and "would stop before its first step" in words
  assert all(kind in words for kind in report.kinds) and page.tags["svg"] >= 5
  assert "prefers-color-scheme:dark" in text
  told = doctor_report.text(report)
  assert "\x1b" not in told and "\u202e" not in told and "NOT OK" in told
  assert all(f"{count:,}  {kind}" in told for kind, count in report.kinds.items())


def command(*flags, config="configs/stage2.py:tiny"):
  return [sys.executable, "launch/check_data.py", f"--config={config}",
          "--config.tokenizer=tests/data/cases/small_yi", *flags]


def call(*flags, **more):
  return subprocess.run(command(*flags, **more), cwd=REPO, capture_output=True, text=True,
                        timeout=120)


def test_exit_status(dataset, tmp_path):
  """Clean 0, bad 1 or, where they are left out, 0, all bad 1; what cannot be checked 2."""
  folder, cases = dataset.images, {}
  for name, planted in (("clean", {}), ("bad", {"roles": 2, "missing_image": 1}),
                        ("hopeless", {"format": 8})):
    write(tmp_path / f"{name}.json", 12, folder, planted)
  (tmp_path / "hopeless.json").write_text(json.dumps([{"id": SCRIPT}] * 8))
  data = lambda name: [f"--config.data.path={tmp_path}/{name}.json", f"--report={tmp_path}/{name}",
                       f"--config.data.image_root={folder}"]
  started = {name: subprocess.Popen(command(*flags), cwd=REPO, stdout=subprocess.PIPE,
                                    stderr=subprocess.PIPE, text=True)
             for name, flags in {
                 "clean": data("clean"), "stop": data("bad"),
                 "skip": [*data("bad"), "--config.data.on_error=skip", f"--report={tmp_path}/skip"],
                 "hopeless": [*data("hopeless"), "--config.data.on_error=skip"],
                 "key": [*data("clean"), "--config.data.immage_root=x"],
                 "gone": data("gone"),
                 "no tokenizer": [*data("clean"), "--config.tokenizer="],
                 "images": [*data("clean"), "--images=all"]}.items()}
  for name, process in started.items():
    out, err = process.communicate(timeout=200)
    cases[name] = process.returncode, out, err
  assert {name: case[0] for name, case in cases.items()} == {
      "clean": 0, "stop": 1, "skip": 0, "hopeless": 1, "key": 2, "gone": 1, "no tokenizer": 2,
      "images": 2}
  assert "OK: Training would start with all 12 samples." in cases["clean"][1]
  assert "NOT OK: Training would stop" in cases["stop"][1]
  assert "without 3 of 12 samples" in cases["skip"][1]
  for name in ("key", "gone", "no tokenizer", "images"):
    _, out, err = cases[name]
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and not out, err
  assert "image_root" in cases["key"][2] and "no such data file" in cases["gone"][2]
  assert "config.tokenizer is empty and config.init_from brings none" in cases["no tokenizer"][2]
  for name in ("clean", "bad", "skip", "hopeless"):
    summary = json.loads((tmp_path / name / "summary.json").read_text())
    lines = (tmp_path / name / "problems.jsonl").read_text().splitlines()
    assert len(lines) == sum(summary["kinds"].values())
    Page((tmp_path / name / PAGE).read_text())


def test_no_report_of_before_is_left(dataset, tmp_path):
  report = tmp_path / "report"
  report.mkdir()
  for name in FILES:
    (report / name).write_text("old")
  done = call(f"--config.data.path={tmp_path}/gone.json", f"--report={report}")
  assert done.returncode == 1 and not list(report.iterdir())
