"""Every form of the depthwise convolution against XLA's own, values and gradients."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgjax.models.depthwise import depthwise_conv, grouped_conv, position_matrix, shifted_sum


@pytest.mark.parametrize("form", [shifted_sum, position_matrix, depthwise_conv])
@pytest.mark.parametrize("shape", [(2, 8, 8, 6), (1, 5, 11, 3), (3, 1, 1, 4), (1, 20, 9, 2)])
def test_forms_agree(form, shape):
  rng = np.random.default_rng(0)
  x, g = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
  kernel = rng.normal(size=(7, 7, shape[-1])).astype(np.float32)

  def run(f):
    loss = lambda x, k: jnp.sum(f(x, k) * g)
    return jax.jit(f)(x, kernel), jax.jit(jax.grad(loss, (0, 1)))(x, kernel)

  (ours, our_grads), (want, grads) = run(form), run(grouped_conv)
  np.testing.assert_allclose(ours, want, atol=2e-5)
  for a, b in zip(our_grads, grads):
    np.testing.assert_allclose(a, b, atol=1e-4)
