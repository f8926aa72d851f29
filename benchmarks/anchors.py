"""The estimate of launch/compile.py against steps that others measured on TPUs.

    python benchmarks/anchors.py                # all, compiled to the end
    python benchmarks/anchors.py --sketch       # schedules alone: a minute

Text-only steps of the same shapes as the published runs, compiled by our own code for the same
slices.  The printed ratios are what mgjax/tpu/calibration.py takes its factors from.
"""
import argparse
import collections
import dataclasses
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np  # noqa: E402

from mgjax.config import DecoderConfig, ModelConfig  # noqa: E402
from mgjax.data.config import DataConfig  # noqa: E402
from mgjax.models.remat import RematConfig  # noqa: E402
from mgjax.presets import find  # noqa: E402
from mgjax.tpu import account, slices  # noqa: E402
from mgjax.train.config import MeshConfig, RunConfig  # noqa: E402
from mgjax.train.optimizer import OptimizerConfig, Row  # noqa: E402

LLAMA2_70B = DecoderConfig(width=8192, depth=80, heads=64, kv_heads=8, mlp_width=28672)
LLAMA31_70B = dataclasses.replace(LLAMA2_70B, vocab_size=128256, rope_theta=500000.0)
# What MaxText's global_parameter_scale of 16, 32 and 64 comes to.
SCALE_16 = DecoderConfig(width=4096, depth=32, heads=64, kv_heads=64, head_dim=128, mlp_width=28672)
SCALE_32 = dataclasses.replace(SCALE_16, width=8192)
SCALE_64 = dataclasses.replace(SCALE_32, depth=64)


@dataclasses.dataclass(frozen=True)
class Anchor:
  """A published run: rows and length a chip, and the tokens/s a chip that were measured."""

  name: str
  source: str
  decoder: DecoderConfig
  slice: str
  rows: int
  length: int
  remat: str
  measured: float


def _tokens(c: DecoderConfig, tflops: float) -> float:
  """Tokens/s of a published rate at length 2048: MaxText counted attention's whole square."""
  layer = 2 * c.width * (c.heads + c.kv_heads) * c.head_dim + 3 * c.width * c.mlp_width
  a_token = 6 * (c.depth * layer + c.vocab_size * c.width) \
      + 12 * c.depth * 2048 * c.heads * c.head_dim
  return tflops * 1e12 / a_token


ANCHORS = (
    Anchor("Llama-3.1-8B", "MaxText tiering.md, v6e-256", find("mgm-8b").model.decoder, "v6e-256",
           4, 8192, "offload", 7207),
    Anchor("Llama-3.1-70B", "MaxText tiering.md, v6e-256", LLAMA31_70B, "v6e-256", 2, 8192,
           "offload", 960),
    Anchor("Mixtral-8x7B", "MaxText tiering.md, 8x4x4 v5p", find("mgm-8x7b").model.decoder,
           "v5p-256", 36, 4096, "nothing_saveable", 2909),
    Anchor("Llama-2-70B", "MaxText tiering.md, v5p", LLAMA2_70B, "v5p-512", 4, 4096,
           "save_qkv_attention", 692),
    Anchor("MaxText 32B v5p", "MaxText configs/tpu/v5p, 328 TFLOP/s", SCALE_32, "v5p-128", 6, 2048,
           "save_products", _tokens(SCALE_32, 328)),
    Anchor("MaxText 64B v5p", "MaxText configs/tpu/v5p, 323 TFLOP/s", SCALE_64, "v5p-128", 3, 2048,
           "save_mlp", _tokens(SCALE_64, 323)),
    Anchor("MaxText 16B v5e", "MaxText configs/tpu/v5e, 120 TFLOP/s", SCALE_16, "v5e-256", 6, 2048,
           "nothing_saveable", _tokens(SCALE_16, 120)),
    Anchor("MaxText 32B v5e", "MaxText configs/tpu/v5e, 132 TFLOP/s", SCALE_32, "v5e-256", 4, 2048,
           "nothing_saveable", _tokens(SCALE_32, 132)),
    Anchor("MaxText 64B v5e", "MaxText configs/tpu/v5e, 118 TFLOP/s", SCALE_64, "v5e-256", 2, 2048,
           "nothing_saveable", _tokens(SCALE_64, 118)),
    Anchor("PaliGemma-3B", "arXiv 2407.07726, v5e-256", find("mgm-2b").model.decoder, "v5e-256",
           16, 512, "nothing_saveable", 5189),
)


def config_of(anchor: Anchor, chips: int) -> RunConfig:
  """A run of the language model alone, all of it trained, sharded over all chips."""
  return RunConfig(
      ModelConfig(vision=None, vision_hr=None, decoder=anchor.decoder),
      DataConfig("", "", "vicuna_v1", anchor.length, images_per_row=0,
                 batch_size=anchor.rows * chips),
      optimizer=OptimizerConfig(1e-5, (Row(""),)), mesh=MeshConfig(1, chips, 1, 1),
      remat=RematConfig(decoder=anchor.remat))


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--only", default="", help="part of a name")
  parser.add_argument("--sketch", action="store_true", help="schedules alone: a minute")
  args = parser.parse_args()
  ratios = collections.defaultdict(list)
  for anchor in ANCHORS:
    if args.only.lower() not in anchor.name.lower():
      continue
    chosen = slices.parse_slice(anchor.slice)
    config = config_of(anchor, chosen.chips)
    made = account.of_config(config, "train", chosen, sketched=args.sketch)[0]
    print(made.as_text(), flush=True)
    estimated = anchor.rows * anchor.length / made.expected
    ratio = estimated / anchor.measured
    ratios[chosen.generation].append(ratio)
    print(f"\n== {anchor.name} ({anchor.source}), {chosen.name}: estimate {estimated:,.0f} "
          f"tokens/s/chip, published {anchor.measured:,.0f}, ratio {ratio:.2f}\n", flush=True)
  for generation, of in ratios.items():
    print(f"{generation}: geometric mean of {len(of)} ratios {np.exp(np.mean(np.log(of))):.3f}")
  return 0 if ratios else 1


if __name__ == "__main__":
  sys.exit(main())
