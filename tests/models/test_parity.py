"""The forward pass against the original's own outputs (float32, highest precision)."""
import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from golden_models import CASES, case_batch, case_views, load_case
from safetensors.numpy import load_file

from conversion import mapping
from mgjax import trees
from mgjax.models.convnext import concatenated_features
from mgjax.sharding import make_mesh, mesh_context
from mgjax.train.loss import token_loss
from mgjax.train.step import batch_loss

pytestmark = pytest.mark.usefixtures("highest_precision")


@pytest.fixture(scope="module", params=CASES)
def case(request, golden):
  with mesh_context(make_mesh(devices=jax.devices()[:1])):
    config, model = load_case(golden, request.param)
    facts = json.loads((golden / request.param / "golden.json").read_text())
    outputs = load_file(golden / request.param / "outputs.safetensors")
    yield golden, request.param, config, model, outputs, facts


def close(got, want, atol):
  np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=atol)


def test_towers_and_visual_tokens(case):
  golden, name, config, model, want, _ = case
  tiles, hr = case_views(golden, name)
  ours = jax.jit(model.vision)(tiles.reshape(-1, *tiles.shape[2:]))
  # Pictures there: the tiles of all pictures, then the global views (HD).
  by_picture = ours.reshape(tiles.shape[0], -1, *ours.shape[1:])
  if config.global_view:
    ours = np.concatenate([by_picture[:, 1:].reshape(-1, *ours.shape[1:]), by_picture[:, 0]])
  close(ours, want["vision_features"], 1e-4)
  if hr is not None:
    maps = jax.jit(lambda m, x: m(x))(model.vision_hr, hr)
    features = jax.jit(concatenated_features)(maps)
    sub = np.moveaxis(np.asarray(features), -1, 1)[:, :, 1::4, 2::4]
    close(sub[:len(want["aux_features_sub4"])], want["aux_features_sub4"], 1e-4)
  close(jax.jit(lambda m, t, h: m.encode_views(t, h))(model, tiles, hr), want["image_tokens"], 1e-4)


@pytest.mark.parametrize("scenario", ["right", "left", "trunc", "nomask", "multi"])
def test_logits_and_loss(case, scenario):
  golden, name, config, model, want, facts = case
  if f"{scenario}.logits" not in want:
    pytest.skip(f"{name} has no scenario {scenario}")
  batch = case_batch(golden, name, config, scenario, limit=20 if scenario == "trunc" else None)
  got = np.asarray(jax.jit(lambda m, b: m(b))(model, batch))
  real = want.get(f"{scenario}.new_attention_mask", np.ones(got.shape[:2])).astype(bool)
  ours = batch["segment_ids"] > 0
  assert (real.sum(1) == ours.sum(1)).all()
  close(got[ours], want[f"{scenario}.logits"][real], 1e-4)
  expected = facts["scenarios"][scenario].get("loss")
  if expected is not None:
    total, terms = token_loss(got, batch["targets"], batch["loss_mask"])
    assert abs(total / terms - expected) < 1e-4


def test_grid_without_global_view(golden):
  with mesh_context(make_mesh(devices=jax.devices()[:1])):
    _, model = load_case(golden, "llama_hd")
    want = load_file(golden / "llama_hd" / "outputs.safetensors")["noglobal.image_tokens"]
    tiles, hr = case_views(golden, "llama_hd")
    model.config = dataclasses.replace(model.config, global_view=False)
    close(jax.jit(lambda m, t, h: m.encode_views(t, h))(model, tiles[:, 1:], hr), want, 1e-4)


def test_gradients(case):
  golden, name, config, model, want, facts = case
  batch = case_batch(golden, name, config)
  graphdef, state = nnx.split(model)

  def mean_loss(params):
    total, terms = batch_loss(nnx.merge(graphdef, params), batch, None)
    return total / terms

  grads = trees.flatten(jax.jit(jax.grad(mean_loss))(trees.pure(state)))
  theirs = mapping.to_hf({k: np.asarray(v) for k, v in grads.items()}, mapping.all_rows(config))
  checked = 0
  for key, expected in want.items():
    kind, _, tensor = key.partition("right.grad")
    if kind or not tensor:
      continue
    rows, _, tensor = tensor.partition(".")
    got = theirs[tensor]
    if rows == "_rows":
      got = np.linalg.norm(got, axis=1)
    elif np.abs(expected).max() < 1e-6:
      continue  # a bias whose true gradient is zero holds rounding noise
    scale = np.abs(expected).max()
    off = np.abs(got - expected).max() / scale
    assert off < 1e-3, (tensor, off)
    checked += 1
  norms = facts["scenarios"]["right"]["grad_norm_per_param"]
  for tensor, expected in norms.items():
    if expected and expected > 1e-6:
      assert abs(np.linalg.norm(theirs[tensor]) / expected - 1) < 1e-3, tensor
  assert checked >= 8 and len(norms) > 15
