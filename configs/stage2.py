"""Stage 2, instruction tuning: the LLM joins in, the towers stay frozen (1.5 M conversations).

    python launch/train.py --config=configs/stage2.py:mgm-7b --workdir=work_dirs/mgm-7b \
        --config.init_from=work_dirs/mgm-7b-stage1

A folder in place of the preset is a checkpoint whose model is trained: configs/stage2.py:DIR.
"""
from mgjax.train.recipes import TUNE_TEXT, base_config, preset_of, tune


def get_config(preset: str = "mgm-7b"):
  chosen = preset_of(preset)
  config = base_config(preset)
  config.data.path = "data/MGM-Finetune/mgm_instruction.json"
  config.data.image_root = "data/MGM-Finetune"
  config.data.aspect = "pad"
  config.data.truncate = True
  config.data.batch_size = 128
  config.optimizer.table = tune(chosen.projector_multiplier) if chosen.model.vision else TUNE_TEXT
  config.checkpoint.every = 1000
  return config
