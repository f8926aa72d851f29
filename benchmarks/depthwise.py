"""The forms of the depthwise 7x7 convolution on this platform, forward and backward.

    python benchmarks/depthwise.py

With --tpu: what it takes in the four stages of ConvNeXt-L for 8 images at 768, bfloat16, on one
chip of a v5e (or --topology), by the TPU's compiler.  XLA's form by the compiler's estimate; our
kernels by the instruction bundles of the compiler's schedule, see mgjax/tpu/bundles.py.  --block: a
whole block instead, by the compile tool's account; --tower: the whole tower, which compiles for
minutes.

    python benchmarks/depthwise.py --tpu [--block | --tower] [--topology=v5e:2x2]
"""
import argparse
import functools
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from timing import seconds

from mgjax.config import ConvNextConfig
from mgjax.kernels import depthwise as kernels
from mgjax.models import depthwise as forms
from mgjax.models.convnext import ConvNext, ConvNextBlock
from mgjax.models.depthwise import depthwise_norm, grouped_conv, shifted_sum
from mgjax.sharding import make_mesh, mesh_context
from mgjax.tpu import bundles, hlo
from mgjax.tpu.links import Network
from mgjax.tpu.roofline import estimate
from mgjax.tpu.slices import chip, describe, parse_slice
from mgjax.xla import compiler_options

SHAPES = ((2, 192, 192, 48), (2, 48, 48, 192), (64, 8, 8, 32))
LARGE = ConvNextConfig(depths=(3, 3, 27, 3), widths=(192, 384, 768, 1536))
IMAGES, SIZE = 8, 768


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tpu", action="store_true")
  parser.add_argument("--block", action="store_true")
  parser.add_argument("--tower", action="store_true")
  parser.add_argument("--topology", default="v5e:2x2")
  chosen = parser.parse_args()
  if not chosen.tpu:
    return here()
  with tempfile.TemporaryDirectory() as folder:
    # Before libtpu is first used: it reads them once.
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(bundles.DUMP_FLAGS).format(folder=folder)
    tpu = Tpu(chosen.topology, pathlib.Path(folder))
    if chosen.tower:
      towers(tpu)
    elif chosen.block:
      blocks(tpu)
    else:
      convolutions(tpu)


def here():
  print(f"{'shape':<20}{'form':<14}{'forward ms':>11}{'fwd+bwd ms':>12}")
  for shape in SHAPES:
    x, kernel = jnp.ones(shape), jnp.ones((7, 7, shape[-1]))
    for form in (shifted_sum, grouped_conv):
      loss = lambda x, k, form=form: jnp.sum(jnp.square(form(x, k)))
      forward = seconds(jax.jit(form), x, kernel, repeats=3)
      both = seconds(jax.jit(jax.grad(loss, (0, 1))), x, kernel, repeats=3)
      print(f"{shape!s:<20}{form.__name__:<14}{forward * 1e3:>11.1f}{both * 1e3:>12.1f}")


class Tpu:
  """One chip that is only described."""

  def __init__(self, topology: str, folder: pathlib.Path):
    self.slice, self.folder = parse_slice(topology), folder
    self.chip = chip(self.slice)
    self.mesh = make_mesh(devices=describe(self.slice)[:1])
    self.clock = self.chip.clock

  def array(self, *shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, PartitionSpec()))

  def params(self, make):
    """Graph and bfloat16 parameters of a module."""
    graph, params = nnx.split(nnx.eval_shape(make))
    return graph, jax.tree.map(lambda s: self.array(*s.shape), params)

  def milliseconds(self, f, *args) -> float:
    """Of f(*args), by the compile tool's account."""
    with mesh_context(self.mesh):
      text = jax.jit(f).lower(*args).compile(compiler_options(self.mesh)).as_text()
    return 1e3 * estimate(hlo.parse(text), self.chip,
                          Network(self.mesh, self.slice, self.chip)).expected

  def kernel_milliseconds(self, name, f, *args) -> float:
    """Of the kernel `name` in f, by its schedule."""
    with mesh_context(self.mesh):
      jax.jit(f).lower(*args).compile()
    return 1e3 * bundles.cycles(bundles.of_kernel(self.folder, name)) / self.clock


def stages():
  for stage, width in enumerate(LARGE.widths):
    side = SIZE // LARGE.stride >> stage
    yield (IMAGES, side, side, width), LARGE.depths[stage]


def convolutions(tpu):
  print("ms a call; registers: cycles a register of 8 x 128; least: 49 multiplications and "
        "additions by four units")
  print(f"{'map':<22}{'least':>7}{'XLA':>7}{'XLA+norm':>9}{'kernel':>8}{'+norm':>7}{'registers':>10}"
        f"{'gradient':>9}")
  for shape, _ in stages():
    n, h, w, c = shape
    x, taps, vector = tpu.array(*shape), tpu.array(7, 7, c), tpu.array(c)
    registers = n * h * w / 8 * -(-c // 128)
    cores = tpu.chip.cores
    plain = tpu.milliseconds(lambda x, k, b: grouped_conv(x, k) + b, x, taps, vector)
    xla = tpu.milliseconds(lambda x, k, b: depthwise_norm(
        x, k, b, b, b, 1e-6, implementation="xla"), x, taps, vector)
    alone = tpu.kernel_milliseconds("depthwise", lambda x, k, b: kernels.depthwise(
        x, k, b, interpret=False), x, taps, vector)
    normed = tpu.kernel_milliseconds("depthwise_norm", lambda x, k, b: kernels.depthwise_norm(
        x, k, b, b, b, 1e-6, interpret=False), x, taps, vector)
    ours = tpu.kernel_milliseconds("depthwise_gradient", lambda x, g: kernels.depthwise_gradient(
        x, g, interpret=False), x, x)
    least = 1e3 * registers * 49 * 2 / 4 / tpu.clock / cores
    print(f"{shape!s:<22}{least:>7.2f}{plain:>7.2f}{xla:>9.2f}{alone:>8.2f}{normed:>7.2f}"
          f"{normed / 1e3 * tpu.clock * cores / registers:>10.1f}{ours:>9.2f}",
          flush=True)


def blocks(tpu):
  print(f"{'map':<22}{'XLA ms':>8}{'kernel ms':>10}")
  for shape, _ in stages():
    graph, params = tpu.params(lambda c=shape[-1]: ConvNextBlock(
        c, LARGE.norm_eps, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    xla, kernel = with_each(functools.partial(tpu.milliseconds, functools.partial(
        lambda graph, p, x: nnx.merge(graph, p)(x), graph), params, tpu.array(*shape)))
    print(f"{shape!s:<22}{xla:>8.2f}{kernel:>10.2f}", flush=True)


def towers(tpu):
  graph, params = tpu.params(lambda: ConvNext(LARGE, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
  images = tpu.array(IMAGES, SIZE, SIZE, 3)
  xla, kernel = with_each(lambda: tpu.milliseconds(
      lambda p, x: nnx.merge(graph, p)(x), params, images))
  print(f"the tower, {IMAGES} images at {SIZE}: {xla:.1f} ms by XLA's form, {kernel:.1f} by the "
        "kernel")


def with_each(run):
  """run() with XLA's form, and with what is chosen for a TPU."""
  chosen = forms._chosen
  try:
    forms._chosen = lambda x, kernel: "xla"
    yield run()
  finally:
    forms._chosen = chosen
  yield run()


if __name__ == "__main__":
  main()
