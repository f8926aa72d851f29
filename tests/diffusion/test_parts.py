"""Every part of SDXL against diffusers' and transformers' own, on tiny random weights."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers_golden import PROMPTS, latents, many_ends, picture, unet_inputs

from mgjax.diffusion.layers import GroupNorm
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


def check(got, want):
  assert got.shape == want.shape and np.abs(want).max() > 0.1
  np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


def test_unet(sdxl, model):
  check(jax.jit(lambda m, *args: m.unet(*args))(model, *unet_inputs()), sdxl.golden["unet"])


def test_decoder(sdxl, model):
  check(jax.jit(lambda m, z: m.vae.decode(z))(model, latents()), sdxl.golden["decoder"])


def test_encoder(sdxl, model):
  mean, deviation = jax.jit(lambda m, x: m.vae.encode(x))(model, picture())
  check(mean / 0.13025, sdxl.golden["encoder.mean"])
  check(deviation / 0.13025, sdxl.golden["encoder.deviation"])


def test_text_encoders(sdxl, model):
  ids = [tokenizer(PROMPTS) for tokenizer in open_painter(sdxl.folder).tokenizers]
  context, pooled = jax.jit(lambda m, *ids: m.encode_prompts(*ids))(model, *ids)
  check(context, sdxl.golden["context"])
  check(pooled, sdxl.golden["pooled"])


def test_end_of_text_by_its_id(sdxl, model, monkeypatch):
  """Newer configs name the token; there may be larger ids, and several ends."""
  text = model.text_encoder_2
  monkeypatch.setattr(text, "config", dataclasses.replace(text.config, eos_id=7))
  check(jax.jit(lambda m, ids: m(ids)[1])(text, many_ends()), sdxl.golden["pooled.many_ends"])


def test_epsilons(sdxl, model):
  """Too small to be seen in the values above."""
  unet, vae, text = model.unet, model.vae, model.text_encoder_2
  level = unet.down[1]
  block = level.attentions[0].blocks
  norms = [level.resnets[0].norm1, level.resnets[0].norm2, level.attentions[0].norm, block.norm1,
           block.norm2, block.norm3, unet.norm_out, vae.decoder.up[0].resnets[0].norm1,
           vae.encoder.mid.attention.norm, vae.encoder.norm_out, vae.decoder.norm_out,
           text.final_norm, text.last.norm1]
  assert [norm.eps for norm in norms] == sdxl.golden["epsilons"].tolist()


def test_group_norm_of_bfloat16():
  """Its variance takes one pass, in which sums may cancel."""
  x = jnp.asarray(4 + np.random.default_rng(0).normal(size=(2, 9, 7, 8)), jnp.bfloat16)
  norm = GroupNorm(8, 4, 1e-5)
  np.testing.assert_allclose(norm(x).astype(jnp.float32), norm(x.astype(jnp.float32)), atol=0.02)
