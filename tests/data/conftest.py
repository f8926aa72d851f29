import dataclasses
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from mgjax.data.config import DataConfig
from mgjax.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def cases() -> pathlib.Path:
  return pathlib.Path(__file__).with_name("cases")


@pytest.fixture(scope="session")
def small(cases):
  """name -> the committed tokenizer; `_legacy_true` and `_legacy_false` share one model."""
  def load(name):
    tokenizer = load_tokenizer(cases / name.partition("_legacy_")[0])
    if "_legacy_" in name:
      backend = dataclasses.replace(tokenizer.backend, legacy=name.endswith("true"))
      tokenizer = dataclasses.replace(tokenizer, backend=backend)
    return tokenizer
  return load


@pytest.fixture(scope="session")
def llama(small):
  return small("small_llama_legacy_true")


@pytest.fixture
def dataset(tmp_path):
  """Writes records and gives a config for them: dataset(records, **overrides)."""
  folder = tmp_path / "images"
  folder.mkdir()
  rng = np.random.default_rng(0)
  for k in range(4):
    pixels = rng.integers(0, 255, (20 + 3 * k, 30, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{k}.png")

  def make(records, **overrides):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    defaults = dict(template="v1", max_length=160, hr_size=32, tokens_per_image=4, batch_size=2,
                    images_per_row=1, threads=2)
    return DataConfig(str(path), str(folder), **{**defaults, **overrides})
  make.images = folder
  return make
