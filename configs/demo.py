"""The real recipe in miniature, from nothing, on a CPU: what patch info mining is for.

    python launch/train.py --config=configs/demo.py --workdir=work_dirs/demo        # half an hour
    python launch/train.py --config=configs/demo.py:quick --workdir=work_dirs/quick  # minutes

Photographs with small signs: the low-resolution view (56 px) shows that there is a sign and its
colour, only the high-resolution one (128 px) what it says.  Nothing is downloaded, so what the real
recipe takes from the shelf is trained first: the two image towers (on captions), the language model
(on scenes written as text).  Then stage 1 and stage 2 as in configs/stage1.py and stage2.py, once
with mining and once for a twin that has the low-resolution tower alone and as many visual tokens.
"""
import dataclasses

from ml_collections import ConfigDict

from mgjax.demo.make import Sizes
from mgjax.demo.world import World
from mgjax.train.recipes import ALIGN, base_config, tune

FULL = dict(hr_tower=1800, lr_tower=400, language=2000, stage1=600, stage2=700)
LENGTH = 136  # a scene and five questions about it
QUICK = dict(hr_tower=100, lr_tower=30, language=100, stage1=30, stage2=30)


def get_config(size: str = "full"):
  steps = {"full": FULL, "quick": QUICK}[size]
  config = ConfigDict()
  config.world = dataclasses.asdict(World())
  sizes = {"full": Sizes(crops=40_000, text=40_000, scenes=12_000, held_out=480),
           "quick": Sizes(crops=2_000, text=4_000, scenes=1_000, held_out=60)}
  config.sizes = dataclasses.asdict(sizes[size])
  config.runs = ConfigDict()
  config.runs.hr_tower = tower("vision_hr", "crops.json", steps["hr_tower"], hr_size=32)
  config.runs.lr_tower = tower("vision", "captions.json", steps["lr_tower"], hr_size=128)
  config.runs.language = language(steps["language"])
  for suffix, twin in (("", False), ("_twin", True)):
    config.runs["stage1" + suffix] = stage(
        "captions.json", 64, steps["stage1"], 2e-3, ALIGN, twin,
        "vision=lr_tower,decoder=language")
    config.runs["stage2" + suffix] = stage(
        "instruct.json", LENGTH, steps["stage2"], 1e-3, tune(), twin, "stage1" + suffix)
  config.order = ("hr_tower", "lr_tower", "language", "stage1", "stage2", "stage1_twin",
                  "stage2_twin")
  config.compare = (("mining", "stage2"), ("low resolution alone", "stage2_twin"))
  return config


def run(steps: int, batch_size: int, max_length: int, learning_rate: float, preset: str = "demo"):
  """What all runs of the demo share."""
  config = base_config(preset)
  config.steps = steps
  config.data.batch_size, config.data.max_length = batch_size, max_length
  config.data.scan_limit = 1000
  config.optimizer.learning_rate = learning_rate
  config.optimizer.b2, config.optimizer.clip_norm = 0.95, 1.0
  config.optimizer.warmup_ratio = 0.05
  config.mesh.fsdp = 1
  config.remat.update(decoder="none", towers="none", mining="none")
  config.dtype = config.frozen_dtype = "float32"
  config.checkpoint.every = 500
  return config


def tower(name: str, path: str, steps: int, hr_size: int):
  config = run(steps, 64, 24, 3e-3 if name == "vision_hr" else 1e-3)
  config.objective = f"tags:{name}"
  config.data.path, config.data.template = path, "plain"
  config.data.hr_size, config.data.tokens_per_image = hr_size, 1
  config.optimizer.weight_decay = 0.05
  return config


def language(steps: int):
  config = run(steps, 24, LENGTH, 3e-3)
  config.data.path, config.data.images_per_row = "text.json", 0
  config.optimizer.table = (("^decoder/", 1.0), ("", None))
  return config


def stage(path: str, length: int, steps: int, learning_rate: float, table, twin: bool, init_from):
  config = run(steps, 32, length, learning_rate, "demo-lr" if twin else "demo")
  config.data.path, config.optimizer.table, config.init_from = path, table, init_from
  if table is ALIGN and not twin:
    config.init_from = f"vision_hr=hr_tower,{init_from}"
  return config
