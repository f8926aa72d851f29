"""The table of docs/tpu.md: every preset and stage on the smallest slice that takes its batch.

    python benchmarks/pods.py           # sketches: an hour or two; goes on where it stopped
    python benchmarks/pods.py --table   # print what stands in docs/pods.jsonl

A row is found by trying slices from the smallest on; on the first that anything of TRIED fits, the
first of it that does is made faster by experts over chips, and by data parallelism over two groups
of chips.
"""
import argparse
import importlib.util
import json
import math
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

from mgjax.checkpoint import abstract_params  # noqa: E402
from mgjax.config import ConfigError  # noqa: E402
from mgjax.models.remat import SAVED
from mgjax.presets import PRESETS  # noqa: E402
from mgjax.sharding import check_heads, make_mesh, mesh_context  # noqa: E402
from mgjax.tpu import account, slices  # noqa: E402
from mgjax.tpu.report import Report  # noqa: E402
from mgjax.train.compiled import mesh_of
from mgjax.train.config import RunConfig, run_config  # noqa: E402
from mgjax.train.optimizer import split_frozen  # noqa: E402
from mgjax.train.state import model_builder  # noqa: E402

_REPO = Path(__file__).resolve().parents[1]
GENERATIONS = ("v5e", "v5p", "v6e")
TRIED = tuple({"accumulate": n, "remat.decoder": policy} for n, policy in (
    (1, "save_products"), (1, "save_qkv_attention"), (1, "nothing_saveable"), (2, "save_products"),
    (2, "nothing_saveable"), (4, "nothing_saveable")))


def configs() -> list[tuple[int, str]]:
  """(stage, preset) of every published recipe; high definition begins in stage 2."""
  names = [name for name in PRESETS if name.startswith("mgm-") and not name.endswith("-lr")]
  return [(2, n) for n in names] + [(1, n) for n in names if not n.endswith("-hd")]


