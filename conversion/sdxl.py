"""A diffusers SDXL folder <-> an mgjax checkpoint: what `from_hf` and `to_hf` do for SDXL.

The run's folder holds config.json ({"kind": "sdxl", "model": ...}), checkpoints/0, tokenizer/,
tokenizer_2/, and in origin/ the JSON files of the diffusers folder.
"""
from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from conversion import mapping
from conversion.arrays import (
    array_plan,
    as_original,
    held_parts,
    in_shards,
    read_notes,
    with_buffers,
    write_arrays,
    write_notes,
    write_shards,
)
from conversion.config import read_json
from conversion.families import Json
from conversion.sdxl_config import COMPONENTS, INDEX, SCHEDULER, read_configs, write_configs
from conversion.sdxl_mapping import sdxl_rows
from conversion.store import Reader, parameter_shapes
from conversion.tensors import ConversionError, Tensors, open_tensors
from conversion.transfer import finished_folder, needs_space
from mgjax.checkpoint import (
    ORIGIN,
    SDXL,
    TOKENIZER,
    TOKENIZER_2,
    TOKENIZER_FILES,
    read_run,
    write_run,
)
from mgjax.config import build
from mgjax.diffusion.config import SdxlConfig

_HF, _DIFFUSERS = ("model", "pytorch_model"), ("diffusion_pytorch_model",) * 2
# Sub-folder -> what its files' names begin with, safetensors and .bin.
PARTS = {"text_encoder": _HF, "text_encoder_2": _HF, "unet": _DIFFUSERS, "vae": _DIFFUSERS}
VARIANTS = ("", "fp16")  # of a folder's files; the second where the first is not there
# Names that some versions write otherwise: transformers 5 leaves a prefix out, diffusers before
# 0.18 named the attention of the autoencoder differently.
_BARE = re.compile(r"^(?=(embeddings|encoder|final_layer_norm)\.)")
_OLD_ATTENTION = re.compile(r"(\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """SDXL in a folder of either kind: its shapes, and its tensors by the names of `sdxl_rows`."""

  folder: Path
  model: SdxlConfig
  tensors: Tensors


def is_sdxl(path: Path) -> bool:
  """Whether a checkpoint of this package holds SDXL.  Raises CheckpointError."""
  return read_run(path, None)[1].get("kind") == SDXL


def is_pipeline(folder: Path) -> bool:
  """Whether a folder is a diffusers pipeline."""
  return (folder / INDEX).is_file()


def open_pipeline(folder: Path, variants: Sequence[str] = VARIANTS) -> Pipeline:
  """A diffusers folder; variants: see `open_tensors`.  Raises ConversionError."""
  if not folder.is_dir():
    raise ConversionError(f"{folder}: no such folder")
  if not is_pipeline(folder):
    raise ConversionError(f"{folder}: no {INDEX}; expected the folder of a diffusers pipeline")
  for part in COMPONENTS:
    if not (folder / part).is_dir():
      raise ConversionError(f"{folder / part}: no such folder; a diffusers SDXL has "
                            f"{', '.join(COMPONENTS)} and scheduler")
  model, tensors = read_configs(folder), Tensors(str(folder), {}, {}.__getitem__)
  for part, stems in PARTS.items():
    held = open_tensors(folder / part, stems, variants)
    renamed = held.renamed(lambda name, part=part: f"{part}/{_modern(part, name)}")
    if len(renamed.headers) != len(held.headers):
      raise ConversionError(f"{held.where}: some tensors are there twice, by an old name and a new "
                            "one; remove one of them")
    tensors = renamed.over(tensors)
  return Pipeline(folder, model, dataclasses.replace(tensors, where=str(folder)))


def _modern(part: str, name: str) -> str:
  if part == "vae":
    return _OLD_ATTENTION.sub(lambda m: m[1] + _NEW_ATTENTION[m[2]], name)
  return _BARE.sub("text_model.", name) if part.startswith("text_encoder") else name


def open_run(path: Path, dtype: np.dtype | None = None) -> Pipeline:
  """A run folder, or one step of it; numbers as `dtype` if given.  Raises ConversionError or
  CheckpointError."""
  step_dir, run = read_run(path, SDXL)
  folder = step_dir.parent.parent
  model = build(SdxlConfig, run.get("model"), f"{folder}/config.json: model")
  reader = Reader(step_dir)
  held_parts(reader, parameter_shapes(model))
  tensors = as_original(reader, sdxl_rows(model), read_notes(folder)["dtypes"], dtype)
  return Pipeline(folder, model, with_buffers(tensors, folder))


def convert(source: Pipeline, output: Path) -> None:
  """A diffusers folder -> `output`, whole or not at all.  Raises ConversionError."""
  rows, shapes, tensors = sdxl_rows(source.model), parameter_shapes(source.model), source.tensors
  mapping.check_fit(tensors.headers, rows, shapes, str(source.folder))
  arrays = array_plan(tensors, rows, shapes)
  needs_space(output, sum(a.nbytes for a in arrays.values()))
  for name in (TOKENIZER, TOKENIZER_2):
    folder = source.folder / name
    if not (folder / "tokenizer.json").is_file() and not all(
        (folder / n).is_file() for n in ("vocab.json", "merges.txt")):
      raise ConversionError(f"{folder}: no tokenizer; expected vocab.json and merges.txt, or "
                            "tokenizer.json")
  with finished_folder(output) as part:
    write_run(part, {"kind": SDXL, "model": dataclasses.asdict(source.model)},
              source.folder / TOKENIZER)
    _copy_tokenizer(source.folder / TOKENIZER_2, part / TOKENIZER_2)
    for path in _settings(source.folder):
      place = part / ORIGIN / path
      place.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(source.folder / path, place)
    write_notes(part / ORIGIN, tensors, rows, arrays)
    write_arrays(part, tensors, rows, arrays)


def _settings(folder: Path) -> list[Path]:
  """JSON files of a diffusers folder that tell neither shards nor words, relative to it."""
  files = [folder / INDEX, *(f for part in (*PARTS, Path(SCHEDULER).parent)
                             for f in sorted((folder / part).glob("*.json")))]
  return [f.relative_to(folder) for f in files if ".index." not in f.name]


def _copy_tokenizer(source: Path, output: Path) -> None:
  output.mkdir()
  for name in TOKENIZER_FILES:
    if (source / name).is_file():
      shutil.copy(source / name, output)


def export(source: Pipeline, output: Path, shard_bytes: int | None = None,
           dtype: str | None = None) -> None:
  """A run, opened as `dtype`, -> a diffusers folder, or nothing; one file a part unless told
  otherwise.

  JSON files are as they came, or made anew where the run's model is none that ever came.  Raises
  ConversionError.
  """
  needs_space(output, source.tensors.nbytes)
  with finished_folder(output) as folder:
    for name in (*PARTS, Path(SCHEDULER).parent):
      (folder / name).mkdir()
    _write_settings(source, folder, dtype)
    for name in (TOKENIZER, TOKENIZER_2):
      if (source.folder / name).is_dir():
        _copy_tokenizer(source.folder / name, folder / name)
    write_shards([
        in_shards(folder / part, stems[0], _part_of(source.tensors, part), shard_bytes)
        for part, stems in PARTS.items()])


def _part_of(tensors: Tensors, part: str) -> Tensors:
  prefix = f"{part}/"
  return tensors.renamed(lambda n: n.removeprefix(prefix) if n.startswith(prefix) else None)


def _write_settings(source: Pipeline, folder: Path, dtype: str | None) -> None:
  origin = source.folder / ORIGIN
  if is_pipeline(origin) and read_configs(origin) == source.model:
    for path in _settings(origin):
      shutil.copy(origin / path, folder / path)
  else:
    for path, values in write_configs(source.model).items():
      _write_json(folder / path, values)
    if read_configs(folder) != source.model:
      raise ConversionError(f"{source.folder}/config.json: diffusers cannot be told of this model; "
                            "expected one that a diffusers folder says")
  for path in (folder / part / "config.json" for part in PARTS):
    values = read_json(path)
    # transformers builds the model in what its config.json says.
    if said := {key: dtype for key in ("torch_dtype", "dtype") if dtype and values.get(key)}:
      _write_json(path, values | said)


def _write_json(path: Path, values: Json) -> None:
  path.write_text(json.dumps(values, indent=2) + "\n")


def facts(model: SdxlConfig) -> list[tuple[str, str]]:
  """(what, value) pairs about a model."""
  unet, vae, schedule = model.unet, model.vae, model.schedule
  text = lambda c: (f"{c.depth} layers x {c.width}, {c.heads} heads, MLP {c.mlp_width} "
                    f"{c.activation}, vocabulary {c.vocab_size}"
                    + (f", pooled to {c.projection}" if c.projection else ""))
  return [
      ("text encoder", text(model.text_encoder)), ("text encoder 2", text(model.text_encoder_2)),
      ("UNet", f"widths {unet.widths}, {unet.resnets} residual blocks a level, transformers "
       f"{unet.depths} deep and {unet.middle_depth} in the middle, heads {unet.heads}"),
      ("autoencoder", f"widths {vae.widths}, {vae.channels} channels of latents, scaled by "
       f"{vae.scaling}"),
      ("schedule", f"{schedule.sampler}, {schedule.train_steps} steps, betas {schedule.beta_start} "
       f"to {schedule.beta_end} {schedule.beta_schedule}, predicts {schedule.prediction}, spacing "
       f"{schedule.spacing}"),
      ("pictures", f"{model.side} pixels")]
