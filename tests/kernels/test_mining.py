"""The kernel of mining, step by step on the CPU, against what XLA makes of the upsampled map."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgjax.kernels import mining_plan
from mgjax.kernels.mining import mine_maps
from mgjax.kernels.mining_plan import why_not
from mgjax.models.convnext import concatenated_features
from mgjax.models.mining import by_kernel, pool_windows
from mgjax.sharding import make_mesh, mesh_context

EPS = 1e-5
pytestmark = pytest.mark.usefixtures("highest_precision")


def arguments(n, side, window, maps, dtype):
  rng = np.random.default_rng(0)
  channels = sum(c for _, c in maps)
  made = tuple(jnp.asarray(0.3 + rng.normal(size=(n, *(side * window // f,) * 2, c)), dtype)
               for f, c in maps)
  q = jnp.asarray(rng.normal(size=(n, side, side, channels)) * 1.5 * channels**-0.5, dtype)
  g = jnp.asarray(rng.normal(size=(n, side, side, channels)), jnp.float32)
  return q, made, g


def reference(q, maps):
  return pool_windows(q, concatenated_features(list(maps)), EPS)


def kernel(q, maps):
  return mine_maps(q, maps, EPS, True)


def values(form, q, maps, g):
  """What is mined, and the gradients of q and of the maps."""
  def weighed(q, maps):
    y = form(q, maps)
    return jnp.sum(y * g), y
  (dq, d_maps), y = jax.jit(jax.grad(weighed, (0, 1), has_aux=True))(q, maps)
  return [np.asarray(x, np.float32) for x in (y, dq, *d_maps)]


def check(q, maps, g):
  """Against float32 of the same numbers: in bfloat16 the reference itself is as far off."""
  bound = 1e-5 if q.dtype == jnp.float32 else 1e-2
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), (q, maps))
  for ours, want in zip(values(kernel, q, maps, g), values(reference, *exact, g), strict=True):
    np.testing.assert_allclose(ours, want, atol=bound * np.abs(want).max())


@pytest.mark.parametrize("n, side, window, maps, dtype", [
    (2, 3, 8, ((1, 12), (8, 130)), jnp.float32),
    (1, 5, 4, ((1, 12), (1, 24), (4, 40)), jnp.float32),  # two as fine: the global view of HD
    (1, 1, 4, ((1, 12), (2, 24), (4, 140)), jnp.bfloat16),
    (2, 3, 7, ((1, 100),), jnp.float32),                  # upsampled before
    (1, 2, 7, ((1, 100),), jnp.bfloat16)])
def test_is_what_xla_computes(n, side, window, maps, dtype):
  check(*arguments(n, side, window, maps, dtype))


def test_many_windows_beside_each_other_are_worked_on_in_parts(monkeypatch):
  monkeypatch.setattr(mining_plan, "MOST", 8)
  check(*arguments(1, 16, 2, ((1, 8), (2, 10)), jnp.float32))


def test_a_frozen_tower_costs_nothing():
  """No gradient of a map is computed where none trains, through remat and the mesh too."""
  q, maps, g = arguments(1, 2, 4, ((1, 8), (2, 16)), jnp.float32)
  with mesh_context(make_mesh(devices=jax.devices()[:1])):
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def form(q, maps):
      return by_kernel(q, maps, EPS, interpret=True)
    loss = lambda q, maps: jnp.sum(form(q, maps) * g)
    for wrt, outputs in ((0, 1), ((0, 1), 3)):
      found = [len(e.outvars) for e in kernels(jax.make_jaxpr(jax.grad(loss, wrt))(q, maps).jaxpr)
               if "mine_backward" in str(e.params)]
      assert found == [outputs]


def kernels(jaxpr):
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      yield equation
    else:
      for inner in jax.core.jaxprs_in_params(equation.params):
        yield from kernels(inner)


@pytest.mark.parametrize("side, window, factors, vmem, said", [
    (24, 8, (1, 2, 4, 8), 128, None),
    (48, 8, (1, 2, 4, 8), 64, None),
    (24, 8, (1, 1, 2, 4), 64, None),
    (24, 8, (1, 2, 4, 8), 16, "MiB of a core's memory, there are 16"),
    (24, 7, (1, 7), 128, "windows of 7 are not whole positions of maps"),
    (24, 4, (1, 2, 8), 128, "windows of 4 are not whole positions of maps"),
    (3, 8, (1, 2, 4, 8), 128, "3 windows of 8 beside each other are not whole registers")])
def test_what_it_can_take(side, window, factors, vmem, said):
  widths = (192, 384, 768, 1536)
  make = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  maps = [make(8, *(side * window // f,) * 2, c) for f, c in zip(factors, widths)]
  why = why_not(make(8, side, side, sum(m.shape[-1] for m in maps)), maps, vmem << 20)
  assert why is None if said is None else said in why
