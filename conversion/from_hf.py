"""HuggingFace folders -> an mgjax checkpoint, tensor by tensor.

  python -m conversion.from_hf --checkpoint MGM-7B --output checkpoints/mgm-7b [--towers model_zoo]
  python -m conversion.from_hf --llm vicuna-7b --clip clip-vit-large-patch14-336 \\
      --openclip openclip-convnext-large-d-320 --output checkpoints/start-7b [--adapter FILE]
  python -m conversion.from_hf --llm SmolLM2-135M-Instruct --output checkpoints/smollm2

The first reads a published checkpoint; its towers come from it, or from --towers where it has none.
The second puts together the start of stage 1, with the mm_projector.bin of a stage 1 that of stage
2.  The third is a language model alone.  The result is a normal checkpoint: launch/chat.py answers
from it, launch/train.py goes on from it (--config.init_from=OUTPUT).
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from conversion import mapping
from conversion.config import (
    CLIP,
    Json,
    family_of,
    guess_template,
    is_multimodal,
    read_aspect,
    read_clip,
    read_json,
    read_model,
)
from conversion.sources import adapter_tensors, find_towers, read_towers
from conversion.store import Array, Writer
from conversion.tensors import (
    FLOATS,
    ConversionError,
    SafetensorsWriter,
    Tensors,
    first_nonfinite,
    open_tensors,
)
from conversion.transfer import Job, finished_folder, needs_space, run_jobs, tool
from mgjax import trees
from mgjax.checkpoint import ORIGIN, TOKENIZER, abstract_params, write_run
from mgjax.config import ModelConfig
from mgjax.data.conversation import get_template
from mgjax.data.tokenizer import Tokenizer, load_tokenizer
from mgjax.models.mini_gemini import MiniGemini
from mgjax.sharding import make_mesh, mesh_context
from mgjax.train.config import run_config

# Settings that a folder may bring along and that its way back needs.
SETTINGS = ("config.json", "generation_config.json", "preprocessor_config.json")


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
  config = read_json(checkpoint / "config.json")
  where = str(checkpoint)
  tensors, clip = open_tensors(checkpoint), None
  if is_multimodal(config):
    names = [config["mm_vision_tower"], config.get("mm_vision_tower_aux")]
    if towers is not None:
      clip_folder, openclip_folder = find_towers(towers, names)
      clip = clip_folder and read_json(clip_folder / "config.json")
      tensors = tensors.over(read_towers(clip_folder, openclip_folder if names[1] else None))
    elif not any(name.startswith(CLIP) for name in tensors.headers):
      raise ConversionError(f"{where}: the towers are not in it; name the folder that holds "
                            f"{' and '.join(str(n) for n in names if n)} with --towers")
  model = read_model(config, tensors.headers, where, clip)
  return Source(where, tensors, config, model, checkpoint)


def assembled(llm: Path, clip: Path | None, openclip: Path | None, adapter: Path | None) -> Source:
  """The start of a stage from a language model, towers, and perhaps what stage 1 left."""
  config = read_json(llm / "config.json")
  if is_multimodal(config):
    raise ConversionError(f"{llm}: this is a whole checkpoint of the original; convert it with "
                          "--checkpoint")
  tensors = open_tensors(llm)
  if clip is None and openclip is None and adapter is None:
    return Source(str(llm), tensors, config, read_model(config, tensors.headers, str(llm)), llm)
  extra = read_towers(clip, openclip)
  there: Json = {}
  if adapter is not None:
    # What stage 1 saved of the towers is what it looked through (R2.5).
    learnt, there = adapter_tensors(adapter)
    extra = learnt.over(extra)
  has = lambda prefix: any(name.startswith(prefix) for name in extra.headers)
  if not has(CLIP):
    raise ConversionError(f"{llm}: towers without a CLIP; give its folder with --clip")
  hr = has("model.vision_tower_aux.")
  depth = sum(n.startswith("model.mm_projector") and n.endswith("weight") for n in extra.headers)
  views = {"mm_vision_tower": str(clip or there.get("mm_vision_tower") or "clip"),
           "mm_vision_tower_aux": hr and str(openclip or there.get("mm_vision_tower_aux")
                                             or "openclip") or None,
           "mm_vision_select_layer": there.get("mm_vision_select_layer", -2),
           "mm_projector_type": "linear" if depth == 1 else f"mlp{depth or 2}x_gelu"}
  if hr:  # windows of 8x8, as in every release: 336 / 768
    side = read_clip(extra.headers, str(clip or adapter)).side
    views["image_size_aux"] = there.get("image_size_aux") or 32 * side
  config = config | {"model_type": family_of(config, str(llm)).model_type} | views
  tensors = extra.over(tensors)
  clip_config = read_json(clip / "config.json") if clip else None
  model = read_model(config, tensors.headers, str(llm), clip_config)
  print(f"pictures: {model.lr_size} / {model.hr_size} pixels, {model.visual_tokens} tokens")
  if model.vision.width == 1024 and model.vision.image_size != 336:
    print(f"warning: {clip or adapter}: this CLIP sees {model.vision.image_size} pixels; the "
          "presets have clip-vit-large-patch14-336", file=sys.stderr)
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
  tensors, dropped = without_copies(source.tensors, model)
  covered = {r.path for r in rows}
  shapes = {k: v for k, v in parameter_shapes(model).items() if k in covered}
  mapping.check(tensors.headers, rows, shapes, source.where)
  arrays = array_plan(tensors, rows, shapes)
  needs_space(output, sum(a.nbytes for a in arrays.values()))
  tokenizer_dir = tokenizer_dir or source.folder
  settings = chat_settings(source, model, tokenizer_dir, template)
  config = run_config({"model": dataclasses.asdict(model), **settings})

  with finished_folder(output) as part:
    write_origin(part / ORIGIN, source, tensors, rows, arrays, dropped)
    write_run(part, dataclasses.asdict(config), settings["tokenizer"])
    writer = Writer(part, arrays)

    def job(row: mapping.Row) -> None:
      value = read_finite(tensors, row.hf)
      writer.write(row.path, row.at, row.form.load(value))

    run_jobs("reading", [Job(tensors.headers[r.hf].nbytes, lambda r=r: job(r)) for r in rows])


def read_finite(tensors: Tensors, name: str) -> np.ndarray:
  """A tensor; ConversionError if it holds a nan or an infinity."""
  value = tensors.read(name)
  if (at := first_nonfinite(value)) is not None:
    raise ConversionError(f"{tensors.headers[name].file}: {name}{list(at)} is {value[at]}; the "
                          "weights are damaged")
  return value


def without_copies(tensors: Tensors, model: ModelConfig) -> tuple[Tensors, list[str]]:
  """Without a head that is only a copy of the embedding table, and the names left out."""
  head, table = "lm_head.weight", "model.embed_tokens.weight"
  if not model.decoder.tied_head or head not in tensors.headers or table not in tensors.headers:
    return tensors, []
  if not np.array_equal(tensors.read(head), tensors.read(table)):
    raise ConversionError(f"{tensors.headers[head].file}: {head} differs from {table}, but "
                          "config.json says that they are one (tie_word_embeddings)")
  return tensors.renamed(lambda n: None if n == head else n), [head]


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Path -> shape of every parameter of a model."""
  mesh = make_mesh(devices=jax.devices()[:1])
  with mesh_context(mesh):
    _, shapes = abstract_params(lambda: MiniGemini(model, rngs=nnx.Rngs(0)), mesh)
  return {k: v.shape for k, v in trees.flatten(shapes).items()}


