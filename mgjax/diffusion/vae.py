"""SDXL's autoencoder: pictures to latents of an eighth of their size, and back."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mgjax.diffusion.config import VaeConfig
from mgjax.diffusion.layers import (
    Conv,
    GroupNorm,
    ResnetBlock,
    dense,
    in_strips,
    spatial_attention,
    twice,
)


class MapAttention(nnx.Module):
  """One head of attention among all positions of a map, beside a shortcut."""

  def __init__(self, width: int, config: VaeConfig, *, dtype, rngs: nnx.Rngs):
    self.norm = GroupNorm(width, config.groups, config.norm_eps)
    self.q, self.k, self.v, self.out = (
        dense(width, width, dtype=dtype, rngs=rngs) for _ in range(4))

  def __call__(self, x: jax.Array) -> jax.Array:  # [N, H, W, C] -> the same
    n, h, w, c = x.shape
    y = in_strips(self.norm(x).reshape(n, h * w, c))
    attended = spatial_attention(self.q(y), self.k(y), self.v(y), 1)
    return in_strips(x + self.out(attended).reshape(x.shape))


class Middle(nnx.Module):
  """At the smallest size: residual block, attention, residual block."""

  def __init__(self, config: VaeConfig, *, dtype, rngs: nnx.Rngs):
    width = config.widths[-1]
    self.resnets = nnx.List([resnet(width, width, config, dtype=dtype, rngs=rngs)
                             for _ in range(2)])
    self.attention = MapAttention(width, config, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.resnets[1](self.attention(self.resnets[0](x)))


class Level(nnx.Module):
  """Residual blocks of one resolution, and what leads to the next."""

  def __init__(self, d_in: int, d_out: int, blocks: int, config: VaeConfig, *,
               downsample: bool = False, upsample: bool = False, dtype, rngs: nnx.Rngs):
    make = functools.partial(Conv, d_out, d_out, dtype=dtype, rngs=rngs)
    self.resnets = nnx.List([resnet(d_in if i == 0 else d_out, d_out, config, dtype=dtype,
                                    rngs=rngs) for i in range(blocks)])
    self.downsample = nnx.data(make(stride=2, padding=(0, 1)) if downsample else None)
    self.upsample = nnx.data(make() if upsample else None)

  def __call__(self, x: jax.Array) -> jax.Array:
    for block in self.resnets:
      x = block(x)
    if self.downsample is not None:
      x = self.downsample(x)
    if self.upsample is not None:
      x = self.upsample(twice(x, 2 * x.shape[1], 2 * x.shape[2]))
    return x


def resnet(d_in: int, d_out: int, config: VaeConfig, *, dtype, rngs: nnx.Rngs) -> ResnetBlock:
  """A residual block of the autoencoder."""
  return ResnetBlock(d_in, d_out, groups=config.groups, eps=config.norm_eps, dtype=dtype, rngs=rngs)


class Encoder(nnx.Module):
  """Pictures in [-1, 1] -> mean and logarithm of the variance of their latents, before `quant`."""

  def __init__(self, config: VaeConfig, *, dtype, rngs: nnx.Rngs):
    widths, kwargs = config.widths, dict(dtype=dtype, rngs=rngs)
    self.conv_in = Conv(3, widths[0], **kwargs)
    self.down = nnx.List([
        Level(before, width, config.resnets, config, downsample=i < len(widths) - 1, **kwargs)
        for i, (before, width) in enumerate(zip(widths[:1] + widths[:-1], widths))])
    self.mid = Middle(config, **kwargs)
    self.norm_out = GroupNorm(widths[-1], config.groups, config.norm_eps)
    self.conv_out = Conv(widths[-1], 2 * config.channels, **kwargs)

  def __call__(self, x: jax.Array) -> jax.Array:  # [N, H, W, 3] -> [N, H/8, W/8, 8]
    x = self.conv_in(x)
    for level in self.down:
      x = level(x)
    return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
  """Latents behind `post_quant` -> pictures, about in [-1, 1]."""

  def __init__(self, config: VaeConfig, *, dtype, rngs: nnx.Rngs):
    widths, kwargs = config.widths[::-1], dict(dtype=dtype, rngs=rngs)
    self.conv_in = Conv(config.channels, widths[0], **kwargs)
    self.mid = Middle(config, **kwargs)
    self.up = nnx.List([
        Level(before, width, config.resnets + 1, config, upsample=i < len(widths) - 1, **kwargs)
        for i, (before, width) in enumerate(zip(widths[:1] + widths[:-1], widths))])
    self.norm_out = GroupNorm(widths[-1], config.groups, config.norm_eps)
    self.conv_out = Conv(widths[-1], 3, **kwargs)

  def __call__(self, x: jax.Array) -> jax.Array:  # [N, H/8, W/8, 4] -> [N, H, W, 3]
    x = self.mid(self.conv_in(x))
    for level in self.up:
      x = level(x)
    return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Vae(nnx.Module):
  """The autoencoder; latents are scaled as the UNet wants them."""

  def __init__(self, config: VaeConfig, *, dtype, rngs: nnx.Rngs):
    self.config = config
    kwargs = dict(dtype=dtype, rngs=rngs)
    self.encoder = Encoder(config, **kwargs)
    self.decoder = Decoder(config, **kwargs)
    self.quant = dense(2 * config.channels, 2 * config.channels, **kwargs)
    self.post_quant = dense(config.channels, config.channels, **kwargs)

  def encode(self, pictures: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[N, H, W, 3] in [-1, 1] -> mean and standard deviation of the latents, [N, H/8, W/8, 4]."""
    mean, log_variance = jnp.split(self.quant(self.encoder(pictures)).astype(jnp.float32), 2, -1)
    deviation = jnp.exp(0.5 * jnp.clip(log_variance, -30, 20))
    return mean * self.config.scaling, deviation * self.config.scaling

  def decode(self, latents: jax.Array) -> jax.Array:
    """[N, H/8, W/8, 4] -> float32 [N, H, W, 3], about in [-1, 1]."""
    x = self.post_quant(in_strips(latents) / self.config.scaling)
    return self.decoder(x).astype(jnp.float32)
