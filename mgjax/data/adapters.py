"""From the examples of `tfds.data_source` to LLaVA records: the small functions a source names.

An adapter takes one example (a dict of NumPy values) and gives (record, pictures): a dict as in a
LLaVA JSON file, and for each path under "image" the file's bytes or uint8 [H, W, 3].
"""
from __future__ import annotations

from mgjax.data.samples import Entry


def text_of(value) -> str:
  """TFDS gives text as bytes."""
  return value.decode() if isinstance(value, bytes) else str(value)


def captions(example: dict) -> Entry:
  """`image` and `captions/text` (coco_captions): the first caption, for stage 1."""
  name = text_of(example.get("image/filename", "image"))
  caption = text_of(example["captions"]["text"][0])
  return {"id": name, "image": name, "conversations": [
      {"from": "human", "value": "<image>\nDescribe the image briefly."},
      {"from": "gpt", "value": caption}]}, (example["image"],)
