"""Adapters: merged as a run is read, and as folders of the `peft` library, in both directions.

peft's folder has adapter_config.json and adapter_model.safetensors, with a tensor lora_A [rank, in]
and lora_B [out, rank] for each layer.  What else the run trained goes beside it, as the original
leaves it (R4.7), but as safetensors: non_lora_trainables.safetensors.
"""
from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from conversion import mapping
from conversion.arrays import Shards, write_shards
from conversion.config import read_json
from conversion.store import Array, Reader, Writer, parameter_shapes
from conversion.tensors import ConversionError, Header, Tensors, open_file
from conversion.transfer import Job, finished_folder, run_jobs
from mgjax.adapter_base import Base, checksum_on_host, read_base
from mgjax.checkpoint import ORIGIN, TOKENIZER, lora_of, read_run, write_run
from mgjax.config import ConfigError, ModelConfig, build
from mgjax.models.lora import ADAPTER, LoraConfig, merged

CONFIG_FILE, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRAINED = "non_lora_trainables"
_PREFIX = "base_model.model."
_SIDES = {"a": "lora_A", "b": "lora_B"}


class MergedReader:
  """As `Reader`, of a run with adapters: its base with what they learned merged in, float32."""

  def __init__(self, step_dir: Path, base: Base, lora: LoraConfig, frozen_dtype: str):
    self.step_dir, self._lora, self._dtype = step_dir, lora, np.dtype(frozen_dtype)
    self.own = Reader(step_dir)
    self._homes = readers_of(base)
    _check(base, self._homes, self._dtype)
    self._homes |= {k: self.own for k in self.own.arrays if not ADAPTER.search(k)}
    self._changed = set(lora.changes(self._homes))
    kept = lambda k, reader: reader.arrays[k][1] if reader is self.own else self._dtype
    self.arrays = {k: (r.arrays[k][0], np.dtype(np.float32) if k in self._changed else kept(k, r))
                   for k, r in self._homes.items()}

  def read(self, path: str, at: tuple[int, ...]) -> np.ndarray:
    """One entry of a stack, or a whole array with `at` = ()."""
    value = self._homes[path].read(path, at)
    if self._homes[path] is self.own:
      return value
    value = value.astype(self._dtype, copy=False)  # as it was trained against
    if path not in self._changed:
      return value
    layer = path.removesuffix("/kernel")
    pair = [self.own.read(f"{layer}/lora_{x}", at) for x in _SIDES] if self._lora.rank else []
    return np.asarray(_merge(jnp.asarray(value), self._lora, pair))


@functools.partial(jax.jit, static_argnums=1)
def _merge(kernel, lora, pair):
  return merged(kernel, lora, pair, jnp.float32)


def open_reader(step_dir: Path) -> Reader | MergedReader:
  """The parameters of a run, adapters merged.  Raises ConversionError, CheckpointError."""
  base = read_base(step_dir.parent.parent)
  if base is None:
    return Reader(step_dir)
  run = read_run(step_dir, None)[1]
  return MergedReader(step_dir, base, lora_of(run, step_dir), run["frozen_dtype"])


def readers_of(base: Base) -> dict[str, Reader]:
  """For each parameter of a base a reader of the folder that holds it, one for each folder."""
  readers = {folder: Reader(folder) for folder in {f for f, _ in base.parameters.values()}}
  return {k: readers[folder] for k, (folder, _) in base.parameters.items()}


def _check(base: Base, homes: Mapping[str, Reader], dtype: np.dtype) -> None:
  """Raises CheckpointError if a base is not what the adapters were trained on.  Norms and biases
  are looked at, which are quickly read, and differ wherever something was trained."""
  for path in base.parameters:
    if re.search(r"(scale|bias)$", path):
      base.check(path, checksum_on_host(homes[path].read(path, ()).astype(dtype)))


def _names(model: ModelConfig, path: str) -> dict[tuple[int, ...], str]:
  """Entry of the stack `path` -> name of the layer in the original."""
  return {row.at: row.hf.removesuffix(".weight") for row in mapping.all_rows(model)
          if row.path == path}


def export_peft(path: Path, output: Path, dtype: np.dtype | None) -> None:
  """Writes the adapters of a run as a folder of peft.  Raises ConversionError."""
  step_dir, run = read_run(path)
  lora = lora_of(run, step_dir)
  if not lora.rank:
    raise ConversionError(f"{path}: this run has no adapters; --peft needs one of configs/lora.py")
  model, reader = build(ModelConfig, run["model"], f"{path}: model"), Reader(step_dir)
  headers, entries, modules = {}, {}, set()
  for ours in (k for k in reader.arrays if ADAPTER.search(k)):
    layer, side = ours[:-len("/lora_a")], _SIDES[ours[-1]]
    shape, saved = reader.arrays[ours]
    for at, name in _names(model, f"{layer}/kernel").items():
      key = f"{_PREFIX}{name}.{side}.weight"
      headers[key] = Header(shape[len(at):][::-1], dtype or saved, step_dir)
      entries[key] = ours, at
      modules.add(re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)))
  read = lambda key: reader.read(*entries[key]).T.astype(headers[key].dtype)
  rows = [r for r in mapping.all_rows(model) if r.path in reader.arrays]
  rest, whole = {f"{_PREFIX}{r.hf}": r for r in rows}, {}
  for key, row in rest.items():
    shape, saved = reader.arrays[row.path]
    whole[key] = Header(row.form.there(shape[len(row.at):]), dtype or saved, step_dir)
  read_whole = lambda key: rest[key].form.save(
      reader.read(rest[key].path, rest[key].at)).astype(whole[key].dtype)
  with finished_folder(output) as part:
    (part / CONFIG_FILE).write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.rank, "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout, "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "base_model_name_or_path": "", "modules_to_save": None,
        # A regular expression: the names alone would take layers of the towers too.
        "target_modules": "|".join(sorted(modules))}, indent=2) + "\n")
    shards = [Shards(part, WEIGHTS.removesuffix(".safetensors"),
                     Tensors(str(step_dir), headers, read), [sorted(headers)], indexed=False)]
    if rest:
      shards.append(Shards(part, TRAINED, Tensors(str(step_dir), whole, read_whole),
                           [sorted(whole)], indexed=False))
    write_shards(shards)
  if lora.base:
    print(f"note: these adapters were trained on {lora.base} weights; on others they answer a "
          "little otherwise.  Without --peft the model is written with both merged")


