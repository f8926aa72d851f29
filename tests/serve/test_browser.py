"""The page in a real browser (`pip install playwright`, and a Chromium of the system)."""
import re
import shutil
import threading

import numpy as np
import pytest
from serving import data_url, eventually, png, user
from tiny_sdxl import write_folder
from windows import serving_page

from mgjax.diffusion.painter import open_painter
from mgjax.infer.studio import Studio
from mgjax.serve.warm import warm_up_painter

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")]
expect = playwright.expect


@pytest.fixture(scope="module")
def served(assistant, tmp_path_factory):
  from conversion.from_hf import main
  root = tmp_path_factory.mktemp("sdxl")
  assert main(["--sdxl", str(write_folder(root / "hf")), "--output", str(root / "sdxl")]) == 0
  studio = Studio(open_painter(root / "sdxl"), assistant.engine, memory="swap", name="sdxl")
  warm_up_painter(studio)
  with serving_page(assistant, studio=studio) as served:
    yield served


@pytest.fixture(scope="module")
def browser():
  with playwright.sync_playwright() as run:
    browser = run.chromium.launch(executable_path=CHROMIUM, args=[
        "--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"])
    yield browser
    browser.close()


@pytest.fixture
def page(browser, served):
  """A window; whatever it does, it asks no other server for anything and has no error."""
  context = browser.new_context(viewport={"width": 1280, "height": 800})
  page, wrong = context.new_page(), []
  page.set_default_timeout(10_000)
  page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
  page.on("pageerror", lambda error: wrong.append(str(error)))
  page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
  page.on("request", lambda r: None if r.url.startswith((served.url, "data:", "blob:"))
          else wrong.append(r.url))
  page.goto(served.url)
  expect(box(page)).to_be_editable()
  yield page
  context.close()
  assert not wrong


@pytest.fixture
def slowly(served, monkeypatch):
  step, never = served.assistant.engine.step, threading.Event()
  monkeypatch.setattr(served.assistant.engine, "step", lambda: (never.wait(0.05), step())[1])


def box(page):
  return page.get_by_test_id("textbox")


def ask(page, text):
  box(page).fill(text)
  box(page).press("Enter")


def answers(page):
  return page.get_by_test_id("bot").filter(has_not_text="The answer was cut here")


def said(page, n=1):
  """The texts of n answers, once the last is there as a whole."""
  expect(answers(page)).to_have_count(n)
  expect(page.get_by_role("button", name="Submit")).to_be_visible()
  return answers(page).all_inner_texts()


def longest(page, tokens):
  field = page.get_by_label("number input for Longest answer, in tokens")
  field.fill(str(tokens))
  field.press("Tab")


def words(text):
  """What is left of a text when Markdown is shown: what it says, not how."""
  return re.sub(r"\W", "", text)


def test_a_conversation(served, page, slowly):
  longest(page, 20)
  page.locator("input[type=file]").first.set_input_files(
      {"name": "a.png", "mimeType": "image/png", "buffer": png()})
  expect(page.locator(".thumbnail-item")).to_have_count(1)
  ask(page, "What is it?")
  seen = set()
  expect(page.get_by_role("button", name="Submit")).not_to_be_visible()
  while not page.get_by_role("button", name="Submit").is_visible():
    seen.update(answers(page).all_inner_texts())
  first, = said(page)
  assert len(seen) > 2
  expect(page.get_by_test_id("user").locator("img")).to_have_count(1)
  body = {"messages": [user("What is it?", data_url(png()))], "max_tokens": 20, "temperature": 0}
  assert words(first) == words(served.post(body).json()["choices"][0]["message"]["content"])
  ask(page, "And now?")
  assert said(page, 2)[0] == first
  page.get_by_role("button", name="Retry").click()
  expect(page.get_by_role("button", name="Submit")).not_to_be_visible()
  assert said(page, 2)[0] == first
  page.get_by_role("button", name="Undo").click()
  expect(answers(page)).to_have_count(1)
  expect(box(page)).to_have_value("And now?")
  page.get_by_role("button", name="New chat").click()
  expect(answers(page)).to_have_count(0)
  page.get_by_text("How many shapes are there").click()
  said(page)
  page.get_by_role("button", name="Clear").click()
  expect(answers(page)).to_have_count(0)


def test_a_picture_is_drawn_and_talked_about(served, page, monkeypatch):
  """The whole way: a picture and a wish in, a prompt, its picture, and a question about both."""
  page.locator("input[type=file]").first.set_input_files(
      {"name": "a.png", "mimeType": "image/png", "buffer": png()})
  expect(page.locator(".thumbnail-item")).to_have_count(1)
  page.get_by_label("Draw a picture").check()
  longest(page, 12)
  ask(page, "The same by night")
  expect(page.get_by_text("The model wrote no drawing prompt.")).to_be_visible()
  painted = page.get_by_test_id("bot").locator("img")
  expect(painted).to_have_count(0)
  monkeypatch.setattr("mgjax.serve.service.BEAT", 0.1)
  paint, seen = served.studio.paint, []
  monkeypatch.setattr(served.studio, "paint", lambda *a: (threading.Event().wait(1.5),
                                                          seen.append(paint(*a)))[1] or seen[-1])
  page.get_by_role("button", name="Draw it anyway").click()
  expect(page.get_by_text(re.compile(r"Painting \.\.\. 1 s"))).to_be_visible()
  expect(painted).to_have_count(1)
  expect(painted).to_have_js_property("complete", True)
  assert painted.evaluate("image => image.naturalWidth") == 32
  assert served.studio.painter.loaded is False and seen[0].std() > 5
  expect(page.get_by_text("Painting ...")).to_have_count(0)
  page.get_by_label("Draw a picture").uncheck()
  prompts, submit = [], served.assistant.engine.submit
  monkeypatch.setattr(served.assistant.engine, "submit",
                      lambda p, *a: prompts.append(p) or submit(p, *a))
  ask(page, "What has changed?")
  eventually(lambda: prompts)
  expect(page.get_by_role("button", name="Submit")).to_be_visible()
  drawn = served.assistant.see(served.assistant.pixels(seen[0][0], hd=False))
  assert len(prompts[0].images) == 2 and prompts[0].images[1] is drawn
  expect(painted).to_have_count(1)
  page.get_by_role("button", name="Undo").click()
  page.get_by_role("button", name="Undo").click()
  expect(painted).to_have_count(0)
  expect(box(page)).to_have_value("The same by night")


