"""An mgjax checkpoint -> a HuggingFace folder that the original's code loads.

  python -m conversion.to_hf --checkpoint work_dirs/mgm-7b --output MGM-7B [--shard-size 5GB]
  python -m conversion.to_hf --checkpoint work_dirs/mgm-7b-stage1 --output adapter --adapter-only
  python -m conversion.to_hf --checkpoint work_dirs/mgm-7b-lora --output adapter --peft
  python -m conversion.to_hf --checkpoint checkpoints/sdxl --output sdxl    # for diffusers

Adapters of a run of configs/lora.py are merged into their layers; --peft writes them alone, as the
folder of the peft library.  Otherwise it writes config.json, sharded safetensors with their index,
and the tokenizer and generation files; with --adapter-only the mm_projector.bin of a stage 1.
Numbers stay as they are saved (what trained is float32) unless --dtype asks for another type; the
published checkpoints are bfloat16.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np

from conversion import lora, mapping, sdxl
from conversion.arrays import (
    Shards,
    as_original,
    held_parts,
    read_notes,
    with_buffers,
    write_shards,
)
from conversion.config import read_json, write_config
from conversion.families import Json, family_of
from conversion.sources import ADAPTER
from conversion.store import parameter_shapes
from conversion.tensors import DTYPES, ConversionError, Tensors, contiguous, plan_shards
from conversion.transfer import Job, finished_folder, needs_space, run_jobs, tool
from mgjax.checkpoint import ORIGIN, SETTINGS, TOKENIZER, TOKENIZER_FILES, read_run
from mgjax.config import ModelConfig, build
from mgjax.data.tokenizer import load_tokenizer

# Everything before the language model.  Stage 1 saves what has one of these in its name (R2.5), so
# both towers in full.
_SEEING = ("mm_projector", "vlm_uni", "vision_tower")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """An mgjax checkpoint as the original would see it."""

  folder: Path           # of the run
  model: ModelConfig
  run: Json              # its config.json
  tensors: Tensors       # by the original's names

  @property
  def origin(self) -> Path:
    return self.folder / ORIGIN


def open_checkpoint(path: Path, dtype: np.dtype | None = None) -> Checkpoint:
  """A run folder, or one step of it; numbers as `dtype` if given.  Raises ConversionError or
  CheckpointError."""
  step_dir, run = read_run(path)
  folder = step_dir.parent.parent
  if run["objective"] != "language":
    raise ConversionError(f"{path}: this run trained a tower alone ({run['objective']}); only "
                          "whole models have a HuggingFace form")
  model = build(ModelConfig, run["model"], f"{folder}/config.json: model")
  reader = lora.open_reader(step_dir)
  held = held_parts(reader, parameter_shapes(model), ("projector", "mining"))
  rows = [row for row in mapping.all_rows(model) if row.path.split("/")[0] in held]
  notes = read_notes(folder)
  tensors = as_original(reader, rows, notes["dtypes"], dtype)
  if notes.get("copied_head"):  # of the embedding table, as the head
    tensors = tensors.renamed(lambda n: mapping.HEAD if n == mapping.TABLE else None).over(tensors)
  return Checkpoint(folder, model, run, with_buffers(tensors, folder))


def export(source: Checkpoint, output: Path, shard_bytes: int) -> None:
  """Writes the whole model to `output`, or nothing.  Raises ConversionError."""
  headers = source.tensors.headers
  if any(row.hf not in headers for row in mapping.all_rows(source.model)):
    raise ConversionError(f"{source.folder}: it has no projector yet, it is the start of stage 1; "
                          "train that first")
  needs_space(output, source.tensors.nbytes)
  # The original's loader takes the whole CLIP from the files that hold mining and ConvNeXt (R2.3),
  # so everything that sees lies in one file of its own.
  sees = lambda name: any(part in name for part in _SEEING)
  seeing = [n for n in headers if sees(n)]
  speaking = {n: h.nbytes for n, h in headers.items() if not sees(n)}
  names = list(plan_shards(speaking, shard_bytes)) + ([seeing] if seeing else [])
  with finished_folder(output) as part:
    write_settings(source, part)
    write_shards([Shards(part, "model", source.tensors, names, indexed=True)])
  _warn_of_name(output, source)


def export_adapter(source: Checkpoint, output: Path) -> None:
  """Writes mm_projector.bin and config.json as stage 1 does, or nothing."""
  try:
    import torch
  except ImportError as e:
    raise ConversionError(f"{output / ADAPTER}: .bin files are written by torch, which is not "
                          "installed: pip install -e '.[torch]'") from e
  headers = {n: h for n, h in source.tensors.headers.items()
             if any(part in n for part in _SEEING) and not mapping.IGNORED.search(n)}
  if not any("mm_projector" in n for n in headers):
    raise ConversionError(f"{source.folder}: no projector in it; --adapter-only needs a checkpoint "
                          "of stage 1 or 2")
  needs_space(output, sum(h.nbytes for h in headers.values()))
  with finished_folder(output) as part:
    write_settings(source, part, adapter=True)
    held = {}

    def job(name: str) -> None:
      value = contiguous(source.tensors.read(name))
      if value.dtype == DTYPES["BF16"]:
        held[name] = torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
      else:
        held[name] = torch.from_numpy(value)

    run_jobs("reading", [Job(h.nbytes, lambda n=n: job(n)) for n, h in headers.items()])
    with open(part / ADAPTER, "wb") as file:
      torch.save({n: held[n] for n in headers}, file)
      os.fsync(file.fileno())


def write_settings(source: Checkpoint, part: Path, *, adapter: bool = False) -> None:
  """config.json, generation_config.json and the tokenizer."""
  run, origin = source.run, source.origin
  dtype, notes = source.tensors.headers[mapping.TABLE].dtype.name, origin / "tensors.json"
  if notes.is_file() and read_json(notes).get("dtype") == dtype:
    dtype = None  # as it came: config.json says so, or says something else on purpose
  base = read_json(origin / "config.json") if (origin / "config.json").is_file() else None
  config = write_config(source.model, base, aspect=run["chat_aspect"] or run["data"]["aspect"],
                        max_length=run["data"]["max_length"], dtype=dtype)
  if base is None and (source.folder / TOKENIZER).is_dir():
    tokenizer = load_tokenizer(source.folder / TOKENIZER)
    config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id,
               "pad_token_id": tokenizer.pad_id}
  if adapter:
    config["tune_mm_mlp_adapter"] = True
  (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  if adapter:
    return
  for file in origin.iterdir() if origin.is_dir() else ():
    if file.name in SETTINGS:
      shutil.copy(file, part)
  if not (part / "generation_config.json").exists():
    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")
           if config.get(k) is not None}
    if stops := run.get("chat_stop_ids"):
      ids["eos_token_id"] = list(stops)
    (part / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
  for name in TOKENIZER_FILES:
    if (source.folder / TOKENIZER / name).is_file():
      shutil.copy(source.folder / TOKENIZER / name, part)


def _warn_of_name(output: Path, source: Checkpoint) -> None:
  """The original picks its class by the folder's name (R2.3)."""
  if source.model.vision is None:
    return
  family = family_of(read_json(output / "config.json"), str(output))
  wanted = ["mgm"] + {"Gemma": ["2b"], "Mixtral": ["8x7b"]}.get(family.kind, [])
  if missing := [w for w in wanted if w not in output.name.lower()]:
    print(f"note: the original's loader goes by the folder's name; for it, {output.name!r} must "
          f"contain {' and '.join(map(repr, missing))}")


