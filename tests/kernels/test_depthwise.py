"""The TPU's depthwise kernels against the plain form, values and gradients, step by step."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several_devices

from mgjax.kernels.depthwise import depthwise, depthwise_gradient, fits
from mgjax.models import depthwise as forms
from mgjax.models import platforms
from mgjax.models.depthwise import depthwise_norm, grouped_conv
from mgjax.sharding import make_mesh, mesh_context


@pytest.fixture(autouse=True)
def one_device():
  with mesh_context(make_mesh(devices=jax.devices()[:1])), jax.default_matmul_precision("highest"):
    yield


def inputs(shape, dtype=jnp.float32):
  rng, c = np.random.default_rng(0), shape[-1]
  make = lambda *shape, by=1.0: jnp.asarray(rng.normal(size=shape) * by, dtype)
  x, kernel, bias = make(*shape), make(7, 7, c, by=1 / 7), make(c)
  scale, shift = (make(c).astype(jnp.float32) for _ in range(2))
  return (x, kernel, bias, scale, shift), make(*shape)


def value_and_gradients(implementation, args, g, wanted=(0, 1, 2, 3, 4)):
  def weighed(*args):
    y = depthwise_norm(*args, 1e-6, implementation=implementation)
    return jnp.sum((y * g).astype(jnp.float32)), y
  gradients, y = jax.jit(jax.grad(weighed, wanted, has_aux=True))(*args)
  return y, *gradients


def near(ours, want, bar):
  """To `bar`, relative to the largest number where that is above 1."""
  assert ours.dtype == want.dtype and ours.shape == want.shape
  ours, want = (np.asarray(a, np.float32) for a in (ours, want))
  np.testing.assert_allclose(ours, want, atol=bar * max(1, np.abs(want).max()), rtol=0)


@pytest.mark.parametrize("shape", [
    (2, 8, 16, 192),   # lanes left over, as in the first stage
    (1, 5, 11, 130),   # no side a multiple of 8
    (3, 4, 3, 6),      # smaller than the taps
    (1, 33, 9, 128)])  # five blocks, the last of which is mostly beyond the picture
def test_kernels_are_the_plain_form(shape):
  args, g = inputs(shape)
  for ours, want in zip(*(value_and_gradients(i, args, g) for i in ("kernel", "xla")), strict=True):
    near(ours, want, 1e-5)


def test_bfloat16():
  args, g = inputs((2, 9, 24, 136), jnp.bfloat16)
  want = value_and_gradients("xla", [a.astype(jnp.float32) for a in args], g.astype(jnp.float32))
  for ours, exact in zip(value_and_gradients("kernel", args, g), want, strict=True):
    near(ours, exact.astype(ours.dtype), 2e-2)


def test_without_norm_far_from_zero_and_near():
  (x, kernel, bias, scale, shift), g = inputs((2, 8, 24, 64))
  near(depthwise(x, kernel, bias, interpret=True), grouped_conv(x, kernel) + bias, 1e-5)
  want = jax.vjp(grouped_conv, x, kernel)[1](g)[1], g.sum((0, 1, 2))
  for ours, exact in zip(depthwise_gradient(x, g, interpret=True), want):
    near(ours, exact, 1e-5)
  args = x, kernel, bias + 1000, jnp.ones(64), jnp.zeros(64)
  near(depthwise_norm(*args, 1e-6, implementation="kernel"),
       depthwise_norm(*args, 1e-6, implementation="xla"), 1e-3)  # of 1000, float32 has 6e-5
  args = x * 1e-3, kernel, bias * 1e-3, scale, shift  # a variance about as small as eps
  near(depthwise_norm(*args, 1e-6, implementation="kernel"),
       depthwise_norm(*args, 1e-6, implementation="xla"), 1e-5)


@pytest.mark.parametrize("wanted,kernels", [
    ((0,), ["depthwise", "depthwise"]), ((1,), ["depthwise", "depthwise_gradient"]),
    ((2, 4), ["depthwise", "depthwise_gradient"]), ((3, 4), ["depthwise"])])
def test_nothing_is_computed_that_nobody_wants(wanted, kernels):
  args, g = inputs((1, 8, 8, 8))
  traced = jax.make_jaxpr(lambda *a: value_and_gradients("kernel", a, g, wanted))(*args)
  assert sorted(names(traced.jaxpr)) == [*kernels, "layer_norm", "layer_norm_gradient"]
  plain = jax.make_jaxpr(lambda *a: depthwise_norm(*a, 1e-6, implementation="kernel"))(*args)
  assert names(plain.jaxpr) == ["depthwise_norm"]


def names(jaxpr):
  """Of the kernels that a program runs."""
  found = [eqn.params["name"] for eqn in jaxpr.eqns if eqn.primitive.name == "pallas_call"]
  return found + [n for eqn in jaxpr.eqns if eqn.primitive.name != "pallas_call"
                  for sub in jax.core.jaxprs_in_params(eqn.params) for n in names(sub)]


def test_what_the_kernel_cannot_take(monkeypatch):
  assert not fits((1, 8, 4096, 1024), jnp.bfloat16) and not fits((1, 8, 8, 8), jnp.float16)
  for stage in range(4):  # ConvNeXt-L and -XXL at 768 and 1536
    for width in (192, 384):
      for size in (768, 1536):
        side = size >> stage + 2
        assert fits((1, side, side, width << stage), jnp.bfloat16)
  monkeypatch.setattr(forms, "platform", lambda: "tpu")
  monkeypatch.setattr(forms, "core_memory", lambda: 2**27)
  said = []
  monkeypatch.setattr(platforms.logging, "warning", lambda *args: said.append(args[1]))
  platforms.say_once.cache_clear()
  (x, _, bias, scale, shift), _ = inputs((1, 8, 8, 8))
  for _ in range(2):
    y = depthwise_norm(x, jnp.ones((5, 5, 8)), bias, scale, shift, 1e-6)
    assert y.shape == x.shape
  assert len(said) == 1 and "no kernel for the depthwise convolution of float32" in said[0]


def on_eight_devices():
  args, g = inputs((4, 8, 8, 8))
  found = []
  for shape, devices in (((1, 1, 1, 1), 1), ((2, 2, 2, 1), 8)):
    with mesh_context(make_mesh(shape, jax.devices()[:devices])):
      found.append(value_and_gradients("kernel", args, g))
  for ours, want in zip(*found, strict=True):
    near(ours, np.asarray(want), 1e-5)


def test_eight_devices_equal_one():
  several_devices.run(__file__, "on_eight_devices", 8)
