"""Tells what a folder is, without loading weights.

  python -m conversion.inspect DIR

DIR may be a published checkpoint, a language model, a CLIP or OpenCLIP tower, a stage-1 adapter, a
diffusers SDXL, or an mgjax run.  Exits with 0 if everything is there, with 1 if tensors are missing
or unknown.
"""
from __future__ import annotations

import argparse
import collections
import re
import sys
from pathlib import Path

from conversion import mapping, sdxl
from conversion.config import (
    CLIP,
    CONVNEXT,
    is_multimodal,
    read_clip,
    read_convnext,
    read_decoder,
    read_json,
    read_model,
)
from conversion.families import family_of, guess_template
from conversion.sdxl_mapping import sdxl_rows
from conversion.sources import (
    ADAPTER,
    adapter_tensors,
    clip_tensors,
    is_clip,
    is_openclip,
    openclip_tensors,
)
from conversion.tensors import ConversionError, Header, Tensors, open_tensors
from conversion.to_hf import open_checkpoint
from conversion.transfer import tool
from mgjax.checkpoint import STEPS
from mgjax.config import ClipVitConfig, ConvNextConfig, ModelConfig
from mgjax.data.tokenizer import has_tokenizer, load_tokenizer


def is_run(folder: Path) -> bool:
  """Whether a folder is an mgjax run, or one of its steps."""
  return (folder / STEPS).is_dir() or (folder / "state").is_dir() and folder.parent.name == STEPS


def open_any(folder: Path) -> Tensors:
  """The tensors of an mgjax run or of a HuggingFace folder, by the original's names."""
  if not folder.is_dir():
    raise ConversionError(f"{folder}: no such folder")
  if pipeline := open_sdxl(folder):
    return pipeline.tensors
  return open_checkpoint(folder).tensors if is_run(folder) else open_tensors(folder)


def open_sdxl(folder: Path) -> sdxl.Pipeline | None:
  """SDXL as an mgjax run or a diffusers folder, None for anything else."""
  if is_run(folder):
    return sdxl.open_run(folder) if sdxl.is_sdxl(folder) else None
  return sdxl.open_pipeline(folder) if sdxl.is_pipeline(folder) else None


def describe(folder: Path) -> tuple[list[tuple[str, str]], bool]:
  """(what, value) pairs, and whether the folder is whole.  Raises ConversionError."""
  if not folder.is_dir():
    raise ConversionError(f"{folder}: no such folder")
  if pipeline := open_sdxl(folder):
    what = "mgjax run of SDXL" if is_run(folder) else "diffusers SDXL"
    return _facts(what, pipeline.tensors, sdxl.facts(pipeline.model), sdxl_rows(pipeline.model))
  if is_run(folder):
    return _describe_run(folder)
  if is_clip(folder):
    tensors, config = clip_tensors(folder), read_json(folder / "config.json")
    clip = read_clip(tensors.headers, str(folder), config)
    rows = mapping.clip_rows(clip)
    return _facts("CLIP tower", tensors, [("size", _clip(clip))], rows)
  if is_openclip(folder):
    tensors = openclip_tensors(folder)
    hr = read_convnext(tensors.headers, str(folder), folder.name)
    rows = mapping.convnext_rows(hr)
    return _facts("OpenCLIP ConvNeXt tower", tensors, [("size", _convnext(hr))], rows)
  if (folder / ADAPTER).is_file():
    tensors, _ = adapter_tensors(folder)
    return _facts("stage-1 adapter", tensors, [], None)
  return _describe_model(folder)


def _describe_run(folder: Path):
  source = open_checkpoint(folder)
  run = source.run
  lines = _model(source.model) + [
      ("template", run["chat_template"] or run["data"]["template"]),
      ("stop ids", str(list(run.get("chat_stop_ids", ())))),
      ("longest", f"{run['data']['max_length']} tokens")]
  return _facts("mgjax run", source.tensors, lines, mapping.all_rows(source.model))


