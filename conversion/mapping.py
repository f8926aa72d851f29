"""Which tensor of the original is which array here: one table a part, read in both directions."""
from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from conversion.tensors import ConversionError
from mgjax.config import ClipVitConfig, ConvNextConfig, DecoderConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class Form:
  """How a tensor's layout changes on the way in (`load`) and out (`save`), both as views where
  possible; `there` gives the shape in the original for a shape here."""

  load: Callable[[np.ndarray], np.ndarray]
  save: Callable[[np.ndarray], np.ndarray]
  there: Callable[[tuple[int, ...]], tuple[int, ...]]


SAME = Form(lambda x: x, lambda x: x, lambda s: s)
LINEAR = Form(lambda x: x.T, lambda x: x.T, lambda s: s[::-1])
DEPTHWISE = Form(lambda x: x[:, 0].transpose(1, 2, 0),
                 lambda x: x.transpose(2, 0, 1)[:, None], lambda s: (s[2], 1, *s[:2]))

# A 3x3 convolution: [out, in, 3, 3] there, [3, 3, in, out] here.
CONV3 = Form(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1),
             lambda s: (s[3], s[2], s[0], s[1]))


def conv(size: int) -> Form:
  """A convolution whose stride is its size: [out, in, k, k] there, [k*k*in, out] here."""
  return Form(lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
              lambda x: x.reshape(size, size, -1, x.shape[1]).transpose(3, 2, 0, 1),
              lambda s: (s[1], s[0] // size**2, size, size))


@dataclasses.dataclass(frozen=True)
class Row:
  """`hf` name <-> `path` here; with `at` the tensor is that entry of a stacked array: (layer,) or
  (layer, expert)."""

  hf: str
  path: str
  form: Form = SAME
  at: tuple[int, ...] = ()


TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def norm_rows(hf: str, path: str, *at: int, bias: bool = True) -> list[Row]:
  """Scale and bias of a norm."""
  rows = [Row(f"{hf}.weight", f"{path}/scale", SAME, at)]
  return rows + ([Row(f"{hf}.bias", f"{path}/bias", SAME, at)] if bias else [])


def linear_rows(hf: str, path: str, *at: int, bias: bool = True, form: Form = LINEAR) -> list[Row]:
  """Kernel and bias of a dense layer, or a convolution."""
  rows = [Row(f"{hf}.weight", f"{path}/kernel", form, at)]
  return rows + ([Row(f"{hf}.bias", f"{path}/bias", SAME, at)] if bias else [])


def decoder_rows(config: DecoderConfig) -> list[Row]:
  """The language model (R2.2)."""
  rows = [Row(TABLE, "decoder/embedding")]
  for i in range(config.depth):
    hf, path = f"model.layers.{i}", "decoder/blocks"
    names = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v",
             "self_attn.o_proj": "out"}
    if config.experts:
      names["block_sparse_moe.gate"] = "experts/router"
      for e in range(config.experts):
        rows += [Row(f"{hf}.block_sparse_moe.experts.{e}.{theirs}.weight", f"{path}/experts/{ours}",
                     LINEAR, (i, e))
                 for theirs, ours in {"w1": "gate", "w3": "up", "w2": "down"}.items()]
    else:
      names |= {f"mlp.{name}_proj": name for name in ("gate", "up", "down")}
    for theirs, ours in names.items():
      rows += linear_rows(f"{hf}.{theirs}", f"{path}/{ours}", i, bias=False)
    rows += norm_rows(f"{hf}.input_layernorm", f"{path}/norm1", i, bias=False)
    rows += norm_rows(f"{hf}.post_attention_layernorm", f"{path}/norm2", i, bias=False)
  rows += norm_rows("model.norm", "decoder/norm", bias=False)
  return rows if config.tied_head else rows + linear_rows("lm_head", "decoder/head", bias=False)


def clip_block_rows(hf: str, path: str, *at: int) -> list[Row]:
  """A transformer block of CLIP, of its pictures or its texts."""
  rows = norm_rows(f"{hf}.layer_norm1", f"{path}/norm1", *at)
  rows += norm_rows(f"{hf}.layer_norm2", f"{path}/norm2", *at)
  for theirs, ours in {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v",
                       "self_attn.out_proj": "out", "mlp.fc1": "up", "mlp.fc2": "down"}.items():
    rows += linear_rows(f"{hf}.{theirs}", f"{path}/{ours}", *at)
  return rows


def clip_rows(config: ClipVitConfig) -> list[Row]:
  """The CLIP tower (R2.2); blocks past the selected layer go to `unused_blocks`."""
  hf = "model.vision_tower.vision_tower.vision_model"
  rows = [Row(f"{hf}.embeddings.class_embedding", "vision/class_embedding"),
          Row(f"{hf}.embeddings.position_embedding.weight", "vision/position_embedding")]
  rows += linear_rows(f"{hf}.embeddings.patch_embedding", "vision/patch_embed", bias=False,
                  form=conv(config.patch_size))
  rows += norm_rows(f"{hf}.pre_layrnorm", "vision/pre_norm")  # sic: the key is misspelled
  used = config.used_depth
  for i in range(config.depth):
    path, layer = ("vision/blocks", i) if i < used else ("vision/unused_blocks", i - used)
    rows += clip_block_rows(f"{hf}.encoder.layers.{i}", path, layer)
  return rows + norm_rows(f"{hf}.post_layernorm", "vision/post_norm")


def convnext_rows(config: ConvNextConfig) -> list[Row]:
  """The ConvNeXt tower (R2.2)."""
  stem, stages = (f"model.vision_tower_aux.vision_{part}" for part in ("stem", "stages"))
  rows = linear_rows(f"{stem}.0", "vision_hr/stem", form=conv(config.stride))
  rows += norm_rows(f"{stem}.1", "vision_hr/stem_norm")
  for s, depth in enumerate(config.depths):
    hf, path = f"{stages}.{s}", f"vision_hr/stages/{s}"
    if s:
      rows += norm_rows(f"{hf}.downsample.0", f"{path}/down_norm")
      rows += linear_rows(f"{hf}.downsample.1", f"{path}/down", form=conv(2))
    for b in range(depth):
      block, ours = f"{hf}.blocks.{b}", f"{path}/blocks"
      rows += [Row(f"{block}.gamma", f"{ours}/gamma", SAME, (b,)),
               Row(f"{block}.conv_dw.weight", f"{ours}/kernel", DEPTHWISE, (b,)),
               Row(f"{block}.conv_dw.bias", f"{ours}/bias", SAME, (b,))]
      rows += norm_rows(f"{block}.norm", f"{ours}/norm", b)
      rows += linear_rows(f"{block}.mlp.fc1", f"{ours}/up", b)
      rows += linear_rows(f"{block}.mlp.fc2", f"{ours}/down", b)
  return rows


def mining_rows() -> list[Row]:
  """Query, key and value projections of patch info mining (R1.5)."""
  rows = []
  for theirs, ours in {"query": "query", "aux": "key", "val": "value"}.items():
    hf = f"model.vlm_uni_{theirs}_projector"
    rows += norm_rows(f"{hf}.0", f"mining/{ours}/norm")
    rows += linear_rows(f"{hf}.1", f"mining/{ours}/dense")
  return rows


def projector_rows(depth: int) -> list[Row]:
  """mlp{N}x_gelu counts its activations (0, 2, 4 ...); a single linear layer has no number."""
  if depth == 1:
    return linear_rows("model.mm_projector", "projector/layers/0")
  return [row for i in range(depth)
          for row in linear_rows(f"model.mm_projector.{2 * i}", f"projector/layers/{i}")]


def all_rows(config: ModelConfig) -> list[Row]:
  """Every tensor of a full checkpoint."""
  rows = decoder_rows(config.decoder)
  if config.vision is not None:
    rows += clip_rows(config.vision) + projector_rows(config.projector_depth)
  if config.vision_hr is not None:
    rows += convnext_rows(config.vision_hr) + mining_rows()
  return rows


# Buffers that older checkpoints carry and that hold nothing learned.
IGNORED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")


def check_fit(headers: Mapping[str, Any], rows: list[Row], shapes: Mapping[str, tuple],
              where: str) -> None:
  """Raises ConversionError unless tensors, table and model fit each other exactly.

  Args:
    headers: what there is, by name in the original, each with a `shape` (and a `file`).
    rows: the table.
    shapes: path -> shape that the model expects of what the table covers.
    where: what to call the checkpoint.

  Five ways to be wrong: a tensor that two rows claim, one that no row knows, an entry set twice,
  one that is missing, a shape that differs.
  """
  for what, keys in (("tensor", [r.hf for r in rows]), ("entry", [(r.path, r.at) for r in rows])):
    if twice := [key for key, n in Counter(keys).items() if n > 1]:
      raise ConversionError(f"{where}: two rows of the table have the {what} {twice[0]}")
  known = {r.hf for r in rows}
  unknown = sorted(n for n in headers if n not in known and not IGNORED.search(n))
  missing = [r.hf for r in rows if r.hf not in headers]
  if missing or unknown:
    found = len(rows) - len(missing)
    first = unknown and getattr(headers[unknown[0]], "file", "")
    raise ConversionError(
        f"{where}: {len(rows)} tensors expected, {found} of them found; "
        f"missing: {_some(missing)}; unknown: {_some(unknown)}{f' in {first}' if first else ''}")
  filled = Counter(r.path for r in rows)
  stacked = {r.path: len(r.at) for r in rows}
  for path, want in shapes.items():
    if (count := math.prod(want[:stacked.get(path, 0)])) != filled[path]:
      raise ConversionError(f"{where}: {path} needs {count} tensors, the table has {filled[path]}")
  for row in rows:
    if row.path not in shapes:
      raise ConversionError(f"{where}: {row.hf} maps to {row.path}, which this model does not have")
    header, want = headers[row.hf], tuple(shapes[row.path])[len(row.at):]
    if tuple(header.shape) != (expected := row.form.there(want)):
      raise ConversionError(f"{getattr(header, 'file', where)}: {row.hf} has shape "
                            f"{tuple(header.shape)}, expected {expected}")


def _some(names: list[str]) -> str:
  return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "") or "none"


def to_arrays(tensors: Mapping[str, np.ndarray], rows: list[Row], shapes: Mapping[str, tuple],
              where: str = "checkpoint") -> dict[str, np.ndarray]:
  """A small model's tensors, by name in the original, as arrays by path.  Raises as `check_fit`."""
  check_fit(tensors, rows, shapes, where)
  out = {}
  for row in rows:
    value = row.form.load(np.asarray(tensors[row.hf]))
    out.setdefault(row.path, np.empty(shapes[row.path], value.dtype))[row.at] = value
  return out


def to_tensors(arrays: Mapping[str, np.ndarray], rows: list[Row]) -> dict[str, np.ndarray]:
  """Arrays by path -> the original's tensors by name."""
  return {row.hf: row.form.save(np.asarray(arrays[row.path])[row.at]) for row in rows}
