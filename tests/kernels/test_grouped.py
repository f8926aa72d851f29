"""Products by group, in the platform's form, against one product a row."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgjax.kernels.grouped import _blocks_backward, _kernel_backward, grouped_dot


@pytest.mark.parametrize("counts", [(5, 0, 30, 13), (0, 0, 0, 0), (48, 0, 0, 0), (12, 12, 12, 12),
                                    (0, 1, 0, 47), (1, 2, 0, 0)])
def test_values_and_gradients(counts):
  rng = np.random.default_rng(0)
  rows, weights = (rng.normal(size=s).astype(np.float32) for s in ((48, 6), (4, 6, 5)))
  groups = np.repeat(np.arange(4), counts)
  known = np.arange(48) < len(groups)
  own = weights[np.pad(groups, (0, 48 - len(groups)))]
  target = rng.normal(size=(48, 5)).astype(np.float32)
  loss = lambda form: lambda r, w: jnp.sum(jnp.where(known[:, None], form(r, w) * target, 0))
  ours = lambda r, w: grouped_dot(r, w, jnp.array(counts))
  reference = lambda r, w: jnp.einsum(
      "md,mdf->mf", r, w[np.pad(groups, (0, 48 - len(groups)))])
  with jax.default_matmul_precision("highest"):
    got = jax.jit(ours)(rows, weights)
    np.testing.assert_allclose(np.asarray(got)[known], np.einsum("md,mdf->mf", rows, own)[known],
                               atol=1e-5)
    for a, b in zip(jax.jit(jax.grad(loss(ours), (0, 1)))(rows, weights),
                    jax.grad(loss(reference), (0, 1))(rows, weights)):
      np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("counts", [(100, 0, 28), (0, 128, 0), (1, 2, 60), (0, 0, 0)])
def test_the_tpu_kernel_gives_the_gradient_of_the_weights(counts):
  rng = np.random.default_rng(0)
  rows, weights, g = (jnp.asarray(rng.normal(size=s), jnp.float32)
                      for s in ((128, 24), (3, 24, 16), (128, 16)))
  rows, g = (a.at[sum(counts):].set(0) for a in (rows, g))  # what is behind all groups is zero
  got = _kernel_backward(rows, weights, jnp.array(counts), g, interpret=True)
  want = _blocks_backward(rows, weights, jnp.array(counts), g)
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, atol=1e-4)
