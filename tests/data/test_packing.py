"""Plans of epochs: what shares a row, what shares a batch, and in which order."""
import collections
import dataclasses

import numpy as np
import pytest
from records import good, talk

from mgjax.config import ConfigError
from mgjax.data.config import Resolution
from mgjax.data.packing import Planner, group, pack
from mgjax.data.pipeline import make_pipeline
from mgjax.data.sources import Source, draw


def mixture(rng, n):
  """Lengths and pictures as in stage 2: 576 visual tokens and text, a twentieth text alone."""
  images = (rng.random(n) > 0.05).astype(int)
  text = np.where(images > 0, rng.lognormal(5.4, 0.5, n), rng.lognormal(6.2, 0.8, n))
  return np.minimum(text.astype(int) + 20 + 576 * images, 2048), images


def check(rows, lengths, images, row_length, slots):
  """Every sample is in one row, and every row within its bounds."""
  assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
  for row in rows:
    assert row and lengths[row].sum() <= row_length and images[row].sum() <= slots


def test_rows_are_full():
  rng = np.random.default_rng(0)
  lengths, images = mixture(rng, 8192)
  row_length = round(4 * lengths.sum() / images.sum() / 128) * 128  # room for 4 average ones
  rows = pack(lengths, images, row_length, 4)
  check(rows, lengths, images, row_length, 4)
  assert lengths.sum() / (len(rows) * row_length) >= 0.97
  assert images.sum() / (len(rows) * 4) >= 0.9


@pytest.mark.parametrize("seed", range(20))
def test_any_samples_fit_their_rows(seed):
  rng = np.random.default_rng(seed)
  n, slots = int(rng.integers(1, 300)), int(rng.integers(0, 6))
  row_length = int(rng.integers(10, 100))
  lengths = rng.integers(1, row_length + 1, n)
  images = rng.integers(0, slots + 1, n)
  rows = pack(lengths, images, row_length, slots)
  check(rows, lengths, images, row_length, slots)
  for row in rows:  # no row could have gone into another one
    others = [r for r in rows if r is not row]
    assert not any(lengths[row + r].sum() <= row_length and images[row + r].sum() <= slots
                   for r in others) or len(row) > 1


def test_batches_are_grouped_as_in_the_original():
  """R4.6: megabatches of one modality, longest first; the last of each together at the end."""
  rng = np.random.default_rng(0)
  lengths, images = rng.integers(1, 100, 53), (np.arange(53) % 3 > 0).astype(int)
  numbers = rng.permutation(53)
  groups = group(numbers, lengths, images, 8, np.random.default_rng(1))
  assert sorted(np.concatenate(groups)) == list(range(53))
  # 35 with a picture: 4 whole batches and 3 left; 18 without: 2 whole and 2 left.
  assert [len(g) for g in groups] == [8] * 6 + [5]
  modalities = [set(images[g]) for g in groups[:6]]
  assert collections.Counter(map(tuple, modalities)) == {(1,): 4, (0,): 2}
  assert modalities != sorted(modalities, key=str)  # shuffled among each other
  for g in groups[:6]:
    assert (np.diff(lengths[g]) <= 0).all()
  assert (np.diff(groups[6]) > 0).all() and set(images[groups[6]]) == {0, 1}
  # a batch takes neighbours of the epoch's order, not of the lengths
  with_image = numbers[images[numbers] > 0]
  assert {frozenset(g.tolist()) for g in groups[:6] if images[g[0]]} == {
      frozenset(with_image[a:a + 8].tolist()) for a in range(0, 32, 8)}


def test_one_modality_is_cut_in_order():
  numbers = np.random.default_rng(0).permutation(10)
  groups = group(numbers, np.ones(10, int), np.ones(10, int), 4, None)
  assert np.concatenate(groups).tolist() == numbers.tolist()


