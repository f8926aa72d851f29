"""The yardstick "mid": 68.8 M parameters, batch 2, 125 text ids + 576 visual tokens, float32.

    python benchmarks/mid.py

The original (PyTorch 2.13, 2 cores, float32) took: train step 7.0 s, encode_images 2.3-2.5 s,
128 new tokens in 3.8-4.4 s (decode 44-54 tokens/s), 3.1 GiB.
"""
import argparse
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from timing import seconds

from mgjax import trees
from mgjax.data.config import DataConfig
from mgjax.infer.engine import Engine, Prompt
from mgjax.infer.sampling import Sampling
from mgjax.models import images as views
from mgjax.models.convnext import concatenated_features
from mgjax.models.remat import RematConfig
from mgjax.presets import find
from mgjax.sharding import make_mesh, mesh_context
from mgjax.train.config import RunConfig
from mgjax.train.optimizer import OptimizerConfig, Row, make_optimizer
from mgjax.train.state import abstract_state, init_state
from mgjax.train.step import make_train_step

ROWS, TEXT = 2, 125


def batch_of(config, rng):
  """A stage-2 batch: one picture a row, then text, every text token trained."""
  t, length = config.visual_tokens, config.visual_tokens + TEXT
  index = np.concatenate([np.full(10, -1), np.arange(t), np.full(TEXT - 10, -1)])
  row = lambda x: np.tile(np.asarray(x, np.int32), (ROWS, 1))
  return {"tokens": rng.integers(0, 32000, (ROWS, length), dtype=np.int32),
          "visual_index": row(index), "segment_ids": row(np.ones(length)),
          "positions": row(np.arange(length)),
          "targets": rng.integers(0, 32000, (ROWS, length), dtype=np.int32),
          "loss_mask": row(index < 0).astype(bool),
          "images": rng.integers(0, 256, (ROWS, 1, 768, 768, 3), dtype=np.uint8)}


def peak_gib() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  parser.add_argument("--remat", default="nothing_saveable")
  args = parser.parse_args()
  preset = find("mid")
  config, rng = preset.model, np.random.default_rng(0)
  run = RunConfig(
      config, DataConfig("", batch_size=ROWS), "", dtype=args.dtype, frozen_dtype=args.dtype,
      remat=RematConfig(*[args.remat] * 3), optimizer=OptimizerConfig(
          2e-5, (Row("^(mining|projector|decoder)/"), Row("", None))))
  mesh = make_mesh((1, 1, 1, 1), jax.devices()[:1])
  with mesh_context(mesh):
    tx = make_optimizer(run.optimizer, 100)
    graphdef, abstract = abstract_state(run, tx, mesh)
    state, _ = init_state(run, tx, abstract)
    batch = jax.tree.map(jnp.asarray, batch_of(config, rng))
    step = jax.jit(make_train_step(run, graphdef, tx, 100), donate_argnums=0)
    compiled = step.lower(state, batch).compile()
    times = []
    for _ in range(4):
      start = time.perf_counter()
      state, metrics = compiled(state, batch)
      jax.block_until_ready((state, metrics))
      times.append(time.perf_counter() - start)
    print(f"train step            {sorted(times)[1]:6.2f} s   (original 7.0 s)")
    print(f"peak memory after it  {peak_gib():6.2f} GiB (original 3.1 GiB)")

    model = nnx.merge(graphdef, trees.merge(state.params, state.frozen))
    part = lambda name, f, *a: print(f"  {name:<20}{seconds(jax.jit(f), *a, repeats=3):6.2f} s")
    pixels = batch["images"][:, 0]
    hr = views.normalize(pixels)
    tiles = views.low_resolution_tiles(hr, config).reshape(-1, 336, 336, 3)
    tokens = jax.jit(lambda m, x: m(x))(model.vision, tiles)
    maps = jax.jit(lambda m, x: m(x))(model.vision_hr, hr)
    features = jax.jit(concatenated_features)(maps)
    part("encode_images", lambda m, x: m.encode_images(x), model, pixels)
    part("CLIP", lambda m, x: m(x), model.vision, tiles)
    part("ConvNeXt", lambda m, x: m(x), model.vision_hr, hr)
    part("upsample, concatenate", concatenated_features, maps)
    part("mining", lambda m, x, y: m(x, [y]), model.mining, tokens, features)
    part("decoder and logits", lambda m, b: m.decoder.logits(m.decoder(
        m.decoder.embed(b["tokens"]), b["positions"], b["segment_ids"])[0]), model, batch)

    engine = Engine(model, mesh=mesh, max_length=1024)
    visual = engine.encode_images(np.asarray(pixels[:1]))
    prompt = Prompt(np.asarray(batch["tokens"][0]), np.asarray(batch["visual_index"][0]), visual)
    for new in (1, 129):
      list(engine.generate(prompt, Sampling(max_new_tokens=new)))
    timed = {}
    for new in (1, 129):
      start = time.perf_counter()
      engine.encode_images(np.asarray(pixels[:1]))
      list(engine.generate(prompt, Sampling(max_new_tokens=new)))
      timed[new] = time.perf_counter() - start
    print(f"image + prefill       {timed[1]:6.2f} s")
    print(f"128 new tokens in all {timed[129]:6.2f} s   (original 3.8-4.4 s)")
    print(f"decode                {128 / (timed[129] - timed[1]):6.1f} tokens/s "
          "(original 44-54 tokens/s)")


if __name__ == "__main__":
  main()
