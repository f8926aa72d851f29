"""The forms of the depthwise 7x7 convolution on this platform, forward and backward.

    python benchmarks/depthwise.py

With --tpu: what it takes in the four stages of ConvNeXt-L for 8 images at 768, bfloat16, on one
chip of a v5e (or --topology), by the TPU's compiler.  XLA's form by the compiler's estimate; our
kernels by the instruction bundles of the compiler's schedule, see mgjax/tpu/bundles.py.  --block: a
whole block instead, by the compile tool's account; --tower: the whole tower as a run trains it,
which compiles for minutes.

    python benchmarks/depthwise.py --tpu [--block | --tower] [--topology=v5e:2x2]
"""
import argparse
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from one_chip import Chip
from timing import seconds

from mgjax.config import ConvNextConfig
from mgjax.kernels import depthwise as kernels
from mgjax.kernels.layer_norm import layer_norm, layer_norm_gradient
from mgjax.models import depthwise as forms
from mgjax.models.convnext import ConvNext, ConvNextBlock
from mgjax.models.depthwise import depthwise_norm, grouped_conv, shifted_sum
from mgjax.models.layers import plain_layer_norm
from mgjax.models.remat import RematConfig

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
  run = towers if chosen.tower else blocks if chosen.block else convolutions
  run(Chip(chosen.topology, schedules=run is convolutions))


def here():
  print(f"{'shape':<20}{'form':<14}{'forward ms':>11}{'fwd+bwd ms':>12}")
  for shape in SHAPES:
    x, kernel = jnp.ones(shape), jnp.ones((7, 7, shape[-1]))
    for form in (shifted_sum, grouped_conv):
      loss = lambda x, k, form=form: jnp.sum(jnp.square(form(x, k)))
      forward = seconds(jax.jit(form), x, kernel, repeats=3)
      both = seconds(jax.jit(jax.grad(loss, (0, 1))), x, kernel, repeats=3)
      print(f"{shape!s:<20}{form.__name__:<14}{forward * 1e3:>11.1f}{both * 1e3:>12.1f}")


def stages():
  for stage, width in enumerate(LARGE.widths):
    side = SIZE // LARGE.stride >> stage
    yield IMAGES, side, side, width


def convolutions(tpu):
  print("ms a call; registers: cycles a register of 8 x 128; least: 49 multiplications and "
        "additions by four units")
  print(f"{'map':<22}{'least':>7}{'XLA':>7}{'XLA+norm':>9}{'kernel':>8}{'+norm':>7}{'registers':>10}"
        f"{'gradient':>9}{'norm: XLA':>11}{'kernel':>8}{'gradient: XLA':>15}{'kernel':>8}")
  for shape in stages():
    n, h, w, c = shape
    x, taps, vector = tpu.array(*shape), tpu.array(7, 7, c), tpu.array(c)
    registers = n * h * w / 8 * -(-c // 128)
    plain = tpu.milliseconds(lambda x, k, b: grouped_conv(x, k) + b, x, taps, vector)
    xla = tpu.milliseconds(lambda x, k, b: depthwise_norm(
        x, k, b, b, b, 1e-6, implementation="xla"), x, taps, vector)

    def cycles(name, f, *args):
      tpu.compiled(f, *args)
      return tpu.kernel_cycles(name)
    alone = cycles("depthwise", lambda x, k, b: kernels.depthwise(x, k, b, interpret=False),
                   x, taps, vector)
    normed = cycles("depthwise_norm", lambda x, k, b: kernels.depthwise_norm(
        x, k, b, b, b, 1e-6, interpret=False), x, taps, vector)
    gradient = cycles("depthwise_gradient", lambda x, g: kernels.depthwise_gradient(
        x, g, interpret=False), x, x)
    norm = tpu.milliseconds(lambda x, b: plain_layer_norm(x, b, b, 1e-6), x, vector)
    normed_alone = cycles("layer_norm", lambda x, b: layer_norm(x, b, b, 1e-6, interpret=False),
                          x, vector)
    norm_gradient = tpu.milliseconds(lambda x, g, b: jax.vjp(
        lambda x, a, b: plain_layer_norm(x, a, b, 1e-6), x, b, b)[1](g), x, x, vector)
    by_kernel = cycles("layer_norm_gradient", lambda x, g, b: layer_norm_gradient(
        x, g, b, 1e-6, interpret=False), x, x, vector)
    least = registers * 49 * 2 / 4 / tpu.kind.cores
    ms = lambda cycles: f"{1e3 * cycles / tpu.kind.clock:.2f}"
    print(f"{shape!s:<22}{ms(least):>7}{plain:>7.2f}{xla:>9.2f}{ms(alone):>8}{ms(normed):>7}"
          f"{normed * tpu.kind.cores / registers:>10.1f}{ms(gradient):>9}"
          f"{norm:>11.2f}{ms(normed_alone):>8}{norm_gradient:>15.2f}{ms(by_kernel):>8}",
          flush=True)


def blocks(tpu):
  print(f"{'map':<22}{'XLA ms':>8}{'kernel ms':>10}{'with gradients':>24}")
  for shape in stages():
    graph, params = tpu.params(lambda c=shape[-1]: ConvNextBlock(
        c, LARGE.norm_eps, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    forward, backward = passes(tpu, graph, params, tpu.array(*shape))
    print(f"{shape!s:<22}{forward[0]:>8.2f}{forward[1]:>10.2f}{backward[0]:>14.2f}"
          f"{backward[1]:>10.2f}", flush=True)


def towers(tpu):
  graph, params = tpu.params(lambda: ConvNext(
      LARGE, remat_policy=RematConfig().towers, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
  for images in (2, IMAGES):
    for name, (xla, kernel) in zip(("forward", "with gradients"), passes(
        tpu, graph, params, tpu.array(images, SIZE, SIZE, 3), wanted=0)):
      print(f"the tower, {images} images at {SIZE}, {name}: {xla:.1f} ms with XLA's convolutions, "
            f"{kernel:.1f} with the kernels", flush=True)


def passes(tpu, graph, params, x, wanted=(0, 1)):
  """Milliseconds with XLA's convolutions and with kernels, forward, and with the gradients of
  parameters and x or what is `wanted` of them."""
  forward = lambda p, x: nnx.merge(graph, p)(x)
  loss = lambda p, x: sum(jnp.sum(y.astype(jnp.float32)) for y in jax.tree.leaves(forward(p, x)))
  yield tuple(with_each(functools.partial(tpu.milliseconds, forward, params, x)))
  yield tuple(with_each(functools.partial(
      tpu.milliseconds, jax.value_and_grad(loss, wanted), params, x)))


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
