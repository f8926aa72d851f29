"""How many floating-point operations SDXL's parts take, by the shapes of their layers.

What counts is products of matrices and convolutions, a multiplication and an addition each 2, as in
`train.flops`; taps of a convolution that fall on its zeros count too.  Norms, activations, softmax
and the look-up of embeddings count nothing.
"""
from __future__ import annotations

from mgjax.diffusion.config import SdxlConfig, TextEncoderConfig, UNetConfig, VaeConfig


def drawing_flops(config: SdxlConfig, height: int, width: int, steps: int,
                  guided: bool = True) -> dict[str, float]:
  """Of one picture of so many pixels, by program: encode, sample and decode.

  guided: whether each step asks twice, with the prompt and without.
  """
  shrink, asked = config.vae.shrink, 2 if guided else 1
  tokens = config.text_encoder.length
  unet = unet_flops(config.unet, height // shrink, width // shrink, tokens)
  return {"encode": asked * (text_encoder_flops(config.text_encoder)
                             + text_encoder_flops(config.text_encoder_2)),
          "sample": steps * asked * unet,
          "decode": decoder_flops(config.vae, height // shrink, width // shrink)}


def unet_flops(config: UNetConfig, height: int, width: int, tokens: int = 77) -> float:
  """Of the UNet's answer for latents [height, width, 4] and a prompt of so many tokens."""
  widths, levels, vector = config.widths, len(config.widths), 4 * config.widths[0]
  sizes = [(height, width)]  # a level below has half of the positions of a side, rounded up
  for _ in widths[1:]:
    sizes.append(tuple(-(-n // 2) for n in sizes[-1]))
  at = [h * w for h, w in sizes]

  def block(level, d_in):
    """A residual block, and the transformer behind it."""
    d, depth = widths[level], config.depths[level]
    own = _resnet(at[level], d_in, d) + _dense(1, vector, d)
    return own + (_transformer(at[level], d, depth, config.context, tokens) if depth else 0)

  total = _dense(1, widths[0], vector) + _dense(1, vector, vector)
  total += _dense(1, config.pooled + 6 * config.number_width, vector) + _dense(1, vector, vector)
  total += _conv(at[0], config.channels, widths[0])
  skips = [widths[0]]
  for level, d in enumerate(widths):
    for _ in range(config.resnets):
      total += block(level, skips[-1])
      skips.append(d)
    if level < levels - 1:
      total += _conv(at[level + 1], d, d)
      skips.append(d)
  last, d = at[-1], widths[-1]
  total += 2 * (_resnet(last, d, d) + _dense(1, vector, d))
  if config.middle_depth:
    total += _transformer(last, d, config.middle_depth, config.context, tokens)
  before = d
  for level in reversed(range(levels)):
    for _ in range(config.resnets + 1):
      total += block(level, before + skips.pop())
      before = widths[level]
    if level:
      total += _conv(at[level - 1], before, before)
  return total + _conv(at[0], widths[0], config.channels)


def decoder_flops(config: VaeConfig, height: int, width: int) -> float:
  """Of the autoencoder's picture of latents [height, width, 4]."""
  widths, positions, d = config.widths[::-1], height * width, config.widths[-1]
  total = _dense(positions, config.channels, config.channels) + _conv(positions, config.channels, d)
  total += 2 * _resnet(positions, d, d) + _attention(positions, positions, d, d)
  for i, after in enumerate(widths):
    total += _resnet(positions, d, after) + config.resnets * _resnet(positions, after, after)
    d = after
    if i < len(widths) - 1:
      positions *= 4
      total += _conv(positions, d, d)
  return total + _conv(positions, d, 3)


def text_encoder_flops(config: TextEncoderConfig) -> float:
  """Of what a text encoder says of one prompt; its last block runs only for the pooled vector."""
  d, n, pooled = config.width, config.length, bool(config.projection)
  block = _attention(n, n, d, d) + _dense(n, d, config.mlp_width) + _dense(n, config.mlp_width, d)
  return (config.depth - 1 + pooled) * block + pooled * _dense(1, d, config.projection)


def _dense(rows: int, d_in: int, d_out: int) -> float:
  return 2 * rows * d_in * d_out


def _conv(outputs: int, d_in: int, d_out: int) -> float:
  return _dense(outputs, 9 * d_in, d_out)


def _resnet(positions: int, d_in: int, d_out: int) -> float:
  """Without what the time adds to it."""
  shortcut = _dense(positions, d_in, d_out) if d_in != d_out else 0
  return _conv(positions, d_in, d_out) + _conv(positions, d_out, d_out) + shortcut


def _attention(queries: int, keys: int, width: int, d_keys: int) -> float:
  """With its projections; everyone sees everyone."""
  projections = 2 * _dense(queries, width, width) + 2 * _dense(keys, d_keys, width)
  return projections + 2 * _dense(queries, keys, width)


def _transformer(positions: int, width: int, depth: int, context: int, tokens: int) -> float:
  block = (_attention(positions, positions, width, width)
           + _attention(positions, tokens, width, context)
           + _dense(positions, width, 8 * width) + _dense(positions, 4 * width, width))
  return 2 * _dense(positions, width, width) + depth * block
