"""The engine turns ids and pictures into ids; it never sees text.

Many answers grow at once, each in a row of one cache: a step reads one more token of every row, and
a row whose answer has ended takes the next prompt while the others go on (continuous batching).
What a prompt has in common with what a row holds is not read again, so the next turn of a
conversation reads only what is new, and many questions about one picture read it once.
"""
from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from mgjax.infer.aside import to_devices, to_host
from mgjax.infer.cache import Cache
from mgjax.infer.programs import Programs, Step
from mgjax.infer.sampling import Sampling
from mgjax.models.mini_gemini import MiniGemini

# 768 holds one picture of 576 tokens and a question.  Prompts are read in windows of these lengths,
# one or several of together A_STEP positions a step: no answer waits longer for its next token.
BUCKETS = (64, 128, 256, 512, 768, 1024)
A_STEP = BUCKETS[-1]
WORTH_COPYING = 32  # positions more than a free row has, for which another row is copied


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What is asked: `tokens` and `visual_index` int [N], as `data.tokenize.expand` makes them.

  `images` are the visual tokens [T, D] of each picture, from `Engine.encode_images`; visual_index
  counts through all of them.  A picture is known again only if it is the same array.
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


@dataclasses.dataclass(eq=False)
class Answer:
  """An answer that grows: `tokens` so far; a stop id, if one is met, is the last.

  ended: None while it grows, then "stop" (a stop id), "length" (max_new_tokens), "cancelled", or
    "failed" (a program was interrupted, or out of memory).
  reused: positions of the prompt that did not have to be read; None before it is begun.
  """

  prompt: Prompt
  sampling: Sampling
  tokens: list[int] = dataclasses.field(default_factory=list)
  ended: str | None = None
  reused: int | None = None


@dataclasses.dataclass(eq=False)
class _Row:
  """A row of the cache: what it holds, and whose answer grows in it."""

  number: int
  prompt: Prompt | None = None          # whose first `read` positions are in the cache
  read: int = 0
  answer: Answer | None = None
  fed: int = 0                          # tokens of the answer that are in the cache behind them
  used: int = 0                         # when an answer last began here

  @property
  def grows(self) -> bool:
    return self.answer is not None and self.answer.ended is None

  @property
  def length(self) -> int:
    """The slot that is written next."""
    return self.read + self.fed

  def common(self, prompt: Prompt) -> int:
    """Positions from the start that are the same here and in the prompt."""
    if self.prompt is None:
      return 0
    said = self.answer.tokens[:self.fed] if self.answer else []
    own_tokens = np.append(self.prompt.tokens[:self.read], said).astype(np.int32)
    own_index = np.append(self.prompt.visual_index[:self.read], np.full(len(said), -1))
    n = min(len(own_tokens), len(prompt))
    index = prompt.visual_index[:n]
    same = own_index[:n] == index
    same &= (own_tokens[:n] == prompt.tokens[:n]) | (index >= 0)
    at = 0
    for old, new in zip(self.prompt.images, prompt.images):
      if old is not new:  # from here on the index counts through other pictures
        break
      at += len(new)
    same &= index < at
    return n if same.all() else int(same.argmin())


