"""Patch info mining as the package computes it against the literal form, at full size: 576 queries,
64 candidates each, 2880 channels, one picture, float32.

    python benchmarks/mining.py
"""
import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from timing import seconds

from mgjax.models.mining import PatchInfoMining
from mgjax.sharding import make_mesh, mesh_context

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "models"))
from literal_mining import literal_mining  # noqa: E402


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--backward", action="store_true", help="forward and backward")
  args = parser.parse_args()
  with mesh_context(make_mesh((1, 1, 1, 1), jax.devices()[:1])):
    mining = PatchInfoMining(1024, 2880, dtype=jnp.float32, rngs=nnx.Rngs(0))
    tokens = jax.random.normal(jax.random.key(0), (1, 576, 1024))
    features = jax.random.normal(jax.random.key(1), (1, 192, 192, 2880))
    forms = {"associative": lambda m, x, a: m(x, [a]), "literal": literal_mining}
    rows = {}
    for name, form in forms.items():
      if args.backward:
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


if __name__ == "__main__":
  main()
