"""HuggingFace folders -> an mgjax checkpoint, tensor by tensor.

  python -m conversion.from_hf --checkpoint MGM-7B --output checkpoints/mgm-7b [--towers model_zoo]
  python -m conversion.from_hf --llm vicuna-7b --clip clip-vit-large-patch14-336 \\
      --openclip openclip-convnext-large-d-320 --output checkpoints/start-7b [--adapter FILE]
  python -m conversion.from_hf --llm SmolLM2-135M-Instruct --output checkpoints/smollm2
  python -m conversion.from_hf --peft ADAPTER --base checkpoints/mgm-7b --output work_dirs/adapted
  python -m conversion.from_hf --sdxl stable-diffusion-xl-base-1.0 --output checkpoints/sdxl

The first reads a published checkpoint; its towers come from it, or from --towers where it has none.
The second puts together the start of stage 1, with the mm_projector.bin of a stage 1 that of stage
2.  The third is a language model alone.  The fourth is a folder of the peft library, whose adapters
are for the model of a checkpoint, which stays where it is.  The result is a normal checkpoint:
launch/chat.py answers from it, launch/train.py goes on from it (--config.init_from=OUTPUT).  The
last is the folder of a diffusers pipeline, with all its parts.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from conversion import lora, mapping, sdxl
from conversion.arrays import array_plan, write_arrays, write_notes
from conversion.config import (
  CLIP,
  CONVNEXT,
  check_types,
  is_multimodal,
  read_aspect,
  read_clip,
  read_json,
  read_model,
  write_config,
)
from conversion.families import Json, family_of, guess_template
from conversion.sources import adapter_tensors, find_towers, read_towers
from conversion.store import Array, parameter_shapes
from conversion.tensors import ConversionError, Tensors, open_tensors
from conversion.transfer import finished_folder, needs_space, tool
from mgjax.checkpoint import ORIGIN, SETTINGS, TOKENIZER, write_run
from mgjax.config import ModelConfig
from mgjax.data.conversation import get_template
from mgjax.data.tokenizer import has_tokenizer, load_tokenizer
from mgjax.train.config import run_config


@dataclasses.dataclass(frozen=True)
class Source:
  """What is to be converted: tensors by the original's names, and what config.json says."""

  where: str
  tensors: Tensors
  config: Json
  model: ModelConfig
  folder: Path          # of the language model: tokenizer and settings
  complete: bool = True  # False: the start of stage 1, whose projector and mining are still to come


def published(checkpoint: Path, towers: Path | None) -> Source:
  """A checkpoint of the original, or a language model alone."""
  if sdxl.is_pipeline(checkpoint):
    raise ConversionError(f"{checkpoint}: this is a diffusers pipeline; convert it with --sdxl")
  where = str(checkpoint / "config.json")
  config = read_json(checkpoint / "config.json")
  check_types(config, where)
  tensors, clip = open_tensors(checkpoint), None
  if not is_multimodal(config):
    if towers is not None:
      raise ConversionError(f"{where}: no mm_vision_tower in it, so --towers has no use; to put a "
                            "language model and towers together use --llm, --clip and --openclip")
  elif towers is not None:
    names = [config["mm_vision_tower"], config.get("mm_vision_tower_aux")]
    clip_folder, openclip_folder = find_towers(towers, names)
    clip = clip_folder and read_json(clip_folder / "config.json")
    tensors = tensors.over(read_towers(clip_folder, openclip_folder))
  else:
    for prefix, key in ((CLIP, "mm_vision_tower"), (CONVNEXT, "mm_vision_tower_aux")):
      if config.get(key) and not any(name.startswith(prefix) for name in tensors.headers):
        raise ConversionError(f"{checkpoint}: the towers are not in it; name the folder that holds "
                              f"{config[key]} with --towers")
  model = read_model(config, tensors.headers, where, clip)
  side = model.vision and model.vision.side * model.grid
  if towers is not None and model.vision_hr and model.hr_size != 32 * side:
    raise ConversionError(
        f"{where}: image_size_aux {model.hr_size} and a CLIP of {side} patches a side "
        f"(embeddings.position_embedding.weight) do not make windows of 8x8; {towers} holds "
        "another CLIP")
  return Source(str(checkpoint), tensors, config, model, checkpoint)


# What stage 1 says of the pictures that it has learnt from.
_VIEWS = ("mm_vision_tower", "mm_vision_tower_aux", "mm_vision_select_layer", "image_size_aux",
          "image_grid", "image_global", "tokenizer_model_max_length")


