"""launch/draw.py, and what --draw does in launch/chat.py."""
import importlib.util
import pathlib

import numpy as np
import pytest
from PIL import Image
from serving import png, tiny_assistant
from stub_painter import ANSWER, LONG, StubPainter, colour, opened, says
from tiny_sdxl import write_folder

from conversion.from_hf import main
from mgjax.infer.gallery import Gallery
from mgjax.infer.sampling import Sampling

REPO = pathlib.Path(__file__).resolve().parents[2]


def program(name):
  spec = importlib.util.spec_from_file_location(f"launch_{name}", REPO / "launch" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


chat_program, draw_program = program("chat"), program("draw")


@pytest.fixture(autouse=True)
def painter(monkeypatch):
  painter = StubPainter()
  painter.opened = []
  monkeypatch.setattr("mgjax.diffusion.painter.open_painter",
                      lambda *a, **k: painter.opened.append((a, k)) or painter)
  return painter


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
  """A converted SDXL, tiny and random."""
  root = tmp_path_factory.mktemp("sdxl")
  assert main(["--sdxl", str(write_folder(root / "hf")), "--output", str(root / "sdxl")]) == 0
  return root / "sdxl"


@pytest.fixture(scope="module")
def assistant():
  return tiny_assistant(rows=1)


@pytest.fixture
def talk(assistant, monkeypatch, tmp_path, capsys):
  """Runs chat.py on these lines; what it writes to stdout and stderr, and the conversation."""
  def run(*options, lines=(), tokens=40):
    chats, lines = [], iter([*lines, "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(chat_program, "open_chat", lambda args: chats.append(
        assistant.conversation(Sampling(max_new_tokens=tokens))) or chats[0])
    code = chat_program.main(["--checkpoint", "x", "--draw", "sdxl", "--draw_to",
                              str(tmp_path / "a.png"), *options])
    return code, *capsys.readouterr(), chats[0] if chats else None
  return run


def pixels(path):
  return opened(path.read_bytes())[1]


def test_one_question_is_answered_and_painted(talk, painter, assistant, monkeypatch, tmp_path):
  says(monkeypatch, assistant, ANSWER)
  code, out, err, chat = talk("--prompt", "A cat", "--draw_size", "64x96", "--draw_steps", "7",
                              "--draw_guidance", "3", "--draw_seed", "5")
  assert (code, out) == (0, ANSWER + "\n") and painter.opened == [(("sdxl",), {})]
  (prompts, painting), = painter.orders
  assert prompts == ["a red cat"] and (painting.width, painting.height, painting.steps,
                                       painting.guidance, painting.seed) == (64, 96, 7, 3.0, 5)
  assert (pixels(tmp_path / "a.png") == colour("a red cat", 5)).all()
  assert f"[{tmp_path}/a.png: 64 x 96, " in err and chat.waiting == 1 and painter.loaded
  assert chat.turns[0][1] == "A cat <GEN>"


def test_a_conversation_with_pictures(talk, painter, assistant, monkeypatch, tmp_path):
  (tmp_path / "a-2.png").write_bytes(b"mine")
  says(monkeypatch, assistant, ANSWER, "It is red.", f"<h>{LONG}</h>", "I cannot.", "a dog</h>",
       "Yes.")
  code, out, err, chat = talk("--draw_memory", "swap", lines=[
      "/draw A cat", "Which colour?", "/draw Another", "/draw More", "/redraw", "/drop",
      "Is it?", "/draw", "/redraw"])
  assert code == 0 and not painter.loaded
  assert [prompts for prompts, _ in painter.orders] == [
      ["a red cat"], [LONG], ["a dog"], ["Yes."]]
  assert [painting.seed for _, painting in painter.orders] == [0, 1, 2, 3]
  assert sorted(p.name for p in tmp_path.iterdir()) == [
      "a-2.png", "a-3.png", "a-4.png", "a-5.png", "a.png"]
  assert (tmp_path / "a-2.png").read_bytes() == b"mine"
  assert (pixels(tmp_path / "a-3.png") == colour(LONG, 1)).all()
  notes = err.splitlines()
  assert any("it does not see the end: words it is" in n for n in notes)
  assert sum("goes with the next question" in n for n in notes) == 4
  assert any(n.startswith("[no picture: the model wrote no drawing prompt") for n in notes)
  assert any(n.startswith("error: draw what?") for n in notes)
  asked = [text for role, text in chat.turns if role == "human"]
  assert asked == ["A cat <GEN>", "<image>\nWhich colour?", "Another <GEN>",
                   "<image>\nMore <GEN>", "Is it? <GEN>"]
  assert chat.turns[7][1] == "<h>a dog</h>" and chat.waiting == 1


def test_a_forced_prompt_and_a_model_that_cannot_see(talk, painter, assistant, monkeypatch):
  monkeypatch.setattr(type(assistant), "sees", False)
  code, out, err, chat = talk("--draw_force", "--prompt", "A cat", tokens=8)
  assert code == 0 and out.startswith("<h>") and chat.waiting == 0
  assert painter.orders[0][0] == [" ".join(out[3:].split())]
  assert "next question" not in err


def test_stopped_answers_and_failing_painters(talk, painter, assistant, monkeypatch, tmp_path):
  says(monkeypatch, assistant, ANSWER)
  painter.fail = RuntimeError("RESOURCE_EXHAUSTED")
  code, out, err, chat = talk("--prompt", "A cat")
  assert code == 2 and "error: the memory of the devices is too small" in err
  assert out == ANSWER + "\n" and "Traceback" not in err

  class Interrupted:
    cut, drawing = False, "a cat"

    def ask(self, question, **_):
      yield "begun"
      raise KeyboardInterrupt

  drawer = type("D", (), {"force": False, "paint": lambda *_: pytest.fail("painted")})()
  chat_program.say(Interrupted(), "?", drawer)


@pytest.mark.parametrize("options, message", [
    (["--draw_size", "20"], "width 20: expected a multiple of"),
    (["--draw_steps", "0"], "steps 0: expected 1"),
    (["--draw_to", "a.gif"], "--draw_to a.gif: expected a name that ends in .png"),
    (["--draw_to", "no/a.png"], "there is no folder no")])
def test_settings_are_checked_before_anything_is_loaded(talk, options, message):
  code, out, err, chat = talk(*options)
  assert code == 2 and chat is None and not out
  assert err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("options, message", [
    (["--draw_size", "big"], "'big' is no size"), (["--draw_memory", "disk"], "invalid choice"),
    (["--draw_steps", "x"], "invalid int")])
def test_arguments_that_are_none(talk, options, message, capsys):
  with pytest.raises(SystemExit) as caught:
    talk(*options)
  assert caught.value.code == 2 and message in capsys.readouterr().err


def test_without_a_painter(assistant, capsys):
  with pytest.raises(SystemExit):
    chat_program.arguments(["--checkpoint", "x", "--draw_steps", "3"])
  assert "--draw_steps says how to draw" in capsys.readouterr().err
  chat, args = assistant.conversation(), chat_program.arguments(["--checkpoint", "x"])
  for line in ("/draw a cat", "/redraw"):
    with pytest.raises(ValueError, match=f"{line.split()[0]} needs something to draw with"):
      chat_program.obey(chat, line, args)


def test_the_whole_way(sdxl, assistant, monkeypatch, tmp_path):
  """A picture in, a prompt out, its picture back, and a question about it; with a real painter."""
  (tmp_path / "photo.png").write_bytes(png())
  monkeypatch.undo()
  asked, submit = [], assistant.engine.submit
  with monkeypatch.context() as patch:
    patch.setattr(assistant.engine, "submit", lambda p, *a: asked.append(p) or submit(p, *a))
    patch.setattr(chat_program, "open_chat", lambda args: assistant.conversation(
        Sampling(max_new_tokens=12)))
    lines = iter([f"/image {tmp_path}/photo.png", "/draw The same by night", "What has changed?",
                  "/exit"])
    patch.setattr("builtins.input", lambda _: next(lines))
    assert chat_program.main(["--checkpoint", "x", "--draw", str(sdxl), "--draw_to",
                              str(tmp_path / "a.png"), "--draw_size", "16x8", "--draw_steps", "2",
                              "--draw_force", "--draw_memory", "swap"]) == 0
  assert pixels(tmp_path / "a.png").shape == (8, 16, 3) and pixels(tmp_path / "a.png").std() > 5
  drawn = assistant.see(assistant.pixels(str(tmp_path / "a.png"), hd=False))
  assert asked[1].images[0] is asked[0].images[0] and asked[1].images[1] is drawn


# launch/draw.py

def draw(tmp_path, *options):
  return draw_program.main(["--model", "sdxl", "--output", str(tmp_path / "b.png"), *options])


def test_pictures_alone(painter, tmp_path, capsys):
  assert draw(tmp_path, "--prompt", "a cat", "--prompt", LONG, "--count", "2", "--size", "96x64",
              "--negative", "", "--seed", "3", "--sampler", "ddim") == 0
  out, err = capsys.readouterr()
  names = [tmp_path / name for name in ("b.png", "b-2.png", "b-3.png", "b-4.png")]
  assert out.splitlines() == list(map(str, names))
  assert (pixels(names[3]) == colour(LONG, 3, 3)).all() and pixels(names[0]).shape == (64, 96, 3)
  assert painter.opened == [(("sdxl",), {"sampler": "ddim"})]
  (prompts, painting), = painter.orders
  assert prompts == ["a cat", "a cat", LONG, LONG] and painting.negative is None
  assert "it does not see the end: words it is" in err and "painted in" in err
  assert draw(tmp_path, "--prompt", "a cat") == 0
  assert capsys.readouterr().out == f"{tmp_path}/b-5.png\n"
  assert painter.orders[1][1].negative.startswith("out of frame")


@pytest.mark.parametrize("options, message", [
    (["--prompt", " "], "--prompt is empty"), (["--count", "0"], "0 pictures"),
    (["--guidance", "nan"], "guidance nan"), (["--size", "7x7"], "multiple of"),
    (["--seed", "-1"], "seed -1")])
def test_what_cannot_be_painted(painter, tmp_path, capsys, options, message):
  assert draw(tmp_path, "--prompt", "a cat", *options) == 2
  out, err = capsys.readouterr()
  assert not out and err.startswith("error: ") and err.count("\n") == 1 and message in err
  assert not painter.orders and not list(tmp_path.iterdir())


def test_a_folder_that_is_no_sdxl(monkeypatch, tmp_path, capsys):
  monkeypatch.undo()
  for folder, message in ((tmp_path / "none", "no such folder"), (tmp_path, "no checkpoint")):
    assert draw_program.main(["--model", str(folder), "--prompt", "a", "--output",
                              str(tmp_path / "a.png")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("name, kind", [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.webp", "WEBP")])
def test_a_picture_is_saved_as_its_name_says(tmp_path, name, kind):
  gallery = Gallery(tmp_path / name)
  saved = [gallery.save(np.zeros((8, 8, 3), np.uint8)) for _ in range(2)]
  assert [p.name for p in saved] == [name, name.replace("a.", "a-2.")]
  with Image.open(saved[1]) as image:
    assert image.format == kind


def test_half_a_file_is_not_left(tmp_path, monkeypatch):
  def full(*_, **__):
    raise OSError("no space left")
  monkeypatch.setattr(Image.Image, "save", full)
  with pytest.raises(OSError, match="no space"):
    Gallery(tmp_path / "a.png").save(np.zeros((8, 8, 3), np.uint8))
  assert not list(tmp_path.iterdir())
