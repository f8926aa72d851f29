"""Weights as small integers: a token's time is that of reading every weight once, and these are
half or a quarter as many bytes.

    int8    one scale for each output channel
    int4    one scale for each output channel and group of inputs; the head stays int8

The matrices of the decoder's layers and its head are quantised.  The embedding table is not, since
only the rows of a few tokens are read; where it is the head as well, an int8 copy becomes the head.
Norms, routers, towers and projector stay: they are small, or run once a picture.  The products are
computed in the model's dtype; integers are what lies in memory.
"""
from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from mgjax.checkpoint import LoadedModel, load_model, load_params
from mgjax.infer.cache import with_unstacked_blocks
from mgjax.models.layers import Dense
from mgjax.models.mini_gemini import MiniGemini
from mgjax.models.moe import Experts, route
from mgjax.sharding import constrain, fitting_spec, gathered

FORMATS = {"int8": jnp.int8, "int4": jnp.int4}
GROUPS = (128, 64, 32)                    # inputs that share a scale in int4
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)  # of the largest weight of a group, tried in int4
# Rows for which sums of int4 groups are scaled rather than weights: the compiler of TPUs counts
# 10 and 53 thousand cycles for 8 rows of a 4096 x 1376 matrix, 243 and 111 for 64 of 4096 x 11008.
FEW_ROWS = 16
FEW_TOKENS = 128  # for which all experts are read as integers


def check_format(name: str | None) -> None:
  """ValueError unless it is None or one of FORMATS."""
  if name is not None and name not in FORMATS:
    raise ValueError(f"quantize: {name!r} does not exist; one of {', '.join(FORMATS)}, or None")


