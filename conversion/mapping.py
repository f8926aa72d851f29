"""Which tensor of the original is which array here: one table a part, read in both directions."""
from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

import numpy as np

from mgjax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Form:
  """How a tensor's layout changes on the way in, and on the way out (given the shape there)."""

  name: str
  load: Callable[[np.ndarray], np.ndarray]
  save: Callable[[np.ndarray], np.ndarray]


def _load_conv(x):  # [out, in, k, k] -> [k*k*in, out]
  return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def _save_conv(size):
  return lambda x: x.reshape(size, size, -1, x.shape[1]).transpose(3, 2, 0, 1)


SAME = Form("same", lambda x: x, lambda x: x)
LINEAR = Form("linear", lambda x: x.T, lambda x: x.T)
DEPTHWISE = Form("depthwise", lambda x: x[:, 0].transpose(1, 2, 0),
                 lambda x: x.transpose(2, 0, 1)[:, None])


def conv(size: int) -> Form:
  """A convolution whose stride is its size: a matrix on flattened patches."""
  return Form(f"conv{size}", _load_conv, _save_conv(size))


@dataclasses.dataclass(frozen=True)
class Row:
  """`hf` name <-> `path` here; with `at` the tensor is that entry of a stacked array: (layer,) or
  (layer, expert)."""

  hf: str
  path: str
  form: Form = SAME
  at: tuple[int, ...] = ()


def _norm(hf, path, *at, bias=True):
  rows = [Row(f"{hf}.weight", f"{path}/scale", SAME, at)]
  return rows + ([Row(f"{hf}.bias", f"{path}/bias", SAME, at)] if bias else [])


def _linear(hf, path, *at, bias=True, form=LINEAR):
  rows = [Row(f"{hf}.weight", f"{path}/kernel", form, at)]
  return rows + ([Row(f"{hf}.bias", f"{path}/bias", SAME, at)] if bias else [])


def decoder_rows(config: ModelConfig) -> list[Row]:
  """The language model (R2.2)."""
  rows = [Row("model.embed_tokens.weight", "decoder/embedding")]
  for i in range(config.decoder.depth):
    hf, path = f"model.layers.{i}", "decoder/blocks"
    names = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v",
             "self_attn.o_proj": "out"}
    if config.decoder.experts:
      names["block_sparse_moe.gate"] = "experts/router"
      for e in range(config.decoder.experts):
        rows += [Row(f"{hf}.block_sparse_moe.experts.{e}.{theirs}.weight", f"{path}/experts/{ours}",
                     LINEAR, (i, e))
                 for theirs, ours in {"w1": "gate", "w3": "up", "w2": "down"}.items()]
    else:
      names |= {f"mlp.{name}_proj": name for name in ("gate", "up", "down")}
    for theirs, ours in names.items():
      rows += _linear(f"{hf}.{theirs}", f"{path}/{ours}", i, bias=False)
    rows += _norm(f"{hf}.input_layernorm", f"{path}/norm1", i, bias=False)
    rows += _norm(f"{hf}.post_attention_layernorm", f"{path}/norm2", i, bias=False)
  rows += _norm("model.norm", "decoder/norm", bias=False)
  return rows if config.decoder.tied_head else rows + _linear("lm_head", "decoder/head", bias=False)


def clip_rows(config: ModelConfig, prefix="model.vision_tower.vision_tower.") -> list[Row]:
  """The CLIP tower (R2.2); blocks past the selected layer go to `unused_blocks`."""
  hf = prefix + "vision_model"
  rows = [Row(f"{hf}.embeddings.class_embedding", "vision/class_embedding"),
          Row(f"{hf}.embeddings.position_embedding.weight", "vision/position_embedding")]
  rows += _linear(f"{hf}.embeddings.patch_embedding", "vision/patch_embed", bias=False,
                  form=conv(config.vision.patch_size))
  rows += _norm(f"{hf}.pre_layrnorm", "vision/pre_norm")  # sic: the key is misspelled
  used = config.vision.used_depth
  for i in range(config.vision.depth):
    path, layer = ("vision/blocks", i) if i < used else ("vision/unused_blocks", i - used)
    block = f"{hf}.encoder.layers.{i}"
    for theirs, ours in {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v",
                         "self_attn.out_proj": "out", "mlp.fc1": "up", "mlp.fc2": "down"}.items():
      rows += _linear(f"{block}.{theirs}", f"{path}/{ours}", layer)
    rows += _norm(f"{block}.layer_norm1", f"{path}/norm1", layer)
    rows += _norm(f"{block}.layer_norm2", f"{path}/norm2", layer)
  return rows + _norm(f"{hf}.post_layernorm", "vision/post_norm")


