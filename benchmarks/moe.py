"""A Mixtral-shaped layer of experts (8, two a token): grouped products against the dense form that
computes every expert for every token; and the same compiled for a TPU slice.

    python benchmarks/moe.py [--width 2048 --mlp 7168 --tokens 256]
    python benchmarks/moe.py --compile v5p:2x2x2     # needs `pip install -e '.[tpu]'`
"""
import argparse
import collections
import os
import re

import jax
import jax.numpy as jnp
from flax import nnx
from timing import seconds

from mgjax.checkpoint import abstract_params
from mgjax.config import DecoderConfig
from mgjax.models.moe import Experts, route
from mgjax.sharding import batch_sharding, make_mesh, mesh_context


def dense(module: Experts, x: jax.Array) -> jax.Array:
  """Every expert for every token, weighted by 0 where it was not chosen."""
  k, experts = module.config.experts_per_token, module.config.experts
  weights, chosen = route(module.router(x), k)
  share = jnp.sum(jax.nn.one_hot(chosen, experts) * weights[..., None], axis=-2)  # [B, L, E]
  rows = x.reshape(-1, x.shape[-1])
  y = 0
  for e in range(experts):
    gate, up, down = (w[e].astype(x.dtype) for w in (module.gate, module.up, module.down))
    y += ((jax.nn.silu(rows @ gate) * (rows @ up)) @ down) * share.reshape(-1, experts)[:, e:e + 1]
  return y.reshape(x.shape)


def measure(config: DecoderConfig, tokens: int):
  with mesh_context(make_mesh(devices=jax.devices()[:1])):
    build = lambda: Experts(config, jax.nn.silu, dtype=jnp.float32, rngs=nnx.Rngs(0))
    module = build()
    x = jax.random.normal(jax.random.key(0), (1, tokens, config.width))
    forms = {"grouped": lambda m, x: m(x)[0], "dense": dense}
    first = None
    for what, wrap in (("forward", lambda f: f), ("forward + backward", lambda f: jax.grad(
        lambda m, x: jnp.sum(jnp.square(f(m, x))), (0, 1)))):
      for name, form in forms.items():
        time = seconds(jax.jit(wrap(form)), module, x, repeats=3)
        first = time if name == "grouped" else first
        print(f"{what}, {name}: {time * 1e3:.0f} ms ({time / first:.2f}x)", flush=True)
    off = jnp.abs(jax.jit(forms["grouped"])(module, x) - jax.jit(dense)(module, x)).max()
    print(f"largest difference {off:.1e}")


def compile_for(topology: str, config: DecoderConfig, tokens: int):
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  jax.config.update("jax_platforms", "cpu")
  from jax.experimental import topologies
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  mesh = make_mesh({"expert": config.experts, "fsdp": -1}, devices)
  with mesh_context(mesh):
    build = lambda: Experts(config, jax.nn.silu, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graphdef, params = abstract_params(build, mesh)
    rows = mesh.shape["fsdp"]
    x = jax.ShapeDtypeStruct((rows, tokens // rows, config.width), jnp.bfloat16,
                             sharding=batch_sharding(mesh))
    loss = lambda params, x: jnp.sum(jnp.square(nnx.merge(graphdef, params)(x)[0].astype(float)))
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile()
  memory, text = compiled.memory_analysis(), compiled.as_text()
  kinds = collections.Counter(re.findall(
      r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text))
  print(f"compiled for {topology}, mesh {dict(mesh.shape)}: forward + backward of {tokens} tokens")
  print(f"a chip: parameters {memory.argument_size_in_bytes / 2**30:.2f} GiB, temporary "
        f"{memory.temp_size_in_bytes / 2**30:.2f} GiB; collectives {dict(kinds)}")


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  for name, value in (("width", 2048), ("mlp", 7168), ("tokens", 256)):
    parser.add_argument(f"--{name}", type=int, default=value)
  parser.add_argument("--compile", metavar="TOPOLOGY")
  args = parser.parse_args()
  config = DecoderConfig(width=args.width, mlp_width=args.mlp, experts=8, experts_per_token=2)
  if args.compile:
    compile_for(args.compile, config, args.tokens)
  else:
    measure(config, args.tokens)


if __name__ == "__main__":
  main()
