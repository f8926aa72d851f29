import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgjax.infer.sampling import Sampling, keep_likely, sample

_sample, _keep = jax.jit(sample), jax.jit(keep_likely)


def settings(n, temperature=1.0, top_p=1.0, top_k=0):
  return (jnp.full(n, temperature, jnp.float32), jnp.full(n, top_p, jnp.float32),
          jnp.full(n, top_k, jnp.int32))


def draw(logits, n=4000, seed=0, **wanted):
  """n draws from one row of scores."""
  rows = jnp.tile(jnp.asarray(logits, jnp.float32), (n, 1))
  keys = jax.random.split(jax.random.key(seed), n)
  return np.asarray(_sample(rows, keys, *settings(n, **wanted)))


P = np.array([0.05, 0.5, 0.15, 0.3])
LOGITS = np.log(P) + 3.0


def shares(tokens):
  return np.bincount(tokens, minlength=len(P)) / len(tokens)


def test_zero_temperature_is_argmax():
  logits = np.random.RandomState(0).randn(64, 200).astype(np.float32)
  keys = jax.random.split(jax.random.key(0), 64)
  got = _sample(jnp.asarray(logits), keys, *settings(64, 0.0, 0.5, 3))
  np.testing.assert_array_equal(got, logits.argmax(-1))
  assert got.dtype == jnp.int32


def test_plain_draws_follow_the_probabilities():
  np.testing.assert_allclose(shares(draw(LOGITS)), P, atol=0.03)


def test_temperature_sharpens():
  want = P**2 / (P**2).sum()
  np.testing.assert_allclose(shares(draw(LOGITS, temperature=0.5)), want, atol=0.03)


@pytest.mark.parametrize("top_p, kept", [
    (0.4, [1]), (0.49, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [1, 2, 3]),
    (0.96, [0, 1, 2, 3])])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
  want = np.where(np.isin(np.arange(4), kept), P, 0)
  np.testing.assert_allclose(shares(draw(LOGITS, top_p=top_p)), want / want.sum(), atol=0.03)


@pytest.mark.parametrize("top_k, kept", [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (99, [0, 1, 2, 3])])
def test_top_k(top_k, kept):
  assert set(draw(LOGITS, top_k=top_k)) == set(kept)


def test_top_p_counts_what_top_k_left():
  # Of {0.5, 0.3} the first holds 62 %: 0.6 is reached by it alone, 0.65 is not.
  assert set(draw(LOGITS, top_k=2, top_p=0.6)) == {1}
  assert set(draw(LOGITS, top_k=2, top_p=0.65)) == {1, 3}


def test_sets_equal_those_of_sorting_on_a_large_vocabulary():
  logits = np.random.RandomState(1).randn(3000).astype(np.float32) * 4
  p = np.exp(logits - logits.max())
  p /= p.sum()
  order = np.argsort(-p)
  for top_p in (0.3, 0.9):
    kept = order[:np.searchsorted(np.cumsum(p[order]), top_p) + 1]
    got = np.isfinite(_keep(jnp.asarray(logits)[None], *settings(1, top_p=top_p)[1:]))[0]
    np.testing.assert_array_equal(np.flatnonzero(got), np.sort(kept))


def test_what_a_row_gives_depends_on_that_row_alone():
  rng = np.random.RandomState(2)
  logits, keys = jnp.asarray(rng.randn(6, 50) * 3), jax.random.split(jax.random.key(3), 6)
  temperature = jnp.array([0, 1, 2, 0.5, 1, 0], jnp.float32)
  top_p = jnp.array([1, 0.5, 1, 0.9, 1, 0.3], jnp.float32)
  top_k = jnp.array([0, 0, 0, 7, 2, 1], jnp.int32)
  together = _sample(logits, keys, temperature, top_p, top_k)
  for i in range(6):
    one = _sample(*(a[i:i + 1] for a in (logits, keys, temperature, top_p, top_k)))
    assert one[0] == together[i]


def test_seed_decides():
  assert (draw(LOGITS, seed=1) == draw(LOGITS, seed=1)).all()
  assert (draw(LOGITS, seed=1) != draw(LOGITS, seed=2)).any()


def test_settings_are_arguments_of_one_program():
  before = _sample._cache_size()
  draw(LOGITS), draw(LOGITS, temperature=0), draw(LOGITS, top_p=0.3, top_k=2)
  assert _sample._cache_size() <= before + 1


@pytest.mark.parametrize("bad, named", [
    (dict(temperature=-1), "temperature"), (dict(temperature=float("nan")), "temperature"),
    (dict(top_p=0), "top_p"), (dict(top_p=1.1), "top_p"), (dict(top_k=-1), "top_k"),
    (dict(max_new_tokens=0), "max_new_tokens"), (dict(seed=-1), "seed")])
def test_meaningless_settings_are_refused(bad, named):
  with pytest.raises(ValueError, match=f"{named} is "):
    Sampling(**bad)
