"""Prompts as the ids that a CLIP text encoder reads."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import normalizers, pre_tokenizers

_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
# Words, contractions, single digits, and runs of what is none of these; spaces are left out.
_PIECES = (r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|"
           r"[^\s\p{L}\p{N}]+")


class PromptTokenizer:
  """CLIP's lower-casing BPE, from a folder with vocab.json and merges.txt, or tokenizer.json.

  length: ids of a row, begin and end included.
  Raises ValueError, naming the file, if one is missing or of another kind.
  """

  def __init__(self, folder: Path, length: int):
    self.length = length
    try:
      vocabulary, merges = _pieces(folder)
      pad = _padding(folder)
      self._begin, self._end, self._pad = (vocabulary[token] for token in (_BEGIN, _END, pad))
      model = tokenizers.models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=_END,
                                    continuing_subword_prefix="", fuse_unk=False)
    except OSError as error:
      raise ValueError(f"{folder}: {Path(error.filename).name} cannot be read; expected vocab.json "
                       "and merges.txt of a CLIP tokenizer, or its tokenizer.json") from error
    except Exception as error:  # tokenizers raises Exception itself
      raise ValueError(f"{folder}: not a CLIP tokenizer ({type(error).__name__}: {error})"
                       ) from error
    self._tokenizer = tokenizers.Tokenizer(model)
    self._tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
        normalizers.Lowercase()])
    self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    # A special token is found wherever it stands, that for padding too: SDXL's second is "!".
    self._tokenizer.add_special_tokens([_BEGIN, _END, pad])

  def __call__(self, prompts: Sequence[str]) -> np.ndarray:
    """int32 [N, length]; what is too long is cut, see `cut`."""
    room, rows = self.length - 2, []
    for encoding in self._tokenizer.encode_batch(list(prompts)):
      ids = [self._begin, *encoding.ids[:room], self._end]
      rows.append(ids + [self._pad] * (self.length - len(ids)))
    return np.array(rows, np.int32)

  def cut(self, prompt: str) -> str:
    """The end of a prompt for which there is no room; "" if all of it fits."""
    offsets = self._tokenizer.encode(prompt).offsets[self.length - 2:]
    return prompt[offsets[0][0]:] if offsets else ""


def _pieces(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
  """The vocabulary, and the pairs that are merged, the first first."""
  if (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    return model["vocab"], [tuple(m.split(" ") if isinstance(m, str) else m)
                            for m in model["merges"]]
  lines = (folder / "merges.txt").read_text().split("\n")
  merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
  return json.loads((folder / "vocab.json").read_text()), merges


def _padding(folder: Path) -> str:
  """The padding token that the folder's settings name."""
  for name in ("tokenizer_config.json", "special_tokens_map.json"):
    if (folder / name).is_file():
      token = json.loads((folder / name).read_text()).get("pad_token")
      if token is not None:
        return token["content"] if isinstance(token, dict) else token
  return _END
