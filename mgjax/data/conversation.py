"""Conversation templates as data, and the text that a conversation becomes (R3.2, R3.4, R3.5)."""
from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

from mgjax.config import ConfigError

IMAGE_TAG = "<image>"
HUMAN, GPT = "human", "gpt"  # the two roles of a LLaVA file
Turn = tuple[str, str]       # (role, text)


@dataclasses.dataclass(frozen=True)
class Template:
  """How turns become one prompt string.

  A closed round reads `user_start question user_end assistant_start answer_start answer
  answer_end`; `between` stands between two rounds.  Training counts `answer_start`, the answer and
  `answer_end`; a prompt for generation stops after `assistant_start`.
  """

  name: str
  opening: str = ""          # before the first round: the system text with its separator
  user_start: str = ""
  user_end: str = ""
  assistant_start: str = ""
  answer_start: str = ""
  answer_end: str = ""
  between: str = ""
  caption_only: bool = False  # pre-training: the question is dropped, only <image> + answer stay
  stop: tuple[str, ...] = ()  # strings that end an answer, beside the tokenizer's eos


def _chat(name: str, system: str, user: str, assistant: str, end: str) -> Template:
  """Header-and-end-token styles: every message is closed by the same special token."""
  return Template(name, opening=system + end, user_start=user, user_end=end,
                  assistant_start=assistant, answer_end=end, stop=(end,))


def _vicuna(name: str, system: str) -> Template:
  return Template(name, opening=system + " ", user_start="USER: ", user_end=" ",
                  assistant_start="ASSISTANT:", answer_start=" ", answer_end="</s>",
                  stop=("</s>",))


def _llama_2(name: str, system: str = "") -> Template:
  """A system text stands inside the first question."""
  first = "[INST] " + (f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else "")
  return Template(name, opening=first, user_end=" ", assistant_start="[/INST]", answer_start=" ",
                  answer_end=" </s>", between="<s>[INST] ", stop=("</s>",))


_VICUNA = _vicuna("vicuna_v1", "A chat between a curious user and an artificial intelligence "
                  "assistant. The assistant gives helpful, detailed, and polite answers to the "
                  "user's questions.")
_HELPFUL = ("You are a helpful language and vision assistant. You are able to understand the "
            "visual content that the user provides, and assist the user with a variety of tasks "
            "using natural language.")
_SAFE = ("You are a helpful, respectful and honest assistant. Always answer as helpfully as "
         "possible, while being safe.  Your answers should not include any harmful, unethical, "
         "racist, sexist, toxic, dangerous, or illegal content. Please ensure that your responses "
         "are socially unbiased and positive in nature.\n\nIf a question does not make any sense, "
         "or is not factually coherent, explain why instead of answering something not correct. If "
         "you don't know the answer to a question, please don't share false information.")

def _chatml(name: str, system: str) -> Template:
  """No newline behind the end token, unlike the usual ChatML."""
  return _chat(name, f"<|im_start|>system\n{system}", "<|im_start|>user\n",
               "<|im_start|>assistant\n", "<|im_end|>")


_USER_HEADER = "<|start_header_id|>user<|end_header_id|>\n\n"
_SYSTEM_HEADER = "<|start_header_id|>system<|end_header_id|>\n\n"

TEMPLATES: dict[str, Template] = {
    "plain": Template("plain", answer_end="\n", caption_only=True, stop=("\n",)),
    "vicuna_v1": _VICUNA,
    # The assistant header says "system": the released 8B models were trained that way (R8 N12).
    "llama_3": _chat(
        "llama_3",
        _SYSTEM_HEADER + _HELPFUL, _USER_HEADER, _SYSTEM_HEADER, "<|eot_id|>"),
    "gemma": Template(
        "gemma", user_start="<start_of_turn>user\n", user_end="<end_of_turn>\n",
        assistant_start="<start_of_turn>model\n", answer_end="<end_of_turn>\n<eos>",
        stop=("<end_of_turn>",)),
    "mistral_instruct": _llama_2("mistral_instruct"),
    "chatml_direct": _chatml("chatml_direct", "Answer the questions."),
    # Those of the LLaVA line that the original's evaluation scripts still name.
    "llama_2": _llama_2("llama_2", _SAFE),
    "llava_llama_2": _llama_2("llava_llama_2", _HELPFUL),
    "llava_v1": _vicuna("llava_v1", "A chat between a curious human and an artificial intelligence "
                        "assistant. The assistant gives helpful, detailed, and polite answers to "
                        "the human's questions."),
    "mpt": _chatml("mpt", "A conversation between a user and an LLM-based AI assistant. The "
                   "assistant gives helpful and honest answers."),
}
# The original's other names for the same.
TEMPLATES |= {"v1": TEMPLATES["vicuna_v1"], "imgsp_v1": TEMPLATES["vicuna_v1"],
              "v0_plain": TEMPLATES["plain"], "mistral_direct": TEMPLATES["chatml_direct"]}