def test_a_painting_that_is_stopped(served, page, monkeypatch):
  go = threading.Event()
  monkeypatch.setattr(served.studio, "paint", lambda *_: go.wait(20) and np.zeros((1, 8, 8, 3)))
  longest(page, 12)
  page.get_by_text("A lighthouse in a storm").click()
  page.get_by_role("button", name="Draw it anyway").click()
  expect(page.get_by_text(re.compile(r"Painting \.\.\. \d s"))).to_be_visible()
  page.locator("button.stop-button").click()
  expect(page.get_by_text("Stopped; there is no picture.")).to_be_visible()
  expect(page.get_by_text("Painting ...")).to_have_count(0)
  expect(box(page)).to_be_editable()
  go.set()
  page.wait_for_timeout(1000)
  page.get_by_role("button", name="Clear").click()
  expect(answers(page)).to_have_count(0)


def test_stop_and_a_window_that_is_closed(served, page, slowly):
  for n in (1, 2):
    ask(page, "Tell me all")
    expect(answers(page)).to_have_count(n)
    expect(answers(page).last).not_to_have_text("")
    assert served.metric("mgjax_rows_growing") == 1
    expect(page.get_by_role("button", name="Retry")).to_be_disabled()
    page.locator("button.stop-button").click()
    assert eventually(lambda: served.metric("mgjax_rows_growing") == 0) < 1
    expect(box(page)).to_be_editable()
  page.wait_for_timeout(1000)
  expect(answers(page)).to_have_count(2)  # what was said stays
  expect(box(page)).to_have_value("")
  ask(page, "Tell me all")
  eventually(lambda: served.metric("mgjax_rows_growing") == 1)
  page.close()
  assert eventually(lambda: served.metric("mgjax_rows_growing") == 0) < 1.5


def test_what_goes_wrong_is_told(page):
  longest(page, 4)
  question = "<img src=x onerror=alert(1)> <script>alert(2)</script> is it? "
  ask(page, question)
  said(page)
  assert page.get_by_test_id("user").inner_text() == question.strip()
  ask(page, "long " * 300)
  expect(page.get_by_text("max_length is 256")).to_be_visible()
  expect(box(page)).to_have_value("long " * 299 + "long")
  expect(answers(page)).to_have_count(1)
  page.locator("input[type=file]").first.set_input_files(
      {"name": "<b>.png", "mimeType": "image/png", "buffer": b"nothing"})
  expect(page.locator(".thumbnail-item")).to_have_count(1)
  ask(page, "What?")
  expect(page.get_by_text("not a picture").or_(page.get_by_text("cannot be")).first).to_be_visible()


def test_a_camera(page):
  longest(page, 4)
  page.get_by_role("button", name="Camera").click()
  page.get_by_text("Click to Access Webcam").click()
  page.get_by_role("button", name="capture photo").click()
  expect(page.locator(".thumbnail-item")).to_have_count(1)
  ask(page, "What is it?")
  said(page)
  picture = page.get_by_test_id("user").locator("img")
  expect(picture).to_have_count(1)
  expect(picture).to_have_js_property("complete", True)
  assert picture.evaluate("image => image.naturalWidth") > 200


def test_parameters_and_facts(page):
  for label in ("Temperature", "Top-p", "Top-k", "Longest answer, in tokens", "Seed",
                "Pictures in high resolution (HD)", "Draw a picture"):
    expect(page.get_by_text(label, exact=True).first).to_be_visible()
  facts = page.locator("#facts")
  expect(facts).to_contain_text("2 layers, width 32")
  expect(facts).to_contain_text("20 tokens each")


@pytest.mark.parametrize("width, height", [(1280, 800), (390, 844)])
def test_everything_fits(page, width, height):
  page.set_viewport_size({"width": width, "height": height})
  page.evaluate("window.scrollTo(0, 0)")
  place = page.get_by_role("button", name="New chat").bounding_box()
  assert place["y"] + place["height"] <= height
  assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_key_is_asked_for(assistant, browser):
  with serving_page(assistant, api_key="key") as served:
    page = browser.new_page()
    page.goto(served.url)
    for key in ("wrong", "key"):
      page.get_by_label("username").fill("me")
      page.get_by_label("password").fill(key)
      page.get_by_role("button", name="Login").click()
      if key == "wrong":
        expect(page.get_by_text("Incorrect Credentials")).to_be_visible()
    expect(box(page)).to_be_editable()
    page.close()
