"""How many floating-point operations a training step takes, by the mathematics of the model.

What counts is products of matrices and convolutions, a multiplication and an addition each 2: that
is how MFU is commonly reckoned (PaLM, MaxText).  Norms, activations, softmax, interpolation, the
look-up of embeddings, the loss and the update count nothing; what rematerialisation computes twice
counts once.  A product with weights costs

    2 per weight and position forward
    2 more where the weights train                     (gradient of the weights)
    2 more where something in front of it trains       (gradient of the input)

so a decoder that trains costs the well-known 6N a token, and one that is frozen behind a projector
that trains 4N.  What trains is read off the optimizer's table, by the weights alone; a row with
`layers` counts as if all layers trained (their gradients are computed, and masked).
"""
from __future__ import annotations

import dataclasses
import functools

from mgjax.config import ClipVitConfig, ConvNextConfig, DecoderConfig, ModelConfig
from mgjax.data.packing import Format
from mgjax.models.lora import LoraConfig
from mgjax.train.config import RunConfig
from mgjax.train.optimizer import row_of


@dataclasses.dataclass(frozen=True)
class Work:
  """What the model is given: positions of text and pictures, images of hr_size pixels a side, and
  pairs of a position with one that it sees, itself included (see `pairs_seen`)."""

  positions: int
  pairs: int
  images: int
  hr_size: int


def whole_batch(shape: Format, window: int | None = None) -> Work:
  """All that a batch has room for, padding too, as if each row held one sample.

  That is the usual reckoning, and near what the compiled step computes whatever it is given.
  """
  return Work(shape.rows * shape.length, shape.rows * pairs_seen(shape.length, window),
              shape.rows * shape.slots, shape.hr_size)


def pairs_seen(length: int, window: int | None = None) -> int:
  """Pairs of a position with an earlier one or itself, less than `window` away: the lower triangle
  of the matrix of attention (MaxText's convention; PaLM's counts the whole square).

  >>> pairs_seen(4), pairs_seen(4, window=2)
  (10, 7)
  """
  width = min(length, window or length)
  return width * (width + 1) // 2 + (length - width) * width


@dataclasses.dataclass(frozen=True)
class FlopsReport:
  """Operations of a step by part of the model: vision, vision_hr, mining, projector, decoder (its
  weights), attention (of the decoder) and head, as far as they run."""

  forward: dict[str, float]
  backward: dict[str, float]

  @property
  def total(self) -> float:
    """Forward and backward, all parts."""
    return sum(self.forward.values()) + sum(self.backward.values())

  def of(self, part: str) -> float:
    """Forward and backward of a part; 0 if it does not run."""
    return self.forward.get(part, 0) + self.backward.get(part, 0)


def model_flops(config: RunConfig, work: Work) -> FlopsReport:
  """Operations of a step on `work`, over all devices, for what the optimizer's table trains."""
  if config.objective == "language":
    parts = {n: _adapted(part, n, config.lora)
             for n, part in _mini_gemini(config.model, work).items()}
  else:
    parts = _tagger(config.model, config.objective.removeprefix("tags:"), work)
  trains = lambda path: path is not None and row_of(path, config.optimizer.table).lr is not None
  # Parts come in the order of computation: gradients reach one that trains, or stands behind one.
  reached: dict[str, bool] = {}
  for name, part in parts.items():
    reached[name] = (any(trains(p.path) for p in part.products)
                     or any(reached.get(b, False) for b in part.behind))
  backward = lambda p: p.flops * (trains(p.path) + sum(reached.get(i, False) for i in p.inputs))
  return FlopsReport({n: sum(p.flops for p in part.products) for n, part in parts.items()},
                     {n: sum(map(backward, part.products)) for n, part in parts.items()})


@functools.lru_cache
def batch_flops(config: RunConfig, shape: Format) -> float:
  """Operations of a step on all that a batch of this format has room for, over all devices."""
  return model_flops(config, whole_batch(shape, config.model.decoder.sliding_window)).total


@dataclasses.dataclass(frozen=True)
class _Product:
  """A product: forward operations, the parameter that is a factor (None in attention), and for each
  other factor the part of the model that must be reached for its gradient to be wanted."""

  path: str | None
  flops: float
  inputs: tuple[str, ...]
  sizes: tuple[int, int, int] | None = None  # rows, d_in, d_out of a dense layer


@dataclasses.dataclass(frozen=True)
class _Part:
  products: list[_Product]
  behind: tuple[str, ...] = ()  # parts whose output it takes


def _mini_gemini(config: ModelConfig, work: Work) -> dict[str, _Part]:
  parts = {}
  if work.images:
    model = config.at(work.hr_size)
    crops, tokens = work.images * model.tiles, work.images * model.visual_tokens
    parts["vision"] = _clip(model.vision, crops)
    if model.vision_hr is not None:
      parts["vision_hr"] = _convnext(model.vision_hr, work.images, model.hr_size)
      parts["mining"] = _mining(model, tokens)
    parts["projector"] = _projector(model, tokens)
  return parts | _decoder(config.decoder, work)


def _tagger(config: ModelConfig, tower: str, work: Work) -> dict[str, _Part]:
  if tower == "vision":
    part, width = _clip(config.vision, work.images * config.tiles), config.vision.width
  else:
    part = _convnext(config.vision_hr, work.images, work.hr_size)
    width = config.vision_hr.features
  head = _dense("head/kernel", work.images, width, config.decoder.vocab_size, tower)
  return {tower: part, "head": _Part([head])}