def assembled(llm: Path, clip: Path | None, openclip: Path | None, adapter: Path | None) -> Source:
  """The start of a stage from a language model, towers, and perhaps what stage 1 left."""
  where = str(llm / "config.json")
  config = read_json(llm / "config.json")
  if is_multimodal(config):
    raise ConversionError(f"{llm}: this is a whole checkpoint of the original; convert it with "
                          "--checkpoint")
  tensors = open_tensors(llm)
  if clip is None and openclip is None and adapter is None:
    return Source(str(llm), tensors, config, read_model(config, tensors.headers, where), llm)
  extra, learnt = read_towers(clip, openclip), {}
  if adapter is not None:
    # What stage 1 saved of the towers is what it looked through (R2.5).
    saved, learnt = adapter_tensors(adapter)
    extra = saved.over(extra)
  has = lambda prefix: any(name.startswith(prefix) for name in extra.headers)
  if not has(CLIP):
    raise ConversionError(f"{llm}: towers without a CLIP; give its folder with --clip")
  depth = sum(n.startswith("model.mm_projector") and n.endswith("weight") for n in extra.headers)
  views = {key: learnt[key] for key in _VIEWS if learnt.get(key) is not None}
  views |= {"mm_vision_tower": str(clip)} if clip else {}
  views |= {"mm_vision_tower_aux": str(openclip)} if openclip else {}
  views.setdefault("mm_vision_tower", "clip")
  views.setdefault("mm_vision_select_layer", -2)
  views["mm_projector_type"] = "linear" if depth == 1 else f"mlp{depth or 2}x_gelu"
  if has(CONVNEXT):
    views.setdefault("mm_vision_tower_aux", "openclip")
    # Windows of 8x8, as in every release: 336 / 768.
    views.setdefault("image_size_aux", 32 * read_clip(extra.headers, str(clip or adapter)).side)
  tensors = extra.over(tensors)
  clip_config = read_json(clip / "config.json") if clip else None
  model = read_model(config | {"model_type": family_of(config, where).model_type} | views,
                     tensors.headers, where, clip_config)
  if model.vision.width == 1024 and model.vision.image_size != 336:
    raise ConversionError(
        f"{clip or adapter}: this CLIP sees {model.vision.image_size} pixels "
        "(embeddings.position_embedding.weight); expected clip-vit-large-patch14-336")
  print(f"pictures: {model.lr_size} / {model.hr_size} pixels, {model.visual_tokens} tokens, "
        f"ConvNeXt widths {model.vision_hr and model.vision_hr.widths}")
  config = write_config(model, config, aspect="pad", dtype=None,
                        max_length=views.get("tokenizer_model_max_length", 2048)) | views
  return Source(str(llm), tensors, config, model, llm, complete=adapter is not None)


def convert(source: Source, output: Path, *, template: str | None = None,
            tokenizer_dir: Path | None = None, activation: str | None = None) -> None:
  """Writes `output`, whole or not at all.  Raises ConversionError."""
  model = source.model
  if activation:
    model = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder,
                                                                   activation=activation))
  rows = mapping.all_rows(model)
  if not source.complete:
    rows = [r for r in rows if not r.path.startswith(("projector/", "mining/"))]
  tensors, copied = without_copy(source.tensors, model)
  covered = {r.path for r in rows}
  shapes = {k: v for k, v in parameter_shapes(model).items() if k in covered}
  mapping.check_fit(tensors.headers, rows, shapes, source.where)
  arrays = array_plan(tensors, rows, shapes)
  needs_space(output, sum(a.nbytes for a in arrays.values()))
  if tokenizer_dir is not None and not has_tokenizer(tokenizer_dir):
    raise ConversionError(f"{tokenizer_dir}: neither tokenizer.json nor tokenizer.model is in it")
  tokenizer_dir = tokenizer_dir or source.folder
  settings = chat_settings(source, model, tokenizer_dir, template)
  config = run_config({"model": dataclasses.asdict(model), **settings})

  with finished_folder(output) as part:
    write_origin(part / ORIGIN, source, tensors, rows, arrays, copied)
    write_run(part, dataclasses.asdict(config), settings["tokenizer"])
    write_arrays(part, tensors, rows, arrays)


def without_copy(tensors: Tensors, model: ModelConfig) -> tuple[Tensors, bool]:
  """Without a head that is only a copy of the embedding table, and whether there was one."""
  head, table = mapping.HEAD, mapping.TABLE
  if not model.decoder.tied_head or head not in tensors.headers or table not in tensors.headers:
    return tensors, False
  if not np.array_equal(tensors.read(head), tensors.read(table)):
    raise ConversionError(f"{tensors.headers[head].file}: {head} differs from {table}, but "
                          "config.json says that they are one (tie_word_embeddings)")
  return tensors.renamed(lambda n: None if n == head else n), True


