"""From a question to what is painted, and a picture back into the conversation."""
import dataclasses
import io
import weakref

import numpy as np
import pytest
from PIL import Image
from serving import CASES, png, tiny_assistant
from stub_painter import StubPainter, says

from mgjax.data.conversation import GPT, HUMAN, TEMPLATES
from mgjax.data.images import ImageError
from mgjax.data.tokenize import encode_prompt
from mgjax.data.tokenizer import load_tokenizer
from mgjax.diffusion.painter import PaintError, Painting
from mgjax.infer.aside import to_devices
from mgjax.infer.drawing import drawing_prompt, without_tags
from mgjax.infer.sampling import Sampling
from mgjax.infer.studio import Studio
from mgjax.infer.text import TextStream


@pytest.mark.parametrize("answer, prompt", [
    ("Sure. <h>a red cat</h>", "a red cat"), ("<h>one</h> and <h>two</h>.", "two"),
    ("<h> a\n  red\tcat </h>", "a red cat"), ("< H >cat< / h >", "cat"), ("<h>a</h> <h>b", "a"),
    ("<h>a red cat", "a red cat"), ("<h>a red cat </", "a red cat"), ("<h>a red cat<", "a red cat"),
    ("<h>out <h>in</h> side</h>", "in"), ("<h>one</h><h></h>", "one"), ("<h></h> <h>cat", "cat"),
    ("<h>a</h> b</h>", "a"), ("<h>1 < 2</h>", "1 < 2"), ("", None), ("no", None), ("<h></h>", None),
    ("<h> \n</h>", None), ("cat</h>", None), ("</h>cat<h>", None), ("<html>cat</html>", None)])
def test_what_an_answer_tells_to_draw(answer, prompt):
  assert drawing_prompt(answer) == prompt


def test_an_answer_is_shown_without_its_tags():
  assert without_tags("Here. <h>a cat</h> Good?") == "Here.\n\nPrompt: a cat\n\nGood?"
  assert without_tags("<h>a cat") == "Prompt: a cat" and without_tags(" a\n\n b") == "a\n\n b"


@pytest.mark.parametrize("name", ["small_llama", "small_yi", "small_llama3"])
@pytest.mark.parametrize("rest", ["a red cat</h> Good?", " a red", "", "🦜</h>"])
def test_an_answer_that_has_begun_is_streamed_from_its_start(name, rest):
  tokenizer = load_tokenizer(CASES / name)
  stream = TextStream(tokenizer, ["</s>"], "<h>")
  ids = tokenizer.encode("<h>" + rest, add_bos=False)[len(stream._ids):]
  pieces = [stream.feed(i) for i in ids] + [stream.finish()]
  assert "".join(pieces) == stream.text == ("<h>" + rest).rstrip()


@pytest.mark.parametrize("template, end", [
    ("vicuna_v1", "ASSISTANT: <h>"), ("chatml_direct", "<|im_start|>assistant\n<h>"),
    ("gemma", "<start_of_turn>model\n<h>")])
def test_a_prompt_ends_with_what_the_answer_begins_with(template, end):
  tokenizer, turns = load_tokenizer(CASES / "small_yi"), [(HUMAN, "Draw")]
  prompt = encode_prompt(tokenizer, TEMPLATES[template], turns, 0, 0, "<h>")
  plain = encode_prompt(tokenizer, TEMPLATES[template], turns, 0, 0)
  assert prompt.text.endswith(end) and prompt.text.startswith(plain.text)
  assert len(prompt.tokens) > len(plain.tokens)


# Conversations.

@pytest.fixture(scope="module")
def assistant():
  return tiny_assistant(rows=1)


@pytest.fixture
def chat(assistant):
  return assistant.conversation(Sampling(max_new_tokens=24), fit=False)


def test_a_question_asks_for_a_picture_behind_its_hint(chat, assistant, monkeypatch):
  says(monkeypatch, assistant, "Gern. <h>a red cat</h>", "No.", "<h>unasked</h>")
  chat.attach(png(), texts=["EXIT"])
  assert "".join(chat.ask("Draw it", draw=True)) == "Gern. <h>a red cat</h>"
  assert chat.turns == ((HUMAN, "<image>\nDraw it\nReference OCR Token: EXIT\n <GEN>"),
                        (GPT, "Gern. <h>a red cat</h>"))
  assert chat.drawing == "a red cat"
  "".join(chat.ask("Again", draw=True))
  assert chat.drawing is None and chat.turns[2][1].endswith("\n <GEN>")
  "".join(chat.ask("And?"))
  assert chat.drawing is None and "<GEN>" not in chat.turns[4][1]


def test_a_prompt_that_is_forced(chat, assistant):
  pieces = list(chat.ask("Draw a cat", force=True))
  text = "".join(pieces)
  assert text.startswith("<h>") and len(text) > 3 and chat.drawing == drawing_prompt(text)
  assert chat.turns == ((HUMAN, "Draw a cat <GEN>"), (GPT, text))
  prompt = assistant.prompt([(HUMAN, "Draw a cat <GEN>")], (), "<h>")
  ids = assistant.engine.generate_batch([prompt], Sampling(max_new_tokens=24))[0]
  assert assistant.tokenizer.decode(
      assistant.tokenizer.encode("<h>", add_bos=False) + ids).strip() == text
  "".join(chat.ask("More"))
  assert len(chat.turns) == 4


