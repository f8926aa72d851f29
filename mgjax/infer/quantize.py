"""Weights as small integers: a token's time is that of reading every weight once, and these are
half or a quarter as many bytes.

    int8    one scale for each output channel
    int4    a scale and an offset for each output channel and 32 inputs; the head stays int8

The matrices of the decoder's layers and its head are quantised.  The embedding table is not, since
only the rows of a few tokens are read; where it is the head as well, an int8 copy becomes the head.
Norms, routers, towers and projector stay: they are small, or run once a picture.  The products are
computed in the model's dtype; integers are what lies in memory.
"""
from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from mgjax.checkpoint import LoadedModel, load_model, load_params
from mgjax.infer.cache import with_unstacked_blocks
from mgjax.models.integers import FORMATS, dequantized, part_axes, product, quantized
from mgjax.models.layers import Dense
from mgjax.models.mini_gemini import MiniGemini
from mgjax.models.moe import Experts, route
from mgjax.sharding import constrain, fitting_spec, gathered

FEW_TOKENS = 128  # for which all experts are read as integers


def check_format(name: str | None) -> None:
  """ValueError unless it is None or one of FORMATS."""
  if name is not None and name not in FORMATS:
    raise ValueError(f"quantize: {name!r} does not exist; one of {', '.join(FORMATS)}, or None")


class QuantizedMatrix(nnx.Module):
  """Linear layer [..., D] -> [..., F] without a bias, in the place of a `Dense`.

  Args:
    parts: from `quantized`; with experts in front, x is [E, N, D] or [1, N, D].
    axes: logical names of the dimensions of the matrix.
    dtype: in which it is computed.
  """

  def __init__(self, parts: Sequence[jax.Array], axes: tuple[str | None, ...], dtype):
    self.axes, self.dtype = axes, dtype
    self.parts = nnx.List([nnx.Param(part) for part in parts])

  def __call__(self, x: jax.Array) -> jax.Array:
    rows = x.astype(self.dtype)
    rows = rows.reshape(-1, x.shape[-1]) if len(self.axes) == 2 else rows
    names = part_axes(self.parts[0].dtype, self.axes)
    y = product(rows, [gathered(part[...], *own) for part, own in zip(self.parts, names)])
    return y.reshape(*x.shape[:-1], -1) if len(self.axes) == 2 else y

  def __getitem__(self, index) -> jax.Array:
    """`[...]` is the matrix in `dtype`, as of an nnx.Param."""
    return dequantized([part[...] for part in self.parts], self.dtype)[index]


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
    return QuantizedMatrix(_laid_out(w, name, axes, **which), axes, dtype)
  shapes = jax.eval_shape(functools.partial(_part, name=name, axes=axes, **which), w)
  named = part_axes(FORMATS[name], axes)
  specs = [fitting_spec(s.shape, *names) for s, names in zip(shapes, named)]
  return QuantizedMatrix(
      [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(w.sharding.mesh, spec))
       for s, spec in zip(shapes, specs)], axes, dtype)


@functools.partial(jax.jit, static_argnames=("name", "axes", "transposed"))
def _laid_out(w, name, axes, layer=None, transposed=False):
  parts = _part(w, name, axes, layer, transposed)
  return tuple(jax.lax.with_sharding_constraint(a, fitting_spec(a.shape, *names))
               for a, names in zip(parts, part_axes(FORMATS[name], axes)))


def _part(w, name, axes, layer=None, transposed=False):
  """A matrix, or that of a layer of a stack, quantised."""
  w = w if layer is None else jax.lax.dynamic_index_in_dim(w, layer, keepdims=False)
  w = w.T if transposed else w
  shared = fitting_spec(w.shape, *axes)[len(axes) - 2]
  ways = 1 if shared is None else jax.sharding.get_abstract_mesh().shape[shared]
  return quantized(w, name, ways)
