"""What the loss over a large vocabulary takes of memory, in chunks and from whole float32 scores,
by the TPU's compiler: value and gradients of hidden states and weights, on one chip, bfloat16.

    python benchmarks/loss.py                       # one row of 4096 positions, Gemma-2B's head
    python benchmarks/loss.py --length=8192 --vocab=128256 --width=4096 --topology=v5e:2x2
"""
import argparse

import jax
import jax.numpy as jnp
from one_chip import Chip

from mgjax.train.loss import next_token_loss, token_loss

WANTED = {"forward": (), "and gradient of hidden states": (0,), "and of weights": (0, 1)}


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--topology", default="v5p:2x2x1")
  parser.add_argument("--length", type=int, default=4096)
  parser.add_argument("--vocab", type=int, default=256_000)
  parser.add_argument("--width", type=int, default=2048)
  args = parser.parse_args()
  tpu = Chip(args.topology)
  arrays = (tpu.array(1, args.length, args.width), tpu.array(args.vocab, args.width),
            tpu.array(1, args.length, dtype=jnp.int32), tpu.array(1, args.length, dtype=jnp.bool))
  print(f"GiB made on the way, {args.length} positions, {args.vocab:,} words, width {args.width}")
  print(f"{'':<32}{'chunks':>8}{'whole':>8}")
  for name, wanted in WANTED.items():
    row = [made(tpu, form, wanted, arrays) for form in (chunked, from_scores)]
    print(f"{name:<32}{row[0]:>8.2f}{row[1]:>8.2f}", flush=True)


def chunked(hidden, weights, targets, mask):
  return next_token_loss(hidden, weights, ("vocab", "embed"), targets, mask)[0]


def from_scores(hidden, weights, targets, mask):
  scores = (hidden @ weights.T).astype(jnp.float32)
  return token_loss(scores, targets, mask)[0]


def made(tpu, form, wanted, arrays) -> float:
  """GiB at the peak, without arguments; a gradient that comes out is among them."""
  stats = tpu.compiled(jax.value_and_grad(form, wanted) if wanted else form,
                       *arrays).memory_analysis()
  return (stats.peak_memory_in_bytes - stats.argument_size_in_bytes) / 2**30


if __name__ == "__main__":
  main()