def array_plan(tensors: Tensors, rows: list[mapping.Row],
               shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
  """What is written; a stack of tensors of several dtypes has the one that holds them all."""
  dtypes: dict[str, np.dtype] = {}
  for row in rows:
    header = tensors.headers[row.hf]
    if header.dtype not in FLOATS:
      raise ConversionError(f"{header.file}: {row.hf} is {header.dtype.name}; expected float32, "
                            "float16 or bfloat16")
    before = dtypes.setdefault(row.path, header.dtype)
    if before != header.dtype:  # float16 and bfloat16 both fit into float32
      dtypes[row.path] = np.dtype(np.float32)
  stacked = {row.path: len(row.at) for row in rows}
  return {path: Array(shapes[path], dtype, stacked[path]) for path, dtype in dtypes.items()}


def chat_settings(source: Source, model: ModelConfig, tokenizer_dir: Path,
                  template: str | None) -> Json:
  """What travels beside the weights: template, stop ids, how pictures are made square, length."""
  family = family_of(source.config, source.where)
  tokenizer = find_tokenizer(tokenizer_dir)
  if tokenizer is not None and tokenizer.vocab_size > model.decoder.vocab_size:
    print(f"warning: {tokenizer_dir}: its tokenizer has {tokenizer.vocab_size} entries, the model "
          f"{model.decoder.vocab_size}; they belong to different models", file=sys.stderr)
  has = lambda token: tokenizer is not None and tokenizer.backend.token_id(token) is not None
  name = get_template(template or guess_template(family, has)).name
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


def find_tokenizer(folder: Path) -> Tokenizer | None:
  """The tokenizer in a folder; None, with a warning, if there is none."""
  if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
    return load_tokenizer(folder)
  print(f"warning: {folder} holds no tokenizer; chat needs one: give --tokenizer, or put "
        f"tokenizer.json or tokenizer.model into OUTPUT/{TOKENIZER}", file=sys.stderr)
  return None


def optional_json(path: Path) -> Json:
  """A JSON file, {} if it is not there."""
  return read_json(path) if path.is_file() else {}


def write_origin(folder: Path, source: Source, tensors: Tensors, rows: list[mapping.Row],
                 arrays: Mapping[str, Array], dropped: list[str]) -> None:
  """What the way back needs beside the arrays: settings, dtypes that a stack hides, buffers."""
  folder.mkdir(parents=True)
  for name in SETTINGS:
    if (source.folder / name).is_file():
      (folder / name).write_bytes((source.folder / name).read_bytes())
  dtypes = {r.hf: tensors.headers[r.hf].dtype.name for r in rows
            if tensors.headers[r.hf].dtype != arrays[r.path].dtype}
  (folder / "tensors.json").write_text(json.dumps({"dtypes": dtypes, "copies": dropped}) + "\n")
  buffers = sorted(n for n in tensors.headers if mapping.IGNORED.search(n))
  if buffers:
    headers = {n: (tensors.headers[n].shape, tensors.headers[n].dtype) for n in buffers}
    writer = SafetensorsWriter(folder / "buffers.safetensors", headers)
    for name in buffers:
      writer.write(name, tensors.read(name))
    writer.close()


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
  add("--output", "the checkpoint to make; must not exist", required=True)
  add("--tokenizer", "its tokenizer, if not in the language model's folder")
  parser.add_argument("--template", metavar="NAME",
                      help="conversation template; default: by family and tokenizer")
  parser.add_argument("--activation", choices=("silu", "gelu", "gelu_tanh"),
                      help="of the language model's MLP, where config.json says another than it "
                           "was trained with (Gemma)")
  args = parser.parse_args(argv)
  if (args.checkpoint is None) == (args.llm is None):
    parser.error("give either --checkpoint or --llm")
  if args.checkpoint and (args.clip or args.openclip or args.adapter):
    parser.error("--clip, --openclip and --adapter go with --llm; with --checkpoint use --towers")
  if args.llm and args.towers:
    parser.error("--towers goes with --checkpoint; with --llm use --clip and --openclip")
  with tool() as outcome:
    source = (published(args.checkpoint, args.towers) if args.checkpoint else
              assembled(args.llm, args.clip, args.openclip, args.adapter))
    convert(source, args.output, template=args.template, tokenizer_dir=args.tokenizer,
            activation=args.activation)
    print(f"{args.output}: done")
    if not source.complete:
      print("projector and mining are still to be learnt: train stage 1 from it")
  return outcome.code


if __name__ == "__main__":
  sys.exit(main())
