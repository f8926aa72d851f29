"""Arrays of the devices that wait in the host's memory, and come back as they were, bit for bit."""
from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Waiting:
  """An array that waits: what lay on each device of this process, equal pieces once."""

  shape: tuple[int, ...]
  sharding: jax.sharding.Sharding | None      # None: on whatever device, as it was never told
  pieces: dict[tuple, np.ndarray]             # by the slices that they are of the whole
  places: list[tuple[jax.Device, tuple]]      # which device held which of them

  def back(self) -> jax.Array:
    """The array, on its devices again."""
    if self.sharding is None:
      return jax.device_put(*self.pieces.values())
    shards = [jax.device_put(self.pieces[key], device) for device, key in self.places]
    return jax.make_array_from_single_device_arrays(self.shape, self.sharding, shards)


def to_host(tree: Any) -> Any:
  """The same tree with a `Waiting` in place of each array.

  The devices' memory is free once nobody refers to the arrays given.
  """
  return jax.tree.map(lambda x: _waiting(x) if isinstance(x, jax.Array) else x, tree)


def _waiting(array: jax.Array) -> Waiting:
  pieces, places = {}, []
  for shard in array.addressable_shards:
    key = tuple((s.start, s.stop) for s in shard.index)
    if key not in pieces:
      pieces[key] = np.array(shard.data)  # a copy: on CPUs a view would keep the array
    places.append((shard.device, key))
  return Waiting(array.shape, array.sharding if array.committed else None, pieces, places)


def to_devices(tree: Any) -> Any:
  """The tree with every `Waiting` an array again; returns when all have arrived."""
  is_waiting = lambda x: isinstance(x, Waiting)
  back = jax.tree.map(lambda x: x.back() if is_waiting(x) else x, tree, is_leaf=is_waiting)
  jax.block_until_ready([x for x in jax.tree.leaves(back) if isinstance(x, jax.Array)])
  return back