def load(stage: int, preset: str, changes: dict) -> RunConfig:
  """The config file of a stage, with some of its keys changed."""
  path = _REPO / "configs" / f"stage{stage}.py"
  spec = importlib.util.spec_from_file_location("config_file", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(preset)
  config.update_from_flattened_dict(changes)
  return run_config(config.to_dict())


def smallest(stage: int, preset: str, generation: str) -> dict:
  """The row of a preset on a generation."""
  sketched = lambda changes: _fitting(stage, preset, changes, chosen)
  for number in slices.SLICES[generation]:
    chosen = slices.parse_slice(f"{generation}-{number}")
    if not _state_fits(load(stage, preset, {}), chosen):
      continue
    tried = [changes for changes in TRIED if _divides(load(stage, preset, changes), chosen)]
    if not tried or (lean := sketched(tried[-1])) is None:
      continue
    for changes in tried:
      kept = _kept(load(stage, preset, changes)) / chosen.chips
      if lean.memory.peak + kept > lean.memory.available:
        continue  # saves a sketch
      if (best := sketched(changes)) is None:
        continue
      axes = [("mesh.data", (2,))]
      if PRESETS[preset].model.decoder.experts:
        axes.insert(0, ("mesh.expert", (8, 4)))
      for axis, sizes in axes:
        for size in sizes:
          made = sketched(changes | {axis: size}) if best.mesh.get("fsdp", 1) > 8 else None
          if made is not None and made.step < best.step:
            best, changes = made, changes | {axis: size}
            break
      return _row(stage, preset, best, changes)
  return {"stage": stage, "preset": preset, "generation": generation, "fits": False}


def _divides(config, chosen) -> bool:
  """Whether the rows of a micro-batch, and the heads, divide among the chips."""
  try:
    check_heads(config.model.decoder, mesh_of(config, slices.describe(chosen)))
  except ConfigError:
    return False
  return True


def _fitting(stage, preset, changes, chosen) -> Report | None:
  """The sketch of a config on a slice, if its rows divide among the chips and it fits."""
  try:
    made = account.of_config(load(stage, preset, changes), "train", chosen, sketched=True)[0]
  except ConfigError:
    return None
  return made if made.fits else None


def _state_fits(config, chosen) -> bool:
  """Whether the arrays that stay, and gradients, could fit; saves trying slices far too small."""
  mesh = make_mesh(devices=jax.local_devices()[:1])
  with mesh_context(mesh):
    shapes = abstract_params(model_builder(config), mesh)[1]
  count = lambda tree: sum(math.prod(s.shape) for s in jax.tree.leaves(tree))
  trained, frozen = map(count, split_frozen(shapes, config.optimizer.table))
  return 14 * trained + 2 * frozen < 0.9 * chosen.chips * slices.chip(chosen).hbm


def _kept(config) -> float:
  """Bytes that the decoder keeps for the backward pass, of one micro-batch on all chips."""
  c = config.model.decoder
  heads, mlp = c.heads * c.head_dim, c.mlp_width * max(1, c.experts_per_token * (c.experts > 0))
  of = {"qkv": 2 * (heads + 2 * c.kv_heads * c.head_dim), "attention": 2 * heads,
        "residual": 2 * c.width, "mlp": 4 * mlp}
  a_token = sum(of[name] for name in SAVED.get(config.remat.decoder, ()))
  return a_token * c.depth * config.data.batch_size * config.data.row_length / config.accumulate


def _row(stage, preset, made: Report, changes) -> dict:
  flags = "".join(f" --config.{k}={v}" for k, v in changes.items())
  kept = ("slice", "chips", "mesh", "fits", "step", "mfu", "mfu_bound", "links", "exposed", "binds",
          "calibration", "whole", "useful", "hours")
  return {k: v for k, v in made.as_json().items() if k in kept} | {
      "stage": stage, "preset": preset, "generation": made.slice.split("-")[0],
      "peak": made.memory.peak,
      "command": f"python launch/compile.py --sketch --config=configs/stage{stage}.py:{preset} "
                 f"--topology={made.slice}{flags}"}


def table(rows: list[dict]) -> str:
  """Markdown."""
  lines = ["| stage | preset | slice | mesh | GiB a chip | step s | MFU | MFU bound | "
           "links busy | waited for | useful tokens | hours | flags |", "|" + "---|" * 13]
  for r in rows:
    if not r["fits"]:
      lines.append(f"| {r['stage']} | {r['preset']} | none of {r['generation']} |" + " |" * 10)
      continue
    mesh = " x ".join(f"{a} {n}" for a, n in r["mesh"].items()) or "1"
    flags, peak = " ".join(r["command"].split()[5:]), r["peak"] / 2**30
    flags = flags.replace("--config.", "")
    lines.append(
        f"| {r['stage']} | {r['preset']} | {r['slice']} | {mesh} | {peak:.1f} | {r['step']:.2f} "
        f"| {r['mfu']:.0%} | {r['mfu_bound']:.0%} | {r['links'] / r['step']:.0%} "
        f"| {r['exposed'] / r['step']:.0%} | {r['useful']:.0%} | {r['hours']:.1f} | `{flags}` |")
  return "\n".join(lines)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--out", default=_REPO / "docs" / "pods.jsonl", help="JSON lines")
  parser.add_argument("--only", default="", help="part of \"stage preset generation\"")
  parser.add_argument("--table", action="store_true", help="print the table of the file")
  args = parser.parse_args()
  out = Path(args.out)
  rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
  if args.table:
    print(table(sorted(rows, key=lambda r: (r["stage"], r["preset"], r["generation"]))))
    return 0
  done = {(r["stage"], r["preset"], r["generation"]) for r in rows}
  out.parent.mkdir(parents=True, exist_ok=True)
  for stage, preset in configs():
    for generation in GENERATIONS:
      if (stage, preset, generation) in done or args.only not in f"{stage} {preset} {generation}":
        continue
      row = smallest(stage, preset, generation)
      with out.open("a") as file:
        file.write(json.dumps(row) + "\n")
      print(table([row]).splitlines()[-1], flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())
