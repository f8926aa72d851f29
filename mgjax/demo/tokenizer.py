"""The demo's tokenizer: byte-fallback BPE in which every word of the corpus is one token.

One visual token stands for one cell, and a cell as text must then be one token too ("red7"), so
that a decoder trained on scenes as text meets its visual tokens at known positions. Layout:

  0 <unk>, 1 <s>, 2 <pad>, 3 <|im_start|>, 4 <|im_end|>, 5 newline, 6..261 bytes, then pieces

No BOS is added, as with Yi. Every piece of text between special tokens or newlines is spelt with a
leading space mark, so that a word has the same id at the start of a line, after `assistant` and
inside a sentence: "7" alone and the 7 of "3 7" are the same token.
"""

import json
import os

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIALS = ("<unk>", "<s>", "<pad>", "<|im_start|>", "<|im_end|>")
NEWLINE = "\n"
SPACE = "▁"


def pre_tokenizer():
  """Words with a leading space mark; sentence punctuation stands alone."""
  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=True),
      pre_tokenizers.Split(Regex(r"[?.,!:]"), "isolated"),
    ]
  )


def learn(texts) -> tuple[list[str], list[tuple[str, str]]]:
  """Pieces and merges by which every word in `texts` becomes one token."""
  learner = Tokenizer(models.BPE())
  learner.pre_tokenizer = pre_tokenizer()
  # No limit on the size: merging ends by itself when each word is whole. Words count once each, so
  # that the pieces do not depend on how often the corpus says a word.
  words = sorted({w for text in texts for w in text.split()})
  trainer = trainers.BpeTrainer(vocab_size=1 << 20, min_frequency=1, show_progress=False)
  learner.train_from_iterator(words, trainer)
  learnt = json.loads(learner.to_str())["model"]
  pieces = sorted(learnt["vocab"], key=learnt["vocab"].get)
  return pieces, [tuple(merge) for merge in learnt["merges"]]


def build(texts) -> Tokenizer:
  """The tokenizer for a corpus: an iterable of texts."""
  pieces, merges = learn(texts)
  byte_pieces = [f"<0x{b:02X}>" for b in range(256)]
  order = [*SPECIALS, NEWLINE, *byte_pieces, *pieces]
  vocabulary = {piece: i for i, piece in enumerate(order)}
  tokenizer = Tokenizer(
    models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
  )
  tokenizer.pre_tokenizer = pre_tokenizer()
  # The mark that each piece of text was given comes off again where a line or the text starts.
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Replace(NEWLINE + SPACE, NEWLINE),
      decoders.Replace(SPACE, " "),
      decoders.Strip(" ", 1, 0),
    ]
  )
  tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
  # An ordinary token, since a decoded answer must keep its newlines, but cut out before words are.
  tokenizer.add_tokens([AddedToken(NEWLINE, special=False, normalized=False)])
  return tokenizer


def save(tokenizer: Tokenizer, folder: str) -> None:
  """Writes the two files from which transformers' AutoTokenizer loads."""
  os.makedirs(folder, exist_ok=True)
  tokenizer.save(os.path.join(folder, "tokenizer.json"))
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "<|im_end|>",
    "pad_token": "<pad>",
    "add_bos_token": False,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "legacy": True,
    "model_max_length": 2048,
  }
  with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
    json.dump(config, f, indent=2)
