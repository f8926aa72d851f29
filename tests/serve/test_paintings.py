"""Pictures over HTTP: alone, and at the end of an answer."""
import base64
import contextlib
import json
import logging
import threading

import numpy as np
import openai
import pytest
from serving import data_url, eventually, png, raw_request, serving, user
from stub_painter import ANSWER, LONG, StubPainter, colour, opened, says

from mgjax.data.conversation import GPT, HUMAN
from mgjax.diffusion.painter import NEGATIVE
from mgjax.infer.sampling import Sampling
from mgjax.infer.studio import Studio

BOTH = {"modalities": ["text", "image"]}


@pytest.fixture(scope="module")
def painter():
  return StubPainter()


@pytest.fixture(scope="module")
def served(assistant, painter):
  studio = Studio(painter, assistant.engine, memory="swap", name="sdxl")
  with serving(assistant, studio=studio) as served:
    yield served


@pytest.fixture(autouse=True)
def nothing_painted(painter):
  painter.orders.clear()
  yield
  painter.fail, painter.while_painting = None, lambda: None
  painter.go.set()


def generate(served, **body):
  return served.http.post("/v1/images/generations", json={"prompt": "a cat", "seed": 7} | body)


def of_url(url):
  head, _, data = url.partition(",")
  return head, *opened(base64.b64decode(data))


# Pictures alone.

def test_pictures_by_the_official_client(served, painter):
  answer = served.openai.images.generate(
      model="sdxl", prompt=" a cat ", n=2, size="64x96", user="me",
      extra_body={"seed": 7, "steps": 3, "guidance": 2.5, "negative_prompt": ""})
  (prompts, painting), = painter.orders
  assert prompts == ["a cat"] * 2
  assert (painting.width, painting.height, painting.steps, painting.guidance, painting.negative,
          painting.seed) == (64, 96, 3, 2.5, None, 7)
  for i, picture in enumerate(answer.data):
    kind, pixels = opened(base64.b64decode(picture.b64_json))
    assert kind == "PNG" and pixels.shape == (96, 64, 3)
    assert (pixels == colour("a cat", 7, i)).all() and picture.revised_prompt is None
  assert answer.size == "64x96" and answer.created > 1e9


def test_what_is_left_out_is_as_the_model_has_it(served, painter):
  seeds = {generate(served, seed=None, size="auto").json()["seed"] for _ in range(2)}
  painting = painter.orders[0][1]
  assert len(seeds) == 2 and painting.seed in seeds
  assert (painting.width, painting.steps, painting.negative) == (None, 50, NEGATIVE)


@pytest.mark.parametrize("kind, options", [
    ("png", {}), ("jpeg", {"output_compression": 90}), ("webp", {"output_compression": 0})])
def test_formats_and_urls(served, kind, options):
  body = generate(served, output_format=kind, response_format="url", **options).json()
  head, found, pixels = of_url(body["data"][0]["url"])
  assert head == f"data:image/{kind};base64" and found == kind.upper()
  assert abs(pixels.astype(int) - colour("a cat", 7)).max() < 24
  assert body["output_format"] == kind and body["size"] == "64x64"


def test_a_prompt_that_is_cut_is_told(served):
  picture, = generate(served, prompt=LONG).json()["data"]
  assert picture["revised_prompt"] == "a very long prompt of nine"


@pytest.mark.parametrize("body, param, message", [
    ({"prompt": " "}, "prompt", "is empty"), ({"prompt": 5}, "prompt", "must be a string"),
    ({"prompt": "x" * 40_000}, "prompt", "40,000 characters"),
    ({"n": 0}, "n", "1 to 4"), ({"n": 5}, "n", "1 to 4"), ({"n": 1.5}, "n", "an integer"),
    ({"size": "big"}, "size", "expected \"1024x1024\""), ({"size": "20x64"}, "size", "multiple of"),
    ({"size": "0x0"}, "size", "multiple of"), ({"size": "128x128"}, "size", "16,384 pixels"),
    ({"size": "999999x999999"}, "size", "at most 8,192"), ({"size": 64}, "size", "a string"),
    ({"steps": 0}, "steps", "1 to 1000"), ({"steps": 101}, "steps", "at most 100"),
    ({"guidance": -1}, "guidance", "0 to 100"), ({"guidance": 10**400}, "guidance", "not finite"),
    ({"seed": "one"}, "seed", "an integer"), ({"negative_prompt": 5}, "negative_prompt", "string"),
    ({"response_format": "file"}, "response_format", "b64_json, url"),
    ({"output_format": "gif"}, "output_format", "png, jpeg, webp"),
    ({"output_compression": 50}, "output_compression", "100 for a png"),
    ({"output_format": "webp", "output_compression": 101}, "output_compression", "0 to 100"),
    ({"quality": "hd"}, "quality", "not supported"), ({"stream": True}, "stream", "not supported"),
    ({"background": "transparent"}, "background", "not supported"),
    ({"colour": "red"}, "colour", "unknown parameter")])
