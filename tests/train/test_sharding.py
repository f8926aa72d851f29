"""Every family on eight devices: what is cut, and that nothing has to be put together again."""
import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from flax import nnx
from small_run import make_run

from mgjax import trees
from mgjax.data.packing import Format
from mgjax.data.pipeline import batch_arrays
from mgjax.sharding import batch_sharding, make_mesh, mesh_context
from mgjax.train.optimizer import make_optimizer
from mgjax.train.state import abstract_state
from mgjax.train.step import batch_loss, make_train_step

# Family -> the mesh, micro-batches, and what its decoder has that that of `tiny` has not.
CASES = {
    "llama": ((2, 2, 2, 1), 2, {}),
    "gemma": ((2, 4, 1, 1), 1, dict(activation="gelu", norm_offset=1.0, scale_inputs=True,
                                    tied_head=True, kv_heads=1)),
    "mistral": ((1, 4, 2, 1), 1, dict(sliding_window=9)),
    "mixtral": ((1, 2, 2, 2), 1, dict(experts=4)),
}
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def check(family, root):
  shape, accumulate, decoder = CASES[family]
  mesh, config = make_mesh(shape), make_run(root, steps=1, accumulate=accumulate)
  decoder = dataclasses.replace(config.model.decoder, **decoder)
  config = dataclasses.replace(
      config, model=dataclasses.replace(config.model, decoder=decoder),
      router_loss=0.01 if decoder.experts else 0.0)
  with mesh_context(mesh):
    tx = make_optimizer(config.optimizer, 1)
    graphdef, state = abstract_state(config, tx, mesh)
    batch = {k: jax.ShapeDtypeStruct(*v, sharding=batch_sharding(mesh))
             for k, v in batch_arrays(Format(8 * accumulate, 48, 1, 128, 16)).items()}

    def loss(params, frozen, batch):
      return batch_loss(nnx.merge(graphdef, trees.merge(params, frozen)), batch, None)[0]
    gradients = jax.jit(jax.grad(loss)).lower(state.params, state.frozen, batch).compile(FAST)
    shardings = jax.tree.map(lambda s: s.sharding, state)
    step = jax.jit(make_train_step(config, graphdef, tx, 1), donate_argnums=0,
                   out_shardings=(shardings, None)).lower(state, batch).compile(FAST)

  # Gradients lie as the parameters do, though nobody asks for it; moments as `abstract_state` says.
  params, grads = trees.flatten(state.params), trees.flatten(gradients.output_shardings)
  for path, p in params.items():
    assert grads[path].is_equivalent_to(p.sharding, p.ndim), (path, grads[path], p.sharding)
  moments = [s for s in jax.tree.leaves(state.opt_state) if s.ndim]
  expected = 2 * list(params.values())
  assert sorted((m.shape, str(m.sharding.spec)) for m in moments) == sorted(
      (p.shape, str(p.sharding.spec)) for p in expected)
  for got, asked in zip(jax.tree.leaves(step.output_shardings[0]), jax.tree.leaves(state)):
    assert got.is_equivalent_to(asked.sharding, asked.ndim)
  # No weight of any size is whole on a device: every matrix is cut along fsdp or tensor, an
  # expert's along expert too.
  for path, p in (params | trees.flatten(state.frozen)).items():
    axes = {part for part in p.sharding.spec if part}
    if p.size >= 4096 and path.split("/")[-1] in ("kernel", "embedding", "gate", "up", "down"):
      assert axes & {"fsdp", "tensor"}, (path, p)
      assert "expert" in axes or "experts/" not in path or "router" in path, path


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_cut_and_never_put_together_again(family, tmp_path):
  here = pathlib.Path(__file__)
  env = os.environ | {"JAX_NUM_CPU_DEVICES": "8",
                      "PYTHONPATH": f"{here.parent}{os.pathsep}{here.parents[2]}"}
  # A cached program says nothing while it is loaded.
  env |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}
  done = subprocess.run([sys.executable, "-c", f"from test_sharding import check; "
                         f"check({family!r}, {str(tmp_path)!r})"],
                        env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "nvoluntary" not in done.stderr and "replicat" not in done.stderr, done.stderr
