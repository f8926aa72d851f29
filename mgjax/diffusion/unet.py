"""SDXL's UNet: what noise is in latents, told the time step, the prompt and the sizes.

Source: Podell et al., SDXL (2023), section 2; the published model's config.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mgjax.diffusion.config import UNetConfig
from mgjax.diffusion.layers import (
    Conv,
    GroupNorm,
    ResnetBlock,
    dense,
    in_strips,
    spatial_attention,
    twice,
)
from mgjax.models.layers import LayerNorm, gelu, stack


def wave_features(numbers: jax.Array, width: int) -> jax.Array:
  """[...] -> [..., width]: cosines, then sines, of the numbers at frequencies from 1 to 1/10000."""
  half = width // 2
  angles = numbers.astype(jnp.float32)[..., None] * np.exp(
      -np.log(10000) * np.arange(half, dtype=np.float32) / half)
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class Embedding(nnx.Module):
  """Two layers with SiLU between: [N, d_in] -> [N, d_out]."""

  def __init__(self, d_in: int, d_out: int, *, dtype, rngs: nnx.Rngs):
    self.up = dense(d_in, d_out, dtype=dtype, rngs=rngs)
    self.down = dense(d_out, d_out, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down(jax.nn.silu(self.up(x)))


class Attention(nnx.Module):
  """Queries of a map's positions to keys of `context`, or of their own."""

  def __init__(self, width: int, context: int, heads: int, *, dtype, rngs: nnx.Rngs):
    make = functools.partial(dense, dtype=dtype, rngs=rngs)
    self.heads = heads
    self.q = make(width, width, bias=False)
    self.k = make(context, width, bias=False)
    self.v = make(context, width, bias=False)
    self.out = make(width, width)

  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
    """x [N, L, D], context [N, M, E] -> [N, L, D]."""
    return self.out(spatial_attention(self.q(x), self.k(context), self.v(context), self.heads))


class TransformerBlock(nnx.Module):
  """Attention among positions, attention to the prompt, gated MLP; each pre-norm and residual."""

  def __init__(self, width: int, context: int, heads: int, *, dtype, rngs: nnx.Rngs):
    eps, kwargs = 1e-5, dict(dtype=dtype, rngs=rngs)
    self.norm1 = LayerNorm(width, eps)
    self.attn1 = Attention(width, width, heads, **kwargs)
    self.norm2 = LayerNorm(width, eps)
    self.attn2 = Attention(width, context, heads, **kwargs)
    self.norm3 = LayerNorm(width, eps)
    self.up = dense(width, 8 * width, **kwargs)
    self.down = dense(4 * width, width, **kwargs)

  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
    """x [N, L, D], context [N, M, E] -> [N, L, D]."""
    y = self.norm1(x)
    x = in_strips(x + self.attn1(y, y))
    x = in_strips(x + self.attn2(self.norm2(x), context))
    values, gates = jnp.split(self.up(self.norm3(x)), 2, axis=-1)
    return in_strips(x + self.down(values * gelu(gates)))


class Transformer(nnx.Module):
  """Transformer blocks over the positions of a map, beside a shortcut."""

  def __init__(self, width: int, depth: int, heads: int, config: UNetConfig, *, dtype,
               rngs: nnx.Rngs):
    self.norm = GroupNorm(width, config.groups, 1e-6)
    self.proj_in = dense(width, width, dtype=dtype, rngs=rngs)
    block = lambda r: TransformerBlock(width, config.context, heads, dtype=dtype, rngs=r)
    self.blocks = stack(depth, block, rngs)
    self.proj_out = dense(width, width, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
    """x [N, H, W, C], context [N, M, E] -> [N, H, W, C]."""
    n, h, w, c = x.shape
    y = self.proj_in(in_strips(self.norm(x).reshape(n, h * w, c)))
    y, _ = jax.lax.scan(lambda y, block: (block(y, context), None), y, self.blocks)
    return in_strips(x + self.proj_out(y).reshape(x.shape))


class Level(nnx.Module):
  """Residual blocks of one resolution, perhaps a transformer behind each.

  inputs: channels that each residual block gets.
  """

  def __init__(self, inputs: list[int], index: int, config: UNetConfig, *, dtype, rngs: nnx.Rngs):
    width, depth, heads = config.widths[index], config.depths[index], config.heads[index]
    self.resnets = nnx.List([resnet(d_in, width, config, dtype=dtype, rngs=rngs)
                             for d_in in inputs])
    self.attentions = nnx.List([
        Transformer(width, depth, heads, config, dtype=dtype, rngs=rngs)
        for _ in inputs] if depth else [])

  def step(self, i: int, x: jax.Array, time: jax.Array, context: jax.Array) -> jax.Array:
    """The i-th residual block and its transformer."""
    x = self.resnets[i](x, time)
    return self.attentions[i](x, context) if self.attentions else x


class DownLevel(Level):
  """On the way down, to half the size at the end unless it is the last."""

  def __init__(self, index: int, config: UNetConfig, **kwargs):
    width, before = config.widths[index], config.widths[max(index - 1, 0)]
    super().__init__([before] + [width] * (config.resnets - 1), index, config, **kwargs)
    last = index == len(config.widths) - 1
    self.downsample = nnx.data(None if last else Conv(width, width, stride=2, **kwargs))


class UpLevel(Level):
  """On the way up, to twice the size at the end unless it is the first level."""

  def __init__(self, index: int, config: UNetConfig, **kwargs):
    widths = config.widths
    # What the way down has left: its blocks, and behind the level before the halved map.
    skips = [widths[index]] * config.resnets + [widths[max(index - 1, 0)]]
    below = widths[min(index + 1, len(widths) - 1)]
    inputs = [x + skip for x, skip in zip([below] + [widths[index]] * config.resnets, skips)]
    super().__init__(inputs, index, config, **kwargs)
    self.upsample = nnx.data(Conv(widths[index], widths[index], **kwargs) if index else None)


class Middle(nnx.Module):
  """Between the way down and the way up."""

  def __init__(self, config: UNetConfig, *, dtype, rngs: nnx.Rngs):
    width, kwargs = config.widths[-1], dict(dtype=dtype, rngs=rngs)
    self.resnets = nnx.List([resnet(width, width, config, **kwargs) for _ in range(2)])
    self.attentions = nnx.List([
        Transformer(width, config.middle_depth, config.heads[-1], config, **kwargs)]
        if config.middle_depth else [])

  def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array) -> jax.Array:
    x = self.resnets[0](x, time)
    for attention in self.attentions:
      x = attention(x, context)
    return self.resnets[1](x, time)


