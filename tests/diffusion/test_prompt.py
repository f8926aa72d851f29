"""Prompts as ids, against transformers' CLIP tokenizer."""
import json

import pytest
from diffusers_golden import TEXTS
from tiny_sdxl import write_tokenizer

from mgjax.diffusion.prompt import PromptTokenizer


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_ids(sdxl, name):
  ids = PromptTokenizer(sdxl.source / name, 77)(TEXTS)
  assert ids.tolist() == sdxl.golden[name].tolist()


def test_ids_from_one_file(sdxl, tmp_path):
  """As transformers writes it since its version 5."""
  source = sdxl.source / "tokenizer_2"
  lines = (source / "merges.txt").read_text().splitlines()[1:]
  model = {"type": "BPE", "vocab": json.loads((source / "vocab.json").read_text()),
           "merges": [line.split() for line in lines]}
  (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "!"}))
  assert PromptTokenizer(tmp_path, 77)(TEXTS).tolist() == sdxl.golden["tokenizer_2"].tolist()


def test_what_is_cut_is_told(sdxl):
  tokenizer = PromptTokenizer(sdxl.source / "tokenizer", 77)
  fits = "the cat " * 37 + "Red"  # 75 tokens
  assert tokenizer.cut(fits) == ""
  assert tokenizer.cut(fits + " the DOG") == "the DOG"
  assert (tokenizer([fits]) == tokenizer([fits + " the DOG"])).all()


def test_broken_folders(tmp_path):
  with pytest.raises(ValueError, match="merges.txt cannot be read; expected vocab.json"):
    PromptTokenizer(tmp_path, 77)
  write_tokenizer(tmp_path, "<pad>")  # not in the vocabulary
  with pytest.raises(ValueError, match="not a CLIP tokenizer .KeyError: '<pad>'"):
    PromptTokenizer(tmp_path, 77)
