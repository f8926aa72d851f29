"""What the paper's authors published for each model (R6.3), by the preset's name."""
from __future__ import annotations

from mgjax.config import ModelConfig
from mgjax.presets import PRESETS

# The paper's columns, as `Score.headline` names them.
COLUMNS = ("TextVQA", "MMBench", "MME perception", "MME cognition", "MM-Vet", "MMMU val",
           "MMMU test", "MathVista")
_ROWS = {
    "mgm-2b": (56.2, 59.8, 1341, 312, 31.1, 31.7, 29.1, 29.4),
    "mgm-7b": (65.2, 69.3, 1523, 316, 40.8, 36.1, 32.8, 31.4),
    "mgm-13b": (65.9, 68.5, 1565, 322, 46.0, 38.1, 33.5, 37.0),
    "mgm-8b": (67.6, 72.7, 1606, 341, 47.3, 38.2, 36.3, None),
    "mgm-8x7b": (69.2, 75.6, 1639, 379, 45.8, 41.8, 37.1, 41.8),
    "mgm-34b": (70.1, 79.6, 1666, 439, 53.0, 48.7, 43.6, 38.9),
    "mgm-7b-hd": (68.4, 65.8, 1546, 319, 41.3, 36.8, 32.9, 32.2),
    "mgm-13b-hd": (70.2, 68.6, 1597, 320, 50.5, 37.3, 35.1, 37.0),
    "mgm-8b-hd": (71.6, None, 1532, 357, None, 37.0, None, None),
    "mgm-8x7b-hd": (71.9, 74.7, 1633, 356, 53.5, 40.0, 37.0, 43.1),
    "mgm-34b-hd": (74.1, 80.6, 1659, 482, 59.3, 48.0, 44.9, 43.3),
}


def published(preset: str) -> dict[str, float]:
  """The published figures of a model, by column; none for a model that was not."""
  return {column: figure for column, figure in zip(COLUMNS, _ROWS.get(preset, ()))
          if figure is not None}


def preset_of(model: ModelConfig) -> str:
  """The published model that this is, "" if it is none of them."""
  return next((name for name in _ROWS if _shape(PRESETS[name].model) == _shape(model)), "")


def _shape(model: ModelConfig) -> tuple:
  """What tells the models apart, and no training changes."""
  decoder = model.decoder
  return (decoder.width, decoder.depth, decoder.kv_heads, decoder.mlp_width, decoder.experts,
          model.hr_size, model.grid, model.vision is None, model.vision_hr is None)
