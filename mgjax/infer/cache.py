"""Keys and values of what was read so far, and how the decoder reads on behind them.

Layers are not stacked here as they are in training: a scan copies each layer's weights and cache
out of the stack, and one token's worth of work does not pay for that.
"""
from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mgjax.config import DecoderConfig
from mgjax.models.decoder import Decoder
from mgjax.sharding import constrain

BLOCK = 128  # slots that attention reads at a time
CACHE_DTYPES = ("float32", "bfloat16", "int8")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """k, v: one array [B, K, S, h] a layer.  A row holds one conversation, from its slot 0 on.

  Where they are int8, k_scale and v_scale are what to multiply them by, float32 [B, K, S] a layer.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  k_scale: tuple[jax.Array, ...] = ()
  v_scale: tuple[jax.Array, ...] = ()

  @property
  def slots(self) -> int:
    """S: positions that fit."""
    return self.k[0].shape[2]


def rounded_slots(n: int) -> int:
  """The least number of slots that holds n positions and that attention can read in blocks."""
  return -(-n // BLOCK) * BLOCK


def empty_cache(config: DecoderConfig, rows: int, slots: int, dtype) -> Cache:
  """A cache of zeros; `slots` must be a multiple of BLOCK.  To be traced inside a mesh."""
  shape = rows, config.kv_heads, slots, config.head_dim
  zeros = lambda shape, dtype: tuple(
      _laid_out(jnp.zeros(shape, dtype)) for _ in range(config.depth))
  scales = lambda: zeros(shape[:3], jnp.float32) if dtype == jnp.int8 else ()
  return Cache(zeros(shape, dtype), zeros(shape, dtype), scales(), scales())


def check_cache_dtype(dtype) -> jnp.dtype:
  """A dtype or its name as a dtype; ValueError unless it is one of CACHE_DTYPES."""
  name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
  if name not in CACHE_DTYPES:
    raise ValueError(f"cache_dtype: {name!r} does not exist; one of {', '.join(CACHE_DTYPES)}")
  return jnp.dtype(name)


def _laid_out(x):
  return constrain(x, *cache_axes(x.ndim))


def cache_axes(dims: int) -> tuple[str | None, ...]:
  """Logical names of the dimensions of an array of a cache."""
  return ("batch", "act_heads", None, None)[:dims]


def with_unstacked_blocks(decoder: Decoder) -> Decoder:
  """The same decoder with `blocks` as a list of layers, as `extend` reads it.

  The layers are copied out of the stack; everything else is shared with the decoder given, which
  stays as it is.  A decoder of ShapeDtypeStructs gives one of ShapeDtypeStructs; one whose layers
  are a list is given back.
  """
  if isinstance(decoder.blocks, nnx.List):
    return decoder
  graphdef, state = nnx.split(decoder.blocks)
  depth = decoder.config.depth
  if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state)):
    layers = [jax.tree.map(_layer_shape, state) for _ in range(depth)]  # or they would be shared
  else:
    layer_of = lambda stack, i: jax.tree.map(lambda a: a[i], stack)
    layers = jax.jit(lambda stack: [layer_of(stack, i) for i in range(depth)])(state)
  decoder = nnx.merge(*nnx.split(decoder))  # new module objects around the same arrays
  decoder.blocks = nnx.List([nnx.merge(graphdef, layer) for layer in layers])
  return decoder


def _layer_shape(stack: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  mesh, spec = stack.sharding.mesh, stack.sharding.spec
  return jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype,
                              sharding=NamedSharding(mesh, P(*spec[1:])))


@jax.named_scope("decoder")
def extend(decoder: Decoder, x: jax.Array, start: jax.Array, cache: Cache) -> tuple[jax.Array,
                                                                                    Cache]:
  """Reads L more positions of every row: a prompt, a new turn, or one token.

  Args:
    decoder: from `with_unstacked_blocks`.
    x: embeddings [B, L, D].
    start: int [B]; the x of a row goes to its slots start .. start+L-1, which must exist.  A slot
      sees those of its row up to itself; what later slots hold does not matter, so padding may
      follow the real positions.
    cache: what was read before.

  Returns: final hidden states [B, L, D] and the cache.
  """
  positions = start[:, None] + jnp.arange(x.shape[1])                           # [B, L]
  x, window = decoder.enter(x), decoder.config.sliding_window
  layers = []
  for i, block in enumerate(decoder.blocks):
    q, k, v = block.qkv(x, positions)
    k, k_scale = _written(cache.k[i], cache.k_scale[i:i + 1], k, start)
    v, v_scale = _written(cache.v[i], cache.v_scale[i:i + 1], v, start)
    layers.append((k, v, k_scale, v_scale))
    x, _ = block.finish(x, cached_attention(q, k, v, start, window, *k_scale, *v_scale))
  k, v, k_scale, v_scale = zip(*layers)
  return decoder.norm(x), Cache(k, v, sum(k_scale, ()), sum(v_scale, ()))


def _written(cached: jax.Array, scale: tuple[jax.Array, ...], new: jax.Array,
             start: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """cached [B, K, S, h] with new [B, L, K, h] in the slots of each row from start [B] on; and, if
  it is int8, the one scale [B, K, S]."""
  if not scale:
    return _put(cached, new, start), ()
  new, new_scale = quantized_vectors(new)
  return _put(cached, new, start), (_put(scale[0], new_scale, start),)


def _put(cached: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
  """cached [B, K, S, ...] with new [B, L, K, ...] in the slots of each row from start [B] on."""
  new = new.astype(cached.dtype)
  if new.shape[1] == 1 and cached.dtype == jnp.int8:
    return _laid_out(_set_in_tiles(cached, new[:, 0], start))
  if new.shape[1] == 1:
    return _laid_out(cached.at[jnp.arange(len(start)), :, start].set(new[:, 0]))
  write = lambda row, n, at: jax.lax.dynamic_update_slice(row, n, (0, at, 0)[:row.ndim])
  return _laid_out(jax.vmap(write)(cached, new.swapaxes(1, 2), start))


def _set_in_tiles(cached, new, start):
  """cached [B, K, S, h] with new [B, K, h] in the slot start [B] of each row.

  32 slots are written at a time, the tile of int8 on a TPU: to write one of them, the compiler
  copies all of the cache into smaller tiles and back.
  """
  b, k, s, h = cached.shape
  tiles, rows, (tile, slot) = cached.reshape(b, k, s // 32, 32, h), jnp.arange(b), divmod(start, 32)
  here = (jnp.arange(32) == slot[:, None])[:, None, :, None]                    # [B, 1, 32, 1]
  changed = jnp.where(here, new[:, :, None], tiles[rows, :, tile])
  return tiles.at[rows, :, tile].set(changed).reshape(cached.shape)


def quantized_vectors(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x [..., h] -> int8 [..., h], and what to multiply each vector by, float32 [...]."""
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=-1) / 127
  return jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None]).astype(jnp.int8), scale


