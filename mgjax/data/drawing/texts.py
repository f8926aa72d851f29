"""What a language model is told to write a picture's prompt, and what counts as its reply (R3.9).

Two recipes, as in the paper (arXiv 2403.18814).  RECAPTION: from the description of a picture, the
short request behind it and the prompt that gives it.  IN_CONTEXT: from a conversation, how it goes
on with a picture.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Sequence

from mgjax.data.conversation import GPT, HUMAN, IMAGE_TAG, TEMPLATES, Turn

RECAPTION, IN_CONTEXT = "recaption", "in-context"
GEN_TAG, PROMPT_START, PROMPT_END = "<GEN>", "<h>", "</h>"
TAGS = (GEN_TAG, PROMPT_START, PROMPT_END, IMAGE_TAG)
CLIP_TOKENS = 75  # that SDXL's text encoders read, begin and end aside

# What a reply must not hold: the tags, also in a near spelling, and what ends a turn of a template.
_CONTROL = re.compile("|".join(
    [r"<\s*/?\s*(?:gen|h|image)\s*/?\s*>"]
    + sorted({re.escape(s) for t in TEMPLATES.values() for s in t.stop if s.strip()})),
    re.IGNORECASE)

# Style only: each request shows some of them.
EXAMPLES = (
    "a red fox asleep in fresh snow at the edge of a birch forest, soft morning light, shallow "
    "depth of field, wildlife photography, muted winter palette",
    "portrait of an old fisherman with a grey beard and a yellow raincoat, rain on his face, dark "
    "harbour behind him, dramatic side light, 85mm photograph, fine skin texture",
    "cosy reading nook under a sloping attic window, stacks of books, knitted blanket, warm lamp "
    "light, rain outside, detailed gouache illustration, earthy colours",
    "futuristic tram gliding through a city overgrown with plants, glass towers, early evening, "
    "wet streets with reflections, cinematic wide shot, concept art, teal and orange",
    "bowl of ramen with a soft egg, spring onions and steam rising, dark wooden table, top view, "
    "food photography, soft window light, crisp focus",
    "tiny astronaut tending a garden inside a glass jar, whimsical, macro view, glowing flowers, "
    "3d render, soft studio light, pastel colours",
    "lighthouse on a cliff in a storm, huge waves, beam of light through the rain, oil painting, "
    "heavy brush strokes, romanticism, deep blues and greys",
    "flat vector poster of a mountain range at sunrise, layered silhouettes, a lone hiker, grain "
    "texture, limited palette of orange, pink and navy",
    "kitten in a wizard hat looking into a spell book, candle light, floating sparks, storybook "
    "watercolour, rounded shapes, warm browns and gold",
    "isometric cutaway of a small coffee roastery, machines, sacks and people at work, clean "
    "lines, soft shadows, low poly render, warm neutral tones",
    "empty desert road under a sky full of stars, vintage car with its lights on, long exposure, "
    "milky way, wide angle photograph, cold blue and amber",
    "queen of autumn with a crown of leaves and berries, flowing amber dress, misty forest, art "
    "nouveau ornament, intricate line work, ink and watercolour",
)

_PROMPT_RULE = """\
"prompt": the prompt for Stable Diffusion XL. In English, {least} to {most} words, phrases between \
commas: the subject first, then setting, composition, style or medium, light and colours. Only \
what can be seen; it must be clear by itself, without the rest. No negative prompt, no weights, no \
parameters."""

_REPLY_RULE = """
Reply with one JSON object with exactly the keys "request", "answer" and "prompt", all three text, \
and nothing around it. Write no tags such as <h>, <GEN> or <image>."""

_INSTRUCTIONS = {
    RECAPTION: """\
You write training data for an assistant that turns wishes into prompts for a text-to-image model. \
You are given the detailed description of a picture. Work backwards to the person who asked for it:
"request": what that person typed: short and casual, the main subject and at most one or two \
wishes, in at most 25 words. Vary the form: a plain wish, a question, a command, a few keywords.
"answer": one short sentence with which the assistant hands over the picture, without the prompt.
""" + _PROMPT_RULE + " It must give the described picture." + _REPLY_RULE,
    IN_CONTEXT: """\