def _describe_model(folder: Path):
  config = read_json(folder / "config.json")
  family = family_of(config, str(folder))
  tensors = open_tensors(folder)
  what = ("checkpoint of the original" if is_multimodal(config) else "language model")
  tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
  vocab_size = read_decoder(config, str(folder / "config.json")).vocab_size
  lines = [("family", f"{family.kind} (model_type {config['model_type']})"),
           ("template", guess_template(family, vocab_size, tokenizer and tokenizer.has)),
           ("tokenizer", f"{tokenizer.vocab_size} entries" if tokenizer else "none")]
  if is_multimodal(config):
    lines += [("towers named", f"{config['mm_vision_tower']}, {config.get('mm_vision_tower_aux')}")]
    towers = {"CLIP": CLIP} | ({"ConvNeXt": CONVNEXT} if config.get("mm_vision_tower_aux") else {})
    lost = [tower for tower, prefix in towers.items()
            if not any(n.startswith(prefix) for n in tensors.headers)]
    if lost:
      facts, _ = _facts(what, tensors, lines, None)
      return [*facts, ("missing", f"{' and '.join(lost)}; convert it with --towers")], False
  model = read_model(config, tensors.headers, str(folder / "config.json"))
  if model.decoder.tied_head:  # often stored again
    lines.append(("head", "the embedding table"))
    tensors = tensors.renamed(lambda n: None if n == mapping.HEAD else n)
  return _facts(what, tensors, lines + _model(model), mapping.all_rows(model))


def _model(model: ModelConfig) -> list[tuple[str, str]]:
  d = model.decoder
  lines = [("language model", f"{d.depth} layers x {d.width}, {d.heads} heads ({d.kv_heads} of "
            f"keys, {d.head_dim} wide), MLP {d.mlp_width} {d.activation}"
            + (f", {d.experts_per_token} of {d.experts} experts" if d.experts else "")
            + (f", window {d.sliding_window}" if d.sliding_window else "")
            + f", vocabulary {d.vocab_size}" + (", tied head" if d.tied_head else ""))]
  if model.vision is not None:
    lines += [("CLIP", _clip(model.vision))]
    lines += [("ConvNeXt", _convnext(model.vision_hr))] if model.vision_hr else []
    lines += [("pictures", f"{model.lr_size} / {model.hr_size} pixels, grid {model.grid}"
               f"{' + global view' if model.global_view else ''}, {model.visual_tokens} tokens, "
               f"projector of {model.projector_depth} layers")]
  return lines


def _clip(config: ClipVitConfig) -> str:
  return (f"{config.depth} layers x {config.width}, {config.heads} heads, {config.image_size} "
          f"pixels in patches of {config.patch_size}")


def _convnext(config: ConvNextConfig) -> str:
  return f"depths {config.depths}, widths {config.widths}"


def _facts(what: str, tensors: Tensors, lines, rows) -> tuple[list[tuple[str, str]], bool]:
  by_dtype: dict[str, int] = collections.Counter()
  for header in tensors.headers.values():
    by_dtype[header.dtype.name] += header.nbytes
  count = sum(_size(h) for h in tensors.headers.values())
  parts = collections.Counter(_part(n) for n in tensors.headers)
  out = [("what", what), *lines,
         ("numbers", f"{count / 1e6:.1f} M: " + ", ".join(
             f"{n / 1e9:.2f} GB of {d}" if n > 1e8 else f"{n / 1e6:.2f} MB of {d}"
             for d, n in by_dtype.items())),
         ("tensors", f"{len(tensors.headers)}: " + ", ".join(f"{p} {n}" for p, n in parts.items()))]
  if rows is None:
    return out, True
  known = {row.hf for row in rows}
  missing = [row.hf for row in rows if row.hf not in tensors.headers]
  extra = [n for n in tensors.headers if n not in known]
  buffers = [n for n in extra if mapping.IGNORED.search(n)]
  unknown = [n for n in extra if n not in buffers]
  some = lambda names: f"{len(names)}: {', '.join(names[:5])}" if names else "none"
  out += [("missing", some(missing)), ("unknown", some(unknown))]
  out += [("buffers", some(buffers))] if buffers else []
  return out, not missing and not unknown


def _size(header: Header) -> int:
  return header.nbytes // header.dtype.itemsize


def _part(name: str) -> str:
  if "/" in name:  # of SDXL
    return name.split("/")[0]
  for part, prefix in (("CLIP", CLIP), ("ConvNeXt", CONVNEXT), ("mining", "model.vlm_uni"),
                       ("projector", "model.mm_projector")):
    if name.startswith(prefix):
      return part
  return "language model" if re.match(r"model\.|lm_head", name) else "other"


def main(argv: list[str] | None = None) -> int:
  """The program; returns its exit code."""
  parser = argparse.ArgumentParser(
      prog="python -m conversion.inspect", description=__doc__, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", type=Path, metavar="DIR")
  args = parser.parse_args(argv)
  with tool() as outcome:
    lines, whole = describe(args.folder)
    for what, value in lines:
      print(f"{what:15} {value}")
    outcome.code = 0 if whole else 1
  return outcome.code


if __name__ == "__main__":
  sys.exit(main())
