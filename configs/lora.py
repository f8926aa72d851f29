"""Stage 2 with LoRA: adapters beside the frozen LLM's layers, where the whole LLM does not fit.

    python launch/train.py --config=configs/lora.py:mgm-7b --workdir=work_dirs/mgm-7b-lora \
        --config.init_from=work_dirs/mgm-7b-stage1

Any checkpoint can be the base; a folder in place of the preset is one, whose model is trained.
Other data: --config.data.path=FILE --config.data.image_root=FOLDER.  Smaller still:
--config.lora.base=int8 (or int4) --config.lora.rank=16 --config.accumulate=32

Targets, rank, alpha and dropout are the original's (R4.7), which has no script for it: the learning
rate is ten times that of the whole LLM, as in LLaVA's scripts, and the projector keeps its own.
"""
from mgjax.train.recipes import base_config, finetune_data, preset_of, tune_adapters

FASTER = 10.0  # adapters learn, than the LLM itself would


def get_config(preset: str = "mgm-7b"):
  chosen = preset_of(preset)
  config = base_config(preset)
  finetune_data(config, chosen)
  config.lora.rank = 64
  if chosen.model.decoder.experts:
    config.lora.pattern = "^decoder/blocks/(q|k|v|out)$"
  config.optimizer.learning_rate = FASTER * chosen.learning_rate
  config.optimizer.table = tune_adapters(chosen.model.vision is not None,
                                         chosen.projector_multiplier / FASTER)
  config.checkpoint.every = 1000
  return config
