"""LoRA: a product of two small matrices beside a frozen one learns what that shall do otherwise.

    y = x W + (alpha / rank) dropout(x) A B        W [D, F] frozen, A [D, rank], B [rank, F]

B starts at zero, so that training starts at the model as it is.  The adapters are parameters of the
layers that they adapt: decoder/blocks/q has lora_a and lora_b beside its kernel, a stack of layers
has a stack of each.  Other code does not know of them.
"""
from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from mgjax.config import ConfigError, at_least
from mgjax.models.integers import (
    FORMATS,
    dequantized,
    packed,
    part_axes,
    product,
    quantized,
    unpacked,
)
from mgjax.models.layers import Dense, uniform_fan_in
from mgjax.models.moe import Experts
from mgjax.sharding import gathered


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Which dense layers are adapted, and how.  The defaults are the original's (R4.7), but for the
  rank (64 there): 0 means no adapters, that is the base exactly."""

  pattern: str = "^decoder/blocks/"  # of paths of dense layers (re.search): decoder/blocks/q, ...
  rank: int = 0
  alpha: float = 16.0
  dropout: float = 0.05              # of what goes into A, in training; in steps of 1/256
  base: str = ""                     # how the layers of `pattern` are kept: int8 or int4 (see
                                     # `integers`); "" as config.frozen_dtype says

  def __post_init__(self):
    at_least(self, 0, "rank", "alpha")
    try:
      re.compile(self.pattern)
    except re.error as error:
      raise ConfigError(f"config.lora.pattern {self.pattern!r} is no regular expression ({error})"
                        ) from error
    if not 0 <= self.dropout < 1:
      raise ConfigError(f"config.lora.dropout is {self.dropout}; expected 0 <= dropout < 1")
    if self.base not in ("", *FORMATS):
      raise ConfigError(f"config.lora.base is {self.base!r}; expected one of {', '.join(FORMATS)}, "
                        "or nothing for config.frozen_dtype")

  @property
  def used(self) -> bool:
    """Whether anything differs from training without it."""
    return bool(self.rank or self.base)

  @property
  def scale(self) -> float:
    """What A B is multiplied by."""
    return self.alpha / self.rank if self.rank else 0.0

  def changes(self, paths: Iterable[str]) -> list[str]:
    """Of the paths of a model's parameters, the kernels of the layers that the pattern takes."""
    if not self.used:
      return []
    layer = lambda path: path.removesuffix("/kernel")
    return [p for p in paths if layer(p) != p and re.search(self.pattern, layer(p))]


ADAPTER = re.compile(r"/lora_[ab]$")
QUANTIZED_PART = re.compile(r"/kernel/\d+$")  # of a kernel that `LoraConfig.base` quantises

# Layers whose matrix is read otherwise than by a product with it, and why that is in the way.
_REFUSED = {
    r"decoder/head": "the loss reads it piece by piece; train it whole by config.optimizer.table",
    r"vision_hr/(stem|stages/\d/down)": "TPUs have their own forms for them; train them whole by "
    "config.optimizer.table",
    r"mining/key/dense": "queries go through its matrix; train it whole by config.optimizer.table",
    r"decoder/blocks/experts/(gate|up|down)": "experts are multiplied group by group; leave them "
    "out: --config.lora.pattern='^decoder/blocks/(q|k|v|out)$'"}


class AdaptedDense(Dense):
  """A `Dense`, or a stack of them, with an adapter and perhaps a quantised kernel, in its place.

  key: of dropout, one for each layer of a stack; None: there is none.
  """

  def __init__(self, dense: Dense, config: LoraConfig, frozen_dtype, *, rngs: nnx.Rngs):
    self.dtype, self.axes, self.bias = dense.dtype, dense.axes, dense.bias
    self.scale, self.dropout, self.key = config.scale, config.dropout, nnx.data(None)
    *lead, d_in, d_out = dense.kernel.get_value().shape
    stacked = ("layers",) * len(lead)
    param = lambda value, names: nnx.Param(value, out_sharding=(*stacked, *names))
    self.kernel = dense.kernel
    if config.base:
      parts = kept_parts(dense.kernel[...].astype(frozen_dtype), config.base)
      self.kernel = nnx.List(map(param, parts, part_axes(FORMATS[config.base], self.axes)))
    self.lora_a = self.lora_b = nnx.data(None)
    if config.rank:
      a_axes, b_axes = adapter_axes(self.axes)
      init = uniform_fan_in(d_in)  # peft's Kaiming-uniform with sqrt(5)
      self.lora_a = param(init(rngs(), (*lead, d_in, config.rank)), a_axes)
      self.lora_b = param(jnp.zeros((*lead, config.rank, d_out)), b_axes)

  def product(self, rows: jax.Array) -> jax.Array:  # [N, D] -> [N, F]
    if isinstance(self.kernel, nnx.List):
      names = part_axes(FORMATS["int8" if len(self.kernel) == 2 else "int4"], self.axes)
      values, *scales = (gathered(p[...], *own) for p, own in zip(self.kernel, names))
      y = product(rows, [unpacked(values) if values.ndim == 3 else values, *scales])
    else:
      y = super().product(rows)
    if self.lora_a is None:
      return y
    if self.key is not None:
      rows = dropped(rows, self.dropout, self.key)
    a, b = (gathered(w[...].astype(self.dtype), *names)
            for w, names in zip((self.lora_a, self.lora_b), adapter_axes(self.axes)))
    return y + (rows @ a * self.scale) @ b