def test_what_means_nothing_is_refused(served, painter, body, param, message):
  response = generate(served, **body)
  error = response.json()["error"]
  assert response.status_code == 400 and error["param"] == param and message in error["message"]
  assert not painter.orders


def test_half_a_character_another_model_and_what_asks_for_nothing(served):
  post = lambda text: served.http.post("/v1/images/generations", content=text,
                                       headers={"content-type": "application/json"})
  assert "half a character" in post('{"prompt": "\\ud83d"}').json()["error"]["message"]
  assert post("{").json()["error"]["code"] == "not_json"
  with pytest.raises(openai.NotFoundError, match="there is 'sdxl'"):
    served.openai.images.generate(model="dall-e-3", prompt="a cat")
  idle = {"quality": "standard", "style": "vivid", "background": "auto", "moderation": "low",
          "stream": False, "size": None}
  assert generate(served, **idle).status_code == 200


def test_a_server_that_cannot_draw_says_so(assistant):
  with serving(assistant) as served:
    with pytest.raises(openai.NotFoundError, match="launch/serve.py --draw") as caught:
      served.openai.images.generate(prompt="a cat")
    assert caught.value.code == "no_drawing_model"
    for body in (BOTH, {"draw": True}, {"draw": {}}):
      response = served.post({"messages": [user("a")]} | body)
      assert response.status_code == 400
      assert response.json()["error"]["code"] == "no_drawing_model"
    assert served.post({"messages": [user("a")], "max_tokens": 2, "draw": False,
                        "modalities": ["text"]}).status_code == 200


def test_models_health_and_metrics(served):
  cards = {m.id: m.architecture for m in served.openai.models.list()}
  assert cards == {"tiny": {"input_modalities": ["text", "image"],
                            "output_modalities": ["text", "image"]},
                   "sdxl": {"input_modalities": ["text"], "output_modalities": ["image"]}}
  assert served.openai.models.retrieve("sdxl").id == "sdxl"
  assert served.http.get("/health").json() == {"status": "ok", "draws": "sdxl"}
  names = ["mgjax_painted_pictures_total", "mgjax_painting_seconds_count"]
  before = [served.metric(name) for name in names]
  generate(served, n=2)
  assert [served.metric(name) - b for name, b in zip(names, before)] == [2, 1]
  assert served.metric("mgjax_draw_queue") == 0 == served.metric("mgjax_held_bytes")


# With an answer.

def test_text_and_picture_in_one_answer(served, painter, assistant, monkeypatch):
  says(monkeypatch, assistant, ANSWER)
  answer = served.ask("A cat", tokens=40, seed=3, extra_body=BOTH).choices[0]
  assert answer.message.content == ANSWER and answer.finish_reason == "stop"
  assert answer.message.drawing == {"prompt": "a red cat"}
  part, = answer.message.images
  assert part["type"] == "image_url"
  assert (of_url(part["image_url"]["url"])[2] == colour("a red cat", 3)).all()
  assert painter.orders[0][0] == ["a red cat"]


