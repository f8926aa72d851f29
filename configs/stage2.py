"""Stage 2, instruction tuning: the LLM joins in, the towers stay frozen (1.5 M conversations).

    python launch/train.py --config=configs/stage2.py:mgm-7b --workdir=work_dirs/mgm-7b \
        --config.init_from=work_dirs/mgm-7b-stage1
"""
from mgjax.presets import find
from mgjax.train.recipes import base_config, tune


def get_config(preset: str = "mgm-7b"):
  config = base_config(preset)
  config.data.path = "data/MGM-Finetune/mgm_instruction.json"
  config.data.image_root = "data/MGM-Finetune"
  config.data.aspect = "pad"
  config.data.truncate = True
  config.data.batch_size = 128
  config.optimizer.table = tune(find(preset).projector_multiplier)
  config.checkpoint.every = 1000
  return config
