"""What diffusers and transformers make of the tiny SDXL.

    PYTHONPATH=.:tests python tests/diffusion/diffusers_golden.py   # writes golden.npz

Needs the extra `parity`; `test_golden.py` makes it anew where that is there.
"""
from __future__ import annotations

import contextlib
import pathlib
import tempfile

import numpy as np
from tiny_sdxl import SCHEDULER, write_folder

from mgjax.diffusion.painter import Painting, make_noise

FILE = pathlib.Path(__file__).with_name("golden.npz")
PROMPTS = ["the red cat on the dog", "dog! 12"]
SMALL = Painting(width=48, height=32, steps=4, seed=3)
# Names of whole pipelines, and how they differ from SMALL.
PIPELINES = {
    "plain": {}, "unguided": {"guidance": 0.0}, "nothing_negative": {"negative": None},
    "negative": {"negative": "the dog", "steps": 3},
    "sizes": {"original": (200, 300), "crop": (8, 16), "target": (64, 64)}}
TRAJECTORIES = [(sampler, prediction, spacing, steps)
                for sampler in ("euler", "ddim") for prediction in ("epsilon", "v_prediction")
                for spacing in ("leading", "trailing", "linspace") for steps in (1, 4, 30)]
TEXTS = [
    "", "the cat", "  The RED\n\tcat!!  on 12 dogs' beds, it's   fine ", "naïve café — ½ 漢字 🙂",
    "a<|endoftext|>b", "no! not <|startoftext|> this", "cafe\u0301 \u00a0 x", "the cat " * 60,
    "I'll we've they'd 'Tis", "_under_score-dash/slash", "\u200b\ufeff", "ÀÉÎ ǅ İ ß"]