def chat_settings(source: Source, model: ModelConfig, tokenizer_dir: Path,
                  template: str | None) -> Json:
  """What travels beside the weights: template, stop ids, how pictures are made square, length."""
  family = family_of(source.config, source.where)
  tokenizer = load_tokenizer(tokenizer_dir) if has_tokenizer(tokenizer_dir) else None
  if tokenizer is None:
    print(f"warning: {tokenizer_dir} holds no tokenizer; chat needs one: give --tokenizer, or put "
          f"tokenizer.json or tokenizer.model into OUTPUT/{TOKENIZER}", file=sys.stderr)
  if tokenizer is not None and tokenizer.vocab_size > model.decoder.vocab_size:
    print(f"warning: {tokenizer_dir}: its tokenizer has {tokenizer.vocab_size} entries, the model "
          f"{model.decoder.vocab_size}; they belong to different models", file=sys.stderr)
  name = get_template(template or guess_template(
      family, model.decoder.vocab_size, tokenizer and tokenizer.has)).name
  config, stops = source.config, set()
  for values in (config, optional_json(source.folder / "generation_config.json")):
    eos = values.get("eos_token_id")
    stops |= set(eos if isinstance(eos, list) else [] if eos is None else [eos])
  longest = min(config.get("max_position_embeddings") or 4096, 4096)
  aspect = read_aspect(config)
  return {"chat_template": name, "chat_stop_ids": tuple(sorted(stops)), "chat_aspect": aspect,
          "tokenizer": str(tokenizer_dir.absolute()) if tokenizer else "",
          "data": {"path": "", "template": name, "aspect": aspect,
                   "images_per_row": 1 if model.vision else 0,
                   "max_length": config.get("tokenizer_model_max_length") or longest}}


def optional_json(path: Path) -> Json:
  """A JSON file, {} if it is not there."""
  return read_json(path) if path.is_file() else {}


def write_origin(folder: Path, source: Source, tensors: Tensors, rows: list[mapping.Row],
                 arrays: Mapping[str, Array], copied: bool) -> None:
  """What the way back needs beside the arrays: settings, dtypes that a stack hides, buffers."""
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(source.config, indent=2) + "\n")
  for name in SETTINGS:
    if (source.folder / name).is_file():
      (folder / name).write_bytes((source.folder / name).read_bytes())
  write_notes(folder, tensors, rows, arrays, copied_head=copied,
              dtype=tensors.headers[mapping.TABLE].dtype.name)


def main(argv: list[str] | None = None) -> int:
  """The program; returns its exit code."""
  parser = argparse.ArgumentParser(
      prog="python -m conversion.from_hf", description=__doc__, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  add = lambda name, text, **kwargs: parser.add_argument(name, type=Path, metavar="DIR", help=text,
                                                         **kwargs)
  add("--checkpoint", "a published checkpoint")
  add("--towers", "folder with the CLIP and OpenCLIP folders, where --checkpoint lacks the towers")
  add("--llm", "a language model")
  add("--clip", "a CLIP folder (openai/clip-vit-large-patch14-336)")
  add("--openclip", "an OpenCLIP ConvNeXt folder")
  add("--adapter", "mm_projector.bin of a stage 1, or the folder that holds it")
  add("--sdxl", "a diffusers SDXL")
  add("--peft", "adapters, a folder of the peft library")
  add("--base", "the checkpoint that --peft is for")
  add("--output", "the checkpoint to make; must not exist", required=True)
  add("--tokenizer", "its tokenizer, if not in the language model's folder")
  parser.add_argument("--template", metavar="NAME",
                      help="conversation template; default: by family and tokenizer")
  parser.add_argument("--activation", choices=("silu", "gelu", "gelu_tanh"),
                      help="of the language model's MLP, where config.json says another than it "
                           "was trained with (Gemma)")
  parser.add_argument("--variant", choices=[v for v in sdxl.VARIANTS if v],
                      help="which files of --sdxl; default: the plain ones, fp16 where there are "
                           "no plain ones")
  args = parser.parse_args(argv)
  if sum(x is not None for x in (args.checkpoint, args.llm, args.sdxl, args.peft)) != 1:
    parser.error("give one of --checkpoint, --llm, --peft and --sdxl")
  if (args.peft is None) != (args.base is None):
    parser.error("--peft and --base go together")
  of_others = [f"--{n}" for n in ("towers", "clip", "openclip", "adapter", "tokenizer", "template",
                                  "activation") if getattr(args, n)]
  if (args.sdxl or args.peft) and of_others:
    parser.error(f"{of_others[0]} has no use with {'--sdxl' if args.sdxl else '--peft'}")
  if args.variant and not args.sdxl:
    parser.error("--variant goes with --sdxl")
  if args.checkpoint and (args.clip or args.openclip or args.adapter):
    parser.error("--clip, --openclip and --adapter go with --llm; with --checkpoint use --towers")
  if args.llm and args.towers:
    parser.error("--towers goes with --checkpoint; with --llm use --clip and --openclip")
  with tool() as outcome:
    if args.sdxl:
      variants = (args.variant,) if args.variant else sdxl.VARIANTS
      sdxl.convert(sdxl.open_pipeline(args.sdxl, variants), args.output)
      note = None
    elif args.peft:
      lora.import_peft(args.peft, args.base, args.output)
      note = None
    else:
      source = (published(args.checkpoint, args.towers) if args.checkpoint else
                assembled(args.llm, args.clip, args.openclip, args.adapter))
      convert(source, args.output, template=args.template, tokenizer_dir=args.tokenizer,
              activation=args.activation)
      note = None if source.complete else (
          "projector and mining are still to be learnt: train stage 1 from it")
    print(f"{args.output}: done")
    if note:
      print(note)
  return outcome.code


if __name__ == "__main__":
  sys.exit(main())
