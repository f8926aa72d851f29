"""Every part of SDXL against diffusers' and transformers' own, on tiny random weights."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgjax.diffusion.painter import open_painter
from mgjax.sharding import make_mesh, mesh_context

pytestmark = pytest.mark.usefixtures("highest_precision")


@pytest.fixture(scope="module")
def model(sdxl):
  """The converted model, inside a mesh."""
  painter = open_painter(sdxl.folder)
  painter.load()
  with mesh_context(make_mesh(devices=jax.devices()[:1])):
    yield painter.model


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def as_torch(x):
  """A map as torch has it."""
  import torch
  return torch.tensor(x).permute(0, 3, 1, 2)


def check(got, want):
  want = want.detach().numpy()
  assert got.shape == want.shape and np.abs(want).max() > 0.1
  np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


def test_unet(sdxl, model):
  import torch
  x, context, pooled = normal(2, 18, 13, 4), normal(2, 77, 48), normal(2, 24)
  sizes = np.array([[128, 96, 0, 8, 128, 96], [100, 200, 3, 4, 5, 6]], np.float32)
  time = np.array([981, 400.5], np.float32)
  got = jax.jit(lambda m, *args: m.unet(*args))(model, x, time, context, pooled, sizes)
  with torch.no_grad():
    want = sdxl.pipeline.unet(
        as_torch(x), torch.tensor(time), torch.tensor(context), added_cond_kwargs=dict(
            text_embeds=torch.tensor(pooled), time_ids=torch.tensor(sizes))).sample
  check(got, want.permute(0, 2, 3, 1))


def test_decoder(sdxl, model):
  z = 0.13025 * normal(2, 5, 3, 4)
  want = sdxl.pipeline.vae.decode(as_torch(z / 0.13025)).sample
  check(jax.jit(lambda m, z: m.vae.decode(z))(model, z), want.permute(0, 2, 3, 1))


def test_encoder(sdxl, model):
  picture = np.clip(normal(2, 20, 12, 3), -1, 1)
  want = sdxl.pipeline.vae.encode(as_torch(picture)).latent_dist
  mean, deviation = jax.jit(lambda m, x: m.vae.encode(x))(model, picture)
  check(mean / 0.13025, want.mean.permute(0, 2, 3, 1))
  check(deviation / 0.13025, want.std.permute(0, 2, 3, 1))


def test_text_encoders(sdxl, model):
  import torch
  ids, ids_2 = (tokenizer(["the red cat! 12", "dog"], padding="max_length", max_length=77,
                          return_tensors="pt").input_ids
                for tokenizer in (sdxl.pipeline.tokenizer, sdxl.pipeline.tokenizer_2))
  first = sdxl.pipeline.text_encoder(ids, output_hidden_states=True)
  second = sdxl.pipeline.text_encoder_2(ids_2, output_hidden_states=True)
  context, pooled = jax.jit(lambda m, *ids: m.encode_prompts(*ids))(
      model, *(x.numpy().astype(np.int32) for x in (ids, ids_2)))
  check(context, torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1))
  check(pooled, second.text_embeds)


def test_end_of_text_by_its_id(sdxl, model):
  """Newer configs name the token; there may be larger ids, and several ends."""
  encoder = sdxl.pipeline.text_encoder_2
  ids = np.random.default_rng(0).integers(10, 598, (2, 77)).astype(np.int32)
  ids[0, [5, 9]] = ids[1, 76] = 7
  import torch
  inner, text = encoder.text_model, model.text_encoder_2
  old, inner.eos_token_id = inner.eos_token_id, 7
  try:
    want = encoder(torch.tensor(ids, dtype=torch.long)).text_embeds
  finally:
    inner.eos_token_id = old
  import dataclasses
  config, text.config = text.config, dataclasses.replace(text.config, eos_id=7)
  try:
    check(text(jnp.asarray(ids))[1], want)
  finally:
    text.config = config


def test_epsilons(sdxl, model):
  """Too small to be seen in the values above."""
  unet, vae, theirs = model.unet, model.vae, sdxl.pipeline
  level, its = unet.down[1], theirs.unet.down_blocks[1]
  block, its_block = level.attentions[0].blocks, its.attentions[0].transformer_blocks[0]
  text, its_text = model.text_encoder_2, theirs.text_encoder_2.text_model
  pairs = [
      (level.resnets[0].norm1, its.resnets[0].norm1),
      (level.resnets[0].norm2, its.resnets[0].norm2),
      (level.attentions[0].norm, its.attentions[0].norm),
      (block.norm1, its_block.norm1), (block.norm2, its_block.norm2),
      (block.norm3, its_block.norm3), (unet.norm_out, theirs.unet.conv_norm_out),
      (vae.decoder.up[0].resnets[0].norm1, theirs.vae.decoder.up_blocks[0].resnets[0].norm1),
      (vae.encoder.mid.attention.norm, theirs.vae.encoder.mid_block.attentions[0].group_norm),
      (vae.encoder.norm_out, theirs.vae.encoder.conv_norm_out),
      (vae.decoder.norm_out, theirs.vae.decoder.conv_norm_out),
      (text.final_norm, its_text.final_layer_norm),
      (text.last.norm1, its_text.encoder.layers[-1].layer_norm1)]
  assert [ours.eps for ours, _ in pairs] == [its.eps for _, its in pairs]
