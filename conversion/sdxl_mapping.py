"""The tables of SDXL's four parts; names begin with the part's sub-folder in a diffusers folder."""
from __future__ import annotations

from collections.abc import Sequence

from conversion.mapping import CONV3, Row, clip_block_rows, conv, linear_rows, norm_rows
from mgjax.diffusion.config import SdxlConfig, TextEncoderConfig, UNetConfig, VaeConfig


def sdxl_rows(config: SdxlConfig) -> list[Row]:
  """Every tensor of a diffusers folder."""
  return [*text_rows("text_encoder", config.text_encoder),
          *text_rows("text_encoder_2", config.text_encoder_2),
          *unet_rows(config.unet), *vae_rows(config.vae)]


def text_rows(part: str, config: TextEncoderConfig) -> list[Row]:
  """A text encoder, by the names that the published files have."""
  hf = f"{part}/text_model"
  rows = [Row(f"{hf}.embeddings.token_embedding.weight", f"{part}/token_embedding"),
          Row(f"{hf}.embeddings.position_embedding.weight", f"{part}/position_embedding")]
  for i in range(config.depth - 1):
    rows += clip_block_rows(f"{hf}.encoder.layers.{i}", f"{part}/blocks", i)
  rows += clip_block_rows(f"{hf}.encoder.layers.{config.depth - 1}", f"{part}/last")
  rows += norm_rows(f"{hf}.final_layer_norm", f"{part}/final_norm")
  return rows + (linear_rows(f"{part}/text_projection", f"{part}/projection", bias=False)
                 if config.projection else [])


def unet_rows(config: UNetConfig) -> list[Row]:
  """The UNet."""
  widths, levels = config.widths, len(config.widths)
  rows = _conv("unet/conv_in", "unet/conv_in")
  for theirs, ours in {"time_embedding": "time", "add_embedding": "extra"}.items():
    rows += linear_rows(f"unet/{theirs}.linear_1", f"unet/{ours}/up")
    rows += linear_rows(f"unet/{theirs}.linear_2", f"unet/{ours}/down")
  for i in range(levels):
    hf, path = f"unet/down_blocks.{i}", f"unet/down/{i}"
    rows += _resnets(hf, path, _changes(widths, i, config.resnets), time=True)
    rows += _transformers(hf, path, config.depths[i], config.resnets)
    if i < levels - 1:
      rows += _conv(f"{hf}.downsamplers.0.conv", f"{path}/downsample")
  rows += _resnets("unet/mid_block", "unet/mid", [False] * 2, time=True)
  rows += _transformers("unet/mid_block", "unet/mid", config.middle_depth, 1)
  for up, i in enumerate(reversed(range(levels))):
    hf, path, blocks = f"unet/up_blocks.{up}", f"unet/up/{up}", config.resnets + 1
    # Each gets what the way down has left beside its own: always more channels than it gives.
    rows += _resnets(hf, path, [True] * blocks, time=True)
    rows += _transformers(hf, path, config.depths[i], blocks)
    if i:
      rows += _conv(f"{hf}.upsamplers.0.conv", f"{path}/upsample")
  return (rows + norm_rows("unet/conv_norm_out", "unet/norm_out")
          + _conv("unet/conv_out", "unet/conv_out"))


def vae_rows(config: VaeConfig) -> list[Row]:
  """The autoencoder, by the names that newer files have."""
  rows = []
  for half, ours, sampler, widths, blocks in (
      ("encoder", "down", "downsample", config.widths, config.resnets),
      ("decoder", "up", "upsample", config.widths[::-1], config.resnets + 1)):
    hf = f"vae/{half}"
    rows += _conv(f"{hf}.conv_in", f"{hf}/conv_in")
    rows += _resnets(f"{hf}.mid_block", f"{hf}/mid", [False] * 2)
    attention, path = f"{hf}.mid_block.attentions.0", f"{hf}/mid/attention"
    rows += norm_rows(f"{attention}.group_norm", f"{path}/norm")
    for theirs, name in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out"}.items():
      rows += linear_rows(f"{attention}.{theirs}", f"{path}/{name}")
    for i in range(len(widths)):
      level, path = f"{hf}.{ours}_blocks.{i}", f"{hf}/{ours}/{i}"
      rows += _resnets(level, path, _changes(widths, i, blocks))
      if i < len(widths) - 1:
        rows += _conv(f"{level}.{sampler}rs.0.conv", f"{path}/{sampler}")
    rows += norm_rows(f"{hf}.conv_norm_out", f"{hf}/norm_out")
    rows += _conv(f"{hf}.conv_out", f"{hf}/conv_out")
  rows += linear_rows("vae/quant_conv", "vae/quant", form=conv(1))
  return rows + linear_rows("vae/post_quant_conv", "vae/post_quant", form=conv(1))


def _conv(hf: str, path: str) -> list[Row]:
  return linear_rows(hf, path, form=CONV3)


def _changes(widths: Sequence[int], level: int, blocks: int) -> list[bool]:
  """Which blocks of a level change the number of channels: its first, if the level before has
  another; the first level gets its own."""
  return [widths[max(level - 1, 0)] != widths[level]] + [False] * (blocks - 1)


def _resnets(hf: str, path: str, changes: Sequence[bool], *, time: bool = False) -> list[Row]:
  """Residual blocks of one level; `changes`: whether each changes the number of channels."""
  rows = []
  for j, changed in enumerate(changes):
    block, ours = f"{hf}.resnets.{j}", f"{path}/resnets/{j}"
    for n in (1, 2):
      rows += norm_rows(f"{block}.norm{n}", f"{ours}/norm{n}")
      rows += _conv(f"{block}.conv{n}", f"{ours}/conv{n}")
    if time:
      rows += linear_rows(f"{block}.time_emb_proj", f"{ours}/time")
    if changed:
      rows += linear_rows(f"{block}.conv_shortcut", f"{ours}/shortcut", form=conv(1))
  return rows


def _transformers(hf: str, path: str, depth: int, count: int) -> list[Row]:
  """Transformers of one level, `depth` blocks each; none with 0."""
  rows = []
  for j in range(count if depth else 0):
    model, ours = f"{hf}.attentions.{j}", f"{path}/attentions/{j}"
    rows += norm_rows(f"{model}.norm", f"{ours}/norm")
    rows += linear_rows(f"{model}.proj_in", f"{ours}/proj_in")
    rows += linear_rows(f"{model}.proj_out", f"{ours}/proj_out")
    for b in range(depth):
      block, stack = f"{model}.transformer_blocks.{b}", f"{ours}/blocks"
      for n in (1, 2, 3):
        rows += norm_rows(f"{block}.norm{n}", f"{stack}/norm{n}", b)
      for n in ("attn1", "attn2"):
        for name in "qkv":
          rows += linear_rows(f"{block}.{n}.to_{name}", f"{stack}/{n}/{name}", b, bias=False)
        rows += linear_rows(f"{block}.{n}.to_out.0", f"{stack}/{n}/out", b)
      rows += linear_rows(f"{block}.ff.net.0.proj", f"{stack}/up", b)
      rows += linear_rows(f"{block}.ff.net.2", f"{stack}/down", b)
  return rows
