import json

import pytest
from PIL import Image
from records import good, talk

from mgjax.data.conversation import get_template
from mgjax.data.pipeline import make_pipeline
from mgjax.data.samples import DataError, check_structure
from mgjax.data.sources import load_samples


def record(conversations, image=None):
  return {"id": "x", "conversations": conversations} | ({"image": image} if image else {})


def kind(tmp_path, made, template="v1", slots=1):
  """The kind of problem that one record has by itself; None if none."""
  path = tmp_path / "one.json"
  path.write_text(json.dumps([made]))
  (sample,), unread = load_samples(path)
  if unread:
    return unread[0].kind
  found = check_structure(sample, get_template(template), slots)
  return found and found[0]


@pytest.mark.parametrize("expected, made, template, slots", [
    (None, record(talk("Q", "A")), "v1", 0),
    (None, record(talk("<image>Q", "A"), "a.png"), "v1", 1),
    (None, record(talk("<image> a <image>", "A"), "a.png"), "v1", 1),
    (None, record(talk("<image> a <image>", "A"), ["a.png", "b.png"]), "v1", 2),
    (None, record([{"from": "gpt", "value": "Hi"}, *talk("Q", "A")]), "v1", 1),
    (None, record(talk("<image>", "A"), "a.png"), "plain", 1),
    ("format", {"id": "x"}, "v1", 1),
    ("format", {"id": "x", "conversations": []}, "v1", 1),
    ("format", ["no object"], "v1", 1),
    ("format", record([{"from": "human"}]), "v1", 1),
    ("format", record([{"role": "user", "content": "Q"}]), "v1", 1),
    ("format", record(talk("Q", "A"), [3]), "v1", 1),
    ("format", record(talk("Q", "half \ud83d")), "v1", 1),
    ("roles", record([{"from": "bot", "value": "Q"}, {"from": "gpt", "value": "A"}]), "v1", 1),
    ("roles", record([{"from": "human", "value": "Q"}] * 2), "v1", 1),
    ("roles", record(talk("Q", "A", "Q")), "v1", 1),
    ("roles", record([{"from": "gpt", "value": "A"}] * 2), "v1", 1),
    ("empty_answer", record(talk("Q", " \n")), "v1", 1),
    ("image_count", record(talk("Q", "A"), "a.png"), "v1", 1),
    ("image_count", record(talk("<image>", "A", "<image>", "A"), "a.png"), "v1", 1),
    ("image_count", record(talk("<image>", "A"), ["a.png", "b.png"]), "v1", 2),
    ("image_count", record(talk("<image>", "A"), "a.png"), "v1", 0),
    ("image_count", record(talk("<image><image>", "A"), ["a.png", "b.png"]), "v1", 1),
    ("plain_turns", record(talk("<image>", "A", "Q", "A"), "a.png"), "plain", 1),
    ("plain_turns", record(talk("Q", "A")), "plain", 1),
    ("plain_turns", record(talk("Q", "<image> A"), "a.png"), "plain", 1),
    ("image_count", record(talk("<image>\nQ", "A")), "v1", 1),
    ("format", {"id": "x", "images": ["a.png"], "conversations": talk("<image>", "A")}, "v1", 1),
    ("format", record(talk("Q", "A"), float("nan")), "v1", 1),
])
def test_structure(tmp_path, expected, made, template, slots):
  assert kind(tmp_path, made, template, slots) == expected


