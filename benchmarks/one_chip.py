"""One chip of a TPU that is only described, for benchmarks of parts of the model."""
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mgjax.sharding import make_mesh, mesh_context
from mgjax.tpu import bundles, hlo
from mgjax.tpu.links import Network
from mgjax.tpu.roofline import Estimate, estimate
from mgjax.tpu.slices import chip, describe, parse_slice
from mgjax.xla import compiler_options


class Chip:
  """To be made before libtpu is first used: that reads only once where schedules go.

  schedules: write them, for `kernel_cycles`; large programs compile many times longer with it.
  """

  def __init__(self, topology: str, *, schedules: bool = True):
    self._folder = tempfile.TemporaryDirectory()
    if schedules:
      os.environ["LIBTPU_INIT_ARGS"] = " ".join(bundles.DUMP_FLAGS).format(
          folder=self._folder.name)
    self._slice = parse_slice(topology)
    self.kind = chip(self._slice)
    self.mesh = make_mesh(devices=describe(self._slice)[:1])

  def array(self, *shape, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, PartitionSpec()))

  def params(self, make):
    """Graph and bfloat16 parameters of a module."""
    with mesh_context(self.mesh):
      graph, params = nnx.split(nnx.eval_shape(make))
    return graph, jax.tree.map(lambda s: self.array(*s.shape), params)

  def compiled(self, f, *args):
    with mesh_context(self.mesh):
      # A function of its own: what jax traced of `f` may be of another choice of forms.
      return jax.jit(lambda *args: f(*args)).lower(*args).compile(compiler_options(self.mesh))

  def estimate(self, f, *args) -> Estimate:
    """Of f(*args), by the compile tool's account."""
    return estimate(hlo.parse(self.compiled(f, *args).as_text()), self.kind,
                    Network(self.mesh, self._slice, self.kind))

  def milliseconds(self, f, *args) -> float:
    return 1e3 * self.estimate(f, *args).expected

  def kernel_cycles(self, name: str) -> float:
    """Of the kernel of that name that was compiled last, by its schedule (mgjax/tpu/bundles.py),
    shared by the cores of the chip."""
    text = bundles.of_kernel(pathlib.Path(self._folder.name), name)
    return bundles.cycles(text) / self.kind.cores
