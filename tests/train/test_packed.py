"""A packed row gives every sample what it gets alone: scores, losses, gradients."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from small_run import TOKENIZER

from mgjax.data.config import DataConfig, Resolution
from mgjax.data.pipeline import make_pipeline
from mgjax.data.tokenizer import load_tokenizer
from mgjax.models.mini_gemini import MiniGemini
from mgjax.presets import find
from mgjax.sharding import make_mesh, mesh_context
from mgjax.train.step import batch_loss

TINY = find("tiny").model
FAMILIES = {
    "llama": {},
    "gemma": dict(norm_eps=1e-6, activation="gelu", norm_offset=1.0, scale_inputs=True,
                  tied_head=True, kv_heads=1),
    "mistral": dict(sliding_window=9),
    "mixtral": dict(experts=4, experts_per_token=2),
}


@pytest.fixture(autouse=True)
def one_device():
  mesh = make_mesh((1, 1, 1, 1), jax.devices()[:1])
  with mesh_context(mesh), jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Samples with no picture, one and several, of many lengths: make(batching, ...)."""
  root = tmp_path_factory.mktemp("packed")
  rng, records = np.random.default_rng(0), []
  for i in range(4):
    Image.fromarray(rng.integers(0, 255, (40 + i, 60, 3), np.uint8)).save(root / f"{i}.png")
  for i in range(14):
    images = [f"{(i + k) % 4}.png" for k in range((0, 1, 1, 2, 3)[i % 5])]
    said = " ".join(map(str, rng.integers(0, 99, 1 + i)))
    records.append({"id": f"s{i}", "conversations": [
        {"from": "human", "value": "<image>\n" * len(images) + f"Q {i}?"},
        {"from": "gpt", "value": said},
        {"from": "human", "value": "And?"}, {"from": "gpt", "value": f"{i}."}]})
    if images:
      records[-1]["image"] = images
  (root / "data.json").write_text(json.dumps(records))
  tokenizer = load_tokenizer(TOKENIZER)

  def make(batching, model=TINY, **changes):
    config = DataConfig(str(root / "data.json"), str(root), "chatml_direct", 150,
                        hr_size=model.hr_size, tokens_per_image=model.visual_tokens,
                        images_per_row=3, batch_size=2, batching=batching, shuffle=False)
    return make_pipeline(dataclasses.replace(config, **changes), tokenizer)
  return make


def epoch(pipeline):
  batches = iter(pipeline)
  return [next(batches) for _ in range(pipeline.steps_per_epoch)]


def by_sample(batches, values):
  """values [B, L, ...] of each batch -> sample -> those of its segment."""
  found = {}
  for batch, value in zip(batches, values, strict=True):
    for b, numbers in enumerate(batch["sample_index"]):
      for segment, number in enumerate(numbers, 1):
        if number >= 0:
          assert int(number) not in found
          found[int(number)] = np.asarray(value)[b][batch["segment_ids"][b] == segment]
  return found


def build(model, **decoder):
  model = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, **decoder))
  return MiniGemini(model, dtype=jnp.float32, rngs=nnx.Rngs(0))


def put(batch):
  return {k: jnp.asarray(v) for k, v in batch.items() if k != "sample_index"}


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_losses_are_those_of_the_sample_alone(data, family):
  model = build(TINY, **FAMILIES[family])
  score = jax.jit(lambda b: model(b))
  packed, single = epoch(data("packed", row_length=260, images_per_row=5)), epoch(data("single"))
  assert len(packed) * 2 < len(single) and max((b["sample_index"] >= 0).sum(1).max()
                                               for b in packed) >= 3
  logits = [[score(put(b)) for b in batches] for batches in (packed, single)]
  one, other = (by_sample(b, x) for b, x in zip((packed, single), logits))
  assert one.keys() == other.keys() == set(range(14))
  for number in one:
    np.testing.assert_allclose(one[number], other[number], atol=1e-5, rtol=0)

  def losses(batches, scores):
    each = [jax.nn.logsumexp(x, -1) - jnp.take_along_axis(x, b["targets"][..., None], -1)[..., 0]
            for x, b in zip(scores, batches)]
    return {n: float(x.sum()) for n, x in by_sample(
        batches, [x * b["loss_mask"] for x, b in zip(each, batches)]).items()}
  one, other = (losses(b, x) for b, x in zip((packed, single), logits))
  counted = by_sample(packed, [b["loss_mask"] for b in packed])
  for number in one:
    assert abs(one[number] - other[number]) / counted[number].sum() < 1e-5


@pytest.mark.slow
def test_gradients_are_the_same_sum(data):
  graphdef, params = nnx.split(build(TINY))

  def loss(params, batch):
    return batch_loss(nnx.merge(graphdef, params), batch, None)
  gradient = jax.jit(jax.grad(loss, has_aux=True))
  sums = []
  for pipeline in (data("packed", row_length=260, images_per_row=5), data("single")):
    got = [gradient(params, put(batch)) for batch in epoch(pipeline)]
    sums.append((jax.tree.map(lambda *x: sum(x), *[g for g, _ in got]), sum(t for _, t in got)))
  assert sums[0][1] == sums[1][1]
  for a, b in zip(jax.tree.leaves(sums[0][0]), jax.tree.leaves(sums[1][0])):
    np.testing.assert_allclose(a, b, atol=2e-4 * max(1.0, float(jnp.abs(b).max())), rtol=0)


def test_two_resolutions_in_one_stream(data):
  """Pictures of the -hd model beside the others, by the same parameters: each as in a run of its
  own."""
  hd = TINY.at(256)
  assert hd == dataclasses.replace(find("tiny-hd").model, decoder=TINY.decoder)
  mixed = data("packed", row_length=200, resolutions=(
      Resolution(256, hd.visual_tokens, 400, 600, 4, 2),), path="", sources=tuple(
          dataclasses.replace(s, pick=pick, hr_size=size) for s in data("single").config.all_sources
          for pick, size in (("^[01]", 256), ("", 0))))
  batches = epoch(mixed)
  sizes = {b["images"].shape[2] for b in batches}
  assert sizes == {128, 256}
  standard = build(TINY)
  graphdef, params = nnx.split(build(hd))
  high = nnx.merge(graphdef, nnx.split(standard)[1])
  score = {size: jax.jit(lambda b, model=model: model(b))
           for size, model in ((128, standard), (256, high))}
  got = by_sample(batches, [score[b["images"].shape[2]](put(b)) for b in batches])
  assert len(got) == 14
  for size, model in ((128, TINY), (256, hd)):
    alone = epoch(data("single", model, max_length=400))
    expected = by_sample(alone, [score[size](put(b)) for b in alone])
    mine = [n for n in got if mixed.loader.resolution(n).hr_size == size]
    for number in mine:
      original = mixed.samples[number].index  # its number in the run of one source
      np.testing.assert_allclose(got[number], expected[original], atol=1e-5, rtol=0)