You write training data for an assistant that can add pictures to a conversation. You are given a \
conversation between a user and the assistant. Write how it goes on:
"request": the user's next message. It asks, openly or in passing, for a picture that suits the \
conversation, and sounds like this user. At most 40 words, in the user's language.
"answer": the assistant's reply in one to three sentences, in the same language: it goes into what \
was said and hands over the picture, without the prompt.
""" + _PROMPT_RULE + " It must suit the conversation." + _REPLY_RULE,
}


@dataclasses.dataclass(frozen=True)
class Job:
  """One thing to ask: a caption, or a conversation (`turns`, which stay in front of the record)."""

  recipe: str
  id: str
  file: str
  index: int
  text: str  # what the language model gets to read
  turns: tuple[Turn, ...] = ()

  @property
  def key(self) -> tuple[str, str, str]:
    """Recipe, id, and a digest of the text: an input that was edited is another one."""
    return self.recipe, self.id, hashlib.sha256(self.text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Reply:
  """A usable reply of the language model."""

  request: str
  answer: str
  prompt: str


def conversation_text(turns: Sequence[Turn]) -> str:
  """A conversation as the language model reads it."""
  return "\n\n".join(f"{'User' if role == HUMAN else 'Assistant'}: {text}" for role, text in turns)


def messages_for(job: Job, words: tuple[int, int], examples: Sequence[str], shots: int, seed: int,
                 attempt: int = 0, reason: str = "") -> list[dict[str, str]]:
  """The chat messages that ask for `job`, with `shots` of the examples.

  The same arguments always give the same messages.  `reason` is why the attempt before failed.
  """
  draw = random.Random(f"{seed} {job.recipe} {job.id} {attempt}")
  shown = draw.sample(list(examples), min(shots, len(examples)))
  parts = []
  if shown:
    parts.append("Prompts of good quality, for their style:\n" + "\n".join(f"- {p}" for p in shown))
  parts.append(f"{'The description' if job.recipe == RECAPTION else 'The conversation'}:\n"
               f"{job.text}")
  if reason:
    parts.append(f"(An earlier reply could not be used: {reason}.)")
  system = _INSTRUCTIONS[job.recipe].replace("{least}", str(words[0])).replace(
      "{most}", str(words[1]))
  return [{"role": "system", "content": system}, {"role": "user", "content": "\n\n".join(parts)}]


# Most words of what is not the prompt; far above what is asked for.
_MOST_WORDS = {"request": 80, "answer": 150}


def read_reply(text: str, words: tuple[int, int]) -> Reply:
  """The reply in `text`, its prompt with `words` = (least, most) words on one line.

  Raises ValueError saying what is wrong with it.
  """
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"it is not JSON ({error})") from error
  names = [f.name for f in dataclasses.fields(Reply)]
  if not isinstance(value, dict) or sorted(value) != sorted(names):
    found = sorted(value) if isinstance(value, dict) else type(value).__name__
    raise ValueError(f"it is {found!s:.200}, expected an object with the keys {', '.join(names)}")
  for name in names:
    value[name] = _checked(name, value[name], words)
  return Reply(**value)


def _checked(name: str, text: object, words: tuple[int, int]) -> str:
  if not isinstance(text, str):
    raise ValueError(f"{name} is a {type(text).__name__}, expected text")
  text = " ".join(text.split()) if name == "prompt" else text.strip()
  if not text:
    raise ValueError(f"{name} is empty")
  if found := _CONTROL.search(text):
    raise ValueError(f"{name} holds the control tag {found[0]!r}")
  if odd := [c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]:
    raise ValueError(f"{name} holds the character {odd[0]!r}")
  least, most = words if name == "prompt" else (1, _MOST_WORDS[name])
  count = len(text.split())
  if not least <= count <= most:
    raise ValueError(f"{name} has {count} words, expected {least} to {most}")
  if len(text) > 10 * most:  # of a language that puts no spaces, or of one endless word
    raise ValueError(f"{name} has {len(text)} characters, expected at most {10 * most}")
  # Every word and every mark is at least one token of CLIP.
  if name == "prompt" and (pieces := len(re.findall(r"\w+|[^\w\s]", text))) > CLIP_TOKENS:
    raise ValueError(f"prompt has {pieces} words and marks, but SDXL reads {CLIP_TOKENS} tokens")
  return text


def make_record(job: Job, reply: Reply) -> dict:
  """The LLaVA record, text only: the earlier turns, `request <GEN>`, `answer <h>prompt</h>`.

  >>> job = Job(RECAPTION, "7", "captions.json", 0, "A red cat sits on a wall.")
  >>> record = make_record(job, Reply("draw a cat", "Here it is.", "red cat on a wall"))
  >>> [turn["value"] for turn in record["conversations"]]
  ['draw a cat <GEN>', 'Here it is. <h>red cat on a wall</h>']
  """
  turns = [*job.turns, (HUMAN, f"{reply.request} {GEN_TAG}"),
           (GPT, f"{reply.answer} {PROMPT_START}{reply.prompt}{PROMPT_END}")]
  return {"id": f"{job.recipe}-{job.id}", "recipe": job.recipe,
          "conversations": [{"from": role, "value": text} for role, text in turns]}
