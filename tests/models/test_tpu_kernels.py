"""The kernels as the TPU's compiler takes them, forward and backward, without a TPU."""
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from mgjax.config import ConfigError
from mgjax.models.attention import attention
from mgjax.sharding import make_mesh, mesh_context, spec
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
