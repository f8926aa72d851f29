"""What runs on the devices: pictures to visual tokens, prompts and tokens into the cache.

Every program is compiled once: `encode` for each number of pictures (rounded up to a power of two)
and their size, `prefill` for each length of window, `show` for each of these and size of a picture,
`decode` and `copy` once.  Settings such as the temperature are arguments, not programs.
"""
from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mgjax.infer.aside import to_devices, to_host
from mgjax.infer.cache import (
    Cache,
    cache_axes,
    check_cache_dtype,
    empty_cache,
    extend,
    rounded_slots,
    with_unstacked_blocks,
)
from mgjax.infer.sampling import Sampling, sample
from mgjax.models.mini_gemini import MiniGemini
from mgjax.sharding import batch_shards, mesh_context, spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
  """One token of every row, and how the next is drawn; never donated, so it can be read late."""

  token: jax.Array        # int32 [B]
  logits: jax.Array       # float32 [B, V], of which the token was drawn
  key: jax.Array          # uint32 [B, 2]: random state
  temperature: jax.Array  # float32 [B]; these three as in `Sampling`
  top_p: jax.Array        # float32 [B]
  top_k: jax.Array        # int32 [B]


class Programs:
  """The programs of one model on one mesh; see `Engine` for the arguments.

  `rows` conversations lie in the cache, a multiple of what the mesh splits.
  """

  def __init__(self, model: MiniGemini, mesh: Mesh, rows: int, slots: int, cache_dtype=None):
    self.config, self.mesh, self.dtype = model.config, mesh, model.dtype
    self.together = batch_shards(mesh)  # fewest rows that the mesh can split
    self.rows, self.slots = -(-rows // self.together) * self.together, rounded_slots(slots)
    self.compiled: collections.Counter[str] = collections.Counter()  # program -> times compiled
    self._cache_dtype = check_cache_dtype(cache_dtype or model.dtype)
    self._blanks: dict[int, jax.Array] = {}  # windows that show nothing
    with mesh_context(mesh):
      model = nnx.merge(*nnx.split(model))  # new module objects around the same arrays
      model.decoder = with_unstacked_blocks(model.decoder)
      self._graphdef, params = nnx.split(model)
      # A flat list: taking an nnx state apart at every token would cost more than the dispatch.
      self._weights, self._treedef = jax.tree.flatten(params)
    self._encode = jax.jit(self._encode_program)
    self._show = jax.jit(self._show_program, out_shardings=self._replicated)
    self._prefill = jax.jit(self._prefill_program, donate_argnames="cache")
    self._decode = jax.jit(self._decode_program, donate_argnames="cache")
    self._copy = jax.jit(self._copy_program, donate_argnames="cache")
    self._branch = jax.jit(self._branch_program, donate_argnames="cache")
    self._empty = jax.jit(self._empty_program)

  # Pure functions, traced once for each set of shapes.

  def _model(self, params):
    return nnx.merge(self._graphdef, self._treedef.unflatten(params))

  def _encode_program(self, params, pixels):
    n, side = pixels.shape[:2]
    self.compiled[f"encode {n}, {side}"] += 1
    model = self._model(params)
    model.config = model.config.at(side)
    visual = model.encode_images(pixels)
    return tuple(visual[i] for i in range(len(pixels)))

  def _show_program(self, window, image, index):
    """The window [L, D] with the visual tokens [T, D] where index [L] is one of theirs."""
    self.compiled[f"show {len(window)}, {len(image)}"] += 1
    own = (index >= 0) & (index < len(image))
    return jnp.where(own[:, None], image[jnp.where(own, index, 0)], window)

  def _prefill_program(self, params, tokens, is_visual, shown, row, start, last, seed, settings,
                       step, cache):
    self.compiled[f"prefill {len(tokens)}"] += 1
    model = self._model(params)
    spread = lambda x: jnp.broadcast_to(x, (self.together, *x.shape[1:]))
    text = model.decoder.embed(spread(tokens[None]))                             # [B, L, D]
    x = jnp.where(is_visual[:, None], shown.astype(text.dtype), text)
    of_row = lambda a: spread(jax.lax.dynamic_slice_in_dim(a, row, 1))
    x, read = extend(model.decoder, x, jnp.full(self.together, start),
                     jax.tree.map(of_row, cache))
    put = lambda a, new: jax.lax.dynamic_update_slice_in_dim(a, new[:1], row, 0)
    cache = jax.tree.map(put, cache, read)
    x = jax.lax.dynamic_slice_in_dim(x[:1], last, 1, axis=1)
    key = jax.random.key_data(jax.random.key(seed))
    own = self._draw(model, x, *(jnp.asarray(a)[None] for a in (key, *settings)))
    return jax.tree.map(lambda a, b: a.at[row].set(b[0]), step, own), cache

  def _decode_program(self, params, step, start, cache):
    self.compiled["decode"] += 1
    model = self._model(params)
    x, cache = extend(model.decoder, model.decoder.embed(step.token[:, None]), start, cache)
    return self._draw(model, x, step.key, step.temperature, step.top_p, step.top_k), cache

  def _draw(self, model, x, key, *settings):
    logits = model.decoder.logits(x)[:, 0]
    keys = jax.vmap(jax.random.split)(jax.random.wrap_key_data(key))              # [B, 2]
    token = sample(logits, keys[:, 1], *settings)
    return Step(token, logits, jax.random.key_data(keys[:, 0]), *settings)

  def _copy_program(self, source, target, cache):
    self.compiled["copy"] += 1
    copied = lambda a: jax.lax.dynamic_update_slice_in_dim(
        a, jax.lax.dynamic_slice_in_dim(a, source, 1), target, 0)
    return jax.tree.map(copied, cache)

  def _branch_program(self, step, parents, tokens, cache):
    self.compiled["branch"] += 1
    return (dataclasses.replace(step, token=tokens),
            jax.tree.map(lambda a: jnp.take(a, parents, axis=0), cache))

  def _empty_program(self):
    b, vocabulary = self.rows, self.config.decoder.vocab_size
    step = Step(jnp.zeros(b, jnp.int32), jnp.zeros((b, vocabulary)), jnp.zeros((b, 2), jnp.uint32),
                jnp.zeros(b), jnp.ones(b), jnp.zeros(b, jnp.int32))
    return step, empty_cache(self.config.decoder, b, self.slots, self._cache_dtype)

  @property
  def _params(self) -> list[jax.Array]:
    if self._weights is None:
      raise RuntimeError("the model is set aside: nothing can be computed with it until what uses "
                         "the devices has ended")
    return self._weights

  @property
  def is_aside(self) -> bool:
    """Whether the weights are not on the devices; see `set_aside`."""
    return self._weights is None

  @contextlib.contextmanager
  def set_aside(self) -> Iterator[None]:
    """While it lasts the weights wait in the host's memory, and nothing can be computed."""
    waiting, self._weights = to_host(self._params), None
    self._blanks.clear()
    try:
      yield
    finally:
      self._weights = to_devices(waiting)

  @property
  def model(self) -> MiniGemini:
    """The model around the arrays that the programs use.  Call it inside `mesh_context`."""
    return self._model(self._params)

  # What the engine calls.  Where a cache is given it is used up.

  def encode(self, pixels: np.ndarray) -> tuple[jax.Array, ...]:
    """uint8 [N, H, H, 3] -> N arrays of visual tokens [T, D], as `ModelConfig.at(H)` has them."""
    n = len(pixels)
    padding = max(power_of_two(n), self.together) - n
    pixels = np.concatenate([pixels, np.zeros((padding, *pixels.shape[1:]), np.uint8)])
    with mesh_context(self.mesh):
      return self._encode(self._params, pixels)[:n]

  def empty(self) -> tuple[Step, Cache]:
    """Nothing said, nothing read."""
    with mesh_context(self.mesh):
      return self._empty()

  def prefill(self, tokens: np.ndarray, visual_index: np.ndarray, images: Sequence[jax.Array],
              step: Step, cache: Cache, *, row: int, start: int, last: int,
              sampling: Sampling) -> tuple[Step, Cache]:
    """Reads a padded window [L] into the slots of a row from `start` on, and draws the token after
    its real position `last`.  visual_index counts through the images."""
    visual_index = np.asarray(visual_index, np.int32)
    shown = self._shown(visual_index, images)
    settings = (np.float32(sampling.temperature), np.float32(sampling.top_p),
                np.int32(sampling.top_k))
    with mesh_context(self.mesh):
      return self._prefill(
          self._params, *map(self._put, (np.asarray(tokens, np.int32), visual_index >= 0)), shown,
          *map(self._put, (np.int32(row), np.int32(start), np.int32(last),
                           np.uint32(sampling.seed), settings)), step, cache=cache)

  def decode(self, step: Step, start: np.ndarray, cache: Cache) -> tuple[Step, Cache]:
    """Reads the token of every row into its slot start [B], and draws the next."""
    with mesh_context(self.mesh):
      return self._decode(self._params, step, self._put(np.asarray(start, np.int32)), cache=cache)

  def copy(self, source: int, target: int, cache: Cache) -> Cache:
    """Row `target` becomes what row `source` is."""
    with mesh_context(self.mesh):
      return self._copy(*map(self._put, (np.int32(source), np.int32(target))), cache=cache)

  def branch(self, step: Step, parents: np.ndarray, tokens: np.ndarray,
             cache: Cache) -> tuple[Step, Cache]:
    """The first rows become what `parents` are, each with a token of its own to read next."""
    rest = np.arange(len(parents), self.rows)
    whole = lambda x, others: self._put(np.concatenate([x, others]).astype(np.int32))
    with mesh_context(self.mesh):
      return self._branch(step, whole(parents, rest), whole(tokens, 0 * rest), cache=cache)

  # Of a model made of ShapeDtypeStructs, to be compiled ahead of time.

  def lower_encode(self, pictures: int, side: int) -> jax.stages.Lowered:
    """Of so many pictures of that many pixels."""
    pixels = self._shape((pictures, side, side, 3), jnp.uint8)
    with mesh_context(self.mesh):
      return self._encode.lower(self._params, pixels)

  def lower_prefill(self, length: int) -> jax.stages.Lowered:
    """Of a prompt of that length."""
    number, window = self._shape((), jnp.int32), self._shape((length,), jnp.int32)
    is_visual = self._shape((length,), jnp.bool)
    shown = self._shape((length, self.config.decoder.width), self.dtype)
    settings = tuple(self._shape((), d) for d in (jnp.float32, jnp.float32, jnp.int32))
    step, cache = self.shapes()
    with mesh_context(self.mesh):
      return self._prefill.lower(self._params, window, is_visual, shown, number, number, number,
                                 self._shape((), jnp.uint32), settings, step, cache=cache)

  def lower_decode(self) -> jax.stages.Lowered:
    """Of one more token of every row."""
    step, cache = self.shapes()
    with mesh_context(self.mesh):
      return self._decode.lower(self._params, step, self._shape((self.rows,), jnp.int32),
                                cache=cache)

  def shapes(self) -> tuple[Step, Cache]:
    """ShapeDtypeStructs of what `empty` gives."""
    with mesh_context(self.mesh):
      step, cache = jax.eval_shape(self._empty_program)
    lay = lambda a: self._shape(a.shape, a.dtype, *cache_axes(a.ndim))
    return (jax.tree.map(lambda a: self._shape(a.shape, a.dtype), step), jax.tree.map(lay, cache))

  def _shape(self, dims, dtype, *axes):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(self.mesh, spec(*axes)))

  def _put(self, x):
    return jax.device_put(x, self._replicated)

  def _shown(self, visual_index: np.ndarray, images: Sequence[jax.Array]) -> jax.Array:
    """The visual tokens of a window: [L, D] for visual_index [L]."""
    length = len(visual_index)
    if length not in self._blanks:
      blank = jnp.zeros((length, self.config.decoder.width), self.dtype)
      self._blanks[length] = self._put(blank)
    shown, at = self._blanks[length], 0
    for image in images:
      own = visual_index - at
      if ((own >= 0) & (own < len(image))).any():
        with mesh_context(self.mesh):
          shown = self._show(shown, image, self._put(own))
      at += len(image)
    return shown

  @functools.cached_property
  def _replicated(self):
    return NamedSharding(self.mesh, P())


def power_of_two(n: int) -> int:
  """The least that is not below n; 0 for 0."""
  return 1 << (n - 1).bit_length() if n else 0