def import_peft(folder: Path, base_path: Path, output: Path) -> None:
  """Writes a run whose adapters are those of a peft folder, and whose base is a checkpoint.
  Raises ConversionError, CheckpointError."""
  step_dir, run = read_run(base_path)
  if read_base(step_dir.parent.parent) is not None:
    raise ConversionError(f"{base_path}: has adapters itself, it is no base for others; merge it "
                          "first: python -m conversion.to_hf, then conversion.from_hf")
  model = build(ModelConfig, run["model"], f"{base_path}: model")
  told, tensors = read_json(folder / CONFIG_FILE), open_file(folder / WEIGHTS)
  lora = _lora_config(told, folder, model, tensors)
  shapes, rows = parameter_shapes(model), mapping.all_rows(model)
  jobs, arrays = [], {}
  claimed: set[str] = set()
  for path in lora.changes(shapes):
    *lead, d_in, d_out = shapes[path]
    for side, theirs in _SIDES.items():
      ours = f"{path.removesuffix('/kernel')}/lora_{side}"
      inner = (d_in, lora.rank) if side == "a" else (lora.rank, d_out)
      arrays[ours] = Array((*lead, *inner), np.dtype(np.float32), len(lead))
      for at, name in _names(model, path).items():
        key = f"{_PREFIX}{name}.{theirs}.weight"
        if key not in tensors.headers:
          raise ConversionError(f"{folder / WEIGHTS}: {key} is missing, other layers have theirs")
        if tensors.headers[key].shape != inner[::-1]:
          raise ConversionError(f"{folder / WEIGHTS}: {key} has shape {tensors.headers[key].shape},"
                                f" {base_path} needs {inner[::-1]}; they belong to another base "
                                "model")
        claimed.add(key)
        jobs.append((ours, at, tensors, key, lambda x: x.T))
  if unknown := sorted(set(tensors.headers) - claimed):
    raise ConversionError(f"{folder / WEIGHTS}: {unknown[0]} is no layer of {base_path} "
                          f"({len(unknown)} such); they belong to another base model")
  if (folder / f"{TRAINED}.safetensors").is_file():
    whole, by_name = open_file(folder / f"{TRAINED}.safetensors"), {r.hf: r for r in rows}
    for key, header in whole.headers.items():
      row = by_name.get(key.removeprefix(_PREFIX))
      if row is None or header.shape != row.form.there(shapes[row.path][len(row.at):]):
        raise ConversionError(f"{whole.where}: {key} {header.shape} does not fit {base_path}")
      arrays[row.path] = Array(shapes[row.path], np.dtype(np.float32), len(row.at))
      jobs.append((row.path, row.at, whole, key, row.form.load))
  dtype, reader = np.dtype(run["frozen_dtype"]), Reader(step_dir)
  with finished_folder(output) as part:
    folders = {name: step_dir.parent.parent / name for name in (TOKENIZER, ORIGIN)}
    there = {name: f if f.is_dir() else None for name, f in folders.items()}
    write_run(part, run | {"lora": dataclasses.asdict(lora)}, there[TOKENIZER], there[ORIGIN])
    Base({k: (step_dir, checksum_on_host(reader.read(k, ()).astype(dtype)))
          for k in shapes if k not in arrays}).write(part, at=output)
    writer = Writer(part, arrays)
    run_jobs("reading", [Job(t.headers[key].nbytes, functools.partial(
        _copy, writer, ours, at, t, key, load)) for ours, at, t, key, load in jobs])


def _copy(writer, path, at, tensors, key, load):
  writer.write(path, at, load(tensors.read(key)))


def _lora_config(told: Mapping, folder: Path, model: ModelConfig, tensors: Tensors) -> LoraConfig:
  """What adapter_config.json means, for the layers that there are tensors of."""
  where = folder / CONFIG_FILE
  plain = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False,
           "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
           "fan_in_fan_out": False}
  strange = {k: told[k] for k, usual in plain.items() if told.get(k) not in (usual, None)}
  if strange:
    raise ConversionError(f"{where}: {strange} is not supported; expected plain LoRA")
  held = {k.removeprefix(_PREFIX) for k in tensors.headers}
  taken = sorted({row.path.removesuffix("/kernel") for row in mapping.all_rows(model)
                  if f"{row.hf.removesuffix('.weight')}.lora_A.weight" in held})
  if not taken:
    raise ConversionError(f"{folder / WEIGHTS}: no adapter in it is of a layer of this model")
  try:
    return LoraConfig("^(" + "|".join(map(re.escape, taken)) + ")$", int(told["r"]),
                      float(told["lora_alpha"]), float(told.get("lora_dropout") or 0.0))
  except (KeyError, TypeError, ValueError, ConfigError) as e:
    raise ConversionError(f"{where}: r and lora_alpha cannot be read ({e})") from e
