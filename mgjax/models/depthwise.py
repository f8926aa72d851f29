"""Depthwise 7x7 convolution, in the form that suits the platform.  The one place that chooses."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgjax.kernels import depthwise as kernels
from mgjax.models.layers import norm_by_kernel, norm_gradients, plain_layer_norm
from mgjax.models.platforms import core_memory, on_each_device, platform, say_once
from mgjax.sharding import batch_shards


def depthwise_norm(x: jax.Array, kernel: jax.Array, bias: jax.Array, scale: jax.Array,
                   shift: jax.Array, eps: float, *, implementation: str = "auto") -> jax.Array:
  """Depthwise convolution with a bias, and LayerNorm over the channels behind it.

  Args:
    x: [N, H, W, C].
    kernel, bias: [k, k, C], [C], whole on every device.
    scale, shift, eps: of the norm, [C] each.
    implementation: "kernel" is the TPU's, for k = 7; "xla" the plain form; "auto" the kernel
      where the devices of the mesh are TPUs and it can take the map, which else is said once.

  Returns: [N, H, W, C] in the dtype of x.
  """
  if implementation == "auto":
    implementation = _chosen(x, kernel)
  if implementation == "kernel":
    return _by_kernels(x, kernel, bias, scale, shift, eps)
  return plain_layer_norm(depthwise_conv(x, kernel) + bias.astype(x.dtype), scale, shift, eps)


def _chosen(x, kernel):
  if platform() != "tpu":
    return "xla"
  n = x.shape[0] // batch_shards(jax.sharding.get_abstract_mesh()) or 1
  enough = core_memory() > kernels.MEMORY + kernels.SPARE  # not on v4
  if enough and kernel.shape[0] == kernels.TAPS and kernels.fits((n, *x.shape[1:]), x.dtype):
    return "kernel"
  say_once(f"no kernel for the depthwise convolution of {x.dtype} {list(x.shape)} with "
           f"{kernel.shape[0]}x{kernel.shape[1]} taps: XLA's form, which is slower")
  return "xla"


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _by_kernels(x, kernel, bias, scale, shift, eps):
  local = functools.partial(kernels.depthwise_norm, eps=eps, interpret=platform() != "tpu")
  return on_each_device(local, (x,), (kernel, bias, scale, shift))


def _kernels_forward(x, kernel, bias, scale, shift, eps):
  # The gradient of the norm wants what goes into it: here it is written.
  of_map, of_taps = x.perturbed, kernel.perturbed or bias.perturbed
  x, kernel, bias, scale, shift = (a.value for a in (x, kernel, bias, scale, shift))
  y = on_each_device(_convolve, (x,), (kernel, bias))
  saved = kernel if of_map else None, x if of_taps else None, (kernel[0, 0, :0], bias[:0])
  return norm_by_kernel(y, scale, shift, eps), (y, scale, shift, *saved)


def _kernels_backward(eps, saved, g):
  y, scale, shift, kernel, x, (like_kernel, like_bias) = saved
  d_x = d_kernel = d_bias = None
  d_y, d_scale, d_shift = norm_gradients(eps, (y, scale, shift), g)
  if kernel is not None:  # the same convolution with the kernel turned round
    d_x = on_each_device(_convolve, (d_y,), (kernel[::-1, ::-1], jnp.zeros(kernel.shape[2:])))
  if x is not None:
    d_kernel, d_bias = on_each_device(_gradient, (x, d_y), (), summed=(True, True))
    d_kernel, d_bias = d_kernel.astype(like_kernel.dtype), d_bias.astype(like_bias.dtype)
  return d_x, d_kernel, d_bias, d_scale, d_shift


_by_kernels.defvjp(_kernels_forward, _kernels_backward, symbolic_zeros=True)


def _convolve(x, kernel, bias):
  return kernels.depthwise(x, kernel, bias, interpret=platform() != "tpu")


def _gradient(x, g):
  return kernels.depthwise_gradient(x, g, interpret=platform() != "tpu")


def depthwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Same-size depthwise convolution (stride 1, zero padding).

  x [N, H, W, C], kernel [k, k, C] with k odd -> [N, H, W, C] in the dtype of x.
  XLA's CPU backend runs grouped convolutions through a path that is slower by tens of times than
  adding up shifted products; TPU and GPU have native kernels.  Both forms agree to rounding.
  """
  on_cpu = position_matrix if x.shape[1] * x.shape[2] <= 64 else shifted_sum
  return jax.lax.platform_dependent(x, kernel.astype(x.dtype), cpu=on_cpu, default=grouped_conv)


