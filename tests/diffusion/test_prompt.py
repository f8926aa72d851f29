"""Prompts as ids, against transformers' CLIP tokenizer."""
import pytest
from tiny_sdxl import write_tokenizer

from mgjax.diffusion.prompt import PromptTokenizer

PROMPTS = [
    "", "the cat", "  The RED\n\tcat!!  on 12 dogs' beds, it's   fine ", "naïve café — ½ 漢字 🙂",
    "a<|endoftext|>b", "no! not <|startoftext|> this", "cafe\u0301 \u00a0 x", "the cat " * 60,
    "I'll we've they'd 'Tis", "_under_score-dash/slash", "\u200b\ufeff", "ÀÉÎ ǅ İ ß"]


@pytest.fixture(scope="module", params=["<|endoftext|>", "!"])
def folder(request, tmp_path_factory):
  """A tokenizer as SDXL's first has it, and one as its second."""
  folder = tmp_path_factory.mktemp("tokenizer")
  write_tokenizer(folder, request.param)
  return folder


def test_ids(folder):
  transformers = pytest.importorskip("transformers")
  want = transformers.CLIPTokenizer.from_pretrained(folder)(
      PROMPTS, padding="max_length", max_length=77, truncation=True).input_ids
  assert PromptTokenizer(folder, 77)(PROMPTS).tolist() == want


def test_ids_from_one_file(folder, tmp_path):
  transformers = pytest.importorskip("transformers")
  transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
  (tmp_path / "vocab.json").unlink(missing_ok=True)
  ours = PromptTokenizer(tmp_path, 77)(PROMPTS)
  assert ours.tolist() == PromptTokenizer(folder, 77)(PROMPTS).tolist()


def test_what_is_cut_is_told(folder):
  tokenizer = PromptTokenizer(folder, 77)
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
