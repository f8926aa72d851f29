"""Pictures that the page's model draws."""
import os
import pathlib

import pytest
from serving import data_url, eventually, png, user
from stub_painter import ANSWER, LONG, StubPainter, colour, opened, says
from windows import Window, serving_page

from mgjax.infer.studio import Studio
from mgjax.serve import web_facts, web_talk


@pytest.fixture(scope="module")
def painter():
  return StubPainter()


@pytest.fixture(scope="module")
def served(assistant, painter):
  studio = Studio(painter, assistant.engine, name="sdxl")
  with serving_page(assistant, studio=studio) as served:
    yield served


@pytest.fixture(autouse=True)
def nothing_painted(painter):
  painter.orders.clear()
  yield
  painter.fail = None
  painter.go.set()


def drawn(window, text, *files, **settings):
  window.begin(text, *files, draw=True)
  return window.finish(**{"max_tokens": 60, "seed": 3} | settings)


def parts(window, number=-1):
  """Of a message: its texts, and the files in it."""
  content = window.chat[number]["content"]
  return ([p["text"] for p in content if p["type"] == "text"],
          [p["file"] for p in content if p["type"] == "file"])


def test_a_picture_in_the_conversation(served, painter, window, assistant, monkeypatch):
  with monkeypatch.context() as patch:
    says(patch, assistant, ANSWER)
    drawn(window, "A cat", window.upload(png()))
  texts, (file,) = parts(window)
  assert texts == ["Sure.\n\nPrompt: a red cat"]
  response = served.http.get(file["url"])
  assert response.headers["content-type"] == "image/png"
  kind, pixels = opened(response.content)
  assert kind == "PNG" and (pixels == colour("a red cat", 3)).all()
  (prompt,), painting = painter.orders[0]
  assert (prompt, painting.steps, painting.guidance, painting.width) == ("a red cat", 5, 4.0, 64)
  # The next question refers to it.
  asked, submit = [], assistant.engine.submit
  monkeypatch.setattr(assistant.engine, "submit", lambda p, *a: asked.append(p) or submit(p, *a))
  second = window.ask("Which colour?")
  body = {"messages": [
      user("A cat <GEN>", (data_url(png()), "high")), {"role": "assistant", "content": ANSWER},
      user("Which colour?", (data_url(response.content), "low"))], "max_tokens": 8,
      "temperature": 0}
  assert second == web_talk.literal(served.post(body).json()["choices"][0]["message"]["content"])
  assert asked[0].tokens.tolist() == asked[1].tokens.tolist()
  assert [len(image) for image in asked[0].images] == [20, 4]
  assert len(parts(window, 1)[1]) == 1 and len(painter.orders) == 1
  window.do("chatbot", "undo", [None])
  window.do("chatbot", "undo", [None])
  assert window.chat == [] and window.box["text"] == "A cat" and len(window.box["files"]) == 1


def test_a_cut_prompt_and_another_picture(painter, window, assistant, monkeypatch):
  says(monkeypatch, assistant, f"<h>{LONG}</h>", ANSWER)
  drawn(window, "A cat")
  assert parts(window)[0] == [f"Prompt: {LONG}",
                              "*The painter does not read so much; left out:* words it is"]
  first = parts(window)[1][0]["path"]
  window.again(max_tokens=60)
  assert parts(window)[0] == ["Sure.\n\nPrompt: a red cat"]
  assert parts(window)[1][0]["path"] != first and len(window.chat) == 2


def test_an_answer_without_a_prompt_can_be_forced(painter, window, assistant, monkeypatch):
  with monkeypatch.context() as patch:
    says(patch, assistant, "I cannot.")
    drawn(window, "A cat")
  assert parts(window) == (["I cannot.", "*The model wrote no drawing prompt.*"], [])
  option, = window.chat[-1]["options"]
  window.do("chatbot", "option_select", [None], event_data={"index": 0, "value": option["value"]})
  assert len(window.chat) == 1
  window.finish(("chatbot", "option_select"))
  texts, files = parts(window)
  assert texts[0].startswith("Prompt: ") and len(files) == 1 and not window.chat[-1]["options"]
  before = window.chat  # nothing is left to force
  window.do("chatbot", "option_select", [None], event_data={"index": 0, "value": "x"})
  assert window.chat == before