def convnext_rows(config: ModelConfig, stem="model.vision_tower_aux.vision_stem",
                  stages="model.vision_tower_aux.vision_stages") -> list[Row]:
  """The ConvNeXt tower (R2.2)."""
  rows = _linear(f"{stem}.0", "vision_hr/stem", form=conv(config.vision_hr.stride))
  rows += _norm(f"{stem}.1", "vision_hr/stem_norm")
  for s, depth in enumerate(config.vision_hr.depths):
    hf, path = f"{stages}.{s}", f"vision_hr/stages/{s}"
    if s:
      rows += _norm(f"{hf}.downsample.0", f"{path}/down_norm")
      rows += _linear(f"{hf}.downsample.1", f"{path}/down", form=conv(2))
    for b in range(depth):
      block, ours = f"{hf}.blocks.{b}", f"{path}/blocks"
      rows += [Row(f"{block}.gamma", f"{ours}/gamma", SAME, (b,)),
               Row(f"{block}.conv_dw.weight", f"{ours}/kernel", DEPTHWISE, (b,)),
               Row(f"{block}.conv_dw.bias", f"{ours}/bias", SAME, (b,))]
      rows += _norm(f"{block}.norm", f"{ours}/norm", b)
      rows += _linear(f"{block}.mlp.fc1", f"{ours}/up", b)
      rows += _linear(f"{block}.mlp.fc2", f"{ours}/down", b)
  return rows


def mining_rows(config: ModelConfig) -> list[Row]:
  """Query, key and value projections of patch info mining (R1.5)."""
  rows = []
  for theirs, ours in {"query": "query", "aux": "key", "val": "value"}.items():
    hf = f"model.vlm_uni_{theirs}_projector"
    rows += _norm(f"{hf}.0", f"mining/{ours}/norm") + _linear(f"{hf}.1", f"mining/{ours}/dense")
  return rows


def projector_rows(config: ModelConfig) -> list[Row]:
  """mlp{N}x_gelu counts its activations (0, 2, 4 ...); a single linear layer has no number."""
  if config.projector_depth == 1:
    return _linear("model.mm_projector", "projector/layers/0")
  return [row for i in range(config.projector_depth)
          for row in _linear(f"model.mm_projector.{2 * i}", f"projector/layers/{i}")]


def all_rows(config: ModelConfig) -> list[Row]:
  """Every tensor of a full checkpoint."""
  rows = decoder_rows(config) + clip_rows(config) + projector_rows(config)
  if config.vision_hr is not None:
    rows += convnext_rows(config) + mining_rows(config)
  return rows


# Buffers that older checkpoints carry and that hold nothing learned.
IGNORED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")


def from_hf(tensors: Mapping[str, np.ndarray], rows: list[Row], shapes: Mapping[str, tuple],
            source: str = "checkpoint") -> dict[str, np.ndarray]:
  """The original's tensors as flat arrays by path.

  Args:
    tensors: by name in the original.
    rows: the table.
    shapes: path -> shape that the model expects; must be covered exactly.
    source: what to call the checkpoint in errors.
  Raises:
    ValueError: a tensor is missing, unknown, of the wrong shape, or a path is left empty.
  """
  unknown = [n for n in tensors if not IGNORED.search(n)]
  unknown = sorted(set(unknown) - {r.hf for r in rows})
  missing = [r.hf for r in rows if r.hf not in tensors]
  if missing or unknown:
    raise ValueError(f"{source}: {len(rows)} tensors expected, {len(tensors)} found; "
                     f"missing: {', '.join(missing[:5]) or 'none'}; "
                     f"unknown: {', '.join(unknown[:5]) or 'none'}")
  out, filled = {}, {}
  for row in rows:
    if row.path not in shapes:
      raise ValueError(f"{source}: {row.hf} maps to {row.path}, which this model does not have")
    value, want = row.form.load(np.asarray(tensors[row.hf])), tuple(shapes[row.path])
    if value.shape != want[len(row.at):]:
      raise ValueError(f"{source}: {row.hf} has shape {tensors[row.hf].shape}, which is "
                       f"{value.shape} at {row.path} where {want} is expected")
    if row.at:
      out.setdefault(row.path, np.empty(want, value.dtype))[row.at] = value
    else:
      out[row.path] = value
    filled[row.path] = filled.get(row.path, 0) + 1
  stacked = {row.path: len(row.at) for row in rows}
  for path, want in shapes.items():
    count = math.prod(want[:stacked.get(path, 0)])
    if filled.get(path, 0) != count:
      raise ValueError(f"{source}: {path} needs {count} tensors, {filled.get(path, 0)} were set")
  return out


def to_hf(arrays: Mapping[str, np.ndarray], rows: list[Row]) -> dict[str, np.ndarray]:
  """Flat arrays by path -> the original's tensors by name."""
  out = {}
  for row in rows:
    value = np.asarray(arrays[row.path])
    out[row.hf] = row.form.save(value[row.at])
  return out
