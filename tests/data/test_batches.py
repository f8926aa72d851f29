import dataclasses
import json

import jax
import numpy as np
import pytest
from records import good, talk

from mgjax.data.config import DataConfig
from mgjax.data.images import load_image
from mgjax.data.pipeline import make_pipeline
from mgjax.data.samples import DataError


def take(iterator, n):
  return [next(iterator) for _ in range(n)]


def assert_same(a, b):
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for key in x:
      np.testing.assert_array_equal(x[key], y[key])


def order(batches):
  ids = np.concatenate([b["sample_index"].ravel() for b in batches])
  return ids[ids >= 0].tolist()


def test_layout(dataset, llama):
  records = good(5)
  records[1] |= {"image": ["1.png", "2.png"], "conversations": talk("<image> <image>\nWhich?", "B")}
  config = dataset(records, images_per_row=2, batch_size=5, shuffle=False)
  pipeline = make_pipeline(config, llama)
  batch = next(iter(pipeline))
  shapes = {k: (v.shape, v.dtype.name) for k, v in batch.items()}
  row = ((5, 160), "int32")
  assert shapes == {"tokens": row, "visual_index": row, "segment_ids": row, "positions": row,
                    "targets": row, "loss_mask": ((5, 160), "bool"),
                    "sample_index": ((5, 1), "int32"), "images": ((5, 2, 32, 32, 3), "uint8")}
  assert batch["sample_index"][:, 0].tolist() == [0, 1, 2, 3, 4]
  for slot in (0, 1):
    np.testing.assert_array_equal(batch["images"][1, slot],
                                  load_image(dataset.images / f"{slot + 1}.png", 32, "pad"))
  assert not batch["images"][0].any() and not batch["images"][2, 1].any()
  seen = batch["visual_index"][1]
  assert seen[seen >= 0].tolist() == list(range(8)) and (batch["visual_index"][0] == -1).all()
  length = batch["segment_ids"].sum(axis=1)
  for b, n in enumerate(length):
    assert batch["positions"][b].tolist() == [*range(n), *[0] * (160 - n)]
    assert not batch["loss_mask"][b, n - 1:].any() and batch["loss_mask"][b].any()
    np.testing.assert_array_equal(batch["tokens"][b, 1:n][batch["visual_index"][b, 1:n] < 0],
                                  batch["targets"][b, :n - 1][batch["visual_index"][b, 1:n] < 0])
    learned = batch["targets"][b][batch["loss_mask"][b]]
    assert llama.decode(learned) == records[b]["conversations"][-1]["value"]
  assert pipeline.describe([3]) == [f"{config.path} #3 (id s3)"]
  assert pipeline.steps_per_epoch == 1


def test_text_only_run_has_no_slots(dataset, llama):
  records = [r for r in good(9) if "image" not in r]
  batch = next(iter(make_pipeline(dataset(records, images_per_row=0), llama)))
  assert batch["images"].shape == (2, 0, 32, 32, 3)


def test_every_sample_once_an_epoch_in_an_order_of_the_seed(dataset, llama):
  make = lambda **changes: iter(make_pipeline(dataset(good(10), **changes), llama))  # noqa: E731
  first = order(take(make(), 10))
  assert sorted(first[:10]) == sorted(first[10:]) == list(range(10))
  assert first[:10] != first[10:] and first[:10] != list(range(10))
  assert first == order(take(make(), 10))
  assert first != order(take(make(seed=1), 10))
  assert order(take(make(shuffle=False), 10)) == list(range(10)) * 2


def test_resume_is_exact(dataset, llama):
  pipeline = make_pipeline(dataset(good(10), batch_size=3), llama)
  straight = take(iter(pipeline), 8)
  for stop in (0, 3, 5):
    iterator = iter(pipeline)
    take(iterator, stop)
    state = json.loads(json.dumps(iterator.get_state()))
    take(iterator, 2)  # what is read past the checkpoint is read again
    fresh = iter(make_pipeline(pipeline.config, llama))
    for again in (iterator, fresh):
      again.set_state(state)
      assert_same(take(again, 8 - stop), straight[stop:])


