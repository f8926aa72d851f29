"""The mixture of experts against every expert computed for every token."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several_devices
from flax import nnx

from mgjax.config import DecoderConfig
from mgjax.models.moe import EVEN_SHARES, Experts, balance_loss
from mgjax.sharding import make_mesh, mesh_context

CONFIG = DecoderConfig(width=32, mlp_width=48, experts=4, experts_per_token=2)


def dense(m, x):
  p = jax.nn.softmax(x @ m.router.kernel[...], axis=-1)                     # [B, L, E]
  kept = jnp.where(p >= jnp.sort(p, axis=-1)[..., -2:-1], p, 0)
  kept = kept / kept.sum(-1, keepdims=True)
  one = lambda g, u, d: (jax.nn.silu(x @ g) * (x @ u)) @ d
  said = jax.vmap(one)(m.gate[...], m.up[...], m.down[...])                 # [E, B, L, D]
  return jnp.einsum("ebld,ble->bld", said, kept)


@pytest.mark.parametrize("lopsided", [False, True])
def test_values_and_gradients_are_those_of_the_dense_form(lopsided):
  with jax.default_matmul_precision("highest"), mesh_context(make_mesh(devices=jax.devices()[:1])):
    module = Experts(CONFIG, jax.nn.silu, dtype=jnp.float32, rngs=nnx.Rngs(0))
    if lopsided:  # almost all tokens to one pair, nobody to the rest
      module.router.kernel[...] = module.router.kernel[...].at[:, 2:].set(0).at[:, :2].multiply(0)
    x = jax.random.normal(jax.random.key(0), (2, 24, 32))
    loss = lambda form: lambda m, x: jnp.sum(jnp.sin(form(m, x)))
    ragged = jax.jit(lambda m, x: m(x)[0])
    if not lopsided:
      np.testing.assert_allclose(ragged(module, x), dense(module, x), atol=1e-5)
      ours, theirs = (jax.jit(jax.grad(loss(f), (0, 1)))(module, x) for f in (ragged, dense))
      for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    else:  # equal scores: the first two experts are taken, the others get no gradient
      grads = jax.jit(jax.grad(loss(ragged)))(module, x)
      assert np.abs(np.asarray(grads.gate[...][2:])).max() == 0
      assert np.abs(np.asarray(grads.gate[...][:2])).max() > 0


def on_four_devices():
  """Lopsided: all rows go to the two experts of one device, twice as many as it has room for."""
  with jax.default_matmul_precision("highest"), mesh_context(make_mesh({"expert": 4})):
    config = dataclasses.replace(CONFIG, experts=8)
    module = Experts(config, jax.nn.silu, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (8, 64, 32)).at[..., 0].set(1)
    for lopsided in (False, True):
      if lopsided:
        module.router.kernel[...] = module.router.kernel[...].at[0, :2].set(9)
      chosen = jax.lax.top_k(module.router(x), 2)[1].reshape(-1)
      most = int(jnp.max(jnp.bincount(chosen // 2)))  # rows of a device
      assert (most > EVEN_SHARES * chosen.size // 4) == lopsided
      loss = lambda form: lambda m, x: jnp.sum(jnp.sin(form(m, x)))
      ours, theirs = (jax.jit(jax.value_and_grad(loss(f), (0, 1)))(module, x)
                      for f in (lambda m, x: m(x)[0], dense))
      for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_four_devices_give_the_same():
  several_devices.run(__file__, "on_four_devices", 4)


def test_balance_loss_counts_real_tokens_of_all_layers():
  rng = np.random.default_rng(0)
  scores, real = rng.normal(size=(3, 2, 5, 4)).astype(np.float32), np.ones((2, 5), bool)
  real[1, 3:] = False
  p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
  chosen, probability, n = np.zeros(4), np.zeros(4), 0
  for layer in range(3):
    for b, l in zip(*np.nonzero(real)):
      chosen[np.argsort(scores[layer, b, l])[-2:]] += 1
      probability += p[layer, b, l]
      n += 1
  want = 4 * np.sum(chosen / n * probability / n)
  np.testing.assert_allclose(balance_loss(scores, real, 2), want, rtol=1e-5)
  even = np.tile(np.eye(4, dtype=np.float32) * 1e-4, (1, 1, 1, 1))  # each expert as often
  np.testing.assert_allclose(balance_loss(even, np.ones((1, 4), bool), 1), 1, rtol=1e-4)