def test_progress_is_shown_and_can_be_stopped(served, painter, window, assistant, monkeypatch):
  monkeypatch.setattr("mgjax.serve.service.BEAT", 0.2)
  says(monkeypatch, assistant, ANSWER)
  painter.go.clear()
  window.begin("A cat", draw=True)
  growing, seen = window.growing(max_tokens=60), set()
  while not any("1 s" in text for text in seen):
    next(growing)
    seen.add(parts(window)[0][-1])
  assert "*Painting ... 0 s*" in seen
  window.stop()
  growing.close()
  assert eventually(lambda: served.metric("mgjax_draw_queue") == 0, 5) < 1
  assert parts(window)[0][-1] == "*Stopped; there is no picture.*" and not parts(window)[1]
  painter.go.set()
  asked, submit = [], assistant.engine.submit
  monkeypatch.setattr(assistant.engine, "submit", lambda p, *a: asked.append(p) or submit(p, *a))
  assert window.ask("And?") and parts(window, 1)[0][-1] == "*Stopped; there is no picture.*"
  assert "A cat <GEN><" in assistant.tokenizer.decode(asked[0].tokens, skip_special=False)


def test_a_window_that_is_closed_gives_up_its_place(served, painter, assistant, monkeypatch):
  says(monkeypatch, assistant, ANSWER)
  painter.go.clear()
  window = Window(served)
  window.begin("A cat", draw=True)
  growing = window.growing(max_tokens=60)
  while served.metric("mgjax_draw_queue") == 0:
    next(growing)
  growing.close()
  assert eventually(lambda: served.metric("mgjax_draw_queue") == 0, 5) < 1.5


def test_a_painter_that_fails_leaves_the_answer(served, painter, window, assistant, monkeypatch):
  says(monkeypatch, assistant, ANSWER)
  painter.fail = RuntimeError("RESOURCE_EXHAUSTED")
  drawn(window, "A cat")
  texts, files = parts(window)
  assert texts[0].startswith("Sure.") and "*No picture:* the memory" in texts[1] and not files
  painter.fail = None
  drawn(window, "A cat", draw_size="80x48")
  assert len(parts(window)[1]) == 1


def test_files_are_where_nobody_finds_them(served, painter, window, assistant, monkeypatch):
  says(monkeypatch, assistant, ANSWER)
  drawn(window, "A cat")
  path = pathlib.Path(parts(window)[1][0]["path"])
  assert path.name == "picture.png" and len(path.parent.name) == 32
  folder = path.parent.parent
  for wrong in (folder, path.parent, folder / ".." / "x.png", "/etc/passwd"):
    assert served.http.get(f"/gradio_api/file={wrong}").status_code in (403, 404)
  os.remove(path)
  window.ask("And now?")
  assert "picture.png is no longer here" in window.told[-1] and window.box["text"] == "And now?"


def test_what_the_page_offers(served, window, painter, assistant):
  components = {c["props"].get("label"): c for c in window.config["components"]}
  assert components["Draw a picture"]["type"] == "checkbox"
  assert [size for size, _ in components["Size"]["props"]["choices"]] == [
      "64x64", "80x48", "48x80"]
  assert components["Steps"]["props"]["maximum"] == 100
  facts = next(c["props"]["value"] for c in window.config["components"] if c["type"] == "markdown")
  assert "| Draws with | sdxl, 64 × 64 |" in facts
  examples = next(c["props"]["examples"] for c in window.config["components"]
                  if c["type"] == "chatbot")
  number = [e["text"] for e in examples].index(web_facts.DRAWING_EXAMPLE)
  window.do("chatbot", "example_select", [], event_data={
      "index": number, "value": {"text": "x", "files": []}})
  window.finish(("chatbot", "example_select"))
  assert "no drawing prompt" in parts(window)[0][-2] + parts(window)[0][-1]
  with serving_page(assistant) as plain:
    labels = {c["props"].get("label") for c in Window(plain).config["components"]}
    assert labels.isdisjoint({"Draw a picture", "Size", "Steps"})