def test_shares_of_a_mixture_are_exact_over_epochs():
  sources = [Source("a", epochs=1), Source("b", epochs=0.5), Source("c", epochs=2.25)]
  seen = [collections.Counter() for _ in sources]
  for epoch in range(8):
    drawn = draw([10, 9, 4], sources, seed=0, epoch=epoch, shuffle=True)
    assert [len(d) for d in drawn][::2] == [10, 9] and len(drawn[1]) in (4, 5)
    for counter, d in zip(seen, drawn):
      counter.update(d.tolist())
  for counter, size, times in zip(seen, (10, 9, 4), (8, 4, 18)):
    assert counter == {i: times for i in range(size)}


def test_weights_share_out_the_samples_there_are():
  sources = [Source("a", weight=3), Source("b", weight=1)]
  drawn = draw([100, 300], sources, seed=0, epoch=0, shuffle=True)
  assert [len(d) for d in drawn] == [300, 100]
  assert set(collections.Counter(drawn[0].tolist()).values()) == {3}
  assert len(set(drawn[1].tolist())) == 100


def epoch(pipeline, number=0):
  iterator = iter(pipeline)
  iterator.set_state(iterator.get_state() | {"epoch": number})
  return [next(iterator) for _ in range(pipeline.planner.plan(number).batches)]


def numbers(batches):
  ids = np.concatenate([b["sample_index"].ravel() for b in batches])
  return ids[ids >= 0].tolist()


def samples_of(n):
  """Conversations of many lengths: with one picture, with two, and without."""
  rng, records = np.random.default_rng(0), []
  for i in range(n):
    images = [f"{(i + k) % 4}.png" for k in range((1, 0, 2)[i % 3])]
    records.append({"id": f"s{i}", "conversations": talk(
        "<image>\n" * len(images) + f"Q {i}?", "word " * int(rng.integers(1, 12)))})
    if images:
      records[-1]["image"] = images
  return records


