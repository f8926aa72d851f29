"""A request's messages as turns and pictures."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from mgjax.data.conversation import GPT, HUMAN, IMAGE_TAG, Turn
from mgjax.infer.drawing import asked_to_draw
from mgjax.serve.errors import wrong

_DETAILS = ("auto", "low", "high")
_DRAWN = ("images", "drawing")  # what an answer with a picture has besides
# What clients send back along with an answer; it says nothing.
_ECHOED = ("refusal", "tool_calls", "function_call", "audio", "annotations", "name")


@dataclasses.dataclass(frozen=True)
class ImageRef:
  """A picture that a message names.  param: where it stands in the request."""

  url: str
  hd: bool
  param: str


def read_messages(messages: Any, images: int, check_text: Callable[[str, str], None],
                  sees: bool = True) -> tuple[list[Turn], list[ImageRef]]:
  """Turns with a tag for each picture, and the pictures, at most `images`.

  Pictures that an answer came with go in front of the next question, for a model that `sees`, and
  its question is one that asked to draw.
  check_text: as `Assistant.check_text`.  ApiError naming the message and what is wrong with it.
  """
  if not isinstance(messages, list) or not messages:
    raise wrong("messages must be a list with at least one message", "messages")
  turns: list[Turn] = []
  refs: list[ImageRef] = []
  drawn: list[ImageRef] = []  # that the answer before came with
  for i, message in enumerate(messages):
    where = f"messages[{i}]"
    role = _role(message, where, expected="user" if i % 2 == 0 else "assistant")
    texts, own = _content(message.get("content"), f"{where}.content", role)
    if role == "user":
      own, drawn = drawn + own, []
    elif drawn := _drawn(message.get("images"), f"{where}.images"):
      turns[-1] = (HUMAN, asked_to_draw(turns[-1][1]))
      drawn = drawn if sees else []
    refs += own
    if len(refs) > images:
      raise wrong(f"more than {images} images in one request", "messages", "too_many_images")
    text = "\n".join(texts)
    if role == "assistant":  # what the model said is text: a tag in it is no picture
      text = text.replace(IMAGE_TAG, "")
    else:
      text = text.strip()
    if not text.strip() and not own:
      raise wrong(f"{where} is empty", where)
    try:
      check_text(text, f"text of {where}")
    except ValueError as error:
      raise wrong(str(error), f"{where}.content") from error
    turns.append((HUMAN if role == "user" else GPT, (f"{IMAGE_TAG}\n" * len(own) + text).strip()
                  if role == "user" else text))
  if len(turns) % 2 == 0:
    raise wrong("the last message must be the user's", "messages")
  return turns, refs


def _role(message, where, expected) -> str:
  if not isinstance(message, dict):
    raise wrong(f"{where} must be an object with role and content", where, "invalid_type")
  role = message.get("role")
  if role in ("system", "developer"):
    raise wrong(f"{where}: this model was trained with one fixed system text, so {role} messages "
                "cannot be given; say it in the user's message", f"{where}.role",
                "unsupported_role")
  if role not in ("user", "assistant"):
    raise wrong(f"{where}: the role is {str(role)[:80]!r}, expected user or assistant",
                f"{where}.role")
  if role != expected:
    raise wrong(f"{where} is the {role}'s, expected the {expected}'s: user and assistant must take "
                "turns, beginning with the user", f"{where}.role")
  for name, value in message.items():
    known = name in ("role", "content") or (role == "assistant" and name in _DRAWN)
    if not known and not (name in _ECHOED and value in (None, [])):
      raise wrong(f"{where}: {name[:80]!r} is not supported", f"{where}.{name[:80]}",
                  "unknown_parameter")
  return role


def _content(content, where, role) -> tuple[list[str], list[ImageRef]]:
  if isinstance(content, str):
    return [content], []
  if not isinstance(content, list):
    raise wrong(f"{where} must be a string or a list of parts", where, "invalid_type")
  texts, refs = [], []
  for i, part in enumerate(content):
    at = f"{where}[{i}]"
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str) and len(part) == 2:
      texts.append(part["text"])
    elif kind == "image_url" and role == "user" and len(part) == 2:
      refs.append(_image(part.get("image_url"), f"{at}.image_url"))
    elif kind == "image_url" and role != "user":
      raise wrong(f"{at}: only the user's messages can hold images", at)
    else:
      raise wrong(f'{at} must be {{"type": "text", "text": ...}} or '
                  '{"type": "image_url", "image_url": {"url": ...}}', at, "invalid_type")
  return texts, refs


def _drawn(images, where) -> list[ImageRef]:
  """Seen at the model's standard size: in high resolution a few of them would fill the context."""
  if images is None:
    return []
  if not isinstance(images, list):
    raise wrong(f"{where} must be a list of images", where, "invalid_type")
  refs = []
  for i, part in enumerate(images):
    at = f"{where}[{i}]"
    if not isinstance(part, dict) or part.get("type") != "image_url":
      raise wrong(f'{at} must be {{"type": "image_url", "image_url": {{"url": ...}}}}', at,
                  "invalid_type")
    refs.append(dataclasses.replace(_image(part.get("image_url"), f"{at}.image_url"), hd=False))
  return refs


def _image(image, at) -> ImageRef:
  if not isinstance(image, dict) or not isinstance(image.get("url"), str):
    raise wrong(f'{at} must be {{"url": ..., "detail": ...}}', at, "invalid_type")
  if unknown := image.keys() - {"url", "detail"}:
    raise wrong(f"{at}: {min(unknown)[:80]!r} is not supported", at, "unknown_parameter")
  detail = image.get("detail") or "auto"
  if detail not in _DETAILS:
    raise wrong(f"{at}: detail is {str(detail)[:80]!r}, expected {', '.join(_DETAILS)}",
                f"{at}.detail")
  return ImageRef(image["url"], detail != "low", f"{at}.url")
