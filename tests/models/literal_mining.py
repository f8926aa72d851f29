"""Patch info mining as the paper writes it; the reference for the form that is computed."""
import jax
import jax.numpy as jnp


def literal_mining(mining, tokens, features):
  """Every candidate becomes a key and a value.  tokens [N, P*P, D], features [N, H, H, C]."""
  n, count, d = tokens.shape
  p = round(count**0.5)
  w = features.shape[1] // p
  windows = features.reshape(n, p, w, p, w, -1).transpose(0, 1, 3, 2, 4, 5)
  windows = windows.reshape(n, count, w * w, -1)
  q, k, v = mining.query(tokens), mining.key(windows), mining.value(windows)
  scores = jnp.einsum("ntd,ntjd->ntj", q, k / d**0.5)
  return jnp.einsum("ntj,ntjd->ntd", jax.nn.softmax(scores, axis=-1), v)
