"""The paper's training mixtures as lengths of samples: what rows they fill, without their data.

Parts and sizes are those of R7; the text lengths (mean tokens, spread of their logarithm) are
assumptions, close to what the released files look like, not measured on them: for real data
launch/check_data.py says the same.
"""
from __future__ import annotations

import dataclasses

import numpy as np

from mgjax.data.config import DataConfig
from mgjax.data.packing import WINDOW, Format, pack

# (part, thousands, pictures, mean text tokens, sigma of the logarithm)
STAGE1 = (("LLaVA-Pretrain", 558, 1, 26, 0.35), ("ALLaVA-4V captions", 695, 1, 230, 0.3))
STAGE2 = (
    ("LLaVA conversations", 158, 1, 260, 0.5), ("VQAv2", 83, 1, 150, 0.4), ("GQA", 72, 1, 230, 0.5),
    ("OKVQA", 9, 1, 100, 0.3), ("OCR-VQA", 80, 1, 170, 0.4), ("A-OKVQA", 66, 1, 130, 0.3),
    ("RefCOCO", 48, 1, 270, 0.4), ("Visual Genome", 86, 1, 370, 0.4),
    ("ShareGPT", 40, 0, 1040, 0.7), ("ShareGPT4V", 100, 1, 300, 0.3),
    ("LAION-GPT-4V", 10, 1, 300, 0.4),
    ("ALLaVA-4V", 700, 1, 330, 0.4), ("multi-turn text", 6, 0, 640, 0.8),
    ("documents", 28, 1, 140, 0.5), ("generation", 13, 0, 170, 0.4))
SAMPLES = 60_000


def of_data(data: DataConfig):
  """The mixture that a recipe's files hold, known by their names; None for others."""
  paths = " ".join(source.path for source in data.all_sources)
  return STAGE1 if "MGM-Pretrain" in paths else STAGE2 if "MGM-Finetune" in paths else None


def draw(table, visual_tokens: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
  """Lengths and pictures of SAMPLES samples of a mixture, in random order, cut to `longest`."""
  rng = np.random.default_rng(0)
  lengths, images = [], []
  for _, count, pictures, mean, sigma in table:
    n = round(SAMPLES * count / sum(row[1] for row in table))
    text = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, n)
    lengths.append(np.minimum(np.rint(text).astype(int) + pictures * visual_tokens, longest))
    images.append(np.full(n, pictures))
  order = rng.permutation(sum(map(len, lengths)))
  return np.concatenate(lengths)[order], np.concatenate(images)[order]


@dataclasses.dataclass(frozen=True)
class Fill:
  """How well packed rows are filled: shares of positions and image slots, samples a row, and the
  batches that the whole mixture takes."""

  tokens: float
  images: float
  samples_per_row: float
  batches: float


def fill(table, shape: Format, longest: int) -> Fill:
  """Of batches of one format, with samples cut to `longest`."""
  lengths, images = draw(table, shape.tokens_per_image, longest)
  windows = [slice(at, at + WINDOW) for at in range(0, len(lengths), WINDOW)]
  rows = sum(len(pack(lengths[w], images[w], shape.length, shape.slots)) for w in windows)
  whole = 1000 * sum(row[1] for row in table) / len(lengths)
  return Fill(lengths.sum() / rows / shape.length, images.sum() / rows / max(shape.slots, 1),
              len(lengths) / rows, rows * whole / shape.rows)