class Engine:
  """Generates with one model on one mesh.

  Args:
    model: a MiniGemini, or one that `quantize.quantize` has changed.  The engine copies the
      decoder's layers out of their stack; drop the model where memory is short.
    mesh: where the model lies.
    max_length: longest prompt and answer together, in tokens; slots of a row of the cache.
    rows: answers that grow at once.
    buckets: lengths of the windows in which prompts are read.
    cache_dtype: of keys and values, a dtype or its name, one of `cache.CACHE_DTYPES`; the model's
      compute dtype if None.  int8 has a scale for each position and head.
  """

  def __init__(self, model: MiniGemini, *, mesh: Mesh, max_length: int, rows: int = 1,
               buckets: Sequence[int] = BUCKETS, cache_dtype=None):
    if max_length < 2 or rows < 1:
      raise ValueError(f"engine: max_length is {max_length} and rows {rows}, expected at least 2 "
                       "and 1")
    self.config, self.mesh, self.max_length = model.config, mesh, max_length
    self.buckets = tuple(sorted(b for b in buckets if b < max_length)) or (max_length,)
    self.programs = Programs(model, mesh, rows, max_length, cache_dtype)
    self._waiting: collections.deque[Answer] = collections.deque()
    self._clock = 0  # counts answers
    self._forget()

  @property
  def rows(self) -> int:
    """Answers that can grow at once."""
    return len(self._rows)

  @property
  def growing(self) -> int:
    """Answers that do."""
    return sum(row.grows for row in self._rows)

  @property
  def waiting(self) -> int:
    """Prompts that no row is free for."""
    return len(self._waiting)

  @property
  def picture_sides(self) -> tuple[int, ...]:
    """Sides of the pictures that can be seen: an HD model sees standard ones too."""
    return tuple(sorted({self.config.hr_size // self.config.grid, self.config.hr_size}))

  @property
  def pictures_together(self) -> int:
    """As many pictures take no longer to encode than one: they are shared by the devices."""
    return self.programs.together

  @property
  def is_aside(self) -> bool:
    """Whether weights and cache are not on the devices; see `set_aside`."""
    return self.programs.is_aside

  @contextlib.contextmanager
  def set_aside(self) -> Iterator[None]:
    """While it lasts weights and cache wait in the host's memory, so that another model can have
    the devices.  Afterwards all is as it was, to the last bit: answers that were growing go on, and
    what was read is still known.

    Visual tokens stay on the devices.  RuntimeError if something is to be computed meanwhile.
    """
    with self.programs.set_aside():
      waiting = to_host((self._step, self._cache, self._flying))
      self._step = self._cache = self._flying = None
      try:
        yield
      finally:
        try:
          self._step, self._cache, self._flying = to_devices(waiting)
        except BaseException:
          self._fail()
          raise

  def encode_images(self, pixels: np.ndarray) -> tuple[jax.Array, ...]:
    """uint8 [N, H, H, 3], H one of `picture_sides`, -> N arrays of visual tokens [T, D].

    ValueError for another shape.
    """
    if self.config.vision is None:
      raise ValueError("this is a language model alone: it cannot see pictures")
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.shape[1:] not in [(s, s, 3) for s in self.picture_sides]:
      expected = " or ".join(f"[N, {s}, {s}, 3]" for s in self.picture_sides)
      raise ValueError(f"images are {pixels.dtype} {pixels.shape}, expected uint8 {expected}; "
                       "`data.images.load_image` makes them")
    return self.programs.encode(pixels) if len(pixels) else ()

  # Answers.

  def submit(self, prompt: Prompt, sampling: Sampling) -> Answer:
    """An answer that `step` makes grow, once a row is free.  ValueError as in `check`."""
    self.check(prompt, sampling)
    answer = Answer(prompt, sampling)
    self._waiting.append(answer)
    return answer

  def cancel(self, answer: Answer) -> None:
    """It grows no more, and its row is free at once; nothing if it has ended."""
    if answer.ended is None:
      answer.ended = "cancelled"
    if answer in self._waiting:
      self._waiting.remove(answer)

  def step(self) -> bool:
    """Every answer that grows gets a token, and prompts are read on; False if nothing was to do.

    The tokens given are those of the step before: the device goes on while the host reads them.
    """
    if self.is_aside:  # the answers must not fail for it
      raise RuntimeError("the engine is set aside: no answer grows until what uses the devices has "
                         "ended")
    try:
      flying = self._advance()
      landed, self._flying = self._flying, flying
      tokens = None if landed is None else np.asarray(landed[0])
    except BaseException:  # what ran took the cache along
      self._fail()
      raise
    if landed is not None:
      for token, answer in zip(tokens, landed[1]):
        if answer is not None and answer.ended is None:
          self._give(answer, int(token))
    return landed is not None or flying is not None or bool(self.growing or self.waiting)

  def generate(self, prompt: Prompt, sampling: Sampling) -> Iterator[int]:
    """The answer to one prompt, id by id as each is known; a stop id, if one is met, is the last.

    Closing the iterator cancels the answer.  ValueError as in `check`, at the call.
    """
    self.check(prompt, sampling)
    return self._generate(prompt, sampling)

  def _generate(self, prompt, sampling):
    answer, given = self.submit(prompt, sampling), 0
    try:
      while answer.ended is None or given < len(answer.tokens):
        if given < len(answer.tokens):
          given += 1
          yield answer.tokens[given - 1]
        else:
          self.step()
    finally:
      self.cancel(answer)

  def generate_batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[int]]:
    """Answers to many prompts, in their order.

    ValueError as in `check`, naming the prompt, before anything is computed.
    """
    for i, prompt in enumerate(prompts):
      self.check(prompt, sampling, f"prompt {i}")
    answers = [self.submit(prompt, sampling) for prompt in prompts]
    try:
      while any(answer.ended is None for answer in answers):
        self.step()
    finally:
      for answer in answers:
        self.cancel(answer)
    return [answer.tokens for answer in answers]

  def read_alone(self, prompt: Prompt, sampling: Sampling) -> tuple[Step, Cache, int]:
    """Reads a prompt; what was drawn after it, the cache, which is the caller's from here on, and
    the row that holds it.  ValueError as in `check`, or if answers are growing."""
    self.check(prompt, sampling)
    if self.growing or self.waiting:
      raise ValueError(f"{self.growing + self.waiting} answers are growing; wait for them first")
    answer = self.submit(prompt, sampling)
    row = None
    while row is None or row.read < len(prompt):
      self._advance()
      row = next(r for r in self._rows if r.answer is answer)
    taken = self._step, self._cache, row.number
    self._forget()
    return taken

  def room(self, prompt: Prompt) -> int:
    """How many new tokens fit behind the prompt; 0 or less: none."""
    return self.max_length - len(prompt)

  def check(self, prompt: Prompt, sampling: Sampling, name: str = "prompt") -> None:
    """ValueError unless prompt and answer fit: nothing is ever cut silently."""
    self.check_length(len(prompt), sampling, name)
    needed, there = int(prompt.visual_index.max(initial=-1)) + 1, sum(map(len, prompt.images))
    if needed > there:
      raise ValueError(f"{name}: it refers to {needed} visual tokens, but its {len(prompt.images)} "
                       f"images have {there}")

  def check_length(self, length: int, sampling: Sampling, name: str = "prompt") -> None:
    """ValueError unless a prompt of that length and its answer fit."""
    if sampling.max_new_tokens > (room := self.max_length - length):
      fewer = f", or lower max_new_tokens to {room}" if room > 0 else ""
      raise ValueError(
          f"{name}: {length} tokens and up to {sampling.max_new_tokens} new ones make "
          f"{length + sampling.max_new_tokens}, but max_length is {self.max_length}; shorten "
          f"the prompt or start a new conversation{fewer}")

  def bucket(self, length: int) -> int:
    """The window in which that many positions, or the first of them, are read."""
    return next((b for b in self.buckets if b >= length), self.buckets[-1])

  # How a step goes.

  def _advance(self):
    """Decodes, and reads on; what was drawn, and the answer of each row that it is for."""
    answers: list[Answer | None] = [None] * self.rows
    decoding = [row for row in self._rows if row.grows and row.read == len(row.answer.prompt)
                and row.fed + 1 < row.answer.sampling.max_new_tokens]
    if decoding:
      starts = np.array([row.length for row in self._rows])
      cache, self._cache = self._cache, None
      self._step, self._cache = self.programs.decode(self._step, starts, cache)
      for row in decoding:
        row.fed += 1
        answers[row.number] = row.answer
    room, unread = max(A_STEP, self.buckets[-1]), lambda row: len(row.answer.prompt) - row.read
    while reading := next((r for r in self._rows if r.grows and unread(r)), None) or self._begin():
      if (length := self.bucket(unread(reading))) > room:
        break
      room -= length
      if self._read(reading):
        answers[reading.number] = reading.answer
    return (self._step.token, answers) if any(answers) else None

  def _begin(self) -> _Row | None:
    """The row that the next prompt gets, with what it has in common with it."""
    free = [row for row in self._rows if not row.grows]
    if not free or not self._waiting:
      return None
    answer = self._waiting.popleft()
    common = {row.number: row.common(answer.prompt) for row in self._rows}
    # Where nothing is in common, what was used longest ago is given up.
    target = source = max(free, key=lambda row: (common[row.number], -row.used))
    busy = max(self._rows, key=lambda row: common[row.number])
    if common[busy.number] >= common[target.number] + WORTH_COPYING:
      source, target = busy, min(free, key=lambda row: row.used)
      cache, self._cache = self._cache, None
      self._cache = self.programs.copy(source.number, target.number, cache)
    self._clock += 1
    # The last position is always read: the first token is drawn from it.
    answer.reused = min(common[source.number], len(answer.prompt) - 1)
    target.prompt, target.answer, target.used = answer.prompt, answer, self._clock
    target.read, target.fed = answer.reused, 0
    return target

  def _read(self, row: _Row) -> bool:
    """Reads the next window of a row's prompt; whether that was the last."""
    if self._cache is None:
      self._step, self._cache = self.programs.empty()
    prompt = row.answer.prompt
    length = self.bucket(len(prompt) - row.read)
    # Near the end of the cache the padded window would stick out; then it starts earlier.
    start = min(row.read, self.programs.slots - length)
    window = slice(start, start + length)
    real = len(prompt.tokens[window])
    pad = lambda x, fill: np.pad(x[window], (0, length - real), constant_values=fill)
    cache, self._cache = self._cache, None
    self._step, self._cache = self.programs.prefill(
        pad(prompt.tokens, 0), pad(prompt.visual_index, -1), prompt.images, self._step, cache,
        row=row.number, start=start, last=real - 1, sampling=row.answer.sampling)
    row.read = start + real
    return row.read == len(prompt)

  def _give(self, answer, token):
    answer.tokens.append(token)
    if token in answer.sampling.stop_ids:
      answer.ended = "stop"
    elif len(answer.tokens) >= answer.sampling.max_new_tokens:
      answer.ended = "length"

  def _fail(self):
    for answer in [*self._waiting, *(row.answer for row in self._rows if row.answer)]:
      answer.ended = answer.ended or "failed"
    self._waiting.clear()
    self._forget()

  def _forget(self):
    """Nothing is read, and nothing grows."""
    self._rows = [_Row(n) for n in range(self.programs.rows)]
    self._step = self._cache = None
    self._flying: tuple[jax.Array, list[Answer | None]] | None = None  # drawn, not read yet