def test_the_question_asks_for_it_and_settings_are_taken(served, painter, assistant, monkeypatch):
  asked, submit = [], assistant.engine.submit
  monkeypatch.setattr(assistant.engine, "submit", lambda p, *a: asked.append(p) or submit(p, *a))
  draw = {"size": "64x96", "steps": 4, "guidance": 3, "seed": 9, "negative_prompt": "dog",
          "force": True}
  answer = served.ask("A cat", tokens=12, extra_body={"draw": draw}).choices[0].message
  assert answer.content.startswith("<h>") and len(answer.images) == 1
  own = assistant.prompt([(HUMAN, "A cat <GEN>")], (), "<h>")
  assert asked[0].tokens.tolist() == own.tokens.tolist()
  (prompt,), painting = painter.orders[0]
  assert prompt == answer.drawing["prompt"] == " ".join(answer.content[3:].split())
  assert (painting.width, painting.height, painting.steps, painting.guidance, painting.seed,
          painting.negative) == (64, 96, 4, 3.0, 9, "dog")


def test_a_streamed_answer_brings_its_picture(served, painter, assistant, monkeypatch):
  monkeypatch.setattr("mgjax.serve.service.BEAT", 0.05)
  painter.go.clear()
  threading.Timer(0.4, painter.go.set).start()
  says(monkeypatch, assistant, ANSWER.replace("a red cat", LONG))
  body = {"messages": [user("A cat")], "stream": True, "max_tokens": 60, "seed": 3} | BOTH
  lines = served.post(body).text.split("\n\n")
  assert lines.count(": painting") > 3
  chunks = [json.loads(x[6:])["choices"][0] for x in lines if x.startswith("data: {")]
  deltas = [c["delta"] for c in chunks]
  assert "".join(d.get("content", "") for d in deltas) == f"Sure. <h>{LONG}</h>"
  assert deltas[-2]["drawing"] == {"prompt": LONG, "cut": "words it is"}
  assert len(deltas[-2]["images"]) == 1 and chunks[-1]["finish_reason"] == "stop"
  assert [x["index"] for x in deltas[-2]["images"]] == [0]


def test_an_answer_without_a_prompt_says_so(served, painter, assistant, monkeypatch):
  says(monkeypatch, assistant, "I cannot draw.")
  message = served.ask("A cat", tokens=40, extra_body=BOTH).choices[0].message
  assert message.images == [] and message.drawing["prompt"] is None
  assert "force" in message.drawing["note"] and not painter.orders


def test_the_picture_goes_with_the_next_question(served, assistant, monkeypatch):
  with monkeypatch.context() as patch:
    says(patch, assistant, ANSWER)
    first = served.ask("A cat", tokens=40, seed=3, extra_body=BOTH).choices[0].message
  messages = [user("A cat"), first.model_dump(), user("Which colour is it?", data_url(png()))]
  ask = lambda messages: served.openai.chat.completions.create(
      model="tiny", messages=messages, max_tokens=8, temperature=0).choices[0].message.content
  picture = np.full((64, 64, 3), colour("a red cat", 3), np.uint8)
  images = [assistant.see(assistant.pixels(picture, hd=False)),
            assistant.see(assistant.pixels(png()))]
  prompt = assistant.prompt(
      [(HUMAN, "A cat <GEN>"), (GPT, ANSWER), (HUMAN, "<image>\n<image>\nWhich colour is it?")],
      images)
  ids = assistant.engine.generate_batch(
      [prompt], Sampling(max_new_tokens=8, stop_ids=assistant.ends))[0]
  assert ask(messages) == assistant.tokenizer.decode(ids).strip()
  for bad in ("x", ["x"], [{"type": "image_url"}], [{"type": "image_url", "image_url": {}}]):
    with pytest.raises(openai.BadRequestError, match=r"messages\[1\].images"):
      ask([user("A cat"), {"role": "assistant", "content": "a", "images": bad}, user("b")])
  with pytest.raises(openai.BadRequestError, match="'images' is not supported"):
    ask([user("A cat") | {"images": []}])


@pytest.mark.parametrize("body, message", [
    ({"draw": "yes"}, "must be true, false or an object"), ({"draw": 1}, "must be true"),
    ({"draw": False} | BOTH, "but modalities"), ({"draw": {"sise": "64x64"}}, "'draw.sise'"),
    ({"draw": {"size": "20x20"}}, "draw.width 20"), ({"draw": {"force": 1}}, "draw.force must be"),
    ({"draw": {"steps": 1000}}, "draw.steps is 1000"), ({"modalities": ["audio"]}, "modalities is"),
    ({"modalities": "image"}, "modalities is"), ({"modalities": [[]]}, "modalities is")])
