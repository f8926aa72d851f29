"""Losses, as sums with the number of terms they sum: who accumulates divides last."""
from __future__ import annotations

import jax
import jax.numpy as jnp


def token_loss(logits: jax.Array, targets: jax.Array,
               mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Summed cross entropy of the next token, and how many tokens count.

  logits float32 [B, L, V]; targets int [B, L]; mask bool [B, L] -> two float32 scalars.
  """
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  losses = jax.nn.logsumexp(logits, axis=-1) - chosen
  weights = mask.astype(jnp.float32)
  return jnp.sum(losses * weights), jnp.sum(weights)


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
