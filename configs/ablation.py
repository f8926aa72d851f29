"""The paper's ablation (its Tables 2 and 3) in the shape of the demo: what each part is good for.

    python launch/train.py --config=configs/ablation.py --workdir=work_dirs/ablation   # two hours
    python launch/train.py --config=configs/ablation.py:quick --workdir=work_dirs/ablation-quick

Mining or not, the size of the high-resolution view, the size of its encoder, and tokens in high
definition, all on the same photographs with signs (configs/demo.py) and from the same language
model and towers, trained once.  A seed decides what stages 1 and 2 draw: the first weights of
mining and projector, and the order of the samples.
"""
import dataclasses
from dataclasses import replace

from ml_collections import ConfigDict

from mgjax.config import ConvNextConfig
from mgjax.demo.runs import LENGTH, SIZES, language, stage, tower
from mgjax.demo.world import World
from mgjax.presets import find
from mgjax.train.recipes import ALIGN, tune

FULL = dict(hr_tower=1800, lr_tower=400, language=2000, stage1=600, stage2=700)
QUICK = dict(hr_tower=100, lr_tower=30, language=100, stage1=30, stage2=30)
SEEDS = (0, 1, 2)

DEMO = find("demo").model  # 16 tokens; views of 56 and 128 pixels
# The shelf: a tower serves every row that has its shape, at whatever size, as the paper's does.
TOWERS = {
    "hr_tower": DEMO.vision_hr,
    "hr_tower_small": ConvNextConfig(depths=(1, 1, 1, 1), widths=(16, 32, 48, 64)),
    "hr_tower_large": ConvNextConfig(depths=(2, 2, 4, 2), widths=(48, 96, 144, 192)),
}
# What stands in a row: the model, and the seeds it is trained with.
MODELS = {
    "alone": (replace(DEMO, vision_hr=None), SEEDS),
    "mining": (DEMO, SEEDS),
    "hr64": (replace(DEMO, hr_size=64), SEEDS[:1]),
    "hr96": (replace(DEMO, hr_size=96), SEEDS[:1]),
    "small": (replace(DEMO, vision_hr=TOWERS["hr_tower_small"]), SEEDS[:1]),
    "large": (replace(DEMO, vision_hr=TOWERS["hr_tower_large"]), SEEDS[:1]),
    "hd": (replace(DEMO, grid=2, global_view=True), SEEDS[:1]),  # 80 tokens; 112 and 128 pixels
}
# High definition begins in stage 2, from the stage 1 of a model without tiles (R4.3).
STAGE1_OF = {"hd": "hr64"}
# (row, model, axis): a model may stand under several axes.
ROWS = (
    ("56 px alone", "alone", "mining"),
    ("56 px, mining 128 px", "mining", "mining"),
    ("mining 64 px", "hr64", "size of the HR view"),
    ("mining 96 px", "hr96", "size of the HR view"),
    ("mining 128 px", "mining", "size of the HR view"),
    ("small (0.1 M)", "small", "HR encoder"),
    ("default (0.5 M)", "mining", "HR encoder"),
    ("large (1.7 M)", "large", "HR encoder"),
    ("56 px, mining 64 px", "hr64", "visual tokens"),
    ("56 px, mining 128 px", "mining", "visual tokens"),
    ("HD: 112 px, mining 128 px", "hd", "visual tokens"),
)


def get_config(size: str = "full"):
  steps = {"full": FULL, "quick": QUICK}[size]
  config = ConfigDict()
  # Signs of crops down to half the size: the tower also has to read the smaller views.
  config.world = dataclasses.asdict(World(nearness=(0.45, 1.35)))
  config.sizes = dataclasses.asdict(SIZES[size])
  config.runs = ConfigDict()
  for name, shape in TOWERS.items():
    config.runs[name] = tower(replace(DEMO, vision_hr=shape), "vision_hr", "crops.json",
                              steps["hr_tower"], hr_size=32)
  config.runs.lr_tower = tower(DEMO, "vision", "captions.json", steps["lr_tower"], hr_size=128)
  config.runs.language = language(DEMO, steps["language"])
  order = ["hr_tower", "lr_tower", "language"]
  for seed in SEEDS:
    for name, (model, seeds) in MODELS.items():
      if seed in seeds:
        pair = stages(name, model, steps, seed)
        config.runs.update(pair)
        order += [t for t, shape in TOWERS.items() if t not in order and shape == model.vision_hr]
        order += pair
  config.order = tuple(order)
  config.compare = tuple((label, tuple(f"stage2_{name}_s{seed}" for seed in MODELS[name][1]), axis)
                         for label, name, axis in ROWS)
  config.report = "ablation"
  return config


def stages(name: str, model, steps: dict, seed: int):
  """Stage 1 and stage 2 of a model: run name -> run."""
  own, align = f"{name}_s{seed}", f"{STAGE1_OF.get(name, name)}_s{seed}"
  shelf = "vision=lr_tower,decoder=language"
  if model.vision_hr:
    shelf += "".join(f",vision_hr={t}" for t, shape in TOWERS.items() if shape == model.vision_hr)
  pair = {}
  if own == align:
    pair[f"stage1_{own}"] = stage(model, "captions.json", steps["stage1"], 2e-3, ALIGN, shelf,
                                  max_length=64)
  pair[f"stage2_{own}"] = stage(
      model, "instruct.json", steps["stage2"], 1e-3, tune(), f"stage1_{align}",
      max_length=LENGTH + model.visual_tokens - DEMO.visual_tokens)
  for config in pair.values():
    config.seed = config.data.seed = seed
  return pair
