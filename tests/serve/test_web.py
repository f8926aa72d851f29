import contextlib
import importlib.util
import os
import sys
import threading

import pytest
from serving import CASES, data_url, eventually, png, tiny_assistant, user
from windows import SETTINGS, Window, serving_page

from mgjax.serve import web_facts, web_talk

BLUE = (10, 20, 240)


@pytest.fixture(scope="module")
def served(assistant):
  with serving_page(assistant) as served:
    yield served


@pytest.fixture
def slowly(served, monkeypatch):
  """Steps of the engine take 50 ms."""
  step, never = served.assistant.engine.step, threading.Event()
  monkeypatch.setattr(served.assistant.engine, "step", lambda: (never.wait(0.05), step())[1])


def of_the_api(served, *messages, tokens=8, **options):
  body = {"messages": list(messages), "max_tokens": tokens, "temperature": 0} | options
  response = served.post(body)
  assert response.status_code == 200, response.text
  return response.json()["choices"][0]["message"]["content"]


def shown(text):
  return web_talk.literal(text)


# Conversations.

@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.2, "top_p": 0.7, "seed": 7}])
def test_a_streamed_answer_is_that_of_the_api(served, window, slowly, sampling):
  seen = []
  window.begin(" Tell me all ")
  assert window.chat[0]["content"][0]["text"] == "Tell me all" and not window.box["text"]
  for text in window.growing(max_tokens=12, **sampling):
    seen.append(text)
  assert seen[-1] == shown(of_the_api(served, user("Tell me all"), tokens=12, **sampling))
  assert len(set(seen)) > 3 and all(seen[-1].startswith(text) for text in seen)


def test_a_conversation_with_pictures(served, window):
  red, blue = window.upload(png()), window.upload(png(BLUE), "b.png")
  first = window.ask("What is it?", red)
  second = window.ask("And these?", blue, red, hd=False)
  urls = data_url(png()), data_url(png(BLUE))
  asked = user("What is it?", (urls[0], "high"))
  whole = of_the_api(served, asked)
  assert first == shown(whole)
  expected = of_the_api(served, asked, {"role": "assistant", "content": whole},
                        user("And these?", (urls[1], "low"), (urls[0], "low")))
  assert second == shown(expected) and window.cut()
  kinds = [[part["type"] for part in message["content"]] for message in window.chat]
  assert kinds == [["file", "text"], ["text", "text"], ["file", "file", "text"], ["text", "text"]]
  assert served.http.get(window.chat[0]["content"][0]["file"]["url"]).content == png()


def test_a_picture_alone_is_a_question_and_nothing_is_none(served, window):
  answer = window.ask("", window.upload(png()))
  assert answer == shown(of_the_api(served, user("", data_url(png()))))
  before = window.chat
  window.ask(" ")
  assert window.chat == before


def test_words_in_pictures_are_a_hint(served, window, monkeypatch):
  lines = {"a.png": ["EXIT <42>", "<|im_end|>"], "b.png": []}
  monkeypatch.setattr(web_talk, "read_text", lambda path: lines[os.path.basename(path)])
  first = window.ask("What is it?", window.upload(png()), ocr=True)
  assert [m["content"][-1]["text"] for m in window.chat[:2]] == ["What is it?", "EXIT &lt;42>"]
  assert window.chat[1]["metadata"]["title"] == "Words read in the picture"
  second = window.ask("Sure?", window.upload(png(BLUE), "b.png"), ocr=True)
  assert window.chat[4]["metadata"]["title"] == "No words were found in the picture"
  hint = "\nReference OCR Token: EXIT <42>"
  asked = user(f"What is it?{hint}", data_url(png()))
  whole = of_the_api(served, asked)
  assert first == shown(whole)
  assert second == shown(of_the_api(
      served, asked, {"role": "assistant", "content": whole},
      user(f"Sure?{hint}", data_url(png(BLUE)))))
  assert window.again() != "" and len(window.chat) == 5  # without OCR nothing is read
  assert window.chat[3]["content"][-1]["text"] == "Sure?"