@dataclasses.dataclass(frozen=True)
class Segment:
  """A stretch of the prompt, and whether the loss counts it."""

  text: str
  trained: bool


def get_template(name: str) -> Template:
  """The template of that name; ConfigError naming the nearest one otherwise."""
  if name in TEMPLATES:
    return TEMPLATES[name]
  near = difflib.get_close_matches(name, TEMPLATES, n=1)
  hint = f"did you mean {near[0]!r}? " if near else ""
  raise ConfigError(f"no conversation template {name!r}: {hint}known are {', '.join(TEMPLATES)}")


def control_tokens(template: Template, special: Sequence[str], eos: str) -> tuple[str, ...]:
  """Those of a tokenizer's special tokens that shape a conversation: in a turn they would end it or
  begin another."""
  frame = "".join(getattr(template, field) for field in (
      "opening", "user_start", "user_end", "assistant_start", "answer_start", "answer_end",
      "between"))
  return tuple(token for token in special if token == eos or token in frame)


def place_images(turns: Sequence[Turn], images: int) -> list[Turn]:
  """Moves the image tags of every turn to its start, each followed by a newline (R3.2).

  With one image all tags of a turn collapse to one, as in the released data.  With several images
  every tag is kept, in its turn.  Without images a literal `<image>` is ordinary text: untouched.
  """
  if not images:
    return list(turns)
  placed = []
  for role, text in turns:
    if count := text.count(IMAGE_TAG):
      tags = f"{IMAGE_TAG}\n" * (1 if images == 1 else count)
      text = (tags + text.replace(IMAGE_TAG, "").strip()).strip()
    placed.append((role, text))
  return placed


def drop_leading_reply(turns: Sequence[Turn]) -> list[Turn]:
  """The turns without a first one that is not the human's (a greeting, say), like the original."""
  turns = list(turns)
  return turns[1:] if turns and turns[0][0] != HUMAN else turns


def check_turns(turns: Sequence[Turn], *, open_end: bool = False) -> None:
  """ValueError unless the turns alternate human, gpt, ... and end with gpt (human if open)."""
  for i, (role, _) in enumerate(turns):
    expected = (HUMAN, GPT)[i % 2]
    if role != expected:
      raise ValueError(f"turn {i} is from {role!r}, expected {expected!r}: turns must alternate "
                       f"{HUMAN}, {GPT}, starting with {HUMAN}")
  if not turns or len(turns) % 2 != open_end:
    wanted = f"the {HUMAN}'s question" if open_end else f"an answer from {GPT}"
    raise ValueError(f"{len(turns)} turns: the last one must be {wanted}")


def render(template: Template, turns: Sequence[Turn], add_generation_prompt: bool = False,
           begun: str = "") -> list[Segment]:
  """The prompt as segments; joined, their texts are exactly the original's prompt.

  `turns` are (role, text) pairs with the tags in place (`place_images`).  With
  `add_generation_prompt` the last turn is the human's and the prompt ends where the answer begins,
  or behind what it has `begun` with.
  Raises ValueError where roles do not alternate, or where a caption template gets more than a
  question and an answer.

  >>> [s.text for s in render(TEMPLATES["plain"], [("human", "<image>\\nQ"), ("gpt", "a cat")])]
  ['<image>', 'a cat\\n']
  """
  check_turns(turns, open_end=add_generation_prompt)
  t = template
  if t.caption_only and len(turns) > 2:
    raise ValueError(f"template {t.name!r} takes one question and one answer, got {len(turns)} "
                     "turns; use a chat template for conversations")
  segments, asked = [], t.opening
  for i, (role, text) in enumerate(turns):
    if role == GPT:
      segments += [Segment(asked, False), Segment(t.answer_start + text + t.answer_end, True)]
      asked = t.between
    elif t.caption_only:
      if not text.count(IMAGE_TAG):
        raise ValueError(f"template {t.name!r} is for captions: turn {i} has no {IMAGE_TAG}")
      asked += IMAGE_TAG * text.count(IMAGE_TAG)
    else:
      asked += t.user_start + text + t.user_end + t.assistant_start
  if add_generation_prompt:
    segments.append(Segment(asked + (t.answer_start + begun if begun else ""), False))
  return segments
