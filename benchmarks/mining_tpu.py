"""What mining takes on a TPU, by its compiler's account and the instructions of its code, without
one: from the maps of the high-resolution tower and the queries to what each has gathered, as XLA
does it and by the kernel.  One chip, bfloat16.

    python benchmarks/mining_tpu.py                     # a v5e, 8 pictures of 768 pixels
    python benchmarks/mining_tpu.py --topology=v6e:2x2 --images=2

A kernel's time is a lower bound: its bundles (what the chip starts in a cycle) are scheduled by the
compiler, and waiting for memory comes on top where that takes longer; the matrix units are those of
the bundles that use them most.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SIDE, WINDOW, WIDTHS = 24, 8, (192, 384, 768, 1536)
FORMS = ("XLA", "kernel")
PASSES = {"forward": None, "and queries' gradient": (0,), "and maps' gradients": (0, 1)}


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--topology", default="v5e:2x2")
  parser.add_argument("--images", type=int, default=8)
  parser.add_argument("--one", nargs=2, metavar=("FORM", "PASS"), help="in this process, as JSON")
  args = parser.parse_args()
  if args.one:
    print(json.dumps(compiled(*args.one, args.topology, args.images)))
    return
  print(f"{args.images} pictures, {args.topology}; inputs read once: "
        f"{inputs(args.images) / 1e9:.3f} GB")
  print(f"{'':<32}{'GB':>8}{'ms, memory':>12}{'ms, account':>13}{'ms, bundles':>13}   "
        "bundles of a row of windows, and the unit that binds")
  for form in FORMS:
    for name in PASSES:
      row, kernels = in_child(form, name, args)
      bundles = sum(k["bundles"] * k["steps"] for k in kernels) / row["clock"] * 1e3
      told = ", ".join(f"{k['name']} {k['bundles']} ({k['busiest']} {k['share']:.0%})"
                       for k in kernels)
      print(f"{form + ', ' + name:<32}{row['bytes'] / 1e9:>8.2f}{row['memory'] * 1e3:>12.2f}"
            f"{row['step'] * 1e3:>13.2f}{bundles if kernels else float('nan'):>13.2f}   {told}",
            flush=True)


def inputs(images: int) -> int:
  """Bytes of maps and queries."""
  maps = sum((SIDE * WINDOW >> r)**2 * c for r, c in enumerate(WIDTHS))
  return 2 * images * (maps + SIDE**2 * sum(WIDTHS))


def in_child(form, name, args) -> tuple[dict, list[dict]]:
  """A row, and what the compiler wrote of each kernel: it is told where when it is loaded."""
  with tempfile.TemporaryDirectory() as folder:
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    done = subprocess.run(
        [sys.executable, __file__, f"--topology={args.topology}", f"--images={args.images}",
         "--one", form, name], env=os.environ | {"LIBTPU_INIT_ARGS": flags}, check=True,
        stdout=subprocess.PIPE, text=True)
    row = json.loads(done.stdout.splitlines()[-1])
    files = sorted(Path(folder).glob("*mine_*-final_hlo-static-per-bundle-utilization.txt"))
    return row, [of_kernel(f, args.images) for f in files]


def of_kernel(file: Path, images: int) -> dict:
  """Bundles of a row of windows, and the unit that they use most.  The file has a line of units,
  one of how many there are of each, and one for each bundle."""
  lines = file.read_text().splitlines()
  units = [u.strip() for u in lines[1].split(",")]
  there = [int(n) for n in lines[2].split()]
  uses = [[int(n) for n in line.split()] for line in lines[4:] if line.strip()]
  share, busiest = max((sum(used) / n / len(uses), unit)
                       for used, n, unit in zip(zip(*uses), there, units))
  name = re.search(r"mine_(forward|backward)", file.name)[0]
  # Rows of windows; the first step of a picture reads ahead, and computes next to nothing.
  return {"name": name, "bundles": len(uses), "steps": images * SIDE, "busiest": busiest,
          "share": share}


def compiled(form: str, name: str, topology: str, images: int) -> dict:
  """Bytes of HBM and seconds of a program, by the account."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, PartitionSpec

  from mgjax.models.convnext import concatenated_features
  from mgjax.models.mining import pool_maps, pool_windows
  from mgjax.sharding import make_mesh, mesh_context
  from mgjax.tpu import hlo, links, roofline, slices
  from mgjax.xla import compiler_options
  chosen = slices.parse_slice(topology)
  mesh = make_mesh(devices=slices.describe(chosen)[:1])
  forms = {"XLA": lambda q, maps: pool_windows(q, concatenated_features(maps), 1e-5),
           "kernel": lambda q, maps: pool_maps(q, maps, 1e-5)}
  form = jax.checkpoint(forms[form])  # as in the model: the map is upsampled again

  def gradients(q, maps, g):  # g: what comes from behind
    return jax.grad(lambda *x: jnp.sum(form(*x) * g), PASSES[name])(q, maps), form(q, maps)
  with mesh_context(mesh):
    make = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16,
                                           sharding=NamedSharding(mesh, PartitionSpec()))
    maps = [make(images, *(SIDE * WINDOW >> r,) * 2, c) for r, c in enumerate(WIDTHS)]
    q = make(images, SIDE, SIDE, sum(WIDTHS))
    program = jax.jit(form).lower(q, maps) if PASSES[name] is None else (
        jax.jit(gradients).lower(q, maps, q))
    text = program.compile(compiler_options(mesh)).as_text()
  chip = slices.chip(chosen)
  got = roofline.estimate(hlo.parse(text), chip, links.Network(mesh, chosen, chip))
  return {"bytes": got.hbm_bytes, "memory": got.memory, "step": got.expected, "clock": chip.clock}


if __name__ == "__main__":
  main()