def parse_size(text: str) -> int:
  """'5GB', '500MB' or bytes -> bytes."""
  match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
  if not match or not float(match.group(1)):
    raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5GB or 500MB")
  return int(float(match.group(1)) * 1000 ** " KMGT".index(match.group(2) or " "))


def main(argv: list[str] | None = None) -> int:
  """The program; returns its exit code."""
  parser = argparse.ArgumentParser(
      prog="python -m conversion.to_hf", description=__doc__, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR",
                      help="a run folder, or one of its steps")
  parser.add_argument("--output", type=Path, required=True, metavar="DIR",
                      help="the folder to make; must not exist")
  parser.add_argument("--shard-size", type=parse_size, metavar="SIZE",
                      help="most bytes a file (default: 5GB, the towers stay together; SDXL: one "
                           "file a part)")
  parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"),
                      help="type of the numbers; default: as saved")
  parser.add_argument("--adapter-only", action="store_true",
                      help="only what stage 1 trains, and the towers, as mm_projector.bin")
  parser.add_argument("--peft", action="store_true",
                      help="only the adapters, as a folder of the peft library")
  args = parser.parse_args(argv)
  if args.peft and (args.adapter_only or args.shard_size):
    parser.error("--peft goes without --adapter-only and --shard-size")
  with tool() as outcome:
    dtype = np.dtype(args.dtype) if args.dtype else None
    if args.peft:
      lora.export_peft(args.checkpoint, args.output, dtype)
    elif not args.adapter_only and sdxl.is_sdxl(args.checkpoint):
      sdxl.export(sdxl.open_run(args.checkpoint, dtype), args.output, args.shard_size, args.dtype)
    else:
      source = open_checkpoint(args.checkpoint, dtype)
      if args.adapter_only:
        export_adapter(source, args.output)
      else:
        export(source, args.output, args.shard_size or parse_size("5GB"))
    print(f"{args.output}: done")
  return outcome.code


if __name__ == "__main__":
  sys.exit(main())
