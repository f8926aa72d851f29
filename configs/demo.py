"""The real recipe in miniature, from nothing, on a CPU: what patch info mining is for.

    python launch/train.py --config=configs/demo.py --workdir=work_dirs/demo        # half an hour
    python launch/train.py --config=configs/demo.py:quick --workdir=work_dirs/quick  # minutes

Photographs with small signs: the low-resolution view (56 px) shows that there is a sign and its
colour, only the high-resolution one (128 px) what it says.  Nothing is downloaded, so what the real
recipe takes from the shelf is trained first: the two image towers (on captions), the language model
(on scenes written as text).  Then stage 1 and stage 2 as in configs/stage1.py and stage2.py, once
with mining and once for a twin that has the low-resolution tower alone and as many visual tokens.
configs/ablation.py takes the comparison further.
"""
import dataclasses

from ml_collections import ConfigDict

from mgjax.demo.runs import SIZES, language, stage, tower
from mgjax.demo.world import World
from mgjax.presets import find
from mgjax.train.recipes import ALIGN, tune

FULL = dict(hr_tower=1800, lr_tower=400, language=2000, stage1=600, stage2=700)
QUICK = dict(hr_tower=100, lr_tower=30, language=100, stage1=30, stage2=30)
MINING, TWIN = find("demo").model, find("demo-lr").model


def get_config(size: str = "full"):
  steps = {"full": FULL, "quick": QUICK}[size]
  config = ConfigDict()
  config.world = dataclasses.asdict(World())
  config.sizes = dataclasses.asdict(SIZES[size])
  config.runs = ConfigDict()
  config.runs.hr_tower = tower(MINING, "vision_hr", "crops.json", steps["hr_tower"], hr_size=32)
  config.runs.lr_tower = tower(MINING, "vision", "captions.json", steps["lr_tower"], hr_size=128)
  config.runs.language = language(MINING, steps["language"])
  shelf = "vision=lr_tower,decoder=language"
  for suffix, model, start in (("", MINING, f"vision_hr=hr_tower,{shelf}"), ("_twin", TWIN, shelf)):
    config.runs["stage1" + suffix] = stage(model, "captions.json", steps["stage1"], 2e-3, ALIGN,
                                           start, max_length=64)
    config.runs["stage2" + suffix] = stage(model, "instruct.json", steps["stage2"], 1e-3, tune(),
                                           "stage1" + suffix)
  config.order = ("hr_tower", "lr_tower", "language", "stage1", "stage2", "stage1_twin",
                  "stage2_twin")
  config.compare = (("mining", ("stage2",)), ("low resolution alone", ("stage2_twin",)))
  config.report = "demo"
  return config
