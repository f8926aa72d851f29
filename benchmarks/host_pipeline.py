"""Host side at full size: JPEG to a padded 768-pixel picture, and whole batches with text.

    python benchmarks/host_pipeline.py [--metrics work_dirs/demo/stage2/metrics.jsonl]
"""
import argparse
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mgjax.data.config import DataConfig
from mgjax.data.images import load_image
from mgjax.data.pipeline import make_pipeline
from mgjax.data.tokenizer import load_tokenizer

TOKENIZER = Path(__file__).parents[1] / "tests" / "data" / "cases" / "small_yi"


def photograph(rng) -> bytes:
  """A 1000x700 JPEG with the detail of a photograph: smooth shapes and noise."""
  small = Image.fromarray(rng.integers(0, 256, (35, 50, 3), np.uint8)).resize((1000, 700))
  noisy = np.asarray(small, np.int16) + rng.normal(0, 8, (700, 1000, 3)).astype(np.int16)
  buffer = io.BytesIO()
  Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
  return buffer.getvalue()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--metrics", help="metrics.jsonl of a run, for what its step consumes")
  args = parser.parse_args()
  rng = np.random.default_rng(0)
  with tempfile.TemporaryDirectory() as folder:
    records = []
    for i in range(64):
      Path(folder, f"{i}.jpg").write_bytes(photograph(rng))
      records.append({"id": str(i), "image": f"{i}.jpg", "conversations": [
          {"from": "human", "value": "<image>\nWhat is this?"},
          {"from": "gpt", "value": "A picture of many colours. " * 10}]})
    Path(folder, "data.json").write_text(json.dumps(records))
    start = time.perf_counter()
    for i in range(64):
      load_image(Path(folder, f"{i}.jpg"), 768, "pad")
    single = 64 / (time.perf_counter() - start)
    print(f"one thread, decode + pad + resize to 768: {single:6.1f} images/s")
    data = make_pipeline(DataConfig(f"{folder}/data.json", folder, "chatml_direct", batch_size=16),
                         load_tokenizer(TOKENIZER))
    batches = iter(data)
    next(batches)
    start = time.perf_counter()
    for _ in range(8):
      next(batches)
    whole = 8 * 16 / (time.perf_counter() - start)
    batches.close()
    print(f"whole pipeline, 4 threads:                {whole:6.1f} images/s")
  if args.metrics:
    lines = [json.loads(x) for x in Path(args.metrics).read_text().splitlines()]
    used = statistics.median(x["images_per_s"] for x in lines)
    print(f"the run's step consumes:                  {used:6.1f} images/s (its own size)")


if __name__ == "__main__":
  main()