def _dense(path: str, rows: int, d_in: int, d_out: int, *inputs: str) -> _Product:
  return _Product(path, 2 * rows * d_in * d_out, inputs, (rows, d_in, d_out))


def _adapted(part: _Part, name: str, lora: LoraConfig) -> _Part:
  """With both products of each adapter."""
  more = []
  for p in part.products if lora.rank else ():
    if p.path and lora.changes([p.path]):
      (rows, d_in, d_out), layer = p.sizes, p.path.removesuffix("/kernel")
      more += [_dense(f"{layer}/lora_a", rows, d_in, lora.rank, *p.inputs),
               _dense(f"{layer}/lora_b", rows, lora.rank, d_out, name)]
  return dataclasses.replace(part, products=part.products + more)


def _clip(config: ClipVitConfig, images: int) -> _Part:
  """Only the blocks that run; the class token is a position more."""
  d, patches = config.width, config.side**2
  rows = images * (patches + 1) * config.used_depth
  dense = lambda name, d_in, d_out: _dense(
      f"vision/blocks/{name}/kernel", rows, d_in, d_out, "vision")
  return _Part([
      _dense("vision/patch_embed/kernel", images * patches, 3 * config.patch_size**2, d),
      *(dense(name, d, d) for name in ("q", "k", "v", "out")),
      # Everybody sees everybody; two products, each of two factors.
      _Product(None, 2 * 2 * rows * (patches + 1) * d, ("vision", "vision")),
      dense("up", d, config.mlp_width), dense("down", config.mlp_width, d)])


def _convnext(config: ConvNextConfig, images: int, size: int) -> _Part:
  side = size // config.stride
  products = [_dense("vision_hr/stem/kernel", images * side**2, 3 * config.stride**2,
                     config.widths[0])]
  for i, (depth, width) in enumerate(zip(config.depths, config.widths)):
    stage = f"vision_hr/stages/{i}"
    if i:
      side //= 2
      products.append(_dense(f"{stage}/down/kernel", images * side**2, 4 * config.widths[i - 1],
                             width, "vision_hr"))
    rows = images * side**2 * depth
    products += [_Product(f"{stage}/blocks/kernel", 2 * rows * 7 * 7 * width, ("vision_hr",)),
                 _dense(f"{stage}/blocks/up/kernel", rows, width, 4 * width, "vision_hr"),
                 _dense(f"{stage}/blocks/down/kernel", rows, 4 * width, width, "vision_hr")]
  return _Part(products)


def _mining(config: ModelConfig, tokens: int) -> _Part:
  """As it is run: the queries go through the keys' weights, candidates are never projected."""
  d, features = config.vision.width, config.vision_hr.features
  window = (config.hr_size // config.vision_hr.stride // (config.grid * config.vision.side))**2
  return _Part([
      _dense("mining/query/dense/kernel", tokens, d, d, "mining"),
      _dense("mining/key/dense/kernel", tokens, d, features, "mining"),
      # Scores of the candidates, and their weighted sum.
      _Product(None, 2 * 2 * tokens * window * features, ("mining", "vision_hr")),
      _dense("mining/value/dense/kernel", tokens, features, d, "mining"),
  ], ("vision", "vision_hr"))


def _projector(config: ModelConfig, tokens: int) -> _Part:
  d, out = config.vision.width, config.decoder.width
  before = "vision" if config.vision_hr is None else "mining"
  return _Part([
      _dense("projector/layers/0/kernel", tokens, d, out, before),
      *(_dense(f"projector/layers/{i}/kernel", tokens, out, out, "projector")
        for i in range(1, config.projector_depth))], (before,))


def _decoder(config: DecoderConfig, work: Work) -> dict[str, _Part]:
  """A position goes through as many experts as it chooses; all positions go through the head."""
  d, f, rows = config.width, config.mlp_width, work.positions * config.depth
  q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
  dense = lambda name, rows, d_in, d_out: _dense(
      f"decoder/blocks/{name}", rows, d_in, d_out, "decoder")
  products = [
      _Product("decoder/embedding", 0, ()),  # a look-up; but what stands behind it gets gradients
      dense("q/kernel", rows, d, q), dense("k/kernel", rows, d, kv), dense("v/kernel", rows, d, kv),
      dense("out/kernel", rows, q, d)]
  if config.experts:
    chosen = rows * config.experts_per_token
    products += [dense("experts/router/kernel", rows, d, config.experts),
                 dense("experts/gate", chosen, d, f), dense("experts/up", chosen, d, f),
                 dense("experts/down", chosen, f, d)]
  else:
    products += [dense("gate/kernel", rows, d, f), dense("up/kernel", rows, d, f),
                 dense("down/kernel", rows, f, d)]
  head = "decoder/embedding" if config.tied_head else "decoder/head/kernel"
  attention = _Product(None, 2 * 2 * work.pairs * config.depth * q, ("decoder", "decoder"))
  return {"decoder": _Part(products, ("projector",)),
          "attention": _Part([attention]),
          "head": _Part([_dense(head, work.positions, d, config.vocab_size, "decoder")])}
