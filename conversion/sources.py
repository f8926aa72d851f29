"""Towers and adapters, by the names that their tensors have in a checkpoint of the original."""
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from conversion.config import CLIP, CONVNEXT, read_json
from conversion.families import Json
from conversion.tensors import ConversionError, Tensors, open_file, open_tensors

ADAPTER = "mm_projector.bin"
_OPENCLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
                   "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
# What a CLIP or OpenCLIP file holds beside the image tower that is used.
_CLIP_REST = re.compile(r"^(text_model|visual_projection|text_projection|logit_scale|"
                        r"vision_model\.embeddings\.position_ids)")
_OPENCLIP_REST = re.compile(
    r"^(visual\.(trunk\.)?(head|norm_pre)|trunk\.(head|norm_pre)|(head|norm_pre)|text\.|"
    r"transformer\.|token_embedding|positional_embedding|ln_final|text_projection|logit_scale|"
    r"logit_bias|attn_mask)")


def clip_tensors(folder: Path) -> Tensors:
  """The CLIP tower of a HuggingFace folder."""
  def rename(name: str) -> str | None:
    if _CLIP_REST.match(name):
      return None
    if name.startswith("vision_model."):
      return CLIP + name.removeprefix("vision_model.")
    raise ConversionError(f"{folder}: {name} is no tensor of a CLIP; expected vision_model.*")

  return open_tensors(folder).renamed(rename)


def openclip_tensors(folder: Path) -> Tensors:
  """The ConvNeXt trunk of an OpenCLIP (or timm) folder."""
  file = next((folder / n for n in _OPENCLIP_FILES if (folder / n).is_file()), None)
  if file is None:
    raise ConversionError(f"{folder}: no OpenCLIP weights; expected one of "
                          f"{', '.join(_OPENCLIP_FILES[:3])}")

  def rename(name: str) -> str | None:
    if match := re.fullmatch(r"(?:visual\.)?(?:trunk\.)?(stem|stages)\.(.+)", name):
      return f"{CONVNEXT}vision_{match.group(1)}.{match.group(2)}"
    if _OPENCLIP_REST.match(name):
      return None
    raise ConversionError(f"{file}: {name} is no tensor of a ConvNeXt; expected "
                          "visual.trunk.stem.* and visual.trunk.stages.*; it is another tower")
  return open_file(file).renamed(rename)


def read_towers(clip: Path | None, openclip: Path | None) -> Tensors:
  """Both towers, or the one that is given."""
  towers = Tensors("towers", {}, {}.__getitem__)
  for folder, read in ((clip, clip_tensors), (openclip, openclip_tensors)):
    if folder is not None:
      if not folder.is_dir():
        raise ConversionError(f"{folder}: no such folder")
      towers = read(folder).over(towers)
  return towers


def is_clip(folder: Path) -> bool:
  """Whether a folder holds a HuggingFace CLIP."""
  path = folder / "config.json"
  return path.is_file() and str(read_json(path).get("model_type")).startswith("clip")


def is_openclip(folder: Path) -> bool:
  """Whether a folder holds OpenCLIP weights."""
  return (folder / "open_clip_config.json").is_file() or any(
      (folder / n).is_file() for n in _OPENCLIP_FILES[:3])


def find_towers(root: Path, names: Sequence[str | None]) -> tuple[Path | None, Path | None]:
  """The CLIP and the OpenCLIP folder in or below `root`; None where there is none.

  names: the folders that config.json names; they decide between several.
  """
  if not root.is_dir():
    raise ConversionError(f"{root}: no such folder")
  folders = [root, *_folders_below(root, 3)]
  found = []
  for kind, test, name in (("CLIP", is_clip, names[0]), ("OpenCLIP", is_openclip, names[1])):
    matching = [f for f in folders if name and test(f)]
    if len(matching) > 1:
      named = [f for f in matching if name and f.name == Path(name).name]
      if len(named) != 1:
        raise ConversionError(f"{root}: several {kind} folders ({', '.join(map(str, matching))}) "
                              f"and not one of them is {name!r}; name the folder above one")
      matching = named
    found.append(matching[0] if matching else None)
  if found == [None, None]:
    raise ConversionError(f"{root}: neither a CLIP nor an OpenCLIP folder in it; expected a "
                          "config.json with model_type clip, and open_clip_pytorch_model.bin")
  return found[0], found[1]


def _folders_below(root: Path, depth: int) -> Iterator[Path]:
  for child in sorted(root.iterdir()):
    if child.is_dir():
      yield child
      if depth > 1:
        yield from _folders_below(child, depth - 1)


def adapter_tensors(path: Path) -> tuple[Tensors, Json]:
  """What a stage 1 saved (R2.5), and the config.json beside it ({} if there is none)."""
  file = path / ADAPTER if path.is_dir() else path
  tensors = open_file(file)
  if not any(n.startswith("model.mm_projector") for n in tensors.headers):
    raise ConversionError(f"{file}: no model.mm_projector.* in it; expected the {ADAPTER} that "
                          "stage 1 writes")
  config = file.parent / "config.json"
  return tensors, read_json(config) if config.is_file() else {}
