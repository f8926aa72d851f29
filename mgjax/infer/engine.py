"""The engine turns ids and pictures into ids; it never sees text.

Every program is compiled once: `encode_images` for each number of pictures (rounded up to a power
of two), `prefill` for each bucket of lengths, `decode` once for streaming and once for each size of
batch cache.  Settings such as the temperature are arguments, not programs.
"""
from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mgjax.infer.cache import Cache, empty_cache, extend, rounded_slots, with_unstacked_blocks
from mgjax.infer.sampling import Sampling, sample
from mgjax.models.mini_gemini import MiniGemini
from mgjax.sharding import batch_shards, mesh_context, spec

# 768 holds one picture of 576 tokens and a question, 1536 two, 3072 an HD picture of 2880.
BUCKETS = (64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096)


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What is asked: `tokens` and `visual_index` int [N], as `data.tokenize.expand` makes them.

  `images` are the visual tokens [T, D] of each picture, from `Engine.encode_images`; visual_index
  counts through them: slot*T + t.  A picture kept between turns must be the same array again.
  """

  tokens: np.ndarray
  visual_index: np.ndarray
  images: tuple[jax.Array, ...] = ()

  def __post_init__(self):
    tokens, index = np.asarray(self.tokens, np.int32), np.asarray(self.visual_index, np.int32)
    if tokens.ndim != 1 or tokens.shape != index.shape or not tokens.size:
      raise ValueError(f"prompt: tokens have shape {tokens.shape} and visual_index {index.shape}; "
                       "expected one length for both, at least 1")
    object.__setattr__(self, "tokens", tokens)
    object.__setattr__(self, "visual_index", index)

  def __len__(self) -> int:
    return len(self.tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
  """One token a row, and what the next step needs; never donated, so it can be read late."""

  token: jax.Array   # int32 [B], drawn from
  logits: jax.Array  # float32 [B, V]
  slot: jax.Array    # int32: where the token will be written
  first: jax.Array   # int32 [B]: where each row begins
  rng: jax.Array


class Engine:
  """Generates with one model on one mesh.

  Args:
    model: a MiniGemini.  The engine copies the decoder's layers out of their stack; drop the model
      where memory is short.
    mesh: where the model lies.
    max_length: longest prompt and answer together, in tokens; cache slots of a session.
    buckets: lengths that prompts are padded to; those above max_length are left out.
    cache_dtype: of keys and values; the model's compute dtype if None.
  """

  def __init__(self, model: MiniGemini, *, mesh: Mesh, max_length: int,
               buckets: Sequence[int] = BUCKETS, cache_dtype=None):
    if max_length < 2:
      raise ValueError(f"engine: max_length is {max_length}, expected at least 2")
    self.config, self.mesh, self.max_length = model.config, mesh, max_length
    self.buckets = (*sorted(b for b in buckets if b < max_length), max_length)
    self.rows = batch_shards(mesh)  # fewest rows that the mesh can split
    self.compiled: collections.Counter[str] = collections.Counter()  # program -> times compiled
    self._cache_dtype = cache_dtype or model.dtype
    self._per_image = max(1, self.config.visual_tokens)  # a language model alone has none
    with mesh_context(mesh):
      model = nnx.merge(*nnx.split(model))  # new module objects around the same arrays
      model.decoder = with_unstacked_blocks(model.decoder)
      self._graphdef, params = nnx.split(model)
      # A flat list: taking an nnx state apart at every token would cost more than the dispatch.
      self._params, self._treedef = jax.tree.flatten(params)
      self._dtype = model.dtype
    self._encode = jax.jit(self._encode_program)
    self._prefill = jax.jit(self._prefill_program, donate_argnames="cache")
    self._decode = jax.jit(self._decode_program, donate_argnames="cache")
    self._empty = jax.jit(self._empty_program, static_argnames=("rows", "slots"))

  # Programs: pure functions, traced once for each set of shapes.

  def _model(self, params):
    return nnx.merge(self._graphdef, self._treedef.unflatten(params))

  def _encode_program(self, params, pixels):
    self.compiled[f"encode_images {len(pixels)}"] += 1
    visual = self._model(params).encode_images(pixels)
    return tuple(visual[i] for i in range(len(pixels)))

  def _prefill_program(self, params, tokens, visual_index, images, slot, first, last, seed,
                       settings, cache):
    rows, length = tokens.shape
    self.compiled[f"prefill {rows}x{length}, {len(images) // rows} images, "
                  f"{cache.slots} slots"] += 1
    model = self._model(params)
    visual = jnp.stack(images).reshape(rows, -1, self.config.decoder.width)  # [B, slots*T, D]
    x = model.place(tokens, visual_index, visual)
    x, cache = extend(model.decoder, x, slot, first, cache)
    x = jax.lax.dynamic_slice_in_dim(x, last, 1, axis=1)
    step = self._draw(model, x, slot + last + 1, first, jax.random.key(seed), settings)
    return step, cache

  def _decode_program(self, params, step, settings, cache):
    self.compiled[f"decode {len(step.token)}, {cache.slots} slots"] += 1
    model = self._model(params)
    x = model.decoder.embed(step.token[:, None])
    x, cache = extend(model.decoder, x, step.slot, step.first, cache)
    return self._draw(model, x, step.slot + 1, step.first, step.rng, settings), cache

  def _draw(self, model, x, slot, first, rng, settings):
    logits = model.decoder.logits(x)[:, 0]
    rng, now = jax.random.split(rng)
    return Step(sample(logits, now, **settings), logits, slot, first, rng)

  def _empty_program(self, rows, slots):
    return empty_cache(self.config.decoder, rows, slots, self._cache_dtype)

  # What callers use.

  def encode_images(self, pixels: np.ndarray) -> tuple[jax.Array, ...]:
    """uint8 [N, H, H, 3] -> N arrays of visual tokens [T, D]; ValueError for another shape."""
    if self.config.vision is None:
      raise ValueError("this is a language model alone: it cannot see pictures")
    side = self.config.hr_size
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (side, side, 3):
      raise ValueError(f"images are {pixels.dtype} {pixels.shape}, expected uint8 "
                       f"[N, {side}, {side}, 3]; `data.images.load_image` makes them")
    n = len(pixels)
    if not n:
      return ()
    padding = max(_power_of_two(n), self.rows) - n
    pixels = np.concatenate([pixels, np.zeros((padding, side, side, 3), np.uint8)])
    with mesh_context(self.mesh):
      return self._encode(self._params, pixels)[:n]

  def empty_cache(self, rows: int, slots: int) -> Cache:
    """A new cache with at least that many slots."""
    with mesh_context(self.mesh):
      return self._empty(rows=rows, slots=rounded_slots(slots))

  def prefill(self, tokens: np.ndarray, visual_index: np.ndarray,
              images: Sequence[Sequence[jax.Array]], cache: Cache, *, slot: int, first: np.ndarray,
              last: int, sampling: Sampling) -> tuple[Step, Cache]:
    """Reads a padded window and draws the token after it.  The cache given is used up.

    tokens, visual_index [B, L] for the slots slot .. slot+L-1; `images` of each row; `first` [B]
    where rows begin; `last` is the real position of the window that the next token follows.
    """
    slots = _power_of_two(max(1, *map(len, images)))
    images = tuple(x for row in images for x in (*row, *[self._blank] * (slots - len(row))))
    scalar = lambda x: self._put(np.int32(x))
    with mesh_context(self.mesh):
      return self._prefill(
          self._params, self._put(np.asarray(tokens, np.int32)),
          self._put(np.asarray(visual_index, np.int32)), images, scalar(slot),
          self._put(np.asarray(first, np.int32)), scalar(last), self._put(np.uint32(sampling.seed)),
          self.settings(sampling), cache)

  def decode(self, step: Step, settings: dict[str, jax.Array],
             cache: Cache) -> tuple[Step, Cache]:
    """Reads the token of `step` and draws the next.  The cache given is used up."""
    with mesh_context(self.mesh):
      return self._decode(self._params, step, settings, cache)

  # Programs of an engine whose model is made of ShapeDtypeStructs, to be compiled ahead of time.

  def lower_prefill(self, rows: int, length: int) -> jax.stages.Lowered:
    """Of prompts with a picture each, read into an empty cache of just their length."""
    number, row = self._shape((), jnp.int32), self._shape((rows,), jnp.int32)
    window = self._shape((rows, length), jnp.int32)
    image = self._shape((self._per_image, self.config.decoder.width), self._dtype)
    with mesh_context(self.mesh):
      return self._prefill.lower(
          self._params, window, window, (image,) * rows, number, row, number,
          self._shape((), jnp.uint32), self._settings_shapes(),
          cache=self._cache_shapes(rows, length))

  def lower_decode(self, rows: int, slots: int) -> jax.stages.Lowered:
    """Of one more token a row, with a cache of that many slots."""
    number, row = self._shape((), jnp.int32), self._shape((rows,), jnp.int32)
    logits = self._shape((rows, self.config.decoder.vocab_size), jnp.float32)
    rng = self._shape((), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    with mesh_context(self.mesh):
      return self._decode.lower(self._params, Step(row, logits, number, row, rng),
                                self._settings_shapes(), cache=self._cache_shapes(rows, slots))

  def _shape(self, dims, dtype, *axes):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(self.mesh, spec(*axes)))

  def _settings_shapes(self):
    return dict(temperature=self._shape((), jnp.float32), top_p=self._shape((), jnp.float32),
                top_k=self._shape((), jnp.int32))

  def _cache_shapes(self, rows, slots):
    lay = lambda a: self._shape(a.shape, a.dtype, "batch", "act_heads", None, None)
    with mesh_context(self.mesh):
      return jax.tree.map(lay, jax.eval_shape(
          lambda: self._empty_program(rows, rounded_slots(slots))))

  def settings(self, sampling: Sampling) -> dict[str, jax.Array]:
    """The arguments of `sample` on the device."""
    return dict(temperature=self._put(np.float32(sampling.temperature)),
                top_p=self._put(np.float32(sampling.top_p)),
                top_k=self._put(np.int32(sampling.top_k)))

  def session(self) -> Session:
    """A conversation of its own; see `Session`."""
    return Session(self)

  def generate(self, prompt: Prompt, sampling: Sampling) -> Iterator[int]:
    """The answer to one prompt, id by id; see `Session.generate`."""
    return self.session().generate(prompt, sampling)

  def generate_batch(self, prompts: Sequence[Prompt], sampling: Sampling,
                     rows: int = 8) -> list[list[int]]:
    """Answers to many prompts, in their order, `rows` at a time.

    Each answer ends with the stop id that it met, if it met one.  ValueError as in `generate`,
    before anything is computed.
    """
    for i, prompt in enumerate(prompts):
      self.check_length(prompt, sampling, f"prompt {i}")
    rows = -(-rows // self.rows) * self.rows
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together
    for at in range(0, len(order), rows):
      group = order[at:at + rows]
      self._answer_group([prompts[i] for i in group], [answers[i] for i in group], rows, sampling)
    return answers

  def _answer_group(self, prompts, answers, rows, sampling):
    # Rows end together, so that the whole batch writes one slot: short prompts are padded in front.
    length = self.bucket(max(map(len, prompts)))
    padded = [*prompts, *[prompts[0]] * (rows - len(prompts))]
    front = np.array([length - len(p) for p in padded])
    tokens = np.stack([np.pad(p.tokens, (f, 0)) for p, f in zip(padded, front)])
    index = np.stack([np.pad(p.visual_index, (f, 0), constant_values=-1)
                      for p, f in zip(padded, front)])
    cache = self.empty_cache(rows, length + sampling.max_new_tokens)
    step, cache = self.prefill(tokens, index, [p.images for p in padded], cache, slot=0,
                               first=front, last=length - 1, sampling=sampling)
    settings, unfinished = self.settings(sampling), set(range(len(prompts)))
    for n in range(sampling.max_new_tokens):
      now = step.token
      if n + 1 < sampling.max_new_tokens:  # the device goes on while the host reads
        step, cache = self.decode(step, settings, cache)
      # Rows that ended go on being computed; what they say is not kept.
      for row, token in enumerate(np.asarray(now)[:len(prompts)]):
        if row in unfinished:
          answers[row].append(int(token))
          if token in sampling.stop_ids:
            unfinished.remove(row)
      if not unfinished:
        return

  def bucket(self, length: int) -> int:
    """The length that `length` positions are padded to."""
    return next(b for b in self.buckets if b >= length)

  def room(self, prompt: Prompt) -> int:
    """How many new tokens fit behind the prompt; 0 or less: none."""
    return self.max_length - len(prompt)

  def check_length(self, prompt: Prompt, sampling: Sampling, name: str = "prompt") -> None:
    """ValueError unless prompt and answer fit: nothing is ever cut silently."""
    if sampling.max_new_tokens > (room := self.room(prompt)):
      fewer = f", or lower max_new_tokens to {room}" if room > 0 else ""
      raise ValueError(
          f"{name}: {len(prompt)} tokens and up to {sampling.max_new_tokens} new ones make "
          f"{len(prompt) + sampling.max_new_tokens}, but max_length is {self.max_length}; shorten "
          f"the prompt or start a new conversation{fewer}")
    needed = prompt.visual_index.max(initial=-1) // self._per_image + 1
    if needed > len(prompt.images):
      raise ValueError(f"{name}: it refers to {needed} images, but {len(prompt.images)} were given")

  def _put(self, x):
    return jax.device_put(x, self._replicated)

  @functools.cached_property
  def _blank(self):  # where a row has fewer pictures than others
    with mesh_context(self.mesh):
      return jnp.zeros((self._per_image, self.config.decoder.width), self._dtype)

  @functools.cached_property
  def _replicated(self):
    return NamedSharding(self.mesh, P())


class Session:
  """One conversation.  What a new prompt has in common with what was read before is not read again.

  Prompts are compared id by id from the start, so a history that tokenises differently the second
  time is read again from there on, and nothing else has to be known about it.
  """

  def __init__(self, engine: Engine):
    self._engine = engine
    self._cache: Cache | None = None
    self._tokens: list[int] = []  # ids in the cache; likewise their visual_index
    self._visual_index: list[int] = []
    self._images: tuple[jax.Array, ...] = ()
    self.reused = 0  # positions that the last prompt did not have to read

  def generate(self, prompt: Prompt, sampling: Sampling) -> Iterator[int]:
    """The answer, id by id as each is known; a stop id, if one is met, is the last.

    Closing the iterator stops the answer.  Raises ValueError at the call if prompt and answer do
    not fit into max_length.
    """
    self._engine.check_length(prompt, sampling)
    return self._generate(prompt, sampling)

  def _generate(self, prompt, sampling):
    step, cache = self._read(prompt, sampling)
    settings = self._engine.settings(sampling)
    for n in range(sampling.max_new_tokens):
      now, fed = step.token, n + 1 < sampling.max_new_tokens
      if fed:  # the device goes on while the host reads
        self._cache = None
        step, cache = self._engine.decode(step, settings, cache)
      self._cache = cache
      token = int(np.asarray(now)[0])
      if fed:
        self._tokens.append(token)
        self._visual_index.append(-1)
      yield token
      if token in sampling.stop_ids:
        return

  def _read(self, prompt, sampling):
    """Prefills what the cache does not hold yet."""
    engine = self._engine
    # While a program runs, the cache belongs to it: an interrupt leaves None here, not rubbish.
    cache, self._cache = self._cache, None
    if cache is None:
      cache = engine.empty_cache(engine.rows, engine.max_length)
      self._tokens, self._visual_index = [], []
    # The last position is always read: the next token is drawn from it.
    self.reused = min(self._common(prompt), len(prompt) - 1)
    length = engine.bucket(len(prompt) - self.reused)
    # Near the end of the cache the padded window would stick out; then it starts earlier.
    start = min(self.reused, cache.slots - length)
    window = slice(start, start + length)
    pad = length - len(prompt.tokens[window])
    tokens = np.pad(prompt.tokens[window], (0, pad))
    index = np.pad(prompt.visual_index[window], (0, pad), constant_values=-1)
    rows = engine.rows
    step, cache = engine.prefill(
        np.tile(tokens, (rows, 1)), np.tile(index, (rows, 1)), [prompt.images] * rows, cache,
        slot=start, first=np.zeros(rows), last=len(prompt) - 1 - start, sampling=sampling)
    self._tokens, self._visual_index = prompt.tokens.tolist(), prompt.visual_index.tolist()
    self._images = prompt.images
    return step, cache

  def _common(self, prompt) -> int:
    """Positions from the start that are the same in the cache and in the prompt."""
    n = min(len(self._tokens), len(prompt))
    index = prompt.visual_index[:n]
    same = (np.array(self._visual_index[:n], int) == index)
    same &= (np.array(self._tokens[:n], int) == prompt.tokens[:n]) | (index >= 0)
    for slot, (old, new) in enumerate(zip(self._images, prompt.images)):
      if old is not new:
        same &= index // self._engine._per_image != slot
    return n if same.all() else int(same.argmin())


def _power_of_two(n: int) -> int:
  return 1 << (n - 1).bit_length()