def test_what_was_stopped_is_not_drawn(chat):
  answer = chat.ask("Draw", force=True)
  next(answer)
  answer.close()
  assert chat.turns[1][1].startswith("<h>") and chat.drawing is None


def test_a_picture_in_memory_joins_as_its_file_does(chat, assistant, tmp_path):
  (tmp_path / "a.png").write_bytes(png())
  image = Image.open(io.BytesIO(png()))
  answers, seen = set(), []
  for picture in (tmp_path / "a.png", png(), image, np.asarray(image), image.convert("P")):
    chat.clear()
    chat.attach(picture, hd=False)
    seen.append(chat._waiting[0].visual)
    answers.add("".join(chat.ask("What is it?")))
  assert all(visual is seen[0] for visual in seen[:4]) and len(seen[0]) == 4
  with pytest.raises(ImageError, match="cannot be|not a picture"):
    chat.attach(b"nothing")


def test_a_question_that_is_taken_back(chat):
  assert chat.undo() is None
  first = "".join(chat.ask("Hello"))
  chat.attach(png())
  "".join(chat.ask(" What is it? ", draw=True))
  chat.attach(png((1, 2, 3)))
  assert chat.undo() == "What is it?" and chat.waiting == 1
  assert chat.turns == ((HUMAN, "Hello"), (GPT, first)) and chat.undo() is None
  "".join(chat.ask("What is it?"))
  assert chat.turns[2] == (HUMAN, "<image>\nWhat is it?") and chat.waiting == 0


def test_a_question_that_is_asked_again(chat):
  with pytest.raises(ValueError, match="no question to ask again"):
    chat.ask_again()
  chat.attach(png())
  first = "".join(chat.ask("Hello"))
  assert "".join(chat.ask_again(force=True)).startswith("<h>") and len(chat.turns) == 2
  assert "".join(chat.ask_again()) == first
  chat.attach(png((1, 2, 3)))
  before = chat.turns
  chat._sampling = dataclasses.replace(chat._sampling, max_new_tokens=300)
  with pytest.raises(ValueError, match="max_length is 256"):
    chat.ask_again()
  assert chat.turns == before and chat.waiting == 1


# The studio.

@pytest.mark.parametrize("memory", ["keep", "swap"])
def test_who_is_on_the_devices_while_a_picture_is_painted(chat, assistant, memory):
  engine, painter, seen = assistant.engine, StubPainter(), []
  studio = Studio(painter, engine, memory=memory)
  studio.open()
  assert painter.loaded == (memory == "keep")
  painter.while_painting = lambda: seen.append((engine.is_aside, painter.loaded))
  answer = chat.ask("Tell me")
  begun = next(answer)
  assert studio.paint(["a"] * 2, Painting()).shape == (2, 64, 64, 3)
  assert seen == [(memory == "swap", True)] and not engine.is_aside
  assert painter.loaded == (memory == "keep")
  text = begun + "".join(answer)
  chat.clear()
  assert "".join(chat.ask("Tell me")) == text
  assert set(engine.programs.compiled.values()) == {1}


def test_a_painter_that_fails_leaves_the_model_as_it_was(chat, assistant):
  before = "".join(chat.ask("Hello"))
  painter = StubPainter()
  studio = Studio(painter, assistant.engine, memory="swap")
  for error, kind, message in (
      (RuntimeError("RESOURCE_EXHAUSTED: 9 GB"), PaintError, "memory of the devices"),
      (RuntimeError("a bug"), RuntimeError, "a bug"),
      (KeyboardInterrupt(), KeyboardInterrupt, None)):
    painter.fail = error
    with pytest.raises(kind, match=message):
      studio.paint(["a"], Painting())
    assert not painter.loaded and not assistant.engine.is_aside
  with pytest.raises(PaintError, match="width 20"):
    studio.paint(["a"], Painting(width=20))
  assert len(painter.orders) == 3
  chat.clear()
  assert "".join(chat.ask("Hello")) == before


def test_what_a_failed_painting_held_is_gone_before_the_model_is_back(assistant, monkeypatch):
  painter, held, gone = StubPainter(), [], []

  def fail():
    array = np.zeros(3)
    held.append(weakref.ref(array))
    raise MemoryError

  def back(waiting):
    gone.append(held[0]() is None)
    return to_devices(waiting)

  painter.while_painting = fail
  monkeypatch.setattr("mgjax.infer.programs.to_devices", back)
  with pytest.raises(PaintError):
    Studio(painter, assistant.engine, memory="swap").paint(["a"], Painting())
  assert gone == [True]


def test_a_memory_that_does_not_exist(assistant):
  with pytest.raises(ValueError, match="'disk' does not exist; one of keep, swap"):
    Studio(StubPainter(), assistant.engine, memory="disk")
