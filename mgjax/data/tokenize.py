"""A conversation as ids, loss mask and visual positions: what the model reads, sample by sample."""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mgjax.data.conversation import (
    HUMAN,
    IMAGE_TAG,
    Segment,
    Template,
    Turn,
    check_turns,
    render,
)
from mgjax.data.tokenizer import Tokenizer

IMAGE_ID = -200  # stands for one image in `Tokenized.ids`; never reaches the device


@dataclasses.dataclass(frozen=True)
class Tokenized:
  """A prompt as ids.  `ids` int32 [N] with IMAGE_ID at images, `trained` bool [N]."""

  ids: np.ndarray
  trained: np.ndarray

  @property
  def images(self) -> int:
    """How many images the ids refer to."""
    return int((self.ids == IMAGE_ID).sum())

  @property
  def labels(self) -> np.ndarray:
    """int32 [N]: the id where it is trained, -100 elsewhere, as Hugging Face writes them."""
    return np.where(self.trained, self.ids, -100).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Expanded:
  """A sample with every image spread over its T positions; all fields [N] (see `expand`)."""

  tokens: np.ndarray        # int32
  visual_index: np.ndarray  # int32
  targets: np.ndarray       # int32
  loss_mask: np.ndarray     # bool
  truncated: bool = False


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
  """A prompt for generation: `ids` [M] with IMAGE_ID, `tokens` and `visual_index` int32 [N]."""

  text: str
  ids: np.ndarray
  tokens: np.ndarray
  visual_index: np.ndarray


def text_pieces(segments: Sequence[Segment], has_images: bool) -> list[str]:
  """What is tokenised by itself: the stretches between images (R3.3), or all of it without any."""
  text = "".join(s.text for s in segments)
  return text.split(IMAGE_TAG) if has_images else [text]


def tokenize_conversation(tokenizer: Tokenizer, segments: Sequence[Segment],
                          has_images: bool) -> Tokenized:
  """Ids of a rendered conversation, and which of them the loss counts.

  With images the text is cut at each `<image>` and every piece is tokenised by itself (R3.3), BOS
  in front of the first only.  Without images the text is tokenised as it stands, a literal
  `<image>` included.  An id is trained when a character that it covers is: the mask follows from
  spans, so no template and no tokenizer can shift it.
  """
  trained_char = np.repeat([s.trained for s in segments], [len(s.text) for s in segments])
  ids, trained, at = [], [], 0
  for k, piece in enumerate(text_pieces(segments, has_images)):
    if k:
      ids.append(IMAGE_ID)
      trained.append(False)
      at += len(IMAGE_TAG)
    if not k and tokenizer.adds_bos:
      ids.append(tokenizer.bos_id)
      trained.append(False)
    piece_ids, spans = tokenizer.encode_with_offsets(piece, add_bos=False)
    ids += piece_ids
    # A dummy space covers nothing; it shares the fate of the character that it stands before.
    trained += [bool(trained_char[at + a:at + max(b, a + 1)].any()) for a, b in spans]
    at += len(piece)
  return Tokenized(np.array(ids, np.int32), np.array(trained, bool))


def expand(tokenized: Tokenized, tokens_per_image: int | Sequence[int], *, filler: int = 0,
           max_length: int | None = None) -> Expanded:
  """Spreads each image over its T = tokens_per_image positions and shifts the targets.

  `visual_index` is -1 at text and slot*T + t at token t of the sample's image number slot (where
  each image has a T of its own, it counts through those of all); there `tokens` holds `filler`.
  `targets[t]` is the next id and `loss_mask[t]` whether that id is trained, so that the first word
  after an image is predicted from its last visual token.
  Positions from `max_length` on are cut off, and the last one that stays loses its target.

  >>> text = Tokenized(np.array([1, IMAGE_ID, 7]), np.array([False, False, True]))
  >>> e = expand(text, 2)
  >>> e.tokens.tolist(), e.visual_index.tolist(), e.loss_mask.tolist()
  ([1, 0, 0, 7], [-1, 0, 1, -1], [False, False, True, False])
  """
  is_image = tokenized.ids == IMAGE_ID                                        # [N]
  counts = np.ones(len(is_image), int)
  counts[is_image] = tokens_per_image
  tokens = np.repeat(np.where(is_image, filler, tokenized.ids), counts)       # [N + images*(T-1)]
  visual = np.repeat(is_image, counts)
  trained = np.repeat(tokenized.trained, counts)
  visual_index = np.where(visual, np.cumsum(visual) - 1, -1)
  truncated = max_length is not None and len(tokens) > max_length
  if truncated:
    tokens, trained, visual_index = (x[:max_length] for x in (tokens, trained, visual_index))
  targets = np.append(tokens[1:], filler)
  return Expanded(tokens.astype(np.int32), visual_index.astype(np.int32), targets.astype(np.int32),
                  np.append(trained[1:], False), truncated)


def encode_prompt(tokenizer: Tokenizer, template: Template, turns: Sequence[Turn], images: int,
                  tokens_per_image: int | Sequence[int], begun: str = "") -> EncodedPrompt:
  """The prompt that asks for the next answer, or for how one that has `begun` goes on.

  `turns` are (role, text) pairs that end with the human's question.  Where no turn holds an
  `<image>` tag, all `images` go in front of the first question; otherwise there must be one tag an
  image, wherever they stand.  From two images on, `Image k:` is written before the k-th tag.
  Without images a literal `<image>` is plain text.  Raises ValueError where tags and images differ.
  """
  check_turns(turns, open_end=True)
  turns = list(turns)
  if images:
    tags = sum(text.count(IMAGE_TAG) for _, text in turns)
    if not tags:
      turns[0] = (HUMAN, f"{IMAGE_TAG}\n" * images + turns[0][1])
    elif tags != images:
      raise ValueError(f"{tags} {IMAGE_TAG} tags in the conversation but {images} images were "
                       "given; write one tag an image, or none at all")
  if images > 1:
    turns = _number_images(turns)
  segments = render(template, turns, add_generation_prompt=True, begun=begun)
  tokenized = tokenize_conversation(tokenizer, segments, images > 0)
  if tokenized.images != images:
    raise ValueError(f"template {template.name!r} keeps {tokenized.images} of {images} images")
  expanded = expand(tokenized, tokens_per_image)
  return EncodedPrompt("".join(s.text for s in segments), tokenized.ids, expanded.tokens,
                       expanded.visual_index)


def _number_images(turns: Sequence[Turn]) -> list[Turn]:
  numbered, k = [], 0
  for role, text in turns:
    first, *rest = text.split(IMAGE_TAG)
    for piece in rest:
      k += 1
      first += f"Image {k}:{IMAGE_TAG}{piece}"
    numbered.append((role, first))
  return numbered