@jax.named_scope("attention")
def cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array,
                     window: int | None = None, k_scale: jax.Array | None = None,
                     v_scale: jax.Array | None = None) -> jax.Array:
  """Softmax attention over the filled part of a cache; logits and softmax in float32.

  q [B, L, H, h] at the slots of each row from start [B] on; k, v [B, K, S, h] with S a multiple of
  BLOCK; window: how many slots a query sees, its own included; k_scale, v_scale float32 [B, K, S]:
  what to multiply k and v by, if they are int8.  Returns [B, L, H, h] in the dtype of q.

  Blocks of slots are read up to the last query of the longest row, and each rescales what the
  earlier ones gave; for a row that ended before, a block changes nothing, to the last bit.  Time
  follows what was read, not S, and one program serves every length.
  """
  b, l, heads, h = q.shape
  groups, n = k.shape[1], heads // k.shape[1]
  rows = lambda x: x.reshape(b, l, groups, n, h).transpose(0, 2, 1, 3, 4).reshape(
      b, groups, l * n, h)
  q_rows = rows(q * (h**-0.5))
  q_slots = start[:, None] + jnp.repeat(jnp.arange(l), n)                       # [B, L*n]
  lowest = jnp.finfo(jnp.float32).min

  block = lambda a, i: jax.lax.dynamic_slice_in_dim(a, i * BLOCK, BLOCK, axis=2)

  def read(i, carry):
    peak, total, out = carry
    kb, vb = block(k, i), block(v, i)
    slots = i * BLOCK + jnp.arange(BLOCK)
    seen = slots <= q_slots[..., None]                                          # [B, L*n, BLOCK]
    if window is not None:
      seen &= slots > q_slots[..., None] - window
    logits = jnp.einsum("bkqh,bksh->bkqs", q_rows, kb.astype(q.dtype),
                        preferred_element_type=jnp.float32)
    if k_scale is not None:
      logits *= block(k_scale, i)[:, :, None]                                   # [B, K, 1, BLOCK]
    logits = jnp.where(seen[:, None], logits, lowest)
    new_peak = jnp.maximum(peak, logits.max(-1, keepdims=True))
    # While nothing was seen (a window begins later), peak is `lowest` and the sums are rubbish;
    # the first slot seen scales them by exp(lowest - peak) = 0.
    weights, keep = jnp.exp(logits - new_peak), jnp.exp(peak - new_peak)
    scaled = weights if v_scale is None else weights * block(v_scale, i)[:, :, None]
    got = jnp.einsum("bkqs,bksh->bkqh", scaled.astype(q.dtype), vb.astype(q.dtype),
                     preferred_element_type=jnp.float32)
    return new_peak, total * keep + weights.sum(-1, keepdims=True), out * keep + got

  full = lambda width, value: jnp.full((b, groups, l * n, width), value, jnp.float32)
  blocks = (jnp.max(start) + l - 1) // BLOCK + 1
  _, total, out = jax.lax.fori_loop(
      0, blocks, read, (full(1, lowest), full(1, 0.0), full(h, 0.0)))
  out = (out / total).astype(q.dtype).reshape(b, groups, l, n, h)
  return out.transpose(0, 2, 1, 3, 4).reshape(b, l, heads, h)
