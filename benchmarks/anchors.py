"""The estimate of launch/compile.py against steps that others measured on TPUs.

    python benchmarks/anchors.py                # all, compiled to the end
    python benchmarks/anchors.py --sketch       # schedules alone: a minute

Text-only steps of the same shapes as the published runs, compiled by our own code for the same
slices.  The printed ratios are what mgjax/tpu/calibration.py takes its factor from.
"""
import argparse
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


ANCHORS = (
    Anchor("Llama-3.1-8B", "MaxText tiering.md, v6e-256", find("mgm-8b").model.decoder, "v6e-256",
           4, 8192, "offload", 7207),
    Anchor("Mixtral-8x7B", "MaxText tiering.md, 8x4x4 v5p", find("mgm-8x7b").model.decoder,
           "v5p-256", 36, 4096, "nothing_saveable", 2909),
    Anchor("Llama-2-70B", "MaxText tiering.md, v5p", LLAMA2_70B, "v5p-512", 4, 4096,
           "save_qkv_attention", 692),
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
  ratios = []
  for anchor in ANCHORS:
    if args.only.lower() not in anchor.name.lower():
      continue
    chosen = slices.parse_slice(anchor.slice)
    config = config_of(anchor, chosen.chips)
    made = account.of_config(config, "train", chosen, sketched=args.sketch)[0]
    print(made.as_text(), flush=True)
    estimated = anchor.rows * anchor.length / made.expected
    ratios.append(estimated / anchor.measured)
    print(f"\n== {anchor.name} ({anchor.source}), {chosen.name}: estimate {estimated:,.0f} "
          f"tokens/s/chip, published {anchor.measured:,.0f}, ratio {ratios[-1]:.2f}\n", flush=True)
  if ratios:
    print(f"geometric mean of the ratios {np.exp(np.mean(np.log(ratios))):.3f}")
  return 0 if ratios else 1


if __name__ == "__main__":
  sys.exit(main())
