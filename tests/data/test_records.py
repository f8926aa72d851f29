"""Data files read record by record: JSON by its byte ranges, TFDS through an adapter."""
import json
import pickle
import sys
import types

import numpy as np
import pytest
from PIL import Image
from records import good, talk

from mgjax.config import ConfigError
from mgjax.data import json_records
from mgjax.data.config import DataConfig
from mgjax.data.json_records import index_json
from mgjax.data.pipeline import make_pipeline
from mgjax.data.records import open_records
from mgjax.data.samples import DataError
from mgjax.data.sources import Source, open_sources

ODD = [{"id": "ä", "v": "漢字 🙂 \\ \" [ ] { } ,"}, [], {}, [[1, {"a": [2.5e-3, None]}]], "text, ]",
       12, -0.5, True, None, {"deep": {"er": ["x"] * 5}}]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_json_lists_are_read_as_json_reads_them(tmp_path, monkeypatch, chunk, indent, ascii_only):
  monkeypatch.setattr(json_records, "CHUNK", chunk)
  path = tmp_path / "a.json"
  text = json.dumps(ODD, indent=indent, ensure_ascii=ascii_only)
  for head in (b"", b"\xef\xbb\xbf", b" \n\t"):
    path.write_bytes(head + text.encode() + b"\n ")
    found = index_json(path)
    assert [found[i] for i in range(len(found))] == [(value, ()) for value in ODD]
    again = pickle.loads(pickle.dumps(found))
    assert again.text(3) == ODD[3] and again.fingerprint == found.fingerprint


def test_lines_are_read_as_json_reads_them(tmp_path):
  path = tmp_path / "a.jsonl"
  values = [v for v in ODD if isinstance(v, dict)]
  path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\n".join(
      json.dumps(v, ensure_ascii=False).encode() for v in values))
  found = index_json(path)
  assert [found.text(i) for i in range(len(found))] == values


@pytest.mark.parametrize("text, reason", [
    ("[1, 2", "not valid JSON"), ("[1 2]", "expected ',' or ']' at byte 3"),
    ("[1, 2] 3", "'3' behind the end of the list, at byte 7"), ("[1,]", "not valid JSON"),
    ('["a', "not valid JSON")])
def test_what_is_no_list(tmp_path, text, reason):
  (tmp_path / "a.json").write_text(text)
  with pytest.raises(DataError, match=reason):
    index_json(tmp_path / "a.json")


def test_the_fingerprint_is_that_of_the_content(tmp_path):
  paths = [tmp_path / n for n in ("a.json", "b.json", "c.json")]
  for path, n in zip(paths, (5, 5, 6)):
    path.write_text(json.dumps(good(n)))
  a, b, c = (index_json(p).fingerprint for p in paths)
  assert a == b != c


def test_picks_share_a_file_out(tmp_path):
  records = [{"id": str(i), "conversations": talk("Q", "A")} | ({"image": name} if name else {})
             for i, name in enumerate(["coco/1", "gqa/2", None, "coco/3", ["gqa/4", "coco/5"], 7])]
  path = tmp_path / "a.json"
  path.write_text(json.dumps(records))
  samples = open_sources([Source(str(path), pick=p) for p in ("^coco/", "^$", "co", "^gqa/")])
  assert [t.tolist() for t in samples.taken] == [[0, 3], [2, 5], [], [1, 4]]
  assert len(samples) == 6 and samples.locate(5) == (3, 4)
  assert samples[5].id == "4" and samples[5].index == 4
  whole = open_sources([Source(str(path), pick="^gqa/"), Source(str(path))])
  assert sorted(np.concatenate(whole.taken)) == list(range(6))


@pytest.fixture
def tfds(monkeypatch):
  """Stands for tensorflow_datasets: two examples, as `data_source` gives them."""
  rng = np.random.default_rng(0)
  examples = [{"image": rng.integers(0, 255, (20, 30, 3), np.uint8),
               "image/filename": b"%d.jpg" % i,
               "captions": {"text": np.array([b"a cat %d" % i, b"other"])}} for i in range(5)]
  examples[3] = {"image": examples[3]["image"]}

  def data_source(name, split, data_dir):
    if (name, split, data_dir) != ("coco_captions", "train", None):
      raise ValueError(f"no {name}")
    return examples
  fake = types.ModuleType("tensorflow_datasets")
  fake.data_source = data_source
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
  return examples


def test_tfds_examples_through_an_adapter(tfds, llama):
  config = DataConfig(
      template="plain", max_length=64, hr_size=32, tokens_per_image=4, batch_size=4, shuffle=False,
      on_error="skip",
      sources=(Source("tfds:coco_captions:train", adapter="mgjax.data.adapters:captions"),))
  pipeline = make_pipeline(config, llama)
  assert pipeline.report.counts == {"format": 1}
  assert "KeyError: 'captions'" in pipeline.report.problems[0].message
  batch = next(iter(pipeline))
  assert batch["sample_index"].ravel().tolist() == [0, 1, 2, 4]
  assert llama.decode(batch["targets"][3][batch["loss_mask"][3]]) == "a cat 4\n"
  from mgjax.data.images import square_pixels
  np.testing.assert_array_equal(
      batch["images"][0, 0], square_pixels(Image.fromarray(tfds[0]["image"]), 32, "pad"))


@pytest.mark.parametrize("path, adapter, reason", [
    ("tfds:coco_captions:train", "", "expected tfds:NAME:SPLIT, and an adapter"),
    ("tfds:coco_captions", "mgjax.data.adapters:captions", "expected tfds:NAME:SPLIT"),
    ("tfds:coco_captions:train", "mgjax.data.adapters:caption", "cannot be used"),
    ("tfds:coco_captions:train", "no.such:thing", "cannot be used"),
    ("a.json", "mgjax.data.adapters:captions", "is for data sets of tfds:"),
    ("tfds:other:train", "mgjax.data.adapters:captions", "cannot be opened"),
    ("gs://bucket/folder", "", "no shards.json can be read there")])
def test_what_cannot_be_opened(tfds, path, adapter, reason):
  with pytest.raises((ConfigError, DataError), match=reason):
    open_records(path, adapter)
