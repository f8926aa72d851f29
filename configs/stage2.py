"""Stage 2, instruction tuning: the LLM joins in, the towers stay frozen (1.5 M conversations).

    python launch/train.py --config=configs/stage2.py:mgm-7b --workdir=work_dirs/mgm-7b \
        --config.init_from=work_dirs/mgm-7b-stage1

A folder in place of the preset is a checkpoint whose model is trained: configs/stage2.py:DIR.
Other data: --config.data.path=FILE --config.data.image_root=FOLDER.

configs/stage2.py:mgm-7b,mixed sees documents in high definition (672/1536, 2880 visual tokens) and
everything else at 336/768: rows of one resolution share a batch, the two compiled steps take turns.
"""
from mgjax.train.recipes import (
    FINETUNE_ROWS,
    TUNE_TEXT,
    base_config,
    finetune_data,
    mix_resolutions,
    preset_of,
    tune,
)


def get_config(arg: str = "mgm-7b"):
  preset, _, more = arg.partition(",")
  if more not in ("", "mixed"):
    raise ValueError(f"{arg!r}: expected a preset, or a preset and ',mixed'")
  chosen = preset_of(preset)
  config = base_config(preset)
  finetune_data(config, chosen)
  if more:
    mix_resolutions(config, ("documents and charts", "OCR-VQA"), **FINETUNE_ROWS)
  config.optimizer.table = tune(chosen.projector_multiplier) if chosen.model.vision else TUNE_TEXT
  config.checkpoint.every = 1000
  return config
