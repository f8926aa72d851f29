"""The associative form against the literal one, and what it must refuse."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from literal_mining import literal_mining

from mgjax import trees
from mgjax.models.mining import PatchInfoMining
from mgjax.sharding import make_mesh, mesh_context

pytestmark = pytest.mark.usefixtures("highest_precision")


@pytest.fixture
def mesh():
  with mesh_context(make_mesh(devices=jax.devices()[:1])) as mesh:
    yield mesh


def lively(width, features):
  """A module whose every parameter matters."""
  mining = PatchInfoMining(width, features, dtype=jnp.float32, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(mining)
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32),
                        trees.pure(state))
  return graphdef, params


@pytest.mark.parametrize("side,window", [(4, 8), (3, 5), (1, 8)])
def test_equals_the_literal_form(mesh, side, window):
  graphdef, params = lively(32, 80)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, side * side, 32)).astype(np.float32)
  a = rng.normal(size=(2, side * window, side * window, 80)).astype(np.float32)
  weights = rng.normal(size=(2, side * side, 32)).astype(np.float32)

  def run(form):
    def loss(params, x, a):
      out = form(nnx.merge(graphdef, params), x, a)
      return jnp.sum(out * weights), out
    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(params, x, a)
    return out, trees.flatten(grads)

  ours, our_grads = run(lambda m, x, a: m(x, [a]))
  literal, grads = run(literal_mining)
  np.testing.assert_allclose(ours, literal, atol=1e-5)
  for path, want in grads.items():
    scale = max(1.0, float(np.abs(want).max()))
    np.testing.assert_allclose(our_grads[path], want, atol=1e-5 * scale, err_msg=path)


def test_refuses_a_map_that_windows_do_not_cover(mesh):
  graphdef, params = lively(32, 80)
  with pytest.raises(ValueError, match="16 tokens need a square map .* got 30x30"):
    nnx.merge(graphdef, params)(jnp.zeros((1, 16, 32)), [jnp.zeros((1, 30, 30, 80))])
