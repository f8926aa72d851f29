"""Stage 1, alignment: projector and mining learn to speak to a frozen LLM (1.2 M captions).

    python launch/train.py --config=configs/stage1.py:mgm-7b --workdir=work_dirs/mgm-7b-stage1 \
        --config.init_from=checkpoints/start-7b
"""
from mgjax.presets import find
from mgjax.train.recipes import ALIGN, base_config


def get_config(preset: str = "mgm-7b"):
  if find(preset).model.grid > 1:
    raise ValueError(f"preset {preset!r}: high definition begins in stage 2; align its namesake "
                     f"without -hd here, and start configs/stage2.py:{preset} from that")
  config = base_config(preset)
  config.data.path = "data/MGM-Pretrain/mgm_pretrain.json"
  config.data.image_root = "data/MGM-Pretrain"
  config.data.template = find(preset).align_template
  config.data.aspect = "square"
  config.data.truncate = True
  config.data.batch_size = 256
  config.chat_aspect = "pad"
  config.optimizer.learning_rate = 1e-3
  config.optimizer.table = ALIGN
  config.checkpoint.every = 1000
  return config