def resnet(d_in: int, d_out: int, config: UNetConfig, *, dtype, rngs: nnx.Rngs) -> ResnetBlock:
  """A residual block of the UNet."""
  return ResnetBlock(d_in, d_out, groups=config.groups, eps=config.norm_eps,
                     time_width=4 * config.widths[0], dtype=dtype, rngs=rngs)


class UNet(nnx.Module):
  """Noisy latents -> what the model was trained to predict of them."""

  def __init__(self, config: UNetConfig, *, dtype, rngs: nnx.Rngs):
    self.config, self.dtype = config, dtype
    kwargs, levels, first = dict(dtype=dtype, rngs=rngs), len(config.widths), config.widths[0]
    self.time = Embedding(first, 4 * first, **kwargs)
    self.extra = Embedding(config.pooled + 6 * config.number_width, 4 * first, **kwargs)
    self.conv_in = Conv(config.channels, first, **kwargs)
    self.down = nnx.List([DownLevel(i, config, **kwargs) for i in range(levels)])
    self.mid = Middle(config, **kwargs)
    self.up = nnx.List([UpLevel(i, config, **kwargs) for i in reversed(range(levels))])
    self.norm_out = GroupNorm(first, config.groups, config.norm_eps)
    self.conv_out = Conv(first, config.channels, **kwargs)

  def __call__(self, latents: jax.Array, time: jax.Array, context: jax.Array, pooled: jax.Array,
               sizes: jax.Array) -> jax.Array:
    """The prediction [N, H, W, 4], float32.

    Args:
      latents: [N, H, W, 4], scaled as the sampler says.
      time: float [N], the step of the training's schedule.
      context: [N, M, E], the encoded prompt.
      pooled: [N, P], its pooled vector.
      sizes: [N, 6], the micro-conditioning: height and width of the picture before it was cut, top
        and left of the cut, height and width wanted, in pixels (SDXL, section 2.2).
    """
    time = self._embedded(time, pooled, sizes)
    context = context.astype(self.dtype)
    x = self.conv_in(in_strips(latents))
    skips = [x]
    for level in self.down:
      for i in range(len(level.resnets)):
        x = level.step(i, x, time, context)
        skips.append(x)
      if level.downsample is not None:
        x = level.downsample(x)
        skips.append(x)
    x = self.mid(x, time, context)
    for level in self.up:
      for i in range(len(level.resnets)):
        x = level.step(i, jnp.concatenate([x, skips.pop()], -1), time, context)
      if level.upsample is not None:
        x = level.upsample(twice(x, *skips[-1].shape[1:3]))
    return self.conv_out(jax.nn.silu(self.norm_out(x))).astype(jnp.float32)

  def _embedded(self, time, pooled, sizes):
    """Time step, pooled prompt and sizes as one vector [N, T]."""
    config = self.config
    numbers = wave_features(sizes, config.number_width).reshape(len(sizes), -1)
    extra = jnp.concatenate([pooled.astype(jnp.float32), numbers], -1)
    waves = wave_features(time, config.widths[0])
    return self.time(waves.astype(self.dtype)) + self.extra(extra.astype(self.dtype))
