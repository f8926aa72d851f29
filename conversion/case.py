"""A golden case: a tiny model of the original with inputs and outputs, as this package's arrays.

A folder holds `config.json` (llm, clip_vision, convnext), `golden.json`, and `model`, `inputs` and
`outputs` as safetensors.
"""
from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from conversion import mapping
from conversion.config import read_json, read_model
from conversion.families import Json
from conversion.tensors import ConversionError, open_file, open_tensors
from mgjax import trees
from mgjax.config import ModelConfig
from mgjax.infer.engine import Prompt
from mgjax.models.mini_gemini import MiniGemini

PICTURE = -200  # stands for a picture in the original's ids


class FromViews(MiniGemini):
  """The cases give both views as independent tensors: batch["tiles"] [B, S, tiles, s, s, 3] and
  batch["hr"] [B, S, H, H, 3], normalised."""

  def visual_tokens(self, batch, rng=None):
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    hr = flat(batch["hr"]) if "hr" in batch else None
    visual = self.encode_views(flat(batch["tiles"]), hr, rng)
    return visual.reshape(batch["tiles"].shape[0], -1, visual.shape[-1])


@dataclasses.dataclass(frozen=True)
class Case:
  """What the original was given, and what it gave."""

  folder: Path

  def __post_init__(self):
    for name in ("config.json", "golden.json", "model.safetensors", "inputs.safetensors",
                 "outputs.safetensors"):
      if not (self.folder / name).is_file():
        raise ConversionError(f"{self.folder}: no {name}; a case is a folder with config.json, "
                              "golden.json and three .safetensors")

  @functools.cached_property
  def facts(self) -> Json:
    """golden.json."""
    return read_json(self.folder / "golden.json")

  @functools.cached_property
  def inputs(self) -> dict[str, np.ndarray]:
    return load(self.folder / "inputs.safetensors")

  @functools.cached_property
  def outputs(self) -> dict[str, np.ndarray]:
    return load(self.folder / "outputs.safetensors")

  @functools.cached_property
  def llm(self) -> Json:
    """The original's config.json."""
    return read_json(self.folder / "config.json")["llm"]

  @functools.cached_property
  def config(self) -> ModelConfig:
    """The shapes of the model."""
    parts = read_json(self.folder / "config.json")
    headers = open_tensors(self.folder).headers
    config = read_model(parts["llm"], headers, str(self.folder), parts["clip_vision"])
    if config.vision_hr is None:
      return config
    eps = parts["convnext"].get("norm_eps", config.vision_hr.norm_eps)
    return dataclasses.replace(
        config, vision_hr=dataclasses.replace(config.vision_hr, norm_eps=eps))

  @functools.cached_property
  def rows(self) -> list[mapping.Row]:
    """The table of the model's tensors."""
    return mapping.all_rows(self.config)

  def model(self) -> FromViews:
    """The case's model in float32.  Call it inside a mesh."""
    build = lambda: FromViews(self.config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(nnx.eval_shape(build))  # built for real, op by op, it would be slow
    shapes = {k: v.shape for k, v in trees.flatten(trees.pure(state)).items()}
    arrays = mapping.to_arrays(load(self.folder / "model.safetensors"), self.rows, shapes,
                             str(self.folder))
    return nnx.merge(graphdef, trees.unflatten({k: jnp.asarray(v) for k, v in arrays.items()}))

  def views(self) -> tuple[np.ndarray, np.ndarray | None]:
    """(tiles [N, tiles, s, s, 3] global first, hr [N, H, H, 3] or None), float32."""
    tiles = self.inputs["images"].astype(np.float32)
    tiles = np.moveaxis(tiles if tiles.ndim == 5 else tiles[:, None], 2, -1)
    if self.config.global_view:  # the original appends the global view, here it comes first
      tiles = np.concatenate([tiles[:, -1:], tiles[:, :-1]], axis=1)
    hr = self.inputs.get("images_aux")
    return tiles, None if hr is None else np.moveaxis(hr.astype(np.float32), 1, -1)

  def batch(self, scenario: str = "right") -> dict[str, np.ndarray]:
    """A scenario's rows, right-padded.  Text-only rows use up a picture, as they do there."""
    limit = self.facts["scenarios"][scenario].get("tokenizer_model_max_length")
    name = scenario if f"{scenario}.input_ids" in self.inputs else "right"  # then it is made here
    ids = self.inputs[f"{name}.input_ids"]
    mask = self.inputs.get(f"{name}.attention_mask", np.ones_like(ids)).astype(bool)
    labels = self.inputs.get(f"{name}.labels", np.full_like(ids, -100))
    per_picture, rows, pictures, used = self.config.visual_tokens, [], [], 0
    for row_ids, row_mask, row_labels in zip(ids, mask, labels):
      tokens, where, slots = spread(row_ids[row_mask], per_picture)
      counts = np.where(row_ids[row_mask] == PICTURE, per_picture, 1)
      wanted = np.repeat(np.where(row_ids == PICTURE, -100, row_labels)[row_mask], counts)
      rows.append([x[:limit] for x in (tokens, where, wanted)])
      pictures.append(list(range(used, used + max(slots, 1))))
      used += max(slots, 1)
    length, slots = max(len(r[0]) for r in rows), max(map(len, pictures))
    full = lambda fill: np.full((len(rows), length), fill, np.int32)
    batch = {"tokens": full(0), "visual_index": full(-1), "segment_ids": full(0),
             "positions": full(0), "targets": full(0), "loss_mask": full(0).astype(bool)}
    for r, (tokens, where, wanted) in enumerate(rows):
      n = len(tokens)
      batch["tokens"][r, :n], batch["visual_index"][r, :n] = tokens, where
      batch["segment_ids"][r, :n], batch["positions"][r, :n] = 1, np.arange(n)
      batch["targets"][r, :n - 1] = np.maximum(wanted[1:], 0)
      batch["loss_mask"][r, :n - 1] = wanted[1:] != -100
    tiles, hr = self.views()
    pick = lambda x: np.stack([x[(p + p * slots)[:slots]] for p in pictures])
    batch["tiles"] = pick(tiles)
    return batch if hr is None else batch | {"hr": pick(hr)}

  def prompt(self, scenario: Json, row: int, visual: jax.Array) -> Prompt:
    """One row of a generation scenario; visual [N, T, D] are the tokens of all pictures."""
    ids = np.array(scenario["prompt_ids"][row])
    if "attention_mask" in scenario:
      ids = ids[np.array(scenario["attention_mask"][row], bool)]
    tokens, where, slots = spread(ids, self.config.visual_tokens)
    used = scenario["image_index"][row:row + 1] if slots else []
    return Prompt(tokens, where, tuple(visual[i] for i in used))


def load(path: Path) -> dict[str, np.ndarray]:
  """All tensors of a small file."""
  tensors = open_file(path)
  return {name: tensors.read(name) for name in tensors.headers}


def spread(ids: np.ndarray, per_picture: int) -> tuple[np.ndarray, np.ndarray, int]:
  """The original's ids with every picture over its T positions: tokens, visual_index, pictures."""
  is_picture = np.repeat(ids == PICTURE, np.where(ids == PICTURE, per_picture, 1))
  tokens = np.repeat(np.maximum(ids, 0), np.where(ids == PICTURE, per_picture, 1))
  return tokens, np.where(is_picture, np.cumsum(is_picture) - 1, -1), int((ids == PICTURE).sum())