def grouped_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """As one XLA convolution with a group per channel."""
  return jax.lax.conv_general_dilated(
      x, kernel[:, :, None, :], (1, 1), "SAME", feature_group_count=x.shape[-1],
      dimension_numbers=("NHWC", "HWIO", "NHWC"))


def position_matrix(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """As a matrix from positions to positions for each channel; for maps about as small as the
  kernel, where most taps fall outside."""
  n, h, w, c = x.shape
  k = kernel.shape[0]
  ys, xs = np.divmod(np.arange(h * w), w)
  dy, dx = (a[None, :] - a[:, None] + k // 2 for a in (ys, xs))  # tap from position [out, in]
  inside = (0 <= dy) & (dy < k) & (0 <= dx) & (dx < k)
  taps = np.eye(k * k, dtype=np.float32)[np.where(inside, dy * k + dx, 0)] * inside[..., None]
  matrix = jnp.einsum("bat,tc->bac", taps, kernel.reshape(k * k, c).astype(jnp.float32))
  y = jnp.einsum("nac,bac->nbc", x.reshape(n, h * w, c), matrix.astype(x.dtype))
  return y.reshape(x.shape)


@jax.custom_vjp
def shifted_sum(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """As the sum of k*k shifted products, added in float32."""
  k, (h, w) = kernel.shape[0], x.shape[1:3]
  padded, weights = _pad(x, k).astype(jnp.float32), kernel.astype(jnp.float32)
  taps = (padded[:, i:i + h, j:j + w] * weights[i, j] for i in range(k) for j in range(k))
  return functools.reduce(jnp.add, taps).astype(x.dtype)


def _pad(x, k):
  return jnp.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))


def _forward(x, kernel):
  return shifted_sum(x, kernel), (x, kernel)


def _backward(saved, g):
  # Autodiff of the sum would scatter into 49 padded buffers; the input's gradient is the same sum
  # with the kernel turned round.
  x, kernel = saved
  return shifted_sum(g, kernel[::-1, ::-1]), _kernel_gradient(x, g, kernel.shape[0])


def _kernel_gradient(x, g, k):
  """dK[i, j, c] = sum over n, y, x of padded[n, y+i, x+j, c] * g[n, y, x, c], as matrix products.

  XLA's CPU backend does not vectorise a reduction that keeps the innermost axis.  So a row offset
  i at a time: products of all columns with all columns, of which the k diagonals are wanted.  That
  is W/k times more multiplications, in a form that runs tens of times faster.
  """
  n, h, w, c = x.shape
  rows = _pad(x, k).transpose(3, 0, 1, 2)  # [C, N, H+k-1, W+k-1]
  g = g.transpose(3, 0, 1, 2).reshape(c, n * h, w)
  # A tap j pairs column b of g with column b + j of the padded picture.
  diagonals = np.stack([np.eye(w + k - 1, w, -j, dtype=np.float32) for j in range(k)])
  offsets = []
  for i in range(k):
    band = rows[:, :, i:i + h].reshape(c, n * h, w + k - 1)
    products = jnp.einsum("cma,cmb->cab", band, g, preferred_element_type=jnp.float32)
    offsets.append(jnp.einsum("cab,jab->jc", products, diagonals))
  return jnp.stack(offsets).astype(x.dtype)


shifted_sum.defvjp(_forward, _backward)
