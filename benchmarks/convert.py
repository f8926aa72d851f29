"""Speed and memory of the conversion, both ways, next to a plain copy of the same bytes.

    python benchmarks/convert.py [--gigabytes 6] [--folder DIR]

A checkpoint with the real towers and as many Vicuna-7B layers as fit, bfloat16, in three shards.
The copy ends when its bytes are on the disk, and so do the conversions.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from conversion import mapping
from conversion.store import parameter_shapes
from conversion.tensors import INDEX, SafetensorsWriter, plan_shards
from mgjax.config import DecoderConfig, ModelConfig

BF16 = np.dtype(ml_dtypes.bfloat16)
CONFIG = {
    "model_type": "mgm", "architectures": ["MGMLlamaForCausalLM"], "vocab_size": 32000,
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32,
    "intermediate_size": 11008, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    "mm_vision_tower": "zoo/clip-vit-large-patch14-336", "mm_vision_tower_aux": "zoo/convnext",
    "mm_hidden_size": 1024, "mm_hidden_size_aux": 2880, "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2, "image_size_aux": 768, "tokenizer_model_max_length": 2048}


def make_checkpoint(folder: Path, nbytes: float) -> int:
  """Writes the checkpoint; returns the bytes of its largest tensor."""
  layers = max(1, round((nbytes - 1.55e9) / 405e6))
  model = ModelConfig(decoder=DecoderConfig(depth=layers))
  shapes, rng = parameter_shapes(model), np.random.default_rng(0)
  there = {r.hf: r.form.there(shapes[r.path][len(r.at):]) for r in mapping.all_rows(model)}
  sizes = {n: int(np.prod(s)) * 2 for n, s in there.items()}
  shards = list(plan_shards(sizes, -(-sum(sizes.values()) // 3)))
  folder.mkdir(parents=True)
  noise, weight_map = rng.normal(size=64 << 20).astype(BF16), {}
  for i, names in enumerate(shards):
    file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    writer = SafetensorsWriter(folder / file, {n: (there[n], BF16) for n in names})
    for name in names:
      writer.write(name, np.resize(noise, there[name]))
      weight_map[name] = file
    writer.close()
  (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
  (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
  return max(sizes.values())


def timed(*command: str) -> tuple[float, float]:
  """Seconds until the bytes are on the disk, and peak memory of the process in bytes."""
  os.sync()
  started = time.perf_counter()
  process = subprocess.Popen(command)
  _, status, usage = os.wait4(process.pid, 0)
  os.sync()
  if status:
    sys.exit(f"{' '.join(command)}: failed")
  return time.perf_counter() - started, usage.ru_maxrss * 1024


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--gigabytes", type=float, default=6)
  parser.add_argument("--folder", type=Path, default=Path("work_dirs/conversion"))
  args = parser.parse_args()
  root = args.folder
  shutil.rmtree(root, ignore_errors=True)
  largest = make_checkpoint(root / "hf", args.gigabytes * 1e9)
  size = sum(f.stat().st_size for f in (root / "hf").iterdir())
  bound = 3 * largest + 1e9
  print(f"{size / 1e9:.2f} GB, largest tensor {largest / 1e9:.3f} GB, bound {bound / 1e9:.2f} GB")
  seconds, _ = timed("cp", "-r", str(root / "hf"), str(root / "copy"))
  copied = size / seconds
  print(f"cp: {copied / 1e6:.0f} MB/s")
  shutil.rmtree(root / "copy")
  for what, source, target in (("from_hf", "hf", "run"), ("to_hf", "run", "back")):
    seconds, peak = timed(sys.executable, "-m", f"conversion.{what}", "--checkpoint",
                          str(root / source), "--output", str(root / target))
    print(f"{what}: {size / seconds / 1e6:.0f} MB/s, {size / seconds / copied:.0%} of the copy; "
          f"peak memory {peak / 1e9:.2f} GB, {peak / bound:.0%} of the bound")
  subprocess.run([sys.executable, "-m", "conversion.check", "--checkpoint", str(root / "back"),
                  "--reference", str(root / "hf")], check=True)
  shutil.rmtree(root)


if __name__ == "__main__":
  main()
