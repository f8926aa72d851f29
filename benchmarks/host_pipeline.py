"""Host side at full size: JPEG to packed 768-pixel batches, against a bare Pillow loop that
decodes, pads and resizes the same files, and against torch's DataLoader doing the same work.

    python benchmarks/host_pipeline.py [--workers 0 1 2] [--seconds 20]

All in one run, taking turns.  "a core": images/s over the CPU seconds that all processes used.
"""
import argparse
import json
import multiprocessing
import os
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mgjax.data.config import DataConfig
from mgjax.data.images import PAD_COLOUR
from mgjax.data.pipeline import make_pipeline
from mgjax.data.tokenizer import load_tokenizer

TOKENIZER = Path(__file__).parents[1] / "tests" / "data" / "cases" / "small_yi"
SIZE, PICTURES, ROUNDS = 768, 64, 3


def photograph(rng, path: Path) -> None:
  """A 1000x700 JPEG with the detail of a photograph: smooth shapes and noise."""
  small = Image.fromarray(rng.integers(0, 256, (35, 50, 3), np.uint8)).resize((1000, 700))
  noisy = np.asarray(small, np.int16) + rng.normal(0, 8, (700, 1000, 3)).astype(np.int16)
  Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(path, quality=90)


def bare(path: str) -> np.ndarray:
  """The same decode, pad and resize, written down plainly."""
  image = Image.open(path).convert("RGB")
  side = max(image.size)
  canvas = Image.new("RGB", (side, side), PAD_COLOUR)
  canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
  return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


class Files:
  """For torch's DataLoader."""

  def __init__(self, paths):
    self.paths = paths

  def __len__(self):
    return len(self.paths)

  def __getitem__(self, i):
    return bare(self.paths[i])


def cpu_seconds() -> float:
  """Of this process and its workers."""
  own = resource.getrusage(resource.RUSAGE_SELF)
  ticks = 0
  for child in multiprocessing.active_children():
    fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    ticks += int(fields[11]) + int(fields[12])
  return own.ru_utime + own.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def measure(seconds: float, start) -> tuple[float, float]:
  """(images/s, images per CPU second) of the iterator of counts that `start` gives with what closes
  it, once it runs: what was made ahead is taken first."""
  counts, close = start()
  for _ in range(12):
    next(counts)
  begun, cpu, done = time.perf_counter(), cpu_seconds(), 0
  while time.perf_counter() - begun < seconds:
    done += next(counts)
  took, used = time.perf_counter() - begun, cpu_seconds() - cpu
  close()
  return done / took, done / used


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--seconds", type=float, default=12.0, help="of each measurement")
  args = parser.parse_args()
  rng = np.random.default_rng(0)
  with tempfile.TemporaryDirectory() as folder:
    paths = [f"{folder}/{i}.jpg" for i in range(PICTURES)]
    for path in paths:
      photograph(rng, Path(path))
    records = [{"id": str(i), "image": os.path.basename(path), "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?"},
        {"from": "gpt", "value": "A picture of many colours. " * 10}]}
        for i, path in enumerate(paths * 8)]
    Path(folder, "data.json").write_text(json.dumps(records))
    tokenizer = load_tokenizer(TOKENIZER)

    def pillow():
      return ((bare(random.choice(paths)) is not None for _ in iter(int, 1)), lambda: None)

    def pipeline(workers):
      def start():
        data = make_pipeline(
            DataConfig(f"{folder}/data.json", folder, "chatml_direct", batch_size=4,
                       batching="packed", row_length=3456, images_per_row=4, workers=workers,
                       threads=1 if workers else 2), tokenizer)
        batches = iter(data)
        return (int((b["sample_index"] >= 0).sum()) for b in batches), batches.close
      return start

    def loader(workers):
      def start():
        from torch.utils.data import DataLoader
        batches = iter(DataLoader(Files(paths * 1000), batch_size=16, num_workers=workers))
        return (len(b) for b in batches), getattr(batches, "_shutdown_workers", lambda: None)
      return start

    ways = {"bare Pillow loop, one thread": pillow}
    for workers in args.workers:
      kind = f"{workers} workers" if workers else "2 threads, no workers"
      ways[f"packed batches, {kind}"] = pipeline(workers)
      ways[f"torch DataLoader, {workers} workers"] = loader(workers)
    rates = {name: [] for name in ways}
    for _ in range(ROUNDS):
      for name, start in ways.items():
        rates[name].append(measure(args.seconds, start))
  base = statistics.median(core for _, core in rates["bare Pillow loop, one thread"])
  print("                                     images/s   a core   of Pillow's")
  for name, measured in rates.items():
    rate, core = (statistics.median(x) for x in zip(*measured))
    print(f"{name:36} {rate:8.1f} {core:8.1f} {core / base:10.0%}")


if __name__ == "__main__":
  main()