def test_packed_batches_hold_every_sample_once(dataset, llama):
  config = dataset(samples_of(40), batching="packed", row_length=400, images_per_row=4,
                   batch_size=2)
  pipeline = make_pipeline(config, llama)
  batches = epoch(pipeline)
  assert sorted(numbers(batches)) == list(range(40)) and len(batches) < 10
  single = make_pipeline(dataclasses.replace(config, batching="single"), llama)
  alone = {int(b["sample_index"][r, 0]): {k: v[r] for k, v in b.items()}
           for b in epoch(single) for r in range(2)}
  for batch in batches:
    for r in range(2):
      slot = 0
      for segment, number in enumerate(batch["sample_index"][r], 1):
        if number < 0:
          continue
        mine, its = batch["segment_ids"][r] == segment, alone[int(number)]
        theirs = its["segment_ids"] == 1
        for field in ("tokens", "positions", "targets", "loss_mask"):
          np.testing.assert_array_equal(batch[field][r][mine], its[field][theirs], err_msg=field)
        visual, its_visual = batch["visual_index"][r][mine], its["visual_index"][theirs]
        np.testing.assert_array_equal(visual, np.where(its_visual < 0, -1, its_visual + slot * 4))
        count = len(pipeline.samples[int(number)].images)
        np.testing.assert_array_equal(batch["images"][r, slot:slot + count],
                                      its["images"][:count])
        slot += count
  # no target reaches into the next sample
  last = np.diff(np.pad(batches[0]["segment_ids"], ((0, 0), (0, 1)))) != 0
  assert not batches[0]["loss_mask"][last].any()
  use, = pipeline.planner.use(0)
  filled = np.mean([(b["segment_ids"] > 0).mean() for b in batches])
  slots = np.mean([(b["visual_index"].max(1) // 4 + 1) / 4 for b in batches])
  assert use.batches == len(batches)
  assert abs(use.tokens - filled) < 1e-6 and abs(use.images - slots) < 1e-6


def test_epochs_differ_and_depend_on_the_seed_alone(dataset, llama):
  config = dataset(samples_of(40), batching="packed", row_length=400, images_per_row=4)
  make = lambda **changes: make_pipeline(dataclasses.replace(config, **changes), llama)  # noqa: E731
  first, second = numbers(epoch(make())), numbers(epoch(make(), 1))
  assert first != second and sorted(first) == sorted(second)
  assert first == numbers(epoch(make())) and second == numbers(epoch(make(), 1))
  assert first != numbers(epoch(make(seed=1)))


def test_grouped_batches_are_as_small_as_their_samples(dataset, llama):
  records = [r for r in samples_of(40) if "image" not in r or len(r["image"]) == 1]
  config = dataset(records, batching="grouped", buckets=(60, 110), batch_size=4)
  pipeline = make_pipeline(config, llama)
  batches = epoch(pipeline)
  assert sorted(numbers(batches)) == list(range(len(records)))
  shapes = collections.Counter((b["tokens"].shape[1], b["images"].shape[1]) for b in batches)
  assert len(shapes) > 2 and {length for length, _ in shapes} <= {60, 110, 160}
  for batch in batches:
    longest = (batch["segment_ids"] > 0).sum(1).max()
    fits = [n for n in (60, 110, 160) if n >= longest]
    assert batch["tokens"].shape[1] == fits[0]
    has_image = (batch["visual_index"] >= 0).any()
    assert batch["images"].shape[1] == int(has_image)
    assert pipeline.format_of(batch).length == fits[0]


def test_resolutions_take_turns(dataset, llama):
  records = good(60)
  base = dataset(records, batch_size=4)
  config = dataclasses.replace(
      base, path="", batching="packed", row_length=320, images_per_row=3,
      sources=(Source(base.path, base.image_root, "fine", pick="^1", hr_size=64),
               Source(base.path, base.image_root, "rest")),
      resolutions=(Resolution(64, 16, 200, 400, 2, 2),))
  pipeline = make_pipeline(config, llama)
  assert [len(t) for t in pipeline.samples.taken] == [10, 50]
  batches = epoch(pipeline)
  assert sorted(numbers(batches)) == list(range(60))
  sizes = [b["images"].shape[2] for b in batches]
  assert set(sizes) == {32, 64} and sizes not in (sorted(sizes), sorted(sizes)[::-1])
  for batch in batches:
    shape = pipeline.format_of(batch)
    assert batch["images"].shape[:2] == (shape.rows, shape.slots)
    for n in batch["sample_index"].ravel():
      if n >= 0:
        assert (shape.hr_size == 64) == (pipeline.samples[int(n)].images[:1] == ("1.png",))
  assert pipeline.describe(np.array([[0, 10, -1]])) == ["fine #1 (id s1)", "rest #0 (id s0)"]


@pytest.mark.parametrize("changes, reason", [
    (dict(batching="packd"), "batching is 'packd', expected one of packed, grouped, single"),
    (dict(row_length=100), "row_length 100 is less than max_length 160"),
    (dict(buckets=(64,)), "buckets are for batching 'grouped', not 'single'"),
    (dict(batching="grouped", buckets=(64, 32)), "expected rising lengths"),
    (dict(path="", sources=(Source("a", weight=1), Source("b"))), "only a have a weight"),
    (dict(path="", sources=(Source("a", hr_size=64),)), r"hr_size 64, expected one of \[32\]"),
    (dict(resolutions=(Resolution(32),)), "hr_size 32 is there twice"),
])
def test_config_says_what_does_not_fit(dataset, changes, reason):
  with pytest.raises(ConfigError, match=reason):
    dataclasses.replace(dataset(good(3)), **changes)


def test_nothing_to_read(llama, dataset):
  with pytest.raises(ConfigError, match="nothing to read; set config.data.path"):
    make_pipeline(dataclasses.replace(dataset(good(3)), path=""), llama)
  with pytest.raises(ConfigError, match="no regular expression"):
    Source("a", pick="(")


def test_every_epoch_is_planned_once(dataset, llama, monkeypatch):
  """However many there are: what is forgotten must not be made again at every row."""
  made, make = [], Planner._make
  monkeypatch.setattr(Planner, "_make", lambda self, epoch: (made.append(epoch),
                                                             make(self, epoch))[1])
  iterator = iter(make_pipeline(dataset(good(6), threads=1), llama))
  batches = [next(iterator) for _ in range(7 * 3)]
  assert sorted(numbers(batches)) == sorted(7 * list(range(6)))
  iterator.close()
  assert sorted(set(made)) == list(range(max(made) + 1)) and len(made) <= len(set(made)) + 2
