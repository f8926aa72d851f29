"""What each policy computes again, counted in the program of the gradient; the gradient stays."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr
from test_flops import TINY, make_config, operations, step_operations

from mgjax.checkpoint import abstract_params
from mgjax.config import DecoderConfig
from mgjax.models.decoder import Decoder
from mgjax.models.remat import DECODER, GENERAL, OFFLOAD, RematConfig
from mgjax.sharding import make_mesh, mesh_context

C = DecoderConfig(vocab_size=64, width=32, depth=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48)
B, L = 2, 128


@pytest.fixture(autouse=True)
def one_device():
  with mesh_context(make_mesh(devices=jax.devices()[:1])), jax.default_matmul_precision("highest"):
    yield


def gradient(policy, attention="xla", config=C):
  """(params, x [B, l, D], segment_ids) -> gradients; and what builds the module."""
  build = lambda: Decoder(config, remat_policy=policy, attention=attention, dtype=jnp.float32,
                          rngs=nnx.Rngs(0))
  graphdef = nnx.split(nnx.eval_shape(build))[0]

  def loss(params, x, ids):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden, _ = nnx.merge(graphdef, params)(x, positions, ids)
    return jnp.sum(jnp.sin(hidden))
  return jax.grad(loss, (0, 1)), build


def program(policy, attention="xla", config=C):
  f, build = gradient(policy, attention, config)
  params = abstract_params(build, make_mesh(devices=jax.devices()[:1]))[1]
  made = jax.make_jaxpr(f)(params, jax.ShapeDtypeStruct((B, L, C.width), jnp.float32),
                           jax.ShapeDtypeStruct((B, L), jnp.int32)).jaxpr
  return dce_jaxpr(made, [True] * len(made.outvars))[0]


def kernels(jaxpr) -> int:
  return sum(eqn.primitive.name == "pallas_call" or sum(map(kernels, jaxprs_in_params(eqn.params)))
             for eqn in jaxpr.eqns)


def test_what_is_computed_again():
  """In multiply-adds of a layer.  The block's own output is never needed again; the plain attention
  needs its weights, from queries and keys."""
  qkv, out = C.width * (C.heads + 2 * C.kv_heads) * C.head_dim, C.width * C.heads * C.head_dim
  mlp, weights = 2 * C.width * C.mlp_width, L * C.heads * C.head_dim
  again = {
      "nothing_saveable": qkv + 2 * weights + out + mlp, OFFLOAD: qkv + 2 * weights + out + mlp,
      "dots_saveable": 0, "dots_with_no_batch_dims_saveable": 2 * weights,
      "save_attention": qkv + weights + out + mlp, "save_qkv_attention": weights + out + mlp,
      "save_mlp": qkv + weights, "save_products": weights, "none": 0}
  assert again.keys() == set(DECODER)
  least = operations(program("none"))
  for policy, expected in again.items():
    assert operations(program(policy)) - least == 2 * B * L * C.depth * expected, policy
  # Nothing of the experts but the router's scores: they are weighed before their last product.
  more = dataclasses.replace(C, experts=4)
  expected = qkv + weights + 4 * C.width
  again = operations(program("save_mlp", config=more)) - operations(program("none", config=more))
  assert again == 2 * B * L * C.depth * expected


def test_the_forward_kernel_runs_once_where_its_result_is_kept():
  for policy, times in (("none", 2), ("nothing_saveable", 3), ("save_attention", 2),
                        ("save_qkv_attention", 2), ("save_mlp", 2), ("save_products", 2),
                        (OFFLOAD, 3)):  # the backward pass is one kernel
    assert kernels(program(policy, "splash")) == times, policy


@pytest.mark.parametrize("policy", ["save_qkv_attention", OFFLOAD])
def test_gradients_stay_the_same(policy):
  f, build = gradient(policy)
  params = nnx.split(jax.jit(build)())[1]
  rng = np.random.default_rng(0)
  x = params, rng.normal(size=(1, 16, C.width)).astype(np.float32), np.ones((1, 16), np.int32)
  plain, _ = gradient("none")
  for a, b in zip(*(jax.tree.leaves(jax.jit(g)(*x)) for g in (f, plain)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("table", [pytest.param("align", marks=pytest.mark.slow), "tune"])
def test_frozen_towers_cost_nothing_in_the_backward_pass(table):
  """Nothing of them is computed again, whatever their policy; with one that trains, it is."""
  count = lambda table, policy: step_operations(dataclasses.replace(
      make_config("tiny", table), remat=RematConfig("none", policy, "none")), TINY)
  assert len({count(table, policy) for policy in GENERAL}) == 1
  assert count("all", "nothing_saveable") > count("all", "none")