def test_what_cannot_be_asked_of_an_answer(served, painter, body, message):
  response = served.post({"messages": [user("a")], "max_tokens": 4} | body)
  assert response.status_code == 400 and message in response.json()["error"]["message"]
  assert not painter.orders


# Who waits, who leaves, and what fails.

def order(prompt):
  """A request for a picture, as bytes."""
  return raw_request({"prompt": prompt}).replace(b"chat/completions", b"images/generations")


def test_who_leaves_before_it_is_painted_gives_up_its_place(served, painter):
  painter.go.clear()
  with served.connect() as first:
    first.sendall(order("first"))
    eventually(lambda: painter.orders)
    with served.connect() as second:
      second.sendall(order("second"))
      eventually(lambda: served.metric("mgjax_draw_queue") == 2)
    eventually(lambda: served.metric("mgjax_draw_queue") == 1)
  eventually(lambda: served.metric("mgjax_draw_queue") == 0)
  painter.go.set()
  assert generate(served, prompt="third").status_code == 200
  assert [prompts for prompts, _ in painter.orders] == [["first"], ["third"]]


def test_a_full_queue_refuses(assistant, painter):
  studio = Studio(painter, assistant.engine)
  with serving(assistant, studio=studio, draw_queue=1) as served, contextlib.ExitStack() as stack:
    painter.go.clear()
    for i in range(2):  # one that is painted, and one that waits
      stack.enter_context(served.connect()).sendall(order(str(i)))
      eventually(lambda n=i: served.metric("mgjax_draw_queue") == n + 1)
    refused = [generate(served), served.post({"messages": [user("a")]} | BOTH)]
    for response in refused:
      assert response.status_code == 429 and response.headers["retry-after"] == "1"
      assert "wait to be painted" in response.json()["error"]["message"]
    painter.go.set()
    assert served.ask().choices


def test_answers_go_on_between_two_paintings(served, painter, monkeypatch):
  """A painting takes their time; the next begins only after as much of it was theirs."""
  steps, step = [], served.assistant.engine.step
  never = threading.Event()
  monkeypatch.setattr(served.assistant.engine, "step",
                      lambda: (never.wait(0.01), steps.append(len(painter.orders)), step())[2])
  painter.while_painting = lambda: never.wait(0.15)
  expected = served.ask("Tell me all", tokens=60).choices[0].message.content
  steps.clear()
  threads = [threading.Thread(target=generate, args=(served,)) for _ in range(2)]
  answer = served.ask("Tell me all", tokens=60, stream=True)
  text = next(answer).choices[0].delta.content or ""
  for thread in threads:
    thread.start()
  text += "".join(chunk.choices[0].delta.content or "" for chunk in answer)
  for thread in threads:
    thread.join()
  assert text == expected and steps.count(1) >= 10


@pytest.mark.parametrize("error, status, message", [
    (RuntimeError("RESOURCE_EXHAUSTED: 9 GB"), 500, "memory of the devices"),
    (RuntimeError("a bug"), 500, "the server's log says why")])
def test_a_painter_that_fails(served, painter, assistant, monkeypatch, error, status, message):
  painter.fail = error
  response = generate(served)
  assert response.status_code == status and message in response.json()["error"]["message"]
  says(monkeypatch, assistant, ANSWER)
  with pytest.raises(openai.InternalServerError, match=message):
    served.ask("A cat", tokens=40, extra_body=BOTH)
  with pytest.raises(openai.APIError, match=message):
    list(served.ask("A cat", tokens=40, stream=True, extra_body=BOTH))
  painter.fail = None
  assert generate(served).status_code == 200


def test_a_model_that_finds_no_way_back_ends_the_server(assistant, painter, monkeypatch, caplog):
  studio = Studio(painter, assistant.engine, memory="swap")
  engine = assistant.engine
  with serving(assistant, studio=studio) as served, monkeypatch.context() as patch:
    painter.while_painting = lambda: patch.setattr(type(engine), "is_aside", True)
    with caplog.at_level(logging.CRITICAL):
      assert generate(served, model="painter").status_code == 200
      eventually(lambda: served.http.get("/health").status_code == 503)
    assert "no room to come back" in caplog.text
    assert generate(served, model="painter").status_code == 503
