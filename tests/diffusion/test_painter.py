"""The whole way from prompts to pictures, against diffusers' pipeline; and what is refused."""
import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import several_devices
from diffusers_golden import PIPELINES, PROMPTS, SMALL

from mgjax.checkpoint import CheckpointError
from mgjax.diffusion.painter import PaintError, open_painter


@pytest.fixture(scope="module")
def painter(sdxl, highest_precision):
  return open_painter(sdxl.folder)


@pytest.mark.parametrize("name", PIPELINES)
def test_whole_pipeline(sdxl, painter, name):
  got = painter.latents(PROMPTS, dataclasses.replace(SMALL, **PIPELINES[name]))
  np.testing.assert_allclose(got, sdxl.golden[f"pipeline.{name}"], atol=1e-4, rtol=0)


def test_ddim(sdxl, painter, monkeypatch):
  monkeypatch.setattr(painter, "config", open_painter(sdxl.folder, sampler="ddim").config)
  got = painter.latents(PROMPTS, SMALL)  # by the same compiled program
  np.testing.assert_allclose(got, sdxl.golden["pipeline.ddim"], atol=1e-4, rtol=0)


def test_pictures(sdxl, painter):
  got, want = painter.paint(PROMPTS, SMALL), 255 * sdxl.golden["pictures"]
  assert got.dtype == np.uint8 and got.shape == (2, 32, 48, 3) and got.std() > 10
  assert np.abs(got - want).max() <= 0.5 + 255e-4


def test_noise_is_of_the_picture_not_of_the_batch(painter):
  both = painter.paint(PROMPTS, SMALL)
  alone = painter.paint(PROMPTS[:1], SMALL)
  assert np.abs(both[:1].astype(int) - alone).max() <= 1
  other = painter.paint(PROMPTS[:1], dataclasses.replace(SMALL, seed=4))
  assert np.abs(alone.astype(int) - other).mean() > 5


def test_freed_and_read_again(painter):
  before = painter.paint(PROMPTS[:1], SMALL)
  painter.free()
  assert not painter.loaded
  np.testing.assert_array_equal(painter.paint(PROMPTS[:1], SMALL), before)
  assert painter.loaded


@pytest.mark.slow
def test_eight_devices_paint_what_one_paints(painter, tmp_path, monkeypatch):
  """A picture and its negative half on four of them each, in four strips."""
  np.savez(tmp_path / "one.npz", latents=painter.latents(PROMPTS[:1], SMALL),
           pictures=painter.paint(PROMPTS[:1], SMALL))
  monkeypatch.setenv("MGJAX_SDXL", f"{painter.folder}:{tmp_path}")
  several_devices.run(__file__, "on_eight_devices", 8)


def on_eight_devices():
  import os

  import jax
  folder, results = os.environ["MGJAX_SDXL"].split(":")
  want, painter = np.load(f"{results}/one.npz"), open_painter(folder)
  assert jax.device_count() == 8
  with jax.default_matmul_precision("highest"):
    np.testing.assert_allclose(painter.latents(PROMPTS[:1], SMALL), want["latents"], atol=1e-4)
    pictures = painter.paint(PROMPTS[:1], SMALL)
  assert np.abs(pictures.astype(int) - want["pictures"]).max() <= 1


@pytest.mark.parametrize("changes,said", [
    ({"width": 33}, "width 33: expected a multiple of 2 from 4 to 128; 32 is the nearest"),
    ({"height": 2}, "height 2: expected a multiple of 2 from 4 to 128; 4 is the nearest"),
    ({"width": 10**9}, "width 1000000000: expected .* 128 is the nearest"),
    ({"steps": 0}, "steps 0: expected 1 to 1000"), ({"steps": 1001}, "steps 1001"),
    ({"guidance": float("nan")}, "guidance nan: expected 0 to 100"),
    ({"seed": -1}, "seed -1: expected 0 to 4294967295")])
def test_refused(painter, changes, said):
  with pytest.raises(PaintError, match=said):
    painter.paint(PROMPTS[:1], dataclasses.replace(SMALL, **changes))


def test_no_prompt_is_refused(painter):
  with pytest.raises(PaintError, match="0 pictures: expected at least one prompt"):
    painter.paint([], SMALL)


def test_long_prompts_are_cut_as_sdxl_does(painter):
  fits = "cat " * 75
  assert painter.cut(fits) == "" and painter.cut(fits + "dog").strip() == "dog"
  np.testing.assert_array_equal(painter.paint([fits + "dog"], SMALL), painter.paint([fits], SMALL))


def test_what_is_not_finite_is_told(sdxl):
  """As of the published autoencoder in float16, whose activations overflow."""
  painter = open_painter(sdxl.folder, vae_dtype=jnp.float16)
  painter.load()
  kernel = painter.params["vae"]["decoder"]["conv_in"]["kernel"]
  painter.params["vae"]["decoder"]["conv_in"]["kernel"] = kernel * 60000
  with pytest.raises(PaintError, match="autoencoder's picture is not finite in float16; decode in"):
    painter.paint(PROMPTS[:1], SMALL)
  bias = painter.params["unet"]["conv_in"]["bias"]
  painter.params["unet"]["conv_in"]["bias"] = bias * jnp.nan
  with pytest.raises(PaintError, match="the UNet's latents are not finite in float32"):
    painter.paint(PROMPTS[:1], SMALL)


def test_folders_that_hold_no_sdxl(sdxl, tmp_path):
  with pytest.raises(FileNotFoundError, match="no such folder; expected a converted SDXL"):
    open_painter(tmp_path / "nothing")
  with pytest.raises(CheckpointError, match="no checkpoint found"):
    open_painter(sdxl.source)
  other = tmp_path / "other"
  shutil.copytree(sdxl.folder, other)
  config = json.loads((other / "config.json").read_text())
  (other / "config.json").write_text(json.dumps(config | {"kind": "mgm"}))
  with pytest.raises(CheckpointError, match="it holds a Mini-Gemini.*; expected SDXL, which draws"):
    open_painter(other)
  (other / "config.json").write_text(json.dumps(config))
  (other / "tokenizer" / "merges.txt").unlink()
  with pytest.raises(ValueError, match="merges.txt cannot be read"):
    open_painter(other)
