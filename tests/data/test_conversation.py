import pytest

from mgjax.data.conversation import (
    TEMPLATES,
    check_turns,
    drop_leading_reply,
    get_template,
    place_images,
    render,
)

TURNS = [("human", "<image>\nQ1"), ("gpt", "A1"), ("human", "Q2")]
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions.")
PROMPTS = {
    "v1": SYSTEM + " USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
    "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>"
                     "\nQ1<|im_end|><|im_start|>assistant\nA1<|im_end|><|im_start|>user\nQ2"
                     "<|im_end|><|im_start|>assistant\n",
    "gemma": "<start_of_turn>user\n<image>\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>"
             "\n<eos><start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\n",
    "mistral_instruct": "[INST] <image>\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST]",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_open_prompt_is_the_originals(name):
  template = TEMPLATES[name]
  segments = render(template, TURNS, add_generation_prompt=True)
  assert "".join(s.text for s in segments) == PROMPTS[name]
  assert [s.trained for s in segments] == [False, True, False]


def test_llama_3_calls_the_assistant_system():
  text = "".join(s.text for s in render(TEMPLATES["llama_3"], TURNS[:1], True))
  assert text.endswith("<|eot_id|><|start_header_id|>system<|end_header_id|>\n\n")


def test_plain_keeps_image_and_caption_only():
  segments = render(TEMPLATES["plain"], [("human", "<image>\nDescribe it."), ("gpt", "a cat")])
  assert [(s.text, s.trained) for s in segments] == [("<image>", False), ("a cat\n", True)]
  (opened,) = render(TEMPLATES["plain"], [("human", "<image>\nQ")], add_generation_prompt=True)
  assert opened.text == "<image>"
  with pytest.raises(ValueError, match="no <image>"):
    render(TEMPLATES["plain"], [("human", "Q"), ("gpt", "A")])
  with pytest.raises(ValueError, match="one question and one answer, got 3"):
    render(TEMPLATES["plain"], TURNS, add_generation_prompt=True)


@pytest.mark.parametrize("images, text, expected", [
    (1, "Q\n<image>", "<image>\nQ"),
    (1, "<image><image> Q <image>", "<image>\nQ"),
    (1, "<image>", "<image>"),
    (2, "a <image> b <image>", "<image>\n<image>\na  b"),
    (0, " say <image> ", " say <image> "),
])
def test_place_images(images, text, expected):
  assert place_images([("human", text)], images) == [("human", expected)]


def test_leading_reply_and_order():
  assert drop_leading_reply([("gpt", "hi"), *TURNS]) == TURNS
  check_turns(TURNS, open_end=True)
  for bad in ([], TURNS, [TURNS[1]], [TURNS[0], TURNS[2]], [("user", "Q"), ("gpt", "A")]):
    with pytest.raises(ValueError, match="turn"):
      check_turns(bad)


def test_unknown_template_names_the_nearest():
  with pytest.raises(ValueError, match="did you mean 'vicuna_v1'"):
    get_template("vicuna_v11")
