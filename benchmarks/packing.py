"""What packing saves.

    python benchmarks/packing.py            # rows and batches of the paper's mixtures: seconds
    python benchmarks/packing.py --demo     # and steps/s of the demo's model, packed and padded

The mixtures are those of mgjax/data/mixtures.py.
"""
import argparse
import dataclasses
import tempfile
import time

import jax
import numpy as np

from mgjax.data.mixtures import STAGE1, STAGE2, draw
from mgjax.data.packing import WINDOW, group, pack


def padded_use(lengths, images, text, world: int, batch: int, grouped: bool) -> float:
  """Share of useful positions in the original's batches, each device's padded to its own longest:
  grouped by modality and length (R4.6) as in stage 2, or at random as in stage 1."""
  if not grouped:
    whole = lengths[:len(lengths) // batch * batch].reshape(-1, batch)
    return whole.sum() / (whole.max(1) * batch).sum()
  groups = group(np.arange(len(lengths)), text, images, world * batch, np.random.default_rng(0))
  useful = room = 0
  for members in groups:
    if len(members) < world * batch:
      continue
    dealt: list[list[int]] = [[] for _ in range(world)]
    totals = np.zeros(world)
    for i in members:  # longest first, to the device with the least so far
      d = int(np.argmin(totals))
      dealt[d].append(i)
      totals[d] = np.inf if len(dealt[d]) == batch else totals[d] + text[i]
    useful += lengths[members].sum()
    room += sum(batch * lengths[d].max() for d in dealt)
  return useful / room


def plan() -> None:
  """The table of both stages."""
  print("mixture          row x pictures   filled tokens  image slots  samples/row   us a sample")
  for name, table, visual, longest, row, slots, devices, batch in (
      ("stage 1", STAGE1, 576, 2048, 2944, 4, 16, 16),
      ("stage 2", STAGE2, 576, 2048, 3456, 4, 16, 8),
      ("stage 2, HD", STAGE2, 2880, 4096, 6400, 2, 32, 4)):
    lengths, images = draw(table, visual, longest)
    started = time.perf_counter()
    windows = [slice(at, at + WINDOW) for at in range(0, len(lengths), WINDOW)]
    rows = sum(len(pack(lengths[w], images[w], row, slots)) for w in windows)
    took = time.perf_counter() - started
    packed = lengths.sum() / rows / row
    print(f"{name:16} {row:5} x {slots}       {packed:12.1%} {images.sum() / rows / slots:12.1%} "
          f"{len(lengths) / rows:12.2f} {took / len(lengths) * 1e6:13.1f}")
    grouped = table is STAGE2
    original = padded_use(lengths, images, lengths - visual * images, devices, batch, grouped)
    print(f"{'':16} the original's padded batches ({devices} x {batch}, "
          f"{'grouped' if grouped else 'random'}): {original:.1%} useful; packed does "
          f"{packed / original:.2f} times as much in as many positions")
    print(f"{'':16} one sample a row of {longest} (static shapes): {lengths.mean() / longest:.1%}; "
          f"{packed * longest / lengths.mean():.2f} times")


def demo(steps: int) -> None:
  """Captions and instructions of the demo, its model from random numbers with frozen towers, as
  many samples a step: one a row of 136, and packed.  One after the other, and again."""
  import flax.nnx as nnx
  import jax.numpy as jnp
  import optax

  from mgjax import trees
  from mgjax.data.config import DataConfig
  from mgjax.data.pipeline import make_pipeline
  from mgjax.data.sources import Source
  from mgjax.data.tokenizer import load_tokenizer
  from mgjax.demo.make import Sizes, make
  from mgjax.demo.world import World
  from mgjax.models.mini_gemini import MiniGemini
  from mgjax.presets import find
  from mgjax.sharding import make_mesh, mesh_context
  from mgjax.train.step import batch_loss

  model = find("demo").model
  with tempfile.TemporaryDirectory() as folder, mesh_context(
      make_mesh((1, 1, 1, 1), jax.devices()[:1])):
    make(World(), folder, Sizes(crops=100, text=100, scenes=3000, held_out=12))
    tokenizer = load_tokenizer(f"{folder}/tokenizer")
    single = DataConfig(
        template="chatml_direct", max_length=136, hr_size=128, tokens_per_image=16, batch_size=32,
        scan_limit=0, sources=(Source(f"{folder}/captions.json", folder),
                               Source(f"{folder}/instruct.json", folder)))
    packed = dataclasses.replace(single, batching="packed", row_length=328, images_per_row=4,
                                 batch_size=8)
    graphdef, state = nnx.split(MiniGemini(model, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    start = trees.pure(state)
    towers = {k: start.pop(k) for k in ("vision", "vision_hr")}  # frozen, as in both stages
    tx = optax.adam(1e-3)

    @jax.jit
    def step(params, state, batch):
      def loss(params):
        total, terms = batch_loss(nnx.merge(graphdef, params | towers), batch, None)
        return total / terms
      value, gradient = jax.value_and_grad(loss)(params)
      updates, state = tx.update(gradient, state, params)
      return optax.apply_updates(params, updates), state, value

    for turn in range(2):
      for name, config in (("padded", single), ("packed", packed)):
        batches = iter(make_pipeline(config, tokenizer))
        params, state = start, tx.init(start)
        seconds, samples, losses = 0.0, 0, []
        for i in range(steps + 1):
          batch = next(batches)
          held = {k: jnp.asarray(v) for k, v in batch.items() if k != "sample_index"}
          began = time.perf_counter()
          params, state, value = step(params, state, held)
          losses.append(float(value))
          if i:  # the first compiles
            seconds += time.perf_counter() - began
            samples += int((batch["sample_index"] >= 0).sum())
        batches.close()
        positions = config.formats[0][0].rows * config.formats[0][0].length
        print(f"turn {turn + 1}, {name}: {steps / seconds:.2f} steps/s of {samples / steps:.1f} "
              f"samples in {positions} positions: {samples / seconds:.1f} samples/s; loss of the "
              f"last 20 steps {np.mean(losses[-20:]):.3f}")


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--demo", action="store_true")
  parser.add_argument("--steps", type=int, default=120, help="of the demo's model, each time")
  args = parser.parse_args()
  plan()
  if args.demo:
    demo(args.steps)


if __name__ == "__main__":
  main()
