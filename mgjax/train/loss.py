"""Losses, as sums with the number of terms they sum: who accumulates divides last."""
from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mgjax.sharding import fitting_spec, spec


def token_loss(logits: jax.Array, targets: jax.Array,
               mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Summed cross entropy of the next token, and how many tokens count.

  logits float32 [B, L, V]; targets int [B, L]; mask bool [B, L] -> two float32 scalars.
  """
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  losses = jax.nn.logsumexp(logits, axis=-1) - chosen
  weights = mask.astype(jnp.float32)
  return jnp.sum(losses * weights), jnp.sum(weights)


CHUNK_BYTES = 2**29  # of a device's scores at a time


@jax.named_scope("loss")
def next_token_loss(hidden: jax.Array, weights: jax.Array, axes: tuple[str, str],
                    targets: jax.Array, mask: jax.Array, *,
                    chunk_bytes: int = CHUNK_BYTES) -> tuple[jax.Array, jax.Array]:
  """`token_loss` of the scores hidden @ weights, which never exist as a whole.

  hidden [B, L, D]; weights [D, V] with axes ("embed", "vocab"), or [V, D] with axes ("vocab",
  "embed"), cast to the dtype of hidden; targets int, mask bool [B, L] -> two float32 scalars.

  Each device goes through its positions in chunks.  The forward pass makes the gradients too, from
  the scores that it has at hand, so that the backward pass multiplies nothing again.  Weights that
  do not train get none; the gradient of those that do is added up on each device, in float32, and
  over the devices once.
  """
  head = _Head(tuple(axes), chunk_bytes)
  return _total(head, hidden, weights, targets, mask), jnp.sum(mask, dtype=jnp.float32)


def judge_next_tokens(hidden: jax.Array, weights: jax.Array, axes: tuple[str, str],
                      targets: jax.Array, mask: jax.Array, *,
                      chunk_bytes: int = CHUNK_BYTES) -> tuple[jax.Array, jax.Array]:
  """What `next_token_loss` sums, one by one, for the forward pass alone; arguments as there.

  Returns the cross entropy of each next token, float32 [B, L], 0 where it does not count; and
  whether it is the likeliest, bool [B, L]: the one that greedy decoding takes, which is the first
  of equals.
  """
  head = _Head(tuple(axes), chunk_bytes)
  return _over_devices(head, hidden, weights, targets, mask, (False, False), each=True)[-1]


@dataclasses.dataclass(frozen=True)
class _Head:
  axes: tuple[str, str]  # of the weights
  chunk_bytes: int

  @property
  def vocab(self) -> int:
    return self.axes.index("vocab")

  def scores(self, x, w):  # [N, D] -> [N, V]
    return x @ (w.T if self.vocab == 0 else w)

  def hidden_gradient(self, d, w):  # [N, V] -> [N, D]
    return d @ (w if self.vocab == 0 else w.T)

  def weight_gradient(self, x, d):  # [N, D], [N, V] -> float32, shaped as the weights
    a, b = (d, x) if self.vocab == 0 else (x, d)
    return jnp.einsum("na,nb->ab", a, b, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(head, hidden, weights, targets, mask):
  return _over_devices(head, hidden, weights, targets, mask, (False, False))[0]


def _forward(head, hidden, weights, targets, mask):
  wanted = hidden.perturbed, weights.perturbed
  total, *gradients, _ = _over_devices(
      head, hidden.value, weights.value, targets.value, mask.value, wanted)
  return total, [d if w else None for d, w in zip(gradients, wanted)]


def _backward(head, gradients, g):
  del head
  return *(None if d is None else (d * g).astype(d.dtype) for d in gradients), None, None


_total.defvjp(_forward, _backward, symbolic_zeros=True)


def _over_devices(head, hidden, weights, targets, mask, wanted, each=False):
  """Summed loss and the gradients of hidden and weights, laid out and typed as these; a scalar in
  place of one that is not wanted.  Last, where `each` is wanted, what `judge_next_tokens` gives;
  else None."""
  stored, mesh = fitting_spec(weights.shape, *head.axes), jax.sharding.get_abstract_mesh()
  # A sum over an axis of one device is not always optimised away.
  parts, scattered = (axis if axis and mesh.shape[axis] > 1 else None
                      for axis in (stored[head.vocab], stored[1 - head.vocab]))
  rows = spec("batch")

  def local(hidden, weights, targets, mask):
    total, d_hidden, d_weights, judged = _over_chunks(
        head, parts, hidden, weights, targets, mask, wanted, each)
    if wanted[0] and parts:
      d_hidden = jax.lax.psum(d_hidden, parts)
    if wanted[1]:
      if scattered:
        d_weights = jax.lax.psum_scatter(d_weights, scattered, tiled=True,
                                         scatter_dimension=1 - head.vocab)
      d_weights = jax.lax.psum(d_weights, tuple(a for a in rows[0] if a != scattered))
    return jax.lax.psum(total, rows[0]), d_hidden, d_weights, judged

  used = P(*(parts if axis == "vocab" else None for axis in head.axes))
  total, d_hidden, d_weights, judged = jax.shard_map(
      local, in_specs=(rows, used, rows, rows),
      out_specs=(P(), rows if wanted[0] else P(), stored if wanted[1] else P(), rows),
      check_vma=False)(hidden, weights.astype(hidden.dtype), targets, mask)
  return total, d_hidden, d_weights.astype(weights.dtype), judged


def _over_chunks(head, parts, hidden, weights, targets, mask, wanted, each):
  """The same for the rows of one device and its part of the vocabulary.  parts: the mesh axis that
  the vocabulary is split over, or None; hidden's gradient still has to be added up over it."""
  width, vocab = hidden.shape[-1], weights.shape[head.vocab]
  positions = targets.size
  count = -(-positions * vocab * hidden.dtype.itemsize // head.chunk_bytes)
  size = -(-positions // (count * 16)) * 16
  first = jax.lax.axis_index(parts) * vocab if parts else 0
  sum_parts, max_parts, min_parts = (
      (functools.partial(f, axis_name=parts) if parts else lambda x: x)
      for f in (jax.lax.psum, jax.lax.pmax, jax.lax.pmin))

  def chunk(carry, scanned):
    total, d_weights = carry
    x, target, weight = scanned                        # [size, D], [size], [size]
    scores = head.scores(x, weights).astype(jnp.float32)
    own = (target - first)[:, None] == jnp.arange(vocab)  # [size, vocab]
    peak = max_parts(jnp.max(scores, axis=-1))
    denominator = sum_parts(jnp.sum(jnp.exp(scores - peak[:, None]), axis=-1))
    log_denominator = peak + jnp.log(denominator)
    chosen = sum_parts(jnp.sum(jnp.where(own, scores, 0), axis=-1))
    losses = (log_denominator - chosen) * weight
    total += jnp.sum(losses)
    judged = None
    if each:
      best = first + jnp.argmax(scores, axis=-1)       # [size]: of this part of the vocabulary
      of_peak = jnp.max(scores, axis=-1) == peak
      best = min_parts(jnp.where(of_peak, best, jnp.iinfo(best.dtype).max))
      judged = losses, best == target
    d_x = jnp.zeros(())
    if any(wanted):
      d = (jnp.exp(scores - log_denominator[:, None]) - own) * weight[:, None]
      d = d.astype(x.dtype)
    if wanted[0]:
      d_x = head.hidden_gradient(d, weights)
    if wanted[1]:
      d_weights += head.weight_gradient(x, d)
    return (total, d_weights), (d_x, judged)

  def chunks(x):  # what is padded has mask 0
    x = x.reshape(positions, *x.shape[2:])
    x = jnp.pad(x, ((0, count * size - positions),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(count, size, *x.shape[1:])

  zero = jnp.zeros(()), jnp.zeros(weights.shape if wanted[1] else ())
  (total, d_weights), (d_x, judged) = jax.lax.scan(
      chunk, zero, tuple(map(chunks, (hidden, targets, mask.astype(jnp.float32)))))
  d_hidden = d_x.reshape(-1, width)[:positions].reshape(hidden.shape) if wanted[0] else zero[0]
  judged = jax.tree.map(lambda x: x.reshape(-1)[:positions].reshape(targets.shape), judged)
  return total, d_hidden, d_weights, judged


def tag_loss(scores: jax.Array, targets: jax.Array,
             mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Summed cross entropy between an image's scores and the bag of its caption's tokens.

  scores float32 [B, V]; targets int [B, L], mask bool [B, L]: the caption.  Each distinct token of
  the caption gets an equal share.  Classifying captions trains an image tower as contrastive
  pairs do, without a text tower (Huang et al. 2024, "Classification Done Right").
  """
  rows = jnp.arange(scores.shape[0])[:, None]
  bag = jnp.zeros_like(scores).at[rows, targets].max(mask.astype(scores.dtype))
  share = bag / jnp.maximum(jnp.sum(bag, -1, keepdims=True), 1)
  losses = -jnp.sum(share * jax.nn.log_softmax(scores, axis=-1), axis=-1)
  weights = jnp.any(mask, axis=-1).astype(jnp.float32)
  return jnp.sum(losses * weights), jnp.sum(weights)
