"""The forms of the depthwise 7x7 convolution on this platform, forward and backward.

    python benchmarks/depthwise.py
"""
import jax
import jax.numpy as jnp
from timing import seconds

from mgjax.models.depthwise import grouped_conv, shifted_sum

SHAPES = ((2, 192, 192, 48), (2, 48, 48, 192), (64, 8, 8, 32))


def main():
  print(f"{'shape':<20}{'form':<14}{'forward ms':>11}{'fwd+bwd ms':>12}")
  for shape in SHAPES:
    x, kernel = jnp.ones(shape), jnp.ones((7, 7, shape[-1]))
    for form in (shifted_sum, grouped_conv):
      loss = lambda x, k, form=form: jnp.sum(jnp.square(form(x, k)))
      forward = seconds(jax.jit(form), x, kernel, repeats=3)
      both = seconds(jax.jit(jax.grad(loss, (0, 1))), x, kernel, repeats=3)
      print(f"{shape!s:<20}{form.__name__:<14}{forward * 1e3:>11.1f}{both * 1e3:>12.1f}")


if __name__ == "__main__":
  main()