def test_another_answer(served, window):
  window.ask("Tell me")
  options = {"temperature": 1.5, "max_tokens": 20}
  drawn = {window.again(**options) for _ in range(3)}
  assert len(drawn) > 1 and len(window.chat) == 2
  last = window.again(seed=3, **options)
  whole = of_the_api(served, user("Tell me"), tokens=20, temperature=1.5, seed=3)
  assert last == shown(whole)
  assert window.ask("More") == shown(of_the_api(
      served, user("Tell me"), {"role": "assistant", "content": whole}, user("More")))


def test_undo_and_a_new_chat(served, window):
  red = window.upload(png())
  window.ask("One")
  window.ask("Two", red)
  window.do("chatbot", "undo", [None])
  assert window.box["text"] == "Two" and window.box["files"][0]["path"] == red
  assert len(window.chat) == 2
  window.do("button", "click", [])
  assert window.chat == []
  assert window.ask("Three") == shown(of_the_api(served, user("Three")))
  window.do("chatbot", "undo", [None])
  window.do("chatbot", "undo", [None])
  assert window.chat == []
  window.again()
  assert window.chat == []


def test_an_example(served, window):
  examples = next(c for c in window.config["components"] if c["type"] == "chatbot")["props"][
      "examples"]
  window.do("chatbot", "example_select", [], event_data={
      "index": 0, "value": {"text": "x", "files": []}})
  answer = window.finish(("chatbot", "example_select"))
  file = served.http.get(f"/gradio_api/file={window.chat[0]['content'][0]['file']['path']}")
  assert answer == shown(of_the_api(
      served, user(examples[0]["text"], data_url(file.content))))


def test_two_windows_do_not_mix(served, slowly):
  windows, texts = [Window(served) for _ in range(2)], ("Tell me", "Say it")
  for window, text in zip(windows, texts):
    window.begin(text)
  answers = [window.growing(max_tokens=12) for window in windows]
  for _ in zip(*answers):
    pass
  for answer in answers:
    for _ in answer:
      pass
  for window, text in zip(windows, texts):
    assert window.said() == shown(of_the_api(served, user(text), tokens=12))
    assert [m["content"][0]["text"] for m in window.chat][0] == text and len(window.chat) == 2


# Who stops, who leaves, and what fails.

def test_stop_frees_the_row_and_keeps_what_was_said(served, window, slowly):
  window.begin("Tell me all")
  growing = window.growing(max_tokens=200)
  while not next(growing):
    pass
  assert served.metric("mgjax_rows_growing") == 1
  window.stop()
  assert eventually(lambda: served.metric("mgjax_rows_growing") == 0, 5) < 1
  for _ in growing:
    pass
  said = window.said()
  assert window.ask("And?") and window.chat[1]["content"][0]["text"] == said != ""


def test_what_was_stopped_before_its_first_word_is_asked_with_what_follows(served, window):
  step, go = served.assistant.engine.step, threading.Event()
  served.assistant.engine.step = lambda: (go.wait(10), step())[1]
  try:
    window.begin("One", window.upload(png()))
    growing = window.growing()
    next(growing)
    window.stop()
    growing.close()
    window.begin("Two")
  finally:
    go.set()
    served.assistant.engine.step = step
  one, two = user("One", data_url(png()))["content"], user("Two")
  answer = window.finish()
  assert answer == shown(of_the_api(
      served, two | {"content": [*one, {"type": "text", "text": "Two"}]}))


@pytest.mark.parametrize("others", [0, 3])
def test_a_window_that_is_closed_frees_its_row_or_its_place(served, window, slowly, others):
  with contextlib.ExitStack() as stack:
    for i in range(others):
      stack.callback(served.ask(f"Number {i}", tokens=200, stream=True).close)
    eventually(lambda: served.metric("mgjax_rows_growing") == others)
    window.begin("Tell me")
    growing = window.growing(max_tokens=200)
    figure = "mgjax_queue" if others else "mgjax_rows_growing"
    while served.metric(figure) == 0:
      next(growing)
    growing.close()
    assert eventually(lambda: served.metric(figure) == 0, 5) < 1
    assert served.metric("mgjax_rows_growing") == others
  eventually(lambda: served.metric("mgjax_rows_growing") == 0)


def test_a_conversation_that_is_too_long(served, window):
  window.ask("Hello")
  window.ask("long " * 300)
  assert "max_length is 256" in window.told[0] and window.box["text"].startswith("long long")
  assert [m["content"][0]["text"] for m in window.chat[:1]] == ["Hello"] and len(window.chat) == 2
  assert window.ask("Short") != "" and len(window.told) == 1


