"""How the next token is drawn from its scores."""
from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to generate.  ValueError at once for values that mean nothing."""

  temperature: float = 0.0  # 0: always the likeliest token
  top_p: float = 1.0        # keep the likeliest tokens that together reach this probability
  top_k: int = 0            # keep this many of the likeliest tokens; 0: all
  max_new_tokens: int = 256
  seed: int = 0
  stop_ids: tuple[int, ...] = ()  # ids that end the answer; the one met is the last one given

  def __post_init__(self):
    if not 0 <= self.temperature < float("inf"):
      raise ValueError(f"temperature is {self.temperature}, expected 0 (greedy) or more")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p is {self.top_p}, expected more than 0 and at most 1 (1: keep all)")
    if not 0 <= self.top_k < 2**31:
      raise ValueError(f"top_k is {self.top_k}, expected 0 (keep all) or more, below 2**31")
    if self.max_new_tokens < 1:
      raise ValueError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
    if not 0 <= self.seed < 2**32:
      raise ValueError(f"seed is {self.seed}, expected 0 <= seed < 2**32")


def sample(logits: jax.Array, rng: jax.Array, temperature: jax.Array, top_p: jax.Array,
           top_k: jax.Array) -> jax.Array:
  """float32 [B, V] -> int32 [B]; a key and settings (see `Sampling`) for each row, all [B].

  As in Hugging Face: temperature first, then top-k, then top-p among what top-k left.  The settings
  may be traced: other values need no other program.  What a row gives depends on that row alone.
  """
  greedy = temperature == 0
  # Shifted first: the likeliest scores must not overflow at small temperatures.
  scaled = lambda: (logits - logits.max(-1, keepdims=True)) / jnp.where(
      greedy, 1, temperature)[:, None]
  draw = lambda scores: jnp.where(
      greedy, jnp.argmax(logits, axis=-1), jax.vmap(jax.random.categorical)(rng, scores))
  filtered = ((top_p < 1) | (top_k > 0)) & ~greedy

  def kept():
    scores = scaled()
    return jnp.where(filtered[:, None], keep_likely(scores, top_p, top_k), scores)
  # Branches: what no row asks for costs nothing.
  return jax.lax.cond(
      jnp.all(greedy), lambda: jnp.argmax(logits, axis=-1),
      lambda: jax.lax.cond(jnp.any(filtered), lambda: draw(kept()),
                           lambda: draw(scaled()))).astype(jnp.int32)


def keep_likely(logits: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
  """[B, V], settings [B] -> [B, V]: the tokens that the settings leave out at -inf; ties stay
  together."""
  p = jax.nn.softmax(logits, axis=-1)                                           # [B, V]
  k = jnp.where(top_k > 0, top_k, p.shape[-1])
  p = jnp.where(p >= _threshold(p, lambda kept: kept.sum(-1) >= k), p, -1)
  mass = lambda kept: jnp.where(kept, p, 0).sum(-1)
  enough = top_p * mass(p >= 0)
  p = jnp.where(p >= _threshold(p, lambda kept: mass(kept) >= enough), p, -1)
  return jnp.where(p >= 0, logits, -jnp.inf)


def _threshold(p, enough):
  """The largest t [B, 1] for which `enough(p >= t)` holds, 0 if none does; p [B, V] up to 1.

  A search over the bit patterns of floats, which for positive floats are ordered as they are: exact
  after 31 halvings, and far cheaper than sorting a vocabulary.
  """
  as_float = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)

  def halve(_, bounds):
    low, high = bounds
    middle = low + (high - low + 1) // 2
    holds = enough(p >= as_float(middle)[:, None])
    return jnp.where(holds, middle, low), jnp.where(holds, high, middle - 1)

  low = jnp.zeros(p.shape[0], jnp.int32)
  one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
  low, _ = jax.lax.fori_loop(0, 31, halve, (low, low + one))
  return as_float(low)[:, None]
