"""The kernels as the TPU's compiler takes them, forward and backward, without a TPU."""
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from mgjax.config import ConfigError
from mgjax.models.attention import attention
from mgjax.models.convnext import ConvNextBlock
from mgjax.models.mining import pool_maps
from mgjax.sharding import make_mesh, mesh_context, shardings_of, spec
from mgjax.tpu.slices import describe, parse_slice

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["v5e:2x2", "v5p:2x2x1"])
def devices(request):
  try:
    return describe(parse_slice(request.param))
  except ConfigError as error:
    pytest.skip(str(error))


def kernels(devices, shape, length, heads, kv_heads, h, packed=True, window=None):
  """Kernels of value and gradient by name, on a mesh over rows and heads."""
  mesh = make_mesh(shape, devices)
  with mesh_context(mesh):
    rows, by_head = (NamedSharding(mesh, spec(*names)) for names in
                     (("batch",), ("batch", "seq", "act_heads")))
    x = lambda n: jax.ShapeDtypeStruct((4, length, n, h), jnp.bfloat16, sharding=by_head)
    ids = jax.ShapeDtypeStruct((4, length), jnp.int32, sharding=rows)

    def loss(q, k, v, ids):
      y = attention(q, k, v, ids if packed else None, window)
      return jnp.sum(jnp.sin(y.astype(jnp.float32)))
    text = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(
        x(heads), x(kv_heads), x(kv_heads), ids).compile().as_text()
  names = re.findall(r"(splash_\w+|short_attention)", "\n".join(
      line for line in text.splitlines() if "tpu_custom_call" in line))
  return {re.sub("_segmented|_(no_)?residuals", "", name) for name in names}


@pytest.mark.parametrize("length,heads,kv_heads,h,window", [
    (3456, 4, 4, 128, None), (2944, 8, 2, 256, None), (6400, 4, 2, 128, 4096),
    (512, 2, 2, 64, None), (640, 4, 2, 96, None), (300, 4, 4, 16, None)])
def test_packed_rows(devices, length, heads, kv_heads, h, window):
  assert kernels(devices, (1, 2, 2, 1), length, heads, kv_heads, h, window=window) == {
      "splash_mha_fwd", "splash_mha_dkv"}


@pytest.mark.parametrize("length,heads,h", [(577, 16, 64), (257, 16, 64)])
def test_towers(devices, length, heads, h):
  assert kernels(devices, (1, 2, 2, 1), length, heads, heads, h, packed=False) == {
      "short_attention"}


def test_one_key_head_and_short_rows(devices):
  assert kernels(devices, (1, 4, 1, 1), 2048, 8, 1, 256) == {"splash_mha_fwd", "splash_mha_dkv"}
  assert kernels(devices, (1, 4, 1, 1), 128, 8, 1, 256) == set()


@pytest.mark.parametrize("side,factors,trains", [
    (24, (1, 2, 4, 8), False), (24, (1, 2, 4, 8), True), (48, (1, 2, 4, 8), False),
    (24, (1, 1, 2, 4), True)])
def test_mining(devices, side, factors, trains):
  """At the size of the towers, and of HD's tiles and its global view; no map is copied into another
  layout or upsampled, and a frozen tower's gradients are not computed."""
  mesh = make_mesh((1, 4, 1, 1), devices)
  with mesh_context(mesh):
    rows = NamedSharding(mesh, spec("batch"))
    x = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows)
    widths = (192, 384, 768, 1536)
    maps = [x(4, *(side * 8 // f,) * 2, c) for f, c in zip(factors, widths)]

    def loss(q, maps):
      return jnp.sum(jnp.sin(pool_maps(q, maps, 1e-5)))
    text = jax.jit(jax.value_and_grad(loss, (0, 1) if trains else 0)).lower(
        x(4, side, side, sum(widths)), maps).compile().as_text()
  found = [line for line in text.splitlines() if "tpu_custom_call" in line]
  assert len(found) == 2 and "mine_forward" in found[0] and "mine_backward" in found[1]
  given = found[1].split(" custom-call(")[0]
  assert all((f"bf16[1,{side * 8 // f},{side * 8 // f},{c}]" in given) == trains
             for f, c in zip(factors, widths))


@pytest.mark.parametrize("shape", [(4, 24, 24, 192), (4, 9, 12, 136)])
@pytest.mark.parametrize("wanted,names", [
    (False, ["depthwise_norm"]),
    (True, ["depthwise", "depthwise", "depthwise_gradient", "layer_norm", "layer_norm_gradient"])])
def test_depthwise(devices, shape, wanted, names):
  mesh = make_mesh((1, 2, 2, 1), devices)
  with mesh_context(mesh):
    block = nnx.eval_shape(lambda: ConvNextBlock(
        shape[-1], 1e-6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(block)
    shardings = shardings_of(params, mesh)
    params = jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(
        s.shape, s.dtype, sharding=sharding), params, shardings)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec("batch")))

    def loss(params, x):
      return jnp.sum(jnp.sin(nnx.merge(graph, params)(x).astype(jnp.float32)))
    run = jax.value_and_grad(loss, (0, 1)) if wanted else loss
    text = jax.jit(run).lower(params, x).compile().as_text()
  found = re.findall(r"%((?:depthwise|layer_norm)\w*?)(?:\.\d+)? = .*tpu_custom_call", text)
  assert sorted(found) == names
