"""Small parts that every tower uses: dense layers, norms, stacks run by scan."""
from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mgjax.kernels import layer_norm as kernels
from mgjax.models.platforms import on_each_device, platform
from mgjax.sharding import gathered

Dtype = jnp.dtype


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, x times the normal distribution's integral up to x; float32 within.

  jax.nn.gelu goes through erfc, which keeps the relative error of tiny results too, and of which
  XLA makes two and a half times as many operations on a TPU: more than the products around it.
  """
  return (x * _normal_integral(x)).astype(x.dtype)


def _normal_integral(x):
  return 0.5 + 0.5 * jax.lax.erf(x.astype(jnp.float32) * 0.5**0.5)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
  (x,), (t,) = primals, tangents
  wide = x.astype(jnp.float32)
  density = jnp.exp(-0.5 * jnp.square(wide)) * (2 * jnp.pi)**-0.5
  # Rounded before it is kept for the backward pass.
  return gelu(x), t * (_normal_integral(x) + wide * density).astype(x.dtype)


def uniform_fan_in(fan_in: int):
  """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for linear weights and biases."""
  bound = fan_in**-0.5
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
      key, shape, dtype, minval=-bound, maxval=bound)


class Dense(nnx.Module):
  """Linear layer [..., d_in] -> [..., d_out]; float32 parameters, computed in `dtype`.

  axes: logical names of the kernel's two dimensions; the bias has the second.
  """

  def __init__(self, d_in: int, d_out: int, axes: tuple[str | None, str | None], *,
               bias: bool = True, init=None, bias_init=None, dtype: Dtype, rngs: nnx.Rngs):
    self.dtype, self.axes = dtype, axes
    init = init or nnx.initializers.lecun_normal()
    bias_init = bias_init or nnx.initializers.zeros_init()
    self.kernel = nnx.Param(init(rngs(), (d_in, d_out), jnp.float32), out_sharding=axes)
    self.bias = nnx.data(None)
    if bias:
      self.bias = nnx.Param(bias_init(rngs(), (d_out,), jnp.float32), out_sharding=axes[1:])

  def __call__(self, x: jax.Array) -> jax.Array:
    # As one matrix: XLA's CPU backend is slow at weight gradients that contract several axes.
    y = self.product(x.reshape(-1, x.shape[-1]).astype(self.dtype))
    if self.bias is not None:
      y = y + gathered(self.bias[...].astype(self.dtype), *self.axes[1:])
    return y.reshape(*x.shape[:-1], -1)

  def product(self, rows: jax.Array) -> jax.Array:
    """[N, d_in] -> [N, d_out] in `dtype`, without the bias."""
    return rows @ gathered(self.kernel[...].astype(self.dtype), *self.axes)


def new_dense(d_in: int, d_out: int, axes, *, dtype: Dtype, rngs: nnx.Rngs) -> Dense:
  """`Dense` with PyTorch's initialisation: the modules that the recipe trains from scratch."""
  init = uniform_fan_in(d_in)
  return Dense(d_in, d_out, axes, init=init, bias_init=init, dtype=dtype, rngs=rngs)


class LayerNorm(nnx.Module):
  """LayerNorm over the last axis; statistics in float32, result in the dtype of the input."""

  def __init__(self, width: int, eps: float):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones(width), out_sharding=("norm",))
    self.bias = nnx.Param(jnp.zeros(width), out_sharding=("norm",))

  def __call__(self, x: jax.Array) -> jax.Array:  # [..., C] -> [..., C]
    return plain_layer_norm(x, self.scale[...], self.bias[...], self.eps)


def plain_layer_norm(x: jax.Array, scale: jax.Array, shift: jax.Array, eps: float) -> jax.Array:
  """LayerNorm as XLA runs it: [..., C], scale and shift [C] -> as x."""
  return (standardize(x, eps) * scale + shift).astype(x.dtype)


class TowerNorm(LayerNorm):
  """LayerNorm of what only the batch is split of: on a TPU by a kernel."""

  def __call__(self, x: jax.Array) -> jax.Array:  # [N, ..., C] -> [N, ..., C]
    if platform() == "tpu" and kernels.fits(x.shape, x.dtype):
      return norm_by_kernel(x, self.scale[...], self.bias[...], self.eps)
    return super().__call__(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def norm_by_kernel(x: jax.Array, scale: jax.Array, shift: jax.Array, eps: float) -> jax.Array:
  """LayerNorm as a TPU runs it: [N, ..., C], each device its own N; scale and shift [C] -> as x."""
  local = functools.partial(kernels.layer_norm, eps=eps, interpret=platform() != "tpu")
  return on_each_device(local, (x,), (scale, shift))


def _forward(x, scale, shift, eps):
  return norm_by_kernel(x, scale, shift, eps), (x, scale, shift)


def norm_gradients(eps: float, arguments: tuple[jax.Array, ...],
                   g: jax.Array) -> tuple[jax.Array, ...]:
  """By a TPU's kernel, of the arguments x [N, ..., C], scale and shift [C] of a LayerNorm."""
  x, scale, shift = arguments
  local = functools.partial(kernels.layer_norm_gradient, eps=eps, interpret=platform() != "tpu")
  dx, d_scale, d_shift = on_each_device(local, (x, g), (scale,), summed=(False, True, True))
  return dx, d_scale.astype(scale.dtype), d_shift.astype(shift.dtype)


norm_by_kernel.defvjp(_forward, norm_gradients)


def standardize(x: jax.Array, eps: float) -> jax.Array:
  """LayerNorm without scale and shift, in float32.  [..., C] -> [..., C]"""
  x = x.astype(jnp.float32)
  x = x - jnp.mean(x, -1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)


class RmsNorm(nnx.Module):
  """RMSNorm: normalised in float32, cast to the input's dtype, then times (offset + scale)."""

  def __init__(self, width: int, eps: float, offset: float = 0.0):
    self.eps, self.offset = eps, offset
    self.scale = nnx.Param(jnp.full(width, 1.0 - offset), out_sharding=("norm",))

  def __call__(self, x: jax.Array) -> jax.Array:  # [..., D] -> [..., D]
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
    return y.astype(x.dtype) * (self.offset + self.scale[...]).astype(x.dtype)


def stack(depth: int, make_block: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
  """`depth` equal blocks as one module whose parameters lead with a `layers` axis."""
  build = nnx.vmap(make_block, transform_metadata={nnx.PARTITION_NAME: "layers"})
  return build(rngs.split(depth))