def normal(*shape, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unet_inputs() -> tuple[np.ndarray, ...]:
  """latents, time, context, pooled, sizes; maps that are odd on the way."""
  sizes = np.array([[128, 96, 0, 8, 128, 96], [100, 200, 3, 4, 5, 6]], np.float32)
  return (normal(2, 18, 13, 4), np.array([981, 400.5], np.float32), normal(2, 77, 48),
          normal(2, 24), sizes)


def latents() -> np.ndarray:
  return 0.13025 * normal(2, 5, 3, 4)


def picture() -> np.ndarray:
  return np.clip(normal(2, 20, 12, 3), -1, 1)


def many_ends() -> np.ndarray:
  """Ids in which 7 is the end of the text, as configs of later years name it."""
  ids = np.random.default_rng(0).integers(10, 598, (2, 77)).astype(np.int32)
  ids[0, [5, 9]] = ids[1, 76] = 7
  return ids


def network(x, time):
  """Any function of what a UNet is given."""
  return np.sin(3 * x) + time / 1000


def make(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The outputs of the model in a folder that `write_folder` has made."""
  import torch
  from diffusers import DDIMScheduler, StableDiffusionXLPipeline
  pipeline = StableDiffusionXLPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
  pipeline.set_progress_bar_config(disable=True)
  with torch.no_grad():
    out = parts(pipeline) | tokens(pipeline) | trajectories()
    out |= {f"pipeline.{name}": whole(pipeline, changes) for name, changes in PIPELINES.items()}
    out["pictures"] = whole(pipeline, {}, "np")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    out["pipeline.ddim"] = whole(pipeline, {})
  return {k: np.asarray(v) for k, v in out.items()}


def parts(pipeline) -> dict:
  import torch
  there = lambda x: torch.tensor(x).permute(0, 3, 1, 2)
  here = lambda x: x.permute(0, 2, 3, 1).numpy()
  x, time, context, pooled, sizes = unet_inputs()
  told = dict(text_embeds=torch.tensor(pooled), time_ids=torch.tensor(sizes))
  out = {"unet": here(pipeline.unet(there(x), torch.tensor(time), torch.tensor(context),
                                    added_cond_kwargs=told).sample),
         "decoder": here(pipeline.vae.decode(there(latents() / 0.13025)).sample)}
  encoded = pipeline.vae.encode(there(picture())).latent_dist
  out |= {"encoder.mean": here(encoded.mean), "encoder.deviation": here(encoded.std)}
  ids = [t(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
         for t in (pipeline.tokenizer, pipeline.tokenizer_2)]
  first = pipeline.text_encoder(ids[0], output_hidden_states=True)
  second = pipeline.text_encoder_2(ids[1], output_hidden_states=True)
  out["context"] = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
  out["pooled"] = second.text_embeds
  with end_of_text(pipeline.text_encoder_2.text_model, 7):
    out["pooled.many_ends"] = pipeline.text_encoder_2(torch.tensor(many_ends()).long()).text_embeds
  norms = epsilons(pipeline)
  return out | {"epsilons": np.array([norm.eps for norm in norms])}


@contextlib.contextmanager
def end_of_text(model, token: int):
  before, model.eos_token_id = model.eos_token_id, token
  yield
  model.eos_token_id = before


def epsilons(pipeline) -> list:
  """Norms of every kind, in the order of `test_parts.test_epsilons`."""
  unet, vae, text = pipeline.unet, pipeline.vae, pipeline.text_encoder_2.text_model
  level = unet.down_blocks[1]
  block = level.attentions[0].transformer_blocks[0]
  return [level.resnets[0].norm1, level.resnets[0].norm2, level.attentions[0].norm, block.norm1,
          block.norm2, block.norm3, unet.conv_norm_out, vae.decoder.up_blocks[0].resnets[0].norm1,
          vae.encoder.mid_block.attentions[0].group_norm, vae.encoder.conv_norm_out,
          vae.decoder.conv_norm_out, text.final_layer_norm, text.encoder.layers[-1].layer_norm1]


def tokens(pipeline) -> dict:
  """Ids of both tokenizers."""
  return {name: getattr(pipeline, name)(TEXTS, padding="max_length", max_length=77,
                                        truncation=True, return_tensors="np").input_ids
          for name in ("tokenizer", "tokenizer_2")}


def trajectories() -> dict:
  """Latents after every step of both schedulers, with `network` for a UNet."""
  import diffusers
  import torch
  kinds = {"euler": diffusers.EulerDiscreteScheduler, "ddim": diffusers.DDIMScheduler}
  out = {}
  for sampler, prediction, spacing, steps in TRAJECTORIES:
    scheduler = kinds[sampler].from_config(
        SCHEDULER | dict(prediction_type=prediction, timestep_spacing=spacing))
    scheduler.set_timesteps(steps)
    x, path = torch.tensor(normal(5)) * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps:
      given = scheduler.scale_model_input(x, t).numpy()
      x = scheduler.step(torch.tensor(network(given, float(t))), t, x).prev_sample
      path.append(np.concatenate([[float(t)], given, x.numpy()]))
    out[f"trajectory.{sampler}.{prediction}.{spacing}.{steps}"] = np.array(path, np.float32)
  scheduler = kinds["ddim"].from_config(SCHEDULER | dict(set_alpha_to_one=True))
  scheduler.set_timesteps(5)
  last = scheduler.step(torch.full((3,), 0.25), scheduler.timesteps[-1], torch.ones(3))
  return out | {"last_alpha_one": last.prev_sample}


def whole(pipeline, changes: dict, output: str = "latent") -> np.ndarray:
  """The pipeline from the noise that ours makes: latents or pictures, [N, H, W, C]."""
  import dataclasses

  import torch
  painting = dataclasses.replace(SMALL, **changes)
  noise = make_noise(painting.seed, len(PROMPTS), (painting.height // 2, painting.width // 2, 4))
  sizes = {"original_size": painting.original, "crops_coords_top_left": painting.crop,
           "target_size": painting.target}
  if "original" in changes:
    sizes |= {f"negative_{name}": value for name, value in sizes.items()}
  found = pipeline(
      PROMPTS, negative_prompt=painting.negative and [painting.negative] * len(PROMPTS),
      width=painting.width, height=painting.height, num_inference_steps=painting.steps,
      guidance_scale=painting.guidance, output_type=output,
      latents=torch.tensor(noise).permute(0, 3, 1, 2), **sizes).images
  return found if output == "np" else found.permute(0, 2, 3, 1).numpy()


if __name__ == "__main__":
  with tempfile.TemporaryDirectory() as there:
    np.savez_compressed(FILE, **make(write_folder(pathlib.Path(there))))
  print(f"{FILE}: {FILE.stat().st_size} bytes")
