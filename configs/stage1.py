"""Stage 1, alignment: projector and mining learn to speak to a frozen LLM (1.2 M captions).

    python launch/train.py --config=configs/stage1.py:mgm-7b --workdir=work_dirs/mgm-7b-stage1 \
        --config.init_from=checkpoints/start-7b

A folder in place of the preset is a checkpoint whose model is trained: configs/stage1.py:DIR.
"""
from mgjax.train.recipes import ALIGN, base_config, preset_of


def get_config(preset: str = "mgm-7b"):
  chosen = preset_of(preset)
  if chosen.model.vision is None:
    raise ValueError(f"{preset!r} is a language model alone; convert it together with its towers")
  if chosen.model.grid > 1:
    raise ValueError(f"preset {preset!r}: high definition begins in stage 2; align its namesake "
                     f"without -hd here, and start configs/stage2.py:{preset} from that")
  config = base_config(preset)
  config.data.path = "data/MGM-Pretrain/mgm_pretrain.json"
  config.data.image_root = "data/MGM-Pretrain"
  config.data.template = chosen.align_template
  config.data.aspect = "square"
  config.data.truncate = True
  config.data.batch_size = 256
  config.chat_aspect = "pad"
  config.optimizer.learning_rate = 1e-3
  config.optimizer.table = ALIGN
  config.checkpoint.every = 1000
  return config
