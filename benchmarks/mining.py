"""Patch info mining as the package computes it against the literal form, at full size: 576 queries,
64 candidates each, 2880 channels, one picture, float32.

    python benchmarks/mining.py [--backward]

With --tpu: what it takes on one chip of a v5e (or --topology) for 8 pictures of 768 pixels,
bfloat16, from the maps of the high-resolution tower and the queries to what each has gathered, as
XLA does it and by the kernel: bytes of HBM, the compile tool's account, and the kernels' schedule.

    python benchmarks/mining.py --tpu [--topology=v5e:2x2] [--images=8]
"""
import argparse
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from one_chip import Chip
from timing import seconds

from mgjax.models.convnext import concatenated_features
from mgjax.models.mining import PatchInfoMining, pool_maps, pool_windows
from mgjax.sharding import make_mesh, mesh_context

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "models"))
from literal_mining import literal_mining  # noqa: E402

SIDE, WINDOW, WIDTHS, EPS = 24, 8, (192, 384, 768, 1536), 1e-5
PASSES = {"forward": (), "and queries' gradient": (0,), "and maps' gradients": (0, 1)}


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--backward", action="store_true", help="forward and backward")
  parser.add_argument("--tpu", action="store_true")
  parser.add_argument("--topology", default="v5e:2x2")
  parser.add_argument("--images", type=int, default=8)
  args = parser.parse_args()
  if args.tpu:
    on_tpu(Chip(args.topology), args.images)
  else:
    here(args.backward)


def here(backward: bool):
  with mesh_context(make_mesh((1, 1, 1, 1), jax.devices()[:1])):
    mining = PatchInfoMining(1024, 2880, dtype=jnp.float32, rngs=nnx.Rngs(0))
    tokens = jax.random.normal(jax.random.key(0), (1, 576, 1024))
    features = jax.random.normal(jax.random.key(1), (1, 192, 192, 2880))
    forms = {"associative": lambda m, x, a: m(x, [a]), "literal": literal_mining}
    rows = {}
    for name, form in forms.items():
      if backward:
        form = jax.grad(lambda m, x, a, f=form: jnp.sum(f(m, x, a)), allow_int=True)
      compiled = jax.jit(form).lower(mining, tokens, features).compile()
      rows[name] = (seconds(compiled, mining, tokens, features, repeats=3),
                    compiled.cost_analysis()["flops"],
                    compiled.memory_analysis().temp_size_in_bytes)
      t, flops, temp = rows[name]
      print(f"{name:<12} {t:7.2f} s  {flops / 1e9:8.1f} GFLOP  {temp / 2**30:6.2f} GiB temporary")
    a, b = rows["associative"], rows["literal"]
    print("literal / associative: " + ", ".join(
        f"{what} {y / x:.1f}x" for what, x, y in zip(("time", "FLOPs", "memory"), a, b)))


def on_tpu(tpu: Chip, images: int):
  maps = [tpu.array(images, *(SIDE * WINDOW >> r,) * 2, c) for r, c in enumerate(WIDTHS)]
  q = tpu.array(images, SIDE, SIDE, sum(WIDTHS))
  once = sum(a.size * a.dtype.itemsize for a in (q, *maps))
  print(f"{images} pictures; inputs read once: {once / 1e9:.3f} GB")
  print(f"{'':<32}{'GB':>8}{'ms, memory':>12}{'ms, account':>13}{'ms, schedule':>14}")
  forms = {"XLA": lambda q, maps: pool_windows(q, concatenated_features(maps), EPS),
           "kernel": lambda q, maps: pool_maps(q, maps, EPS)}
  for name, form in forms.items():
    form = jax.checkpoint(form)  # as in the model: the map is upsampled again

    def gradients(wanted, q, maps, g, form=form):  # g: what comes from behind
      return jax.grad(lambda *x: jnp.sum(form(*x) * g), wanted)(q, maps), form(q, maps)
    for told, wanted in PASSES.items():
      run = functools.partial(gradients, wanted) if wanted else form
      got = tpu.estimate(run, q, maps, *[q] * bool(wanted))
      kernels = ["mine_forward"] + ["mine_backward"] * bool(wanted)
      schedule = "" if name == "XLA" else (
          f"{1e3 * sum(map(tpu.kernel_cycles, kernels)) / tpu.kind.clock:.2f}")
      print(f"{f'{name}, {told}':<32}{got.hbm_bytes / 1e9:>8.2f}{got.memory * 1e3:>12.2f}"
            f"{got.expected * 1e3:>13.2f}{schedule:>14}", flush=True)


if __name__ == "__main__":
  main()