def group_size(inputs: int, ways: int = 1) -> int:
  """Inputs of a matrix that share a scale in int4, where `ways` devices share the inputs: no group
  is cut.

  >>> [group_size(*n) for n in ((4096, 8), (11008, 1), (11008, 4), (11008, 8))]
  [128, 128, 64, 32]
  """
  return next((g for g in GROUPS if inputs % (ways * g) == 0),
              math.gcd(inputs // ways, GROUPS[-1]))


def quantized(w: jax.Array, name: str, ways: int = 1) -> tuple[jax.Array, jax.Array]:
  """w [..., D, F] -> integers and their scales.

  int8: [..., D, F] and float32 [..., F].  int4: [..., G, D/G, F] and, in the dtype of w,
  [..., G, F]; the scale is the one of those that CLIPS give with the least squared error.  `ways`
  as in `group_size`.
  """
  d, whole, w = w.shape[-2], name == "int8", w.astype(jnp.float32) if name == "int8" else w
  size, largest = d if whole else group_size(d, ways), jnp.iinfo(FORMATS[name]).max
  grouped = w.astype(jnp.float32).reshape(*w.shape[:-2], d // size, size, w.shape[-1])
  peak = jnp.max(jnp.abs(grouped), axis=-2, keepdims=True)                # [..., G, 1, F]

  def rounded(clip):
    scale = (clip * peak / largest).astype(w.dtype)
    exact = scale.astype(jnp.float32)
    values = jnp.round(grouped / jnp.where(exact > 0, exact, 1))
    values = jnp.clip(values, -largest, largest)
    error = jnp.sum(jnp.square(values * exact - grouped), axis=-2, keepdims=True)
    return values, scale, error

  best = rounded(1.0)
  for clip in () if whole else CLIPS[1:]:
    other = rounded(clip)
    better = other[2] < best[2]
    best = tuple(jnp.where(better, new, old) for new, old in zip(other, best))
  values, scale = best[0].astype(FORMATS[name]), best[1][..., 0, :]
  return (values[..., 0, :, :], scale[..., 0, :]) if whole else (values, scale)


def dequantized(values: jax.Array, scale: jax.Array, dtype) -> jax.Array:
  """What `quantized` gave -> the matrix [..., D, F] that it stands for."""
  w = values.astype(dtype) * scale.astype(dtype)[..., None, :]
  if values.dtype == jnp.int8:
    return w
  return w.reshape(*w.shape[:-3], -1, w.shape[-1])


def product(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
  """x [..., N, D] times what `quantized` gave, in the dtype of x -> [..., N, F]."""
  if values.dtype == jnp.int8:  # the scale of a whole channel can wait until the sum is made
    y = x @ values.astype(x.dtype)
    return (y * (scale if scale.ndim == 1 else scale[..., None, :])).astype(x.dtype)
  x = x.reshape(*x.shape[:-1], values.shape[-3], -1)                      # [..., N, G, D/G]
  if x.shape[-3] > FEW_ROWS:
    # In three dimensions: with scales repeated for two, the compiler writes them out as a matrix.
    w = values.astype(x.dtype) * scale.astype(x.dtype)[..., None, :]
    return jnp.einsum("...ngk,...gkf->...nf", x, w)
  sums = jnp.einsum("...ngk,...gkf->...gnf", x, values.astype(x.dtype),
                    preferred_element_type=jnp.float32)
  return jnp.sum(sums * scale[..., None, :], axis=-3).astype(x.dtype)


class QuantizedMatrix(nnx.Module):
  """Linear layer [..., D] -> [..., F] without a bias, in the place of a `Dense`.

  Args:
    values, scale: from `quantized`; with experts in front, x is [E, N, D] or [1, N, D].
    axes: logical names of the dimensions of the matrix.
    dtype: in which it is computed.
  """

  def __init__(self, values: jax.Array, scale: jax.Array, axes: tuple[str | None, ...], dtype):
    self.axes, self.dtype = axes, dtype
    self.values, self.scale = nnx.Param(values), nnx.Param(scale)

  def __call__(self, x: jax.Array) -> jax.Array:
    values_axes, scale_axes = _axes(self.values.dtype, self.axes)
    rows = x.astype(self.dtype)
    rows = rows.reshape(-1, x.shape[-1]) if len(self.axes) == 2 else rows
    y = product(rows, gathered(self.values[...], *values_axes),
                gathered(self.scale[...], *scale_axes))
    return y.reshape(*x.shape[:-1], -1) if len(self.axes) == 2 else y

  def __getitem__(self, index) -> jax.Array:
    """`[...]` is the matrix in `dtype`, as of an nnx.Param."""
    return dequantized(self.values[...], self.scale[...], self.dtype)[index]


def _axes(dtype, axes: tuple[str | None, ...]) -> tuple[tuple[str | None, ...], ...]:
  """Logical names of the dimensions of integers and scales of a matrix with these names."""
  *lead, inputs, outputs = axes
  if dtype == jnp.int8:
    return axes, (*lead, outputs)
  return (*lead, inputs, None, outputs), (*lead, inputs, outputs)


class QuantizedExperts(Experts):
  """Experts whose matrices are `QuantizedMatrix`es.

  For a few tokens almost all experts are chosen by one or another, so every expert is computed for
  every token, which reads each once, as integers.  For many the matrices are made whole, and
  multiplied group by group.
  """

  def __init__(self, experts: Experts, **matrices: QuantizedMatrix):
    self.config, self.activation = experts.config, experts.activation
    self.dtype, self.router = experts.dtype, experts.router
    self.gate, self.up, self.down = (matrices[name] for name in ("gate", "up", "down"))

  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    if x.shape[0] * x.shape[1] > FEW_TOKENS:
      return super().__call__(x)
    scores = self.router(x)
    weights, chosen = route(scores, self.config.experts_per_token)            # [B, L, k]
    share = jnp.sum(jax.nn.one_hot(chosen, self.config.experts) * weights[..., None], axis=-2)
    share = share.reshape(-1, self.config.experts).T[..., None]               # [E, N, 1]
    rows = constrain(x.reshape(1, -1, x.shape[-1]), None, None, None)
    y = self.activation(self.gate(rows)) * self.up(rows) * share.astype(x.dtype)
    y = self.down(constrain(y, "expert", None, "act_mlp"))                    # [E, N, D]
    return constrain(jnp.sum(y, axis=0).reshape(x.shape), "batch", "seq", "act_embed"), scores


# Paths of the parameters that `quantize` takes.
MATRICES = re.compile(r"decoder/(blocks/([^/]+/kernel|experts/(gate|up|down))|head/kernel)")


def load_quantized(path: str | os.PathLike, mesh: Mesh, *, dtype, name: str) -> LoadedModel:
  """As `checkpoint.load_model`, quantised.  Matrices are read as they are needed, the same of all
  layers at a time, so that the float model never lies on the devices."""
  loaded = load_model(path, mesh, dtype=dtype, leave=MATRICES.fullmatch)
  quantize(loaded.model, name, lambda key, shape: load_params(path, {key: shape})[key])
  return loaded


def quantize(model: MiniGemini, name: str,
             read: Callable[[str, jax.ShapeDtypeStruct], jax.Array] | None = None) -> None:
  """Quantises the decoder of a model in place; its layers are a list then, as the engine's are.

  One matrix of one layer is computed at a time, and the float stack of a matrix is let go when its
  layers are done.  A model of ShapeDtypeStructs stays one.  Call it inside the mesh.

  read: what lies at a path of MATRICES, where the model has only its shape.

  ValueError for a name that is not in FORMATS, and for a model that is quantised already.
  """
  check_format(name)
  decoder = model.decoder
  if isinstance(decoder.blocks, nnx.List):
    raise ValueError("quantize: the layers of this model are a list, it is quantised already")
  def taken(module, key, path):
    """The array of a parameter, which the module has no more."""
    array = getattr(module, key).get_value()
    setattr(module, key, nnx.data(None))
    return read(path, array) if read else array

  make = functools.partial(_matrices, dtype=decoder.dtype)
  blocks, layers, experts = decoder.blocks, {}, {}
  for key in [k for k, part in vars(blocks).items() if isinstance(part, Dense)]:
    axes = getattr(blocks, key).axes
    layers[key] = make(taken(getattr(blocks, key), "kernel", f"decoder/blocks/{key}/kernel"), name,
                       axes)
  if decoder.config.experts:
    for key, axes in (("gate", ("expert", "embed", "mlp")), ("up", ("expert", "embed", "mlp")),
                      ("down", ("expert", "mlp", "embed"))):
      experts[key] = make(taken(blocks.experts, key, f"decoder/blocks/experts/{key}"), name, axes)
  decoder.blocks = with_unstacked_blocks(decoder).blocks
  for i, block in enumerate(decoder.blocks):
    for key, matrices in layers.items():
      setattr(block, key, matrices[i])
    if experts:
      block.experts = QuantizedExperts(block.experts, **{k: m[i] for k, m in experts.items()})
  tied = decoder.head is None
  head = decoder.embedding.get_value() if tied else taken(decoder.head, "kernel",
                                                          "decoder/head/kernel")
  decoder.head = _matrix(head, "int8", ("embed", "vocab"), decoder.dtype, transposed=tied)


def _matrices(stack, name, axes, dtype):
  return [_matrix(stack, name, axes, dtype, layer=i) for i in range(stack.shape[0])]


def _matrix(w, name, axes, dtype, **which) -> QuantizedMatrix:
  if not isinstance(w, jax.ShapeDtypeStruct):
    return QuantizedMatrix(*_laid_out(w, name, axes, **which), axes, dtype)
  shapes = jax.eval_shape(functools.partial(_part, name=name, axes=axes, **which), w)
  specs = [fitting_spec(s.shape, *names) for s, names in zip(shapes, _axes(FORMATS[name], axes))]
  return QuantizedMatrix(
      *(jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(w.sharding.mesh, spec))
        for s, spec in zip(shapes, specs)), axes, dtype)


@functools.partial(jax.jit, static_argnames=("name", "axes", "transposed"))
def _laid_out(w, name, axes, layer=None, transposed=False):
  parts = _part(w, name, axes, layer, transposed)
  return tuple(jax.lax.with_sharding_constraint(a, fitting_spec(a.shape, *names))
               for a, names in zip(parts, _axes(FORMATS[name], axes)))


def _part(w, name, axes, layer=None, transposed=False):
  """A matrix, or that of a layer of a stack, quantised."""
  w = w if layer is None else jax.lax.dynamic_index_in_dim(w, layer, keepdims=False)
  w = w.T if transposed else w
  shared = fitting_spec(w.shape, *axes)[len(axes) - 2]
  ways = 1 if shared is None else jax.sharding.get_abstract_mesh().shape[shared]
  return quantized(w, name, ways)