def dropped(rows: jax.Array, rate: float, key: jax.Array) -> jax.Array:
  """[N, D] with a share `rate` of its values zero, in steps of 1/256, the others larger by as much.

  One random word serves four values: on TPUs drawing them costs more than the adapter's products.
  """
  zeroed, width = round(256 * rate), rows.shape[-1]
  words = jax.random.bits(key, (rows.shape[0], -(-width // 4)), jnp.uint32)
  bits = jnp.concatenate([words >> shift & 255 for shift in (0, 8, 16, 24)], axis=-1)[:, :width]
  return jnp.where(bits >= zeroed, rows * (256 / (256 - zeroed)), 0).astype(rows.dtype)


def kept_parts(w: jax.Array, name: str) -> tuple[jax.Array, ...]:
  """What `integers.quantized` gives, int4 two to a byte: what passes through the train step as int4
  comes back in another layout, which the step, compiled ahead, refuses."""
  values, *scales = quantized(w, name)
  return (packed(values) if name == "int4" else values, *scales)


def adapter_axes(axes: tuple[str | None, str | None]) -> tuple[tuple[str | None, ...], ...]:
  """Logical names of the dimensions of A and B for those of W.  Every matrix is cut over fsdp:
  along `embed` where it has that, else along the rank."""
  rank = lambda side: None if side == "embed" else "rank"
  return (axes[0], rank(axes[0])), (rank(axes[1]), axes[1])


def adapt(model: nnx.Module, config: LoraConfig, frozen_dtype, *, rngs: nnx.Rngs) -> None:
  """Puts `AdaptedDense`s in the place of the dense layers that the pattern matches.

  Raises ConfigError if it matches none, or a layer that cannot be adapted.
  """
  if not config.used:
    return
  layers = _layers(model)
  chosen = [path for path in layers if re.search(config.pattern, path)]
  for path in chosen:
    for refused, reason in _REFUSED.items():
      if re.fullmatch(refused, path):
        raise ConfigError(f"config.lora.pattern {config.pattern!r} takes {path}, which cannot be "
                          f"adapted: {reason}")
  if not chosen:
    near = difflib.get_close_matches(config.pattern, layers, 4, 0.3) or sorted(layers)
    raise ConfigError(f"config.lora.pattern {config.pattern!r} matches no dense layer; the nearest "
                      f"of {len(layers)}: {', '.join(near[:8])}")
  for path in chosen:
    *above, name = layers[path]
    parent = functools.reduce(_child, above, model)
    made = AdaptedDense(_child(parent, name), config, frozen_dtype, rngs=rngs)
    if isinstance(name, int):
      parent[name] = made
    else:
      setattr(parent, name, made)


def _child(node, name):
  return node[name] if isinstance(name, int) else getattr(node, name)


def _layers(model: nnx.Module) -> dict[str, tuple]:
  """Where dense layers, and the matrices of experts, are: "decoder/blocks/q" -> its steps."""
  found = {}
  for steps, module in nnx.iter_modules(model):
    path = "/".join(map(str, steps))
    if isinstance(module, Dense):
      found[path] = steps
    elif isinstance(module, Experts):
      found |= {f"{path}/{name}": () for name in ("gate", "up", "down")}
  return found


def set_dropout(model: nnx.Module, key: jax.Array | None) -> None:
  """From now on adapters drop by this key; None: not at all."""
  adapted = [m for _, m in nnx.iter_modules(model)
             if isinstance(m, AdaptedDense) and m.dropout and m.lora_a is not None]
  for i, module in enumerate(adapted):
    own = None if key is None else jax.random.fold_in(key, i)
    if own is not None and (lead := module.lora_a.get_value().shape[:-2]):
      own = jax.random.split(own, lead)
    module.key = nnx.data(own)


def merged(kernel: jax.Array, config: LoraConfig, adapter: Sequence[jax.Array],
           dtype) -> jax.Array:
  """W + (alpha / rank) A B in float32, then in `dtype`, for a matrix or a stack of them, W as the
  adapter saw it in training: quantised, if the base was.

  kernel [..., D, F] in config.frozen_dtype; adapter: A and B, or nothing.
  """
  def one(w, *ab):
    w = dequantized(quantized(w, config.base), jnp.float32) if config.base else w
    w = w.astype(jnp.float32)
    if ab:
      w += config.scale * jnp.matmul(*(m.astype(jnp.float32) for m in ab), precision="highest")
    return w.astype(dtype)

  for _ in kernel.shape[:-2]:
    one = functools.partial(_mapped, one)
  return one(kernel, *adapter)


def _mapped(f, *stacks):
  return jax.lax.map(lambda layer: f(*layer), stacks)
