"""Products of patches: the forms that a TPU gets, against the plain one."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mgjax.models import convnext
from mgjax.models.convnext import strided_product
from mgjax.models.layers import Dense
from mgjax.sharding import make_mesh, mesh_context


@pytest.mark.parametrize("shape, size", [
    ((2, 32, 256, 3), 4),   # two groups of 32 patches in a row
    ((1, 12, 44, 3), 4),    # of 11 patches, one by one
    ((2, 6, 10, 16), 2)])
def test_all_forms_are_one_product(shape, size, monkeypatch):
  x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
  with mesh_context(make_mesh(devices=jax.devices()[:1])), jax.default_matmul_precision("highest"):
    dense = Dense(size * size * shape[-1], 24, (None, "embed"), dtype=jnp.float32,
                  bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0))
    want = strided_product(x, dense, size)
    monkeypatch.setattr(convnext, "platform", lambda: "tpu")
    got = jax.jit(strided_product, static_argnums=2)(x, dense, size)
  assert want.shape == (shape[0], shape[1] // size, shape[2] // size, 24)
  np.testing.assert_allclose(got, want, atol=1e-5)