def test_hosts_share_each_batch(dataset, llama):
  config = dataset(good(10), batch_size=4)
  whole = take(iter(make_pipeline(config, llama)), 6)
  parts = [take(iter(make_pipeline(config, llama, host=h, hosts=2)), 6) for h in (0, 1)]
  for k, batch in enumerate(whole):
    for h in (0, 1):
      np.testing.assert_array_equal(batch["tokens"][h::2], parts[h][k]["tokens"])
  # a checkpoint of two hosts goes on with one
  two = iter(make_pipeline(config, llama, host=1, hosts=2))
  take(two, 2)
  one = iter(make_pipeline(config, llama))
  one.set_state(two.get_state())
  assert_same(take(one, 4), whole[2:])
  again = iter(make_pipeline(config, llama, host=1, hosts=2))
  again.set_state(two.get_state())
  assert_same(take(again, 4), parts[1][2:])
  with pytest.raises(ValueError, match="batch_size 4 does not divide among 3 hosts"):
    make_pipeline(config, llama, hosts=3)
  with pytest.raises(ValueError, match="host 2 is outside 0..1"):
    make_pipeline(config, llama, host=2, hosts=2)


def late_failures(dataset, n=12):
  """Two images whose header is fine and whose pixels are not."""
  whole = (dataset.images / "1.png").read_bytes()
  (dataset.images / "cut.png").write_bytes(whole[:len(whole) // 2])
  records = good(n)
  for i in (4, 8):
    records[i]["image"] = "cut.png"
  return records


def test_stop_names_the_file_that_fails_late(dataset, llama):
  config = dataset(late_failures(dataset), shuffle=False)
  iterator = iter(make_pipeline(config, llama))
  take(iterator, 2)
  with pytest.raises(DataError, match=r"#4 \(id s4\): broken_image: .*cut.png.*\n.*on_error=skip"):
    next(iterator)
  # The position stays before that batch: what is saved now goes on there.
  assert iterator.get_state()["batch"] == 2


def test_skip_leaves_the_row_of_a_late_failure_empty(dataset, llama):
  pipeline = make_pipeline(dataset(late_failures(dataset), shuffle=False, on_error="skip"), llama)
  iterator = iter(pipeline)
  batches = take(iterator, 8)
  assert order(batches) == [0, 1, 2, 3, 5, 6, 7, 9, 10, 11, *range(4)]
  assert iterator.counts["broken_image"] == 2
  empty = {k: v[0] for k, v in batches[2].items()}  # sample 4
  for field in ("segment_ids", "loss_mask", "images"):
    assert not empty[field].any()
  again = iter(pipeline)
  take(again, 2)
  other = iter(pipeline)
  other.set_state(again.get_state())
  assert_same(take(other, 6), batches[2:])
  assert other.counts == iterator.counts


def test_a_set_without_any_good_image_ends(dataset, llama):
  records = [r | {"image": "cut.png"} for r in late_failures(dataset) if "image" in r]
  iterator = iter(make_pipeline(dataset(records, on_error="skip"), llama))
  with pytest.raises(DataError, match="No sample of the whole set can be used"):
    take(iterator, 20)


def test_hosts_keep_step_when_a_sample_fails(dataset, llama):
  config = dataset(late_failures(dataset), batch_size=4, on_error="skip")
  whole = iter(make_pipeline(config, llama))
  hosts = [iter(make_pipeline(config, llama, host=h, hosts=2)) for h in (0, 1)]
  for _ in range(6):
    batch, parts = next(whole), [next(h) for h in hosts]
    for h in (0, 1):
      np.testing.assert_array_equal(batch["tokens"][h::2], parts[h]["tokens"])
  assert [it.get_state()["epoch"] for it in (whole, *hosts)] == [1, 1, 1]
  assert [it.get_state()["batch"] for it in (whole, *hosts)] == [3, 3, 3]


def test_a_changed_file_is_noticed(dataset, llama, caplog):
  iterator = iter(make_pipeline(dataset(good(10)), llama))
  take(iterator, 2)
  with caplog.at_level("WARNING", logger="absl"):
    iter(make_pipeline(dataset(good(10)), llama)).set_state(iterator.get_state())
    assert "another order" not in caplog.text
    iter(make_pipeline(dataset(good(9)), llama)).set_state(iterator.get_state())
  assert "another order" in caplog.text


def test_workers_change_nothing(dataset, llama):
  """With dropped samples too, through a change of the number of workers, and back to a message."""
  config = dataset(late_failures(dataset), on_error="skip")
  expected = take(iter(make_pipeline(config, llama)), 6)
  two = iter(make_pipeline(dataclasses.replace(config, workers=2), llama))
  try:
    assert_same(take(two, 3), expected[:3])
    one = iter(make_pipeline(config, llama))
    one.set_state(two.get_state())
    assert_same(take(one, 3), expected[3:])
  finally:
    two.close()
  strict = iter(make_pipeline(dataclasses.replace(config, workers=1, on_error="stop"), llama))
  try:
    with pytest.raises(DataError, match="broken_image: .*cut.png"):
      take(strict, 12)
  finally:
    strict.close()


def test_the_originals_collated_batch(golden, llama):
  """The first three items of the golden run, with pixels, against what its collator made."""
  run = golden / "trainer_llama"
  config = DataConfig(str(run / "data.json"), str(golden / "preprocess/images"), "v1",
                      max_length=175, hr_size=128, tokens_per_image=16, batch_size=3, shuffle=False)
  batch = next(iter(make_pipeline(config, llama)))
  items = json.loads((run / "golden.json").read_text())["items"]
  for b, item in enumerate(items[:3]):
    mask = batch["segment_ids"][b].astype(bool)
    text = batch["tokens"][b][mask & (batch["visual_index"][b] < 0)]
    assert text.tolist() == [i for i in item["input_ids"] if i != -200]
    learned = batch["targets"][b][batch["loss_mask"][b]]
    assert learned.tolist() == [i for i in item["labels"] if i != -100]
  assert (batch["visual_index"] >= 0).sum(axis=1).tolist() == [16, 0, 16]


def test_config_refuses_what_it_does_not_know():
  with pytest.raises(ValueError, match="on_error is 'ignore', expected one of stop, skip"):
    DataConfig("a.json", on_error="ignore")
  with pytest.raises(ValueError, match="aspect is 'crop'"):
    DataConfig("a.json", aspect="crop")
  with pytest.raises(ValueError, match="images_per_row is -1"):
    DataConfig("a.json", images_per_row=-1)


def test_a_batch_that_is_held_is_not_overwritten(dataset, llama):
  records = [r for r in good(30) if "image" in r]
  config = dataset(records, batch_size=2, shuffle=False)
  iterator = iter(make_pipeline(config, llama))
  first = next(iterator)
  kept = first["images"].copy()
  on_device = jax.device_put(next(iterator)["images"])  # on a CPU it may share the host's memory
  part = next(iterator)["images"][0]                    # a view holds the whole
  copies = np.asarray(on_device).copy(), part.copy()
  others = take(iterator, 4)
  np.testing.assert_array_equal(first["images"], kept)
  np.testing.assert_array_equal(on_device, copies[0])
  np.testing.assert_array_equal(part, copies[1])
  addresses = {b["images"].ctypes.data for b in others}
  del others
  again = next(iterator)  # what nobody holds is used again
  assert again["images"].ctypes.data in addresses
  fresh = iter(make_pipeline(config, llama))
  np.testing.assert_array_equal(take(fresh, 8)[7]["images"], again["images"])
