"""Text to ids and back, with the characters that each id covers.  No transformers, no JAX."""
from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Sequence

from mgjax.config import ConfigError
from mgjax.data.processes import Sendable

Spans = list[tuple[int, int]]  # character range [start, end) of each id
_SPACE = "\u2581"              # how SentencePiece writes a space inside a piece
_NO_UNK = "<|reserved_special_token_0|>"  # what stands in for unk and pad in Llama-3 (R3.3)


@dataclasses.dataclass(frozen=True)
class SentencePiece(Sendable):
  """A `tokenizer.model`, read as Hugging Face's slow Llama tokenizer reads it.

  Text is cut at the added tokens first.  With `legacy` every stretch between them gets the model's
  own dummy space; without it only the start of the text does.
  """

  model: bytes
  added: dict[str, int]
  special_ids: frozenset[int]  # left out of decoded text
  named_ids: frozenset[int]    # those that the config names as bos, eos, ...: see `encode`
  legacy: bool
  unk: str

  @functools.cached_property
  def _processor(self):
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    proto = sentencepiece_model_pb2.ModelProto.FromString(self.model)
    rules = proto.normalizer_spec
    if rules.precompiled_charsmap or rules.remove_extra_whitespaces:
      raise ConfigError(
          f"tokenizer.model: it rewrites text before cutting it (normalizer {rules.name!r}), so "
          "that ids cannot be traced back to characters; expected an identity normalizer, as in "
          "Llama models; convert it to a tokenizer.json instead")
    if not self.legacy:
      rules.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

  @property
  def special(self) -> tuple[str, ...]:
    """Spellings of the control tokens."""
    return tuple(token for token, i in self.added.items() if i in self.special_ids)

  @functools.cached_property
  def _cut(self) -> re.Pattern:
    longest_first = sorted(self.added, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))

  def __len__(self) -> int:
    return max([self._processor.get_piece_size(), *(i + 1 for i in self.added.values())])

  def encode(self, text: str) -> tuple[list[int], Spans]:
    """Ids and character spans, without BOS."""
    if not text:
      return [], []
    shift = 0
    if not self.legacy:
      text, shift = _SPACE + text.replace(_SPACE, " "), 1
    ids, spans, end = [], [], 0
    for match in [*self._cut.finditer(text), None]:
      start = match.start() if match else len(text)
      if start > end:
        self._encode_stretch(text[end:start], end, ids, spans)
      if match:
        ids.append(self.added[match.group()])
        spans.append(match.span())
        end = match.end()
    if shift:
      spans = [(max(a - 1, 0), b - 1) for a, b in spans]
      space = self._processor.piece_to_id(_SPACE)
      if len(ids) > 1 and ids[0] == space and spans[0] == (0, 0) and ids[1] in self.named_ids:
        ids, spans = ids[1:], spans[1:]  # no dummy space before a special token that has a name
    return ids, spans

  def count(self, texts: Sequence[str]) -> list[int]:
    """How many ids `encode` gives for each text, in half its time."""
    return [self._count(text) for text in texts]

  def _count(self, text: str) -> int:
    if not text:
      return 0
    if not self.legacy:
      text = _SPACE + text.replace(_SPACE, " ")
    total = end = 0
    for match in [*self._cut.finditer(text), None]:
      stretch = text[end:match.start() if match else None]
      if stretch:
        guard = self._guard(stretch)
        total += len(self._processor.encode(guard + stretch)) - self._guard_length * bool(guard)
      if match:
        total += 1
        if stretch == _SPACE and not end and self.added[match.group()] in self.named_ids:
          total -= 1  # see `encode`
        end = match.end()
    return total

  def _guard(self, stretch: str) -> str:
    """What keeps a leading space from being taken for the start of a sentence."""
    return self.unk if not self.legacy and stretch.startswith((_SPACE, " ")) else ""

  @functools.cached_property
  def _guard_length(self) -> int:
    return len(self._processor.encode(self.unk))

  def _encode_stretch(self, text: str, offset: int, ids: list[int], spans: Spans) -> None:
    """Appends a stretch that holds no added token."""
    sp, guard = self._processor, self._guard(text)
    pieces = sp.encode(guard + text, out_type=str)[self._guard_length if guard else 0:]
    new = [sp.piece_to_id(p) for p in pieces]
    # The dummy space is the one character of the pieces that the text does not have.
    at = start = offset - self._dummy_prefix
    rest, first = b"", 0
    for piece, i in zip(pieces, new):
      if sp.is_byte(i):
        # All bytes of a character share its span; it is complete when the bytes decode.
        if not rest:
          start, first = at, len(spans)
        rest += bytes([int(piece[3:5], 16)])
        spans.append((start, start + 1))
        try:
          rest.decode()
        except UnicodeDecodeError:
          continue
        spans[first:] = [(start, start + 1)] * (len(spans) - first)
        at, rest = start + 1, b""
      else:
        spans.append((max(at, offset), at + len(piece)))
        at += len(piece)
    ids += new
    if at != offset + len(text):
      raise ValueError(f"tokenizer.model: {len(text)} characters went in and pieces for "
                       f"{at - offset} came out, for {text[:80]!r}; use a tokenizer.json instead")

  @functools.cached_property
  def _dummy_prefix(self) -> bool:
    """Whether the model puts a space of its own before a text."""
    return self._processor.encode("a", out_type=str)[0].startswith(_SPACE)

  def decode(self, ids: Sequence[int], skip_special: bool) -> str:
    """Text of the ids, as the slow tokenizer spells it."""
    sp, names = self._processor, {i: token for token, i in self.added.items()}
    if skip_special:
      ids = [i for i in ids if i not in self.special_ids]
    tokens = [names.get(i) or sp.id_to_piece(i) for i in ids]
    if tokens and tokens[0].startswith(_SPACE):
      tokens[0] = tokens[0][1:]
    text, run, after_special = "", [], False
    for k, (i, token) in enumerate(zip(ids, tokens)):
      if i in names:
        if self.legacy and k and not after_special:
          text += " "
        text += sp.decode(run) + token
        run, after_special = [], True
      else:
        run.append(token)
        after_special = False
    return text + sp.decode(run)

  def token_id(self, token: str) -> int | None:
    """Id of a token spelled as in the vocabulary; None if there is none."""
    if token in self.added:
      return self.added[token]
    i = self._processor.piece_to_id(token)
    return None if self._processor.is_unknown(i) else i


