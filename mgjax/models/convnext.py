"""The high-resolution tower: an OpenCLIP ConvNeXt trunk (R1.4)."""
from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from mgjax.config import ConvNextConfig
from mgjax.models.depthwise import depthwise_norm
from mgjax.models.images import resize_bilinear
from mgjax.models.layers import Dense, LayerNorm, TowerNorm, gelu, stack
from mgjax.models.platforms import platform
from mgjax.models.remat import remat
from mgjax.sharding import batch_shards, constrain, gathered


def space_to_depth(x: jax.Array, size: int) -> jax.Array:
  """[N, H, W, C] -> [N, H/size, W/size, size*size*C]: a strided convolution becomes a matmul."""
  n, h, w, c = x.shape
  x = x.reshape(n, h // size, size, w // size, size, c).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(n, h // size, w // size, size * size * c)


def strided_product(x: jax.Array, dense: Dense, size: int) -> jax.Array:
  """dense(space_to_depth(x, size)) in the form that suits the platform.

  [N, H, W, C] -> [N, H/size, W/size, d_out].
  """
  if platform() != "tpu":
    return dense(space_to_depth(x, size))
  kernel = gathered(dense.kernel[...].astype(x.dtype), *dense.axes)
  bias = gathered(dense.bias[...].astype(x.dtype), *dense.axes[1:])
  return (_of_planes if x.shape[-1] == 3 else _strided_conv)(x, kernel, bias, size)


def _strided_conv(x, kernel, bias, size):
  """As a convolution: nothing is turned round before the product."""
  taps = kernel.reshape(size, size, x.shape[-1], -1)
  return bias + jax.lax.conv_general_dilated(x, taps, (size, size), "VALID",
                                             dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _of_planes(x, kernel, bias, size):
  """For pictures, which lie on a TPU as planes of colours, 128 pixels of a row in a register.

  Patches side by side, as many as have 128 pixels in a row, are multiplied with a matrix that has
  the kernel once for each of them and zeros elsewhere: 32 times the operations, which takes less
  time than turning pixels round to patches.
  """
  n, h, w, colors = x.shape
  many = math.gcd(w // size, 128 // size)
  rows = x.transpose(0, 3, 1, 2).reshape(n, colors, h // size, size, w // size // many, many * size)
  rows = rows.transpose(0, 2, 4, 1, 3, 5).reshape(-1, colors * size * many * size)
  kernel = kernel.reshape(size, size, colors, -1)
  wide = jnp.einsum("pq,ijkc->kipjqc", jnp.eye(many, dtype=kernel.dtype), kernel)
  y = rows @ wide.reshape(rows.shape[1], -1) + jnp.tile(bias, many)
  return y.reshape(n, h // size, w // size, -1)


def _rows(x: jax.Array) -> jax.Array:
  """[.., C] -> [rows, C], channels innermost in memory too.  Left to itself the TPU's compiler
  turns those of 192 channels, no multiple of 128, over and back around every kernel."""
  return with_layout_constraint(x.reshape(-1, x.shape[-1]), Layout(major_to_minor=(0, 1)))


class ConvNextBlock(nnx.Module):
  """Depthwise 7x7, LayerNorm, inverted bottleneck with exact GELU, layer scale, residual."""

  def __init__(self, width: int, eps: float, *, dtype, rngs: nnx.Rngs):
    # From scratch it starts as the identity: a tap that small training pictures never reach stays 0
    # instead of bringing noise in on larger ones.
    identity = jnp.zeros((7, 7, width)).at[3, 3].set(1)
    self.kernel = nnx.Param(identity, out_sharding=("taps", "taps", "channels"))
    self.bias = nnx.Param(jnp.zeros(width), out_sharding=("channels",))
    self.norm = LayerNorm(width, eps)
    self.up = Dense(width, 4 * width, ("embed", "mlp"), dtype=dtype, rngs=rngs)
    self.down = Dense(4 * width, width, ("mlp", "embed"), dtype=dtype, rngs=rngs)
    self.gamma = nnx.Param(jnp.ones(width), out_sharding=("norm",))

  def __call__(self, x: jax.Array, keep: jax.Array | None = None) -> jax.Array:
    """x [N, H, W, C] -> same.  keep [N]: drop-path factor of the branch, 0 or 1/(1-rate)."""
    kernel = gathered(self.kernel[...].astype(x.dtype), "taps", "taps", "channels")
    bias = gathered(self.bias[...].astype(x.dtype), "channels")
    y = depthwise_norm(x, kernel, bias, self.norm.scale[...], self.norm.bias[...], self.norm.eps)
    # All that follows on rows, the sum too: so the TPU's compiler makes one operation of both
    # products and what is between and behind them.
    rows, y = _rows(x), gelu(self.up(_rows(y)))  # [N*H*W, C], [N*H*W, 4*C]
    batch = "batch" if x.shape[0] % batch_shards(jax.sharding.get_abstract_mesh()) == 0 else None
    y = self.down(constrain(y, batch, "act_mlp")) * self.gamma[...].astype(x.dtype)
    if keep is not None:
      y = (y.reshape(x.shape[0], -1) * keep[:, None].astype(x.dtype)).reshape(y.shape)
    y = _rows(rows + y).reshape(x.shape)
    return constrain(y, "batch", "space", "space", "act_embed")


class ConvNextStage(nnx.Module):
  """Optional 2x downsampling, then a stack of blocks."""

  def __init__(self, config: ConvNextConfig, index: int, *, dtype, rngs: nnx.Rngs):
    width = config.widths[index]
    block = lambda r: ConvNextBlock(width, config.norm_eps, dtype=dtype, rngs=r)
    before = config.widths[index - 1]
    self.down_norm = nnx.data(TowerNorm(before, config.norm_eps) if index else None)
    self.down = nnx.data(
        Dense(4 * before, width, (None, "embed"), dtype=dtype, rngs=rngs) if index else None)
    self.blocks = stack(config.depths[index], block, rngs)


class ConvNext(nnx.Module):
  """Images -> the four stage maps, at strides 4, 8, 16, 32."""

  def __init__(self, config: ConvNextConfig, *, remat_policy: str = "none", dtype, rngs: nnx.Rngs):
    self.config, self.dtype, self.remat_policy = config, dtype, remat_policy
    width = config.widths[0]
    self.stem = Dense(config.stride**2 * 3, width, (None, "embed"), dtype=dtype, rngs=rngs)
    self.stem_norm = TowerNorm(width, config.norm_eps)
    self.stages = nnx.List([ConvNextStage(config, i, dtype=dtype, rngs=rngs)
                            for i in range(len(config.depths))])

  @jax.named_scope("convnext")
  def __call__(self, images: jax.Array, rng: jax.Array | None = None) -> list[jax.Array]:
    """images: normalised [N, H, H, 3] -> [N, H/4, H/4, C0], [N, H/8, H/8, C1], ...

    rng: key for drop path (stochastic depth, per sample, scaled by 1/keep); None switches it off,
    as a rate of 0 does.
    """
    keeps = self._drop_path(images.shape[0], rng)
    x = self.stem_norm(strided_product(images.astype(self.dtype), self.stem, self.config.stride))
    maps = []
    for stage, keep in zip(self.stages, keeps):
      if stage.down is not None:
        x = strided_product(stage.down_norm(x), stage.down, 2)
      body = remat(self.remat_policy)(lambda x, scanned: (scanned[0](x, scanned[1]), None))
      x, _ = jax.lax.scan(body, x, (stage.blocks, keep))
      maps.append(x)
    return maps

  def _drop_path(self, n: int, rng):
    """Per stage, the factors [blocks, N] of the residual branches (None: all kept)."""
    depths = self.config.depths
    if rng is None or self.config.drop_path == 0:
      return [None] * len(depths)
    kept = 1 - np.linspace(0, self.config.drop_path, sum(depths), dtype=np.float32)[:, None]
    factors = jax.random.bernoulli(rng, kept, (sum(depths), n)) / kept
    return jnp.split(factors, np.cumsum(depths)[:-1])


def concatenated_features(maps: list[jax.Array]) -> jax.Array:
  """The stage maps on the grid of the first, channels [r0 | r1 | r2 | r3].

  Upsampled bilinearly in float32 and cast back.  -> [N, H/4, H/4, sum of widths]
  """
  h, w = maps[0].shape[1:3]
  up = [resize_bilinear(m, h, w).astype(m.dtype) for m in maps[1:]]
  return jnp.concatenate([maps[0], *up], axis=-1)