def test_json_and_json_lines_are_the_same(tmp_path):
  records = good(4)
  (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
  (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
  a, b = (load_samples(tmp_path / f)[0] for f in ("a.json", "a.jsonl"))
  assert a == b and [s.index for s in a] == [0, 1, 2, 3]
  assert a[1].images == ("1.png",) and a[0].images == ()


@pytest.mark.parametrize("text, reason", [
    ('[{"id": 1', "not valid JSON"), ("", "expected a JSON list"), ("[]", "no samples"),
    ("id,image", "expected a JSON list"), ("[" * 100_000, "not valid JSON"),
    ('[{"id": ' + "9" * 5000 + "}]", "not valid JSON"),
    ('{"id": "x",\n "conversations": []}', "one object over several lines"),
    (b"[\xe9]", "not valid JSON"), ("[]".encode("utf-16"), "in UTF-8")])
def test_unreadable_files(tmp_path, text, reason):
  (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(DataError, match=reason):
    load_samples(tmp_path / "a.json")
  with pytest.raises(DataError, match="no such data file"):
    load_samples(tmp_path / "b.json")


def test_a_bad_line_keeps_its_place(tmp_path):
  lines = [json.dumps(r) for r in good(3)]
  for bad in (lines[1][:-5].encode(), b'{"id": "\xe9"}'):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([lines[0].encode(), bad, lines[2].encode()]))
    samples, problems = load_samples(tmp_path / "a.jsonl")
    assert len(samples) == 3 and [p.index for p in problems] == [1]
    assert f"at byte {len(lines[0]) + 1} is not valid JSON" in problems[0].message


def spoil(dataset):
  """40 records, ten of them bad in ways that show before training."""
  folder, records = dataset.images, good(40)
  (folder / "empty.png").touch()
  (folder / "text.jpg").write_text("not found")
  Image.new("1", (12_000, 12_000)).save(folder / "bomb.png")
  for i, name in [(1, "gone.png"), (4, "empty.png"), (7, "text.jpg"), (10, "bomb.png"),
                  (13, "../../etc/passwd"), (28, "text.jpg")]:
    records[i]["image"] = name
  records[16]["conversations"] = talk("<image>\nQ", "long " * 200)
  records[19]["conversations"] = talk("<image>\nQ", "")
  records[22]["conversations"] = talk("<image>\nQ", "up to </s> here")
  records[25]["image"] = "half \ud83d.png"
  return records


pillow_warns_too = pytest.mark.filterwarnings("ignore:Image size")
KINDS = {"missing_image": 1, "broken_image": 3, "oversized_image": 1, "path_escape": 2,
         "too_long": 1, "empty_answer": 1, "control_token": 1}


@pillow_warns_too
def test_stop_lists_kinds_and_the_first_few(dataset, llama):
  config = dataset(spoil(dataset))
  with pytest.raises(DataError) as caught:
    make_pipeline(config, llama)
  text = str(caught.value)
  assert "10 of 40 samples" in text and "broken_image 3" in text
  assert "--config.data.on_error=skip" in text
  assert f"{config.path} #1 (id s1): missing_image" in text and "and 1 more" in text
  assert all(kind in text for kind in KINDS) and len(caught.value.problems) == 10


@pillow_warns_too
def test_skip_counts_and_leaves_the_rest(dataset, llama):
  pipeline = make_pipeline(dataset(spoil(dataset), on_error="skip"), llama)
  assert pipeline.report.counts == KINDS
  assert pipeline.report.kept.tolist() == [i for i in range(40)
                                           if i not in range(1, 31, 3)]


def test_truncation_is_asked_for_and_counted(dataset, llama):
  records = good(6)
  records[2]["conversations"] = talk("<image>\nQ", "long " * 200)
  records[4]["conversations"] = talk("<image>\n" + "long " * 200, "A")
  config = dataset(records, truncate=True, on_error="skip")
  pipeline = make_pipeline(config, llama)
  assert pipeline.report.counts == {"no_target": 1} and pipeline.report.truncated == 2
  row = pipeline.loader.row([2], config.formats[0][0])
  assert row["truncated"] and row["segment_ids"].all() and not row["loss_mask"][-1]
  with pytest.raises(DataError, match="the cut took the answer"):
    make_pipeline(dataset(records, truncate=True), llama)


def test_scan_limit_bounds_the_costly_part(dataset, llama):
  records = good(40)
  for r in records[1::3]:
    r["image"] = "text.jpg"
  (dataset.images / "text.jpg").write_text("not found")
  config = dataset(records, scan_limit=8, on_error="skip")
  report = make_pipeline(config, llama).report
  assert report.checked_in_depth == 8 and 0 < len(report.problems) < 13
  records[17]["image"] = "gone.png"  # files are looked for in every sample all the same
  assert 17 in [p.index for p in make_pipeline(dataset(records, scan_limit=0, on_error="skip"),
                                               llama).report.problems]
