"""What the devices of a program are, and how a kernel is run on each of them."""
from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from absl import logging
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from mgjax.sharding import batch_shards, spec


def platform() -> str:
  """Of the devices that the program is for: those of the mesh, which may only be described."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def core_memory() -> int:
  """Bytes of a TPU core's own memory (VMEM), which kernels work in."""
  return pltpu.get_tpu_info().vmem_capacity_bytes


@functools.cache
def say_once(text: str) -> None:
  """A warning, once however often a program is traced."""
  logging.warning("%s", text)


def on_each_device(local: Callable, rows: tuple[jax.Array, ...], whole: tuple[jax.Array, ...] = (),
                   summed: bool | tuple[bool, ...] = False):
  """local(*rows, *whole) with each device's own rows, for XLA cannot cut a kernel.  Rows that the
  devices cannot share evenly are whole everywhere.  summed: what comes out is a sum over rows; a
  tuple where that are several."""
  shared = rows[0].shape[0] % batch_shards(jax.sharding.get_abstract_mesh()) == 0
  axes = spec("batch")[0] if shared else None

  def body(*args):
    total = lambda is_sum, x: jax.lax.psum(x, axes) if is_sum and axes else x
    return jax.tree.map(total, summed, local(*args))
  return jax.shard_map(body, in_specs=(P(axes),) * len(rows) + (P(),) * len(whole),
                       out_specs=jax.tree.map(lambda is_sum: P() if is_sum else P(axes), summed),
                       check_vma=False)(*rows, *whole)
