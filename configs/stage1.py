"""Stage 1, alignment: projector and mining learn to speak to a frozen LLM (1.2 M captions).

    python launch/train.py --config=configs/stage1.py:mgm-7b --workdir=work_dirs/mgm-7b-stage1 \
        --config.init_from=checkpoints/start-7b

A folder in place of the preset is a checkpoint whose model is trained: configs/stage1.py:DIR.
Other data: --config.data.path=FILE --config.data.image_root=FOLDER.
"""
from mgjax.train.recipes import (
    ALIGN,
    PRETRAIN_PARTS,
    base_config,
    loaders,
    packed_rows,
    parts_of,
    preset_of,
)


def get_config(preset: str = "mgm-7b"):
  chosen = preset_of(preset)
  if chosen.model.vision is None:
    raise ValueError(f"{preset!r} is a language model alone; convert it together with its towers")
  if chosen.model.grid > 1:
    raise ValueError(f"preset {preset!r}: high definition begins in stage 2; align its namesake "
                     f"without -hd here, and start configs/stage2.py:{preset} from that")
  config = base_config(preset)
  config.data.sources = parts_of(
      "data/MGM-Pretrain/mgm_pretrain.json", "data/MGM-Pretrain", PRETRAIN_PARTS)
  config.data.template = chosen.align_template
  config.data.aspect = "square"
  config.data.truncate = True
  config.data.update(loaders())
  config.data.batching = "packed"
  config.data.update(packed_rows(chosen.model.visual_tokens, chosen.max_length, samples=256,
                                 text=160))
  config.chat_aspect = "pad"
  config.optimizer.learning_rate = 1e-3
  config.optimizer.table = ALIGN
  config.checkpoint.every = 1000
  return config
