"""The parameters of a checkpoint one slice at a time: no stack of layers has to fit into memory.

orbax writes the frame of a checkpoint (its tree and its marks of completeness), tensorstore the
arrays in it, in pieces: one layer (and expert) each, and no piece above CHUNK bytes.
"""
from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
import types
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from conversion.tensors import ConversionError, contiguous
from mgjax import trees
from mgjax.checkpoint import STEPS, NoKeys, abstract_params, parameter_homes, resolve
from mgjax.config import ModelConfig
from mgjax.diffusion.config import SdxlConfig
from mgjax.diffusion.sdxl import Sdxl
from mgjax.models.mini_gemini import MiniGemini
from mgjax.sharding import make_mesh, mesh_context

CHUNK = 32 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class Array:
  """One parameter to be written: `stacked` leading axes count layers (and experts)."""

  shape: tuple[int, ...]
  dtype: np.dtype
  stacked: int = 0

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  @property
  def chunk(self) -> tuple[int, ...]:
    """One entry of the stack, cut along its first axis into pieces of at most CHUNK bytes."""
    inner = self.shape[self.stacked:]
    row = math.prod(inner[1:]) * self.dtype.itemsize
    rows = max(1, min(inner[0], CHUNK // max(row, 1)))
    pieces = -(-inner[0] // rows)
    return (1,) * self.stacked + (-(-inner[0] // pieces),) + inner[1:]


@functools.cache
def parameter_shapes(model: ModelConfig | SdxlConfig) -> Mapping[str, tuple[int, ...]]:
  """Path -> shape of every parameter of a model."""
  module = Sdxl if isinstance(model, SdxlConfig) else MiniGemini
  mesh = make_mesh(devices=jax.devices()[:1])
  with mesh_context(mesh):
    _, shapes = abstract_params(lambda: module(model, rngs=NoKeys(0)), mesh)
  return types.MappingProxyType({k: v.shape for k, v in trees.flatten(shapes).items()})


class Writer:
  """Writes the parameters of a new checkpoint `<run>/checkpoints/0`."""

  def __init__(self, run: Path, arrays: Mapping[str, Array]):
    self._arrays = arrays
    folder = run.absolute() / STEPS / "0"
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = saving.use_compression = saving.enable_write_sharding_file = False
    saving.array_metadata_store = None
    frame = trees.unflatten({f"params/{path}": np.zeros(1, a.dtype) for path, a in arrays.items()})
    with context:
      ocp.save_checkpointables(folder, dict(state=frame))
    self._stores = {}
    for path, array in arrays.items():
      place = folder / "state" / f"params/{path}".replace("/", ".")
      shutil.rmtree(place)
      self._stores[path] = ts.open({
          "driver": "zarr3", "kvstore": {"driver": "file", "path": f"{place}/"},
          "store_data_equal_to_fill_value": True,  # else zeros would look like a lost file
          "metadata": {
              "shape": array.shape, "data_type": array.dtype.name,
              "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": array.chunk}},
              "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]}},
          create=True).result()

  def write(self, path: str, at: tuple[int, ...], value: np.ndarray) -> None:
    """One entry of a stack (`at` = () for an array that is none), perhaps a transposed view."""
    array, store = self._arrays[path], self._stores[path]
    rows = array.chunk[array.stacked]
    for start in range(0, value.shape[0], rows):
      part = slice(start, min(start + rows, value.shape[0]))
      piece = contiguous(value[part].astype(array.dtype, copy=False))
      try:
        store[at][part].write(piece, can_reference_source_data_indefinitely=True).result()
      except ValueError as e:  # what the disk says
        raise ConversionError(f"{path} cannot be written ({_short(e)})") from e


class Reader:
  """Reads the parameters of any checkpoint of this package, slice by slice.

  Raises ConversionError or CheckpointError naming the folder.
  """

  def __init__(self, checkpoint: str | Path):
    self.step_dir = resolve(checkpoint)
    self._state = self.step_dir / "state"
    try:
      self._frame = json.loads((self._state / "_METADATA").read_text())
    except (OSError, ValueError) as e:
      raise ConversionError(f"{self._state}: cannot be read ({e})") from e
    self._stores = {path: self._open(home) for path, home in parameter_homes(self.step_dir).items()}
    self.arrays: dict[str, tuple[tuple[int, ...], np.dtype]] = {  # shape and dtype by path
        path: (tuple(s.shape), np.dtype(s.dtype.numpy_dtype)) for path, s in self._stores.items()}

  def _open(self, home: str):
    name, base = home.replace("/", "."), {"driver": "file", "path": f"{self._state}/"}
    kvstore = {"driver": "file", "path": f"{self._state}/{name}/"}
    if self._frame.get("use_ocdbt", True):
      kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    driver = "zarr3" if self._frame.get("use_zarr3") else "zarr"
    try:
      return ts.open({"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": False},
                     open=True, read=True).result()
    except ValueError as e:
      raise ConversionError(f"{self.step_dir}: {home} cannot be read ({_short(e)})") from e

  def read(self, path: str, at: tuple[int, ...]) -> np.ndarray:
    """One entry of a stack, or a whole array with `at` = ()."""
    try:
      return np.asarray(self._stores[path][at].read().result())
    except ValueError as e:
      raise ConversionError(f"{self.step_dir}: {path} cannot be read ({_short(e)})") from e


def _short(e: Exception) -> str:
  return " ".join(str(e).split())[:300]
