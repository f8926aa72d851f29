"""The table of decoding in docs/tpu.md: what one more token, and the reading of a prompt, take on
slices, by the TPU compiler's account.

    python benchmarks/decode.py           # sketches, a minute or two each; goes on where it stopped
    python benchmarks/decode.py --table   # print what stands in docs/decode.jsonl
"""
import argparse
import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # it cannot hold programs for other machines

from pods import load  # noqa: E402

from mgjax.tpu import account, slices  # noqa: E402
from mgjax.tpu.aot import Generation  # noqa: E402

_REPO = Path(__file__).resolve().parents[1]
PRESETS, SLICES, ROWS, LENGTH = ("mgm-7b", "mgm-34b"), ("v5e-8", "v5p-8"), (1, 8, 64), 2048
FORMATS = {"bf16": (None, None), "int8": ("int8", "int8")}  # weights, cache


def measured(preset: str, name: str, weights: str, program: str, rows: int) -> dict:
  """A row: a program of a preset on a slice, all of whose chips share every layer."""
  chosen = slices.parse_slice(name)
  quantize, cache = FORMATS[weights]
  config = load(2, preset, {"mesh.tensor": chosen.chips, "mesh.fsdp": 1})
  made = account.of_config(config, Generation(program, quantize, cache), chosen, rows=rows,
                           length=LENGTH, sketched=True)[0]
  row = {"preset": preset, "slice": name, "weights": weights, "program": program, "rows": rows,
         "fits": made.fits, "command":
         f"python launch/compile.py --sketch --config=configs/stage2.py:{preset} --topology={name} "
         f"--config.mesh.tensor={chosen.chips} --config.mesh.fsdp=1 --{program} --rows={rows} "
         f"--length={LENGTH}" + f" --quantize={quantize} --cache_dtype={cache}" * bool(quantize)}
  if made.fits:
    kept = ("chips", "hbm_bytes", "reads", "step", "bound", "binds", "mfu_bound", "mfu")
    row |= {k: getattr(made, k) for k in kept} | {"peak": made.memory.peak}
  else:
    row |= {"needed": made.needed}
  return row


def table(rows: list[dict]) -> str:
  """Markdown: a line for each model, slice and format."""
  lines = ["| model | slice | weights, cache | GiB a chip | bytes: read / needed | tokens/s at 1 | "
           "at 8 | at 64 | at most at 64 | prefill: MFU bound | tokens/s |", "|" + "---|" * 11]
  for preset in PRESETS:
    for name in SLICES:
      for weights in FORMATS:
        own = {(r["program"], r["rows"]): r for r in rows
               if (r["preset"], r["slice"], r["weights"]) == (preset, name, weights)}
        decodes = [own.get(("decode", n)) for n in ROWS]
        if not all(decodes):
          continue
        fitting = [r for r in decodes if r["fits"]]
        speed = [f"{r['rows'] / r['step']:,.0f}" if r["fits"] else
                 f"needs {r['needed'] / 2**30:.1f} GiB" for r in decodes]
        most = decodes[-1]["rows"] / decodes[-1]["bound"] if decodes[-1]["fits"] else None
        read = [r["hbm_bytes"] / r["reads"] for r in fitting]
        prefill = own.get(("prefill", 1))
        lines.append(
            f"| {preset} | {name} | {weights} | {fitting[-1]['peak'] / 2**30:.1f} | "
            f"{min(read):.2f} to {max(read):.2f} | {' | '.join(speed)} | "
            f"{f'{most:,.0f}' if most else ''} | " + (
                f"{prefill['mfu_bound']:.0%} | {LENGTH / prefill['step']:,.0f} |"
                if prefill and prefill["fits"] else "| |"))
  return "\n".join(lines)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--out", type=Path, default=_REPO / "docs" / "decode.jsonl",
                      help="JSON lines")
  parser.add_argument("--table", action="store_true", help="print the table of the file")
  args = parser.parse_args()
  text = args.out.read_text() if args.out.exists() else ""
  rows = [json.loads(line) for line in text.splitlines()]
  keys = ("preset", "slice", "weights", "program", "rows")
  done = {tuple(r[k] for k in keys) for r in rows}
  wanted = [(p, s, w, program, n) for p in PRESETS for s in SLICES for w in FORMATS
            for program, counts in (("decode", ROWS), ("prefill", (1,))) for n in counts]
  for key in wanted if not args.table else ():
    if key not in done:
      rows.append(measured(*key))
      with args.out.open("a") as file:
        file.write(json.dumps(rows[-1]) + "\n")
      print({k: v for k, v in rows[-1].items() if k != "command"}, flush=True)
  print(table(rows))
  return 0


if __name__ == "__main__":
  sys.exit(main())
