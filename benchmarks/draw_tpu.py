"""The table of drawing in docs/tpu.md: what pictures take on slices, by the TPU compiler's account.

    python benchmarks/draw_tpu.py           # compiled whole, minutes each; goes on where it stopped
    python benchmarks/draw_tpu.py --table   # print what stands in docs/draw.jsonl
"""
import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # it cannot hold programs for other machines

from pods import load  # noqa: E402

from mgjax.diffusion.config import SdxlConfig  # noqa: E402
from mgjax.diffusion.painter import Painting  # noqa: E402
from mgjax.tpu import account, slices  # noqa: E402
from mgjax.tpu.aot import Generation  # noqa: E402
from mgjax.tpu.drawing import drawings  # noqa: E402

_REPO = Path(__file__).resolve().parents[1]
SETTINGS = (("v5e-8", 1, 30), ("v5e-4", 1, 30), ("v5e-4", 8, 30),
            ("v5e-8", 8, 30))  # slice, pictures, steps
BESIDE = "mgm-7b"  # all chips sharing every layer, 8 rows of 2048
KEPT = ("chips", "mesh", "model_flops", "compiled_flops", "hbm_bytes", "products", "links",
        "exposed", "bound", "binds", "step", "mfu", "compile_seconds")


def measured(name: str, pictures: int, steps: int, done: set[str]) -> Iterator[dict]:
  """A row for each program that is not done yet."""
  chosen = slices.parse_slice(name)
  command = (f"python launch/compile.py --draw --topology={name} --pictures={pictures} "
             f"--draw_steps={steps}")
  for job in drawings(SdxlConfig(), Painting(steps=steps), pictures, chosen):
    if job.program in done:
      continue
    made = account.of_job(job, chosen)
    row = {"slice": name, "pictures": pictures, "steps": steps, "program": job.program,
           "runs": job.runs, "fits": made.fits, "command": command}
    if made.fits:
      row |= {k: getattr(made, k) for k in KEPT} | {"peak": made.memory.peak}
    else:
      row |= {"needed": made.needed}
    yield row


def beside(name: str) -> dict:
  """Bytes a chip of a language model that waits while pictures are drawn."""
  chosen = slices.parse_slice(name)
  changes = {"mesh.tensor": chosen.chips, "mesh.fsdp": 1}
  size = account.kept(load(2, BESIDE, changes), Generation("decode"), chosen, rows=8, length=2048)
  flags = " ".join(f"--config.{k}={v}" for k, v in changes.items())
  return {"slice": name, "program": BESIDE, "bytes": size, "command":
          f"python launch/compile.py --draw --topology={name} "
          f"--config=configs/stage2.py:{BESIDE} {flags} --rows=8 --length=2048"}


def table(rows: list[dict]) -> str:
  """Markdown: a line for each slice and number of pictures."""
  lines = ["| slice | pictures | steps | seconds | a step, ms | decoding, s | MFU of the steps | "
           f"GiB a chip | with {BESIDE} beside |", "|" + "---|" * 9]
  waiting = {r["slice"]: r["bytes"] for r in rows if r["program"] == BESIDE}
  for setting in SETTINGS:
    own = {r["program"]: r for r in rows
           if r["program"] != BESIDE and (r["slice"], r["pictures"], r["steps"]) == setting}
    if len(own) < 3:
      continue
    name, pictures, steps = setting
    if not all(r["fits"] for r in own.values()):
      needed = max(r.get("needed", 0) for r in own.values())
      lines.append(f"| {name} | {pictures} | {steps} | needs {needed / 2**30:.1f} GiB |")
      continue
    sample, decode = own["sample"], own["decode"]
    peak, whole = max(r["peak"] for r in own.values()), sum(
        r["runs"] * r["step"] for r in own.values())
    lines.append(
        f"| {name} | {pictures} | {steps} | {whole:.2f} | "
        f"{1e3 * sample['step'] / steps:.0f} | {decode['runs'] * decode['step']:.2f} | "
        f"{sample['mfu']:.0%} | {peak / 2**30:.1f} | {(peak + waiting[name]) / 2**30:.1f} |")
  return "\n".join(lines)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--out", type=Path, default=_REPO / "docs" / "draw.jsonl", help="JSON lines")
  parser.add_argument("--table", action="store_true", help="print the table of the file")
  args = parser.parse_args()
  text = args.out.read_text() if args.out.exists() else ""
  rows = [json.loads(line) for line in text.splitlines()]

  def add(row: dict) -> None:
    rows.append(row)
    with args.out.open("a") as file:
      file.write(json.dumps(row) + "\n")
    print({k: v for k, v in row.items() if k != "command"}, flush=True)

  if not args.table:
    for name in dict.fromkeys(name for name, *_ in SETTINGS):
      if not any((r["slice"], r["program"]) == (name, BESIDE) for r in rows):
        add(beside(name))
    for setting in SETTINGS:
      done = {r["program"] for r in rows if r["program"] != BESIDE
              and (r["slice"], r["pictures"], r["steps"]) == setting}
      for row in measured(*setting, done):
        add(row)
  print(table(rows))
  return 0


if __name__ == "__main__":
  sys.exit(main())