@dataclasses.dataclass(frozen=True)
class FastTokenizer:
  """A `tokenizer.json`, run by the `tokenizers` library."""

  backend: object            # tokenizers.Tokenizer
  clean_up_spaces: bool      # decoding takes spaces before punctuation out again

  @property
  def special(self) -> tuple[str, ...]:
    """Spellings of the control tokens."""
    added = self.backend.get_added_tokens_decoder().values()
    return tuple(token.content for token in added if token.special)

  def __len__(self) -> int:
    return self.backend.get_vocab_size(with_added_tokens=True)

  def encode(self, text: str) -> tuple[list[int], Spans]:
    """Ids and character spans, without BOS."""
    encoding = self.backend.encode(text, add_special_tokens=False)
    spans, end = [], 0
    for a, b in encoding.offsets:  # a file may trim spaces off its spans: they go to the next id
      spans.append((min(a, end), b))
      end = b
    return encoding.ids, spans

  def count(self, texts: Sequence[str]) -> list[int]:
    """How many ids `encode` gives for each text."""
    batch = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [len(encoding) for encoding in batch]

  def decode(self, ids: Sequence[int], skip_special: bool) -> str:
    """Text of the ids."""
    text = self.backend.decode(list(ids), skip_special_tokens=skip_special)
    if self.clean_up_spaces:
      for tail in (".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(" " + tail, tail)
        if tail == ",":
          text = text.replace(" ' ", "'")
    return text

  def token_id(self, token: str) -> int | None:
    """Id of a token spelled as in the vocabulary; None if there is none."""
    return self.backend.token_to_id(token)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A tokenizer with its special ids.  Made by `load_tokenizer`; can be pickled."""

  name: str                  # of the folder
  backend: SentencePiece | FastTokenizer
  bos_id: int | None
  eos_id: int
  unk_id: int | None
  pad_id: int
  adds_bos: bool             # whether a text starts with BOS unless asked otherwise
  eos: str                   # spelling of the token `eos_id`

  @functools.cached_property  # asked at every token of a streamed answer
  def vocab_size(self) -> int:
    """Number of ids, added tokens included."""
    return len(self.backend)

  @property
  def special(self) -> tuple[str, ...]:
    """Spellings of the control tokens: text that holds one becomes that token."""
    return self.backend.special

  @property
  def takes_spaces_back(self) -> bool:
    """Whether more ids may take a space away that was decoded before."""
    return isinstance(self.backend, FastTokenizer) and self.backend.clean_up_spaces

  def encode_with_offsets(self, text: str, add_bos: bool | None = None) -> tuple[list[int], Spans]:
    """Ids and, for each, the [start, end) characters of `text` that it covers (BOS: (0, 0)).

    `add_bos=None` does what this tokenizer does by itself.  The bytes of one character share its
    span; a dummy space in front of a text has the empty span (0, 0).
    """
    ids, spans = self.backend.encode(text)
    if self.adds_bos if add_bos is None else add_bos:
      if self.bos_id is None:
        raise ValueError(f"tokenizer {self.name!r} has no BOS token to add; pass add_bos=False")
      ids, spans = [self.bos_id, *ids], [(0, 0), *spans]
    return ids, spans

  def count(self, texts: Sequence[str]) -> list[int]:
    """How many ids each text has, without BOS; faster than encoding them."""
    return self.backend.count(texts)

  def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
    """Ids of `text`; see `encode_with_offsets`."""
    return self.encode_with_offsets(text, add_bos)[0]

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """Text of `ids`.  Left out are negative ones (image placeholders, ignored labels) and those
    past the vocabulary: a model may have more rows than there are words."""
    known = range(self.vocab_size)
    return self.backend.decode([int(i) for i in ids if int(i) in known], skip_special)

  def has(self, token: str) -> bool:
    """Whether the vocabulary has an entry spelled so."""
    return self.backend.token_id(token) is not None

  def token_id(self, token: str) -> int:
    """Id of a vocabulary entry such as `</s>`; KeyError if the vocabulary has no such entry."""
    i = self.backend.token_id(token)
    if i is None:
      raise KeyError(f"tokenizer {self.name!r} has no token {token!r}")
    return i


def has_tokenizer(folder: str | pathlib.Path) -> bool:
  """Whether `load_tokenizer` finds something to read in a folder."""
  return any((pathlib.Path(folder) / n).is_file() for n in ("tokenizer.model", "tokenizer.json"))


def load_tokenizer(folder: str | pathlib.Path) -> Tokenizer:
  """Reads a Hugging Face tokenizer folder.

  `tokenizer.model` is used where `tokenizer_config.json` names a Llama class (Vicuna, Yi, Mistral:
  the original runs their slow class) or where it is all there is, `tokenizer.json` otherwise.
  Raises FileNotFoundError or ConfigError naming the folder and what is missing in it.
  """
  folder = pathlib.Path(folder)
  model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
  if not has_tokenizer(folder):
    raise FileNotFoundError(f"{folder}: neither tokenizer.model nor tokenizer.json is there; give "
                            "the folder of a Hugging Face tokenizer")
  config = _read_json(folder / "tokenizer_config.json")
  llama = (config.get("tokenizer_class") or "").startswith("Llama")
  if model.is_file() and (llama or not fast.is_file()):
    return _load_sentencepiece(folder, model, config)
  return _load_fast(folder, fast, config)


def _load_sentencepiece(folder, model, config) -> Tokenizer:
  if config.get("add_eos_token"):
    raise ConfigError(f"{folder}: add_eos_token is true; eos belongs to the template, set it false")
  names = {kind: _spelling(config.get(f"{kind}_token")) for kind in ("bos", "eos", "unk", "pad")}
  for kind, default in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>")):
    names[kind] = names[kind] or default
  added = dict(_read_json(folder / "added_tokens.json"))
  named = {*filter(None, names.values()),
           *map(_spelling, config.get("additional_special_tokens") or [])}
  special = set(named)
  for i, token in config.get("added_tokens_decoder", {}).items():
    if token.get("lstrip") or token.get("rstrip"):
      raise ConfigError(f"{folder}: added token {token['content']!r} eats neighbouring spaces "
                       "(lstrip/rstrip), which is not supported; set both false")
    added[token["content"]] = int(i)
    if token.get("special"):
      special.add(token["content"])
  legacy = config.get("legacy")
  bare = SentencePiece(model.read_bytes(), {}, frozenset(), frozenset(),
                       True if legacy is None else bool(legacy), names["unk"])
  try:
    len(bare)  # reads it
  except ConfigError:
    raise
  except Exception as error:  # protobuf's own kinds
    raise ConfigError(_broken(model, error)) from error
  for token in named:
    if token not in added:
      i = bare._processor.piece_to_id(token)
      if bare._processor.id_to_piece(i) != token:
        raise ConfigError(f"{folder}: special token {token!r} of tokenizer_config.json is not in "
                         "tokenizer.model; list it under added_tokens_decoder with its id")
      added[token] = i
  backend = dataclasses.replace(bare, added=added, named_ids=frozenset(added[t] for t in named),
                                special_ids=frozenset(added[t] for t in special))
  return _finish(folder, backend, names, adds_bos=config.get("add_bos_token", True))


def _load_fast(folder, path, config) -> Tokenizer:
  import tokenizers
  try:
    backend = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises bare Exceptions
    raise ConfigError(_broken(path, error)) from error
  backend.no_truncation()
  backend.no_padding()
  names = {kind: _spelling(config.get(f"{kind}_token")) for kind in ("bos", "eos", "unk", "pad")}
  around = backend.encode("", add_special_tokens=True).tokens
  if around not in ([], [names["bos"]]):
    raise ConfigError(f"{folder}: tokenizer.json puts {around} around a text; expected nothing or "
                     f"the BOS token {names['bos']!r} of tokenizer_config.json alone")
  fast = FastTokenizer(backend, bool(config.get("clean_up_tokenization_spaces", False)))
  return _finish(folder, fast, names, adds_bos=bool(around))


def _finish(folder, backend, names, adds_bos) -> Tokenizer:
  def find(kind):
    token = names[kind]
    i = backend.token_id(token) if token else None
    if token and i is None:
      raise ConfigError(f"{folder}: {kind}_token {token!r} of tokenizer_config.json is not in the "
                       "vocabulary")
    return i
  bos, eos, unk, pad = map(find, ("bos", "eos", "unk", "pad"))
  if eos is None:
    raise ConfigError(f"{folder}: no eos_token; name it in tokenizer_config.json")
  unk = backend.token_id(_NO_UNK) if unk is None else unk
  pad = next(i for i in (pad, unk, eos) if i is not None)
  return Tokenizer(folder.resolve().name, backend, bos, eos, unk, pad, adds_bos,
                   names["eos"])


def _read_json(path: pathlib.Path) -> dict:
  if not path.is_file():
    return {}
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ConfigError(_broken(path, error)) from error


def _broken(path: pathlib.Path, error: Exception) -> str:
  return f"{path}: cannot be read ({error}); if it is a git-lfs pointer, fetch the file itself"


def _spelling(token: str | dict | None) -> str | None:
  return token["content"] if isinstance(token, dict) else token
