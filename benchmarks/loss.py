"""What the loss over a large vocabulary takes of memory, in chunks and from whole float32 scores,
by the TPU's compiler: value and gradients of hidden states and weights, on one chip, bfloat16.

    python benchmarks/loss.py                       # one row of 4096 positions, Gemma-2B's head
    python benchmarks/loss.py --length=8192 --vocab=128256 --width=4096 --topology=v5e:2x2
"""
import argparse
import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from mgjax.sharding import make_mesh, mesh_context  # noqa: E402
from mgjax.tpu.slices import describe, parse_slice  # noqa: E402
from mgjax.train.loss import next_token_loss, token_loss  # noqa: E402

WANTED = {"forward": (), "and gradient of hidden states": (0,), "and of weights": (0, 1)}


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--topology", default="v5p:2x2x1")
  parser.add_argument("--length", type=int, default=4096)
  parser.add_argument("--vocab", type=int, default=256_000)
  parser.add_argument("--width", type=int, default=2048)
  args = parser.parse_args()
  mesh = make_mesh(devices=describe(parse_slice(args.topology))[:1])
  whole = NamedSharding(mesh, PartitionSpec())
  make = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
  hidden = make(jnp.bfloat16, 1, args.length, args.width)
  weights = make(jnp.bfloat16, args.vocab, args.width)
  targets, mask = make(jnp.int32, 1, args.length), make(jnp.bool, 1, args.length)
  print(f"GiB made on the way, {args.length} positions, {args.vocab:,} words, width {args.width}")
  print(f"{'':<32}{'chunks':>8}{'whole':>8}")
  with mesh_context(mesh):
    for name, wrt in WANTED.items():
      row = [made(form, wrt, hidden, weights, targets, mask) for form in (chunked, from_scores)]
      print(f"{name:<32}{row[0]:>8.2f}{row[1]:>8.2f}", flush=True)


def chunked(hidden, weights, targets, mask):
  return next_token_loss(hidden, weights, ("vocab", "embed"), targets, mask)[0]


def from_scores(hidden, weights, targets, mask):
  scores = (hidden @ weights.T).astype(jnp.float32)
  return token_loss(scores, targets, mask)[0]


def made(form, wrt, *args) -> float:
  """GiB at the peak, without arguments; a gradient that comes out is among them."""
  run = jax.value_and_grad(form, wrt) if wrt else form
  stats = jax.jit(run).lower(*args).compile().memory_analysis()
  return (stats.peak_memory_in_bytes - stats.argument_size_in_bytes) / 2**30


if __name__ == "__main__":
  main()
