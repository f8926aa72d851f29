"""The original's tiny models, as this package's; used by several tests."""
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from conversion import mapping
from mgjax import trees
from mgjax.config import ClipVitConfig, ConvNextConfig, DecoderConfig, ModelConfig
from mgjax.models.mini_gemini import MiniGemini

CASES = ("llama", "llama3", "llama_hd", "llama_noaux", "llama_towers", "yi", "gemma", "gemma_tanh",
         "mistral", "mistral_swa", "mixtral")


class FromViews(MiniGemini):
  """The goldens give both views as independent tensors: batch["tiles"] [B, S, tiles, s, s, 3] and
  batch["hr"] [B, S, H, H, 3], normalised."""

  def visual_tokens(self, batch, rng=None):
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    hr = flat(batch["hr"]) if "hr" in batch else None
    visual = self.encode_views(flat(batch["tiles"]), hr, rng)
    return visual.reshape(batch["tiles"].shape[0], -1, visual.shape[-1])


def family(case: str, llm: dict) -> dict:
  """What sets the case's family apart."""
  if case.startswith("gemma"):
    return dict(activation="gelu_tanh" if case.endswith("tanh") else "gelu", norm_offset=1.0,
                scale_inputs=True, tied_head=True)
  return dict(sliding_window=llm.get("sliding_window"), experts=llm.get("num_local_experts", 0),
              experts_per_token=llm.get("num_experts_per_tok", 2))


def case_config(folder: Path) -> ModelConfig:
  """The shapes of a golden case."""
  c = json.loads((folder / "config.json").read_text())
  llm, clip, hr = c["llm"], c["clip_vision"], c.get("convnext")
  return ModelConfig(
      vision=ClipVitConfig(clip["image_size"], clip["patch_size"], clip["hidden_size"],
                           clip["num_hidden_layers"], clip["num_attention_heads"],
                           clip["intermediate_size"], clip["layer_norm_eps"],
                           llm["mm_vision_select_layer"]),
      vision_hr=ConvNextConfig(tuple(hr["depths"]), tuple(hr["dims"]), hr["norm_eps"]) if hr
      else None,
      decoder=DecoderConfig(
          llm["vocab_size"], llm["hidden_size"], llm["num_hidden_layers"],
          llm["num_attention_heads"], llm["num_key_value_heads"],
          llm.get("head_dim") or llm["hidden_size"] // llm["num_attention_heads"],
          llm["intermediate_size"], llm["rms_norm_eps"], llm["rope_theta"],
          **family(folder.name, llm)),
      hr_size=llm.get("image_size_aux", 128), grid=llm["image_grid"],
      global_view=llm["image_global"],
      projector_depth=1 if llm["mm_projector_type"] == "linear" else 2)


def load_params(folder: Path, config: ModelConfig, graph_params: dict) -> dict:
  """The case's weights as this package's nested parameters."""
  shapes = {k: v.shape for k, v in trees.flatten(graph_params).items()}
  tensors = load_file(folder / "model.safetensors")
  arrays = mapping.from_hf(tensors, mapping.all_rows(config), shapes, folder.name)
  return trees.unflatten({k: jnp.asarray(v) for k, v in arrays.items()})


def load_case(golden: Path, case: str) -> tuple[ModelConfig, FromViews]:
  """Config and float32 model of a case.  Call it inside a mesh."""
  config = case_config(golden / case)
  build = lambda: FromViews(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(nnx.eval_shape(build))  # built for real it would be compiled op by op
  return config, nnx.merge(graphdef, load_params(golden / case, config, trees.pure(state)))


def case_views(golden: Path, case: str) -> tuple[np.ndarray, np.ndarray | None]:
  """(tiles [N, tiles, s, s, 3] global first, hr [N, H, H, 3] or None), float32."""
  inputs = load_file(golden / case / "inputs.safetensors")
  tiles = inputs["images"].astype(np.float32)
  tiles = np.moveaxis(tiles if tiles.ndim == 5 else tiles[:, None], 2, -1)
  if inputs["images"].ndim == 5:  # the original appends the global view, here it comes first
    tiles = np.concatenate([tiles[:, -1:], tiles[:, :-1]], axis=1)
  hr = inputs.get("images_aux")
  return tiles, None if hr is None else np.moveaxis(hr.astype(np.float32), 1, -1)


def case_batch(golden: Path, case: str, config: ModelConfig, scenario: str = "right",
               limit: int | None = None) -> dict[str, np.ndarray]:
  """A scenario's rows as a batch, right-padded.  Text-only rows use up a picture, as there."""
  inputs = load_file(golden / case / "inputs.safetensors")
  if scenario in ("left", "trunc"):  # the same rows; what differs is made here
    scenario = "right"
  ids = inputs[f"{scenario}.input_ids"]
  mask = inputs.get(f"{scenario}.attention_mask", np.ones_like(ids)).astype(bool)
  labels = inputs.get(f"{scenario}.labels", np.full_like(ids, -100))
  tiles, hr = case_views(golden, case)
  rows, pictures, used = [], [], 0
  for row_ids, row_mask, row_labels in zip(ids, mask, labels):
    tokens, where, wanted, slot = [], [], [], 0
    for token, label in zip(row_ids[row_mask], row_labels[row_mask]):
      count = config.visual_tokens if token == -200 else 1
      tokens += [max(token, 0)] * count
      where += [slot * config.visual_tokens + t for t in range(count)] if token == -200 else [-1]
      wanted += [-100] * count if token == -200 else [label]
      slot += token == -200
    rows.append([x[:limit] for x in (tokens, where, wanted)])
    pictures.append(list(range(used, used + max(slot, 1))))
    used += max(slot, 1)
  length, slots = max(len(r[0]) for r in rows), max(map(len, pictures))
  full = lambda fill: np.full((len(rows), length), fill, np.int32)
  batch = {"tokens": full(0), "visual_index": full(-1), "segment_ids": full(0),
           "positions": full(0), "targets": full(0), "loss_mask": full(0).astype(bool)}
  for r, (tokens, where, wanted) in enumerate(rows):
    n = len(tokens)
    batch["tokens"][r, :n], batch["visual_index"][r, :n] = tokens, where
    batch["segment_ids"][r, :n], batch["positions"][r, :n] = 1, np.arange(n)
    nexts = np.array(wanted[1:])
    batch["targets"][r, :n - 1] = np.maximum(nexts, 0)
    batch["loss_mask"][r, :n - 1] = nexts != -100
  pick = lambda x: np.stack([x[(p + p * slots)[:slots]] for p in pictures])
  batch["tiles"] = pick(tiles)
  return batch if hr is None else batch | {"hr": pick(hr)}
