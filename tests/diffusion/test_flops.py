"""What SDXL's parts take, against torch's own count of diffusers' and transformers' modules."""
import dataclasses
import json

import pytest

from mgjax.diffusion.config import UNetConfig, VaeConfig
from mgjax.diffusion.flops import decoder_flops, drawing_flops, text_encoder_flops, unet_flops
from mgjax.diffusion.painter import open_painter


@pytest.fixture(scope="module")
def config(sdxl):
  return open_painter(sdxl.folder).config


@pytest.fixture(scope="module")
def counted(sdxl):
  """counted(part, module, call): operations of call(module of that part of the folder, torch)."""
  torch = pytest.importorskip("torch")
  pytest.importorskip("diffusers")
  from torch.utils.flop_counter import FlopCounterMode

  def count(part, build, call):
    with torch.device("meta"), torch.no_grad():  # shapes alone
      model = build(json.loads((sdxl.source / part / "config.json").read_text()))
      with FlopCounterMode(display=False) as counter:
        call(model, torch)
    return counter.get_total_flops()
  return count


def test_unet(counted, config):
  from diffusers import UNet2DConditionModel
  want = counted("unet", UNet2DConditionModel.from_config, lambda unet, torch: unet(
      torch.zeros(1, 4, 18, 13), torch.zeros(1), torch.zeros(1, 77, 48), added_cond_kwargs=dict(
          text_embeds=torch.zeros(1, 24), time_ids=torch.zeros(1, 6))))
  assert unet_flops(config.unet, 18, 13) == want  # the level below has 9 x 7


def test_decoder(counted, config):
  from diffusers import AutoencoderKL
  want = counted("vae", AutoencoderKL.from_config,
                 lambda vae, torch: vae.decode(torch.zeros(1, 4, 5, 3)))
  assert decoder_flops(config.vae, 5, 3) == want


def test_text_encoders(counted, config):
  from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
  read = lambda model, torch: model(torch.zeros(1, 77, dtype=torch.long))
  build = lambda kind: lambda values: kind(CLIPTextConfig(**values))
  want = counted("text_encoder_2", build(CLIPTextModelWithProjection), read)
  assert text_encoder_flops(config.text_encoder_2) == want
  # Without a projection the last block does not run, which theirs does.
  deeper = dataclasses.replace(config.text_encoder, depth=config.text_encoder.depth + 1)
  want = counted("text_encoder", build(CLIPTextModel), read)
  assert text_encoder_flops(deeper) == want


def test_full_size():
  """As torch counts diffusers' modules of SDXL base 1.0."""
  assert unet_flops(UNetConfig(), 128, 128) == 6_761_236_398_080
  assert decoder_flops(VaeConfig(), 128, 128) == 10_470_392_594_432


def test_guidance_asks_twice(config):
  once, twice = (drawing_flops(config, 32, 64, 3, guided) for guided in (False, True))
  assert once["sample"] == 3 * unet_flops(config.unet, 16, 32)
  assert twice["sample"] == 2 * once["sample"] and twice["encode"] == 2 * once["encode"]
  assert twice["decode"] == once["decode"]