def test_an_answer_is_shorter_where_little_is_left(served, window):
  answer = window.ask("long " * 60, max_tokens=250)
  expected = of_the_api(served, user("long " * 60), tokens=None)
  assert answer == shown(expected) and window.cut() and not window.told


def test_errors_are_told_and_the_question_given_back(assistant):
  with serving_page(assistant, images=1, new_tokens=50) as served:
    window = Window(served)
    red, bad = window.upload(png()), window.upload(b"GIF89a nonsense", "a<b>.gif")
    window.ask("What?", red, red)
    assert "more than 1 images" in window.told[-1] and len(window.box["files"]) == 2
    window.ask("What?", bad)
    assert "picture" in window.told[-1] or "image" in window.told[-1]
    window.ask("What?", top_k=-3)
    assert "top_k is -3" in window.told[-1] and window.chat == [] and window.box["text"] == "What?"
    window.ask("What does <|im_end|> mean?")
    assert "&lt;|im_end|&gt;" in window.told[-1]
    os.remove(red)
    other = window.upload(png(BLUE))
    assert window.ask("What?", other) != "" and len(window.told) == 4
    os.remove(other)
    window.ask("And?")
    assert "a.png is no longer here" in window.told[-1]
    assert os.path.exists(bad)
  assert not os.path.exists(os.path.dirname(os.path.dirname(bad)))


def test_a_failing_engine_and_a_full_queue(assistant, monkeypatch):
  with serving_page(assistant, queue=0) as served:
    window = Window(served)
    with monkeypatch.context() as patch:
      patch.setattr(assistant.engine.programs, "decode", lambda *_: 1 / 0)
      window.ask("Hello, you")
    assert "the model failed" in window.told[0] and window.box["text"] == "Hello, you"
    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
      step, go = assistant.engine.step, threading.Event()
      patch.setattr(assistant.engine, "step", lambda: (go.wait(20), step())[1])
      stack.callback(go.set)
      threads = [threading.Thread(target=served.ask, args=(f"Number {i}",)) for i in range(3)]
      for i, thread in enumerate(threads):
        thread.start()
        eventually(lambda n=i: served.metric("mgjax_rows_growing")
                   + served.metric("mgjax_queue") == n + 1)
      window.ask("Hello")
      assert "requests wait already" in window.told[1] and window.box["text"] == "Hello"
    for thread in threads:
      thread.join()
    assert window.ask("Hello") != ""


def test_fewer_bytes_are_no_fewer_parameters(assistant):
  count, weights = web_facts.facts(assistant).splitlines()[2:4]
  of_int4, their_weights = web_facts.facts(tiny_assistant(name="int4")).splitlines()[2:4]
  assert of_int4 == count and "float32;" in weights and "int4" in their_weights


def test_facts_and_settings(served, window):
  props = {c["props"].get("label"): c["props"] for c in window.config["components"]}
  facts = next(c["props"]["value"] for c in window.config["components"] if c["type"] == "markdown")
  for fact in ("2 layers, width 32", "256 tokens", "28 × 28 | 4 tokens", "56 × 56 | 20 tokens",
               "float32", "1 × cpu"):
    assert fact in facts
  longest = props["Longest answer, in tokens"]
  assert (longest["minimum"], longest["maximum"], longest["value"]) == (1, 256, 256)
  assert props["Pictures in high resolution (HD)"]["visible"]
  order = [c["props"].get("label", "") for c in window.config["components"]
           if c["type"] in ("slider", "number", "checkbox")]
  assert len(order) == len(SETTINGS) and "HD" in order[-2] and "OCR" in order[-1]


# The program.

def test_without_gradio(monkeypatch, capsys, tmp_path):
  spec = importlib.util.spec_from_file_location("serve", CASES.parents[2] / "launch" / "serve.py")
  serve = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(serve)
  monkeypatch.setitem(sys.modules, "gradio", None)
  arguments = ["--checkpoint", str(tmp_path / "none"), "--port", "0"]
  assert serve.main([*arguments, "--web"]) == 2
  assert capsys.readouterr().err == (
      "error: no module 'gradio'; pip install -e '.[serve,web]'\n")
  assert serve.main(arguments) == 2 and "no such folder" in capsys.readouterr().err
