"""Seconds of a step of SDXL's UNet, and of a picture's decoding, beside diffusers (torch): mid-
size, the same random weights, float32, on a CPU.

    pip install -e '.[parity]'
    python benchmarks/draw.py

The two take turns, so that what else the machine does hits both.
"""
import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: E402
from flax import nnx  # noqa: E402

from conversion.mapping import to_tensors  # noqa: E402
from conversion.sdxl_mapping import unet_rows, vae_rows  # noqa: E402
from mgjax import trees  # noqa: E402
from mgjax.diffusion.config import UNetConfig, VaeConfig  # noqa: E402
from mgjax.diffusion.flops import decoder_flops, unet_flops  # noqa: E402
from mgjax.diffusion.unet import UNet  # noqa: E402
from mgjax.diffusion.vae import Vae  # noqa: E402
from mgjax.sharding import make_mesh, mesh_context  # noqa: E402

UNET = UNetConfig(side=64, widths=(128, 256, 512), depths=(0, 2, 4), middle_depth=4,
                  heads=(2, 4, 8), context=512, pooled=256, number_width=64)
VAE = VaeConfig(widths=(64, 128, 256, 256))
SIDE = 32  # of the latents that are decoded


@dataclasses.dataclass(frozen=True)
class Case:
  """The same in both: each gives its answer as float32 [N, H, W, C]."""

  name: str
  flops: float
  ours: Callable
  theirs: Callable


def unet(batch: int) -> Case:
  """A step, on random latents and prompts."""
  kinds = ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2)
  theirs = UNet2DConditionModel(
      sample_size=UNET.side, in_channels=4, out_channels=4, block_out_channels=UNET.widths,
      layers_per_block=UNET.resnets, cross_attention_dim=UNET.context,
      attention_head_dim=UNET.heads, down_block_types=kinds,
      up_block_types=[kind.replace("Down", "Up") for kind in reversed(kinds)],
      transformer_layers_per_block=(1, *UNET.depths[1:]), use_linear_projection=True,
      addition_embed_type="text_time", addition_time_embed_dim=UNET.number_width,
      projection_class_embeddings_input_dim=UNET.pooled + 6 * UNET.number_width)
  call, theirs = same(lambda rngs: UNet(UNET, dtype=jnp.float32, rngs=rngs), theirs,
                      unet_rows(UNET), "unet", UNet.__call__)
  given = (normal(batch, UNET.side, UNET.side, 4), np.full(batch, 500.0, np.float32),
           normal(batch, 77, UNET.context), normal(batch, UNET.pooled),
           np.tile(np.array([512, 512, 0, 0, 512, 512], np.float32), (batch, 1)))
  x, at, context, pooled, sizes = map(torch.tensor, given)
  step = lambda: theirs(x.permute(0, 3, 1, 2), at, context, added_cond_kwargs=dict(
      text_embeds=pooled, time_ids=sizes)).sample
  return Case(f"UNet, {batch} latents of {UNET.side}x{UNET.side}",
              batch * unet_flops(UNET, UNET.side, UNET.side), lambda: call(*given), step)


def decoder() -> Case:
  """A picture."""
  kinds = len(VAE.widths)
  theirs = AutoencoderKL(
      block_out_channels=VAE.widths, latent_channels=4, layers_per_block=VAE.resnets,
      down_block_types=("DownEncoderBlock2D",) * kinds,
      up_block_types=("UpDecoderBlock2D",) * kinds)
  call, theirs = same(lambda rngs: Vae(VAE, dtype=jnp.float32, rngs=rngs), theirs, vae_rows(VAE),
                      "vae", Vae.decode)
  z = normal(1, SIDE, SIDE, 4)
  own = torch.tensor(z / VAE.scaling).permute(0, 3, 1, 2)
  return Case(f"decoder, a picture of {8 * SIDE}x{8 * SIDE}", decoder_flops(VAE, SIDE, SIDE),
              lambda: call(z), lambda: theirs.decode(own).sample)


def same(make, theirs, rows, part, method):
  """Random weights in both: a compiled `method` of our module, and the module of diffusers."""
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
  params = jax.jit(lambda: nnx.split(make(nnx.Rngs(0)))[1])()
  flat = trees.flatten(trees.pure(params))
  tensors = to_tensors({f"{part}/{path}": np.asarray(a) for path, a in flat.items()}, rows)
  theirs.load_state_dict({name.removeprefix(f"{part}/"): torch.tensor(np.ascontiguousarray(t))
                          for name, t in tensors.items()})
  compiled = jax.jit(lambda params, *args: method(nnx.merge(graphdef, params), *args))
  return lambda *args: compiled(params, *args), theirs.eval()


def normal(*shape: int) -> np.ndarray:
  return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def compare(case: Case, repeats: int) -> None:
  """Prints a line: the medians of both, of their ratio, and how far the answers are apart."""
  a, b = np.asarray(case.ours()), case.theirs().permute(0, 2, 3, 1).numpy()  # compiles
  times = []
  for _ in range(repeats):
    times.append([])
    for f in (case.ours, case.theirs):
      begun = time.perf_counter()
      jax.block_until_ready(f())
      times[-1].append(time.perf_counter() - begun)
  mine, other, ratio = (statistics.median(f(*pair) for pair in times) for f in (
      lambda ours, _: ours, lambda _, theirs: theirs, lambda ours, theirs: ours / theirs))
  apart, rate = np.abs(a - b).max() / np.abs(b).max(), case.flops / 1e9
  print(f"{case.name:29} |{mine:7.3f}{other:8.3f} |{ratio:5.2f}x |{rate / mine:7.0f}"
        f"{rate / other:7.0f} |{apart:8.1e}", flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--batch", type=int, default=2)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--threads", type=int, default=os.cpu_count(),
                      help="of torch; jax takes as many as there are cores")
  args = parser.parse_args()
  torch.set_num_threads(args.threads)
  print(f"float32, torch {torch.__version__} with {args.threads} threads, "
        f"{os.cpu_count()} cores\n"
        "                              | seconds        |       | GFLOP/s       | largest\n"
        "                              |  mgjax   torch | ratio |  mgjax  torch | difference")
  with mesh_context(make_mesh(devices=jax.devices()[:1])), torch.inference_mode():
    for case in (unet(args.batch), decoder()):
      compare(case, args.repeats)


if __name__ == "__main__":
  main()
