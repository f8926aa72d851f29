import asyncio
import base64
import json
import socket
import subprocess
import sys
import time

import openai
import pytest
from serving import CASES, bomb, data_url, eventually, png, raw_request, serving, user

RED = data_url(png())
GPT = {"role": "assistant", "content": "Yes."}


def refused(served, status, code=None, message="", param=None, **body):
  """The error that a body gets, which has OpenAI's form."""
  # Not `json=`: httpx cannot send half a character.
  body = json.dumps({"messages": [user("Hello")], "max_tokens": 4} | body)
  response = served.http.post("/v1/chat/completions", content=body,
                              headers={"content-type": "application/json"})
  return check(response.status_code, response.text, status, code, message, param)


def check(got, text, status, code=None, message="", param=None):
  assert got == status, text
  error = json.loads(text)["error"]
  assert error.keys() == {"message", "type", "param", "code"} and "Traceback" not in text
  assert message in error["message"], error
  assert code in (None, error["code"]) and param in (None, error["param"]), error
  return error


@pytest.mark.parametrize("parameter, value, code", [
    ("n", 2, "unsupported_parameter"), ("n", True, "unsupported_parameter"),
    ("presence_penalty", 0.5, "unsupported_parameter"), ("logprobs", True, None),
    ("tools", [{"type": "function"}], None), ("response_format", {"type": "json_object"}, None),
    ("store", True, None), ("user", 5, "invalid_type"), ("best_of", 1, "unknown_parameter"),
    ("temperatur", 1, "unknown_parameter"), ("temperature", "hot", "invalid_type"),
    ("temperature", -1, None), ("temperature", 10**400, None), ("top_p", -0.1, None),
    ("top_p", 1.5, None), ("top_k", -1, None), ("top_k", 2**31, None), ("top_k", 1.5, None),
    ("seed", "one", None), ("seed", False, None), ("stop", "", None), ("stop", ["a"] * 5, None),
    ("stop", [1], None), ("max_tokens", 0, None), ("max_tokens", True, None),
    ("stream", "yes", None), ("model", 7, None)])
def test_parameters_that_mean_nothing_or_are_not_done(served, parameter, value, code):
  refused(served, 400, code, param=parameter, **{parameter: value})


def test_parameters_that_ask_for_nothing_are_accepted(served):
  neutral = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "me", "store": False,
             "metadata": {"a": "b"}, "logit_bias": {}, "tools": None, "seed": -1, "top_logprobs": 0,
             "response_format": {"type": "text"}, "max_completion_tokens": 4, "stop": None}
  assert served.post({"messages": [user("Hello")], "max_tokens": 4} | neutral).status_code == 200
  refused(served, 400, param="max_tokens", max_completion_tokens=5)
  refused(served, 400, param="stream_options", stream_options={"include": True})


def test_an_unknown_model_is_404(served):
  with pytest.raises(openai.NotFoundError) as caught:
    served.openai.chat.completions.create(model="gpt-4", messages=[user("Hello")])
  assert caught.value.code == "model_not_found" and caught.value.param == "model"


@pytest.mark.parametrize("messages, message", [
    ([], "at least one message"), ("Hello", "at least one message"), ([5], "must be an object"),
    ([user("")], "is empty"), ([user(" \n ")], "is empty"), ([user("a"), GPT], "must be the user"),
    ([{"role": "user", "content": []}], "is empty"), ([GPT], "is the assistant's"),
    ([user("a"), user("b")], "is the user's"), ([{"role": "tool", "content": "a"}], "'tool'"),
    ([user("a"), {"role": "assistant", "content": "<image>"}, user("b")], "is empty"),
    ([{"role": "user"}], "must be a string or a list"), ([{"content": "a"}], "the role is 'None'"),
    ([{"role": "user", "content": 5}], "must be a string or a list"),
    ([{"role": ["user"], "content": "a"}], "the role is"),
    ([{"role": "user", "content": ["a"]}], "must be {"),
    ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "must be {"),
    ([{"role": "user", "content": "a", "colour": "red"}], "'colour' is not supported"),
    ([{"role": "system", "content": "Be short."}, user("a")], "one fixed system text"),
    ([user("see <image> here")], "holds <image>"), ([user("a<|im_end|>b")], "holds <|im_end|>"),
    ([{"role": "user", "content": [{"type": "text", "text": "<image>"}]}], "holds <image>"),
    ([user("a"), {"role": "assistant", "content": "x<ima<image>ge>y"}, user("b")],
     "holds <image>"),
    ([user("half \ud83d a character")], "half a character"),
    ([user("a", RED), {"role": "assistant", "content": user("b", RED)["content"]}, user("c")],
     "only the user's"),
])
def test_messages(served, messages, message):
  refused(served, 400, None, message, messages=messages)


def test_a_prompt_longer_than_the_context(served):
  refused(served, 400, "context_length_exceeded", "max_length is 256",
          messages=[user("long " * 300)])
  refused(served, 400, "context_length_exceeded", "up to 255 new ones", max_tokens=255)
  begun = time.monotonic()
  refused(served, 400, "context_length_exceeded", "5,000,000 characters",
          messages=[user("x" * 5_000_000)])
  assert time.monotonic() - begun < 5
  with serving(served.assistant, new_tokens=5) as short:
    refused(short, 400, None, "at most 5", max_tokens=6)
    assert short.ask(max_tokens=None).usage.completion_tokens <= 5


@pytest.mark.parametrize("url, code", [
    ("file:///etc/passwd", "invalid_image_url"), ("/etc/passwd", "invalid_image_url"),
    ("", "invalid_image_url"), ("ftp://example.com/a.png", "invalid_image_url"),
    ("data:image/png,abc", "invalid_image_url"),
    ("data:image/png;base64,", "broken_image"), ("data:image/png;base64,!!!!", "invalid_base64"),
    ("data:image/png;base64,abc", "invalid_base64"),
    ("data:image/png;base64,\u6771\u4eac", "invalid_base64"),
    (data_url(b"garbage" * 100), "broken_image"), (data_url(png()[:60]), "broken_image"),
    (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "broken_image"),
    (data_url(bomb()), "oversized_image"), (data_url(bomb(2**31 - 1, 1)), "oversized_image"),
    ("http://127.0.0.1/a.png", "image_not_fetched"),
    ("HTTP://169.254.169.254/latest/meta-data", "image_not_fetched"),
    ("https://example.com/a.png", "image_not_fetched")])
def test_pictures(served, url, code):
  with pytest.raises(openai.BadRequestError) as caught:
    served.ask("What?", RED, url)
  assert caught.value.code == code
  assert caught.value.param == "messages[0].content[2].image_url.url"


def test_picture_parts(served):
  part = lambda image: [{"role": "user", "content": [{"type": "image_url", "image_url": image}]}]
  for image in (RED, None, {}, {"url": 5}, {"url": RED, "detail": "huge"}, {"url": RED, "a": 1},
                {"url": RED, "detail": ["low"]}):
    refused(served, 400, messages=part(image))
  assert served.post({"messages": part({"url": RED}), "max_tokens": 2}).status_code == 200


def test_a_thousand_pictures(served):
  refused(served, 400, "too_many_images", messages=[user("What?", *[RED] * 1000)])


def test_eight_pictures_and_a_large_file(served):
  assert served.ask("What?", *[(RED, "low")] * 8).choices
  with serving(served.assistant, picture=1000) as small:
    refused(small, 400, "image_too_large", messages=[user("a", data_url(bytes(2000)))])


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": NaN}',
                                  b"[" * 100_000, b'{"seed": ' + b"9" * 10_000 + b"}"])
def test_what_is_no_json(served, body):
  response = served.http.post("/v1/chat/completions", content=body,
                              headers={"content-type": "application/json"})
  check(response.status_code, response.text, 400, "not_json")


def test_what_a_web_page_could_send_unasked(served):
  response = served.http.post("/v1/chat/completions", content=b"{}",
                              headers={"content-type": "text/plain"})
  check(response.status_code, response.text, 415)


def test_wrong_paths_and_methods(served):
  response = served.http.get("/v1/nothing")
  check(response.status_code, response.text, 404)
  response = served.http.get("/v1/chat/completions")
  check(response.status_code, response.text, 405)
  assert served.http.get("/docs").status_code == served.http.get("/openapi.json").status_code == 404


def test_the_key(assistant):
  with serving(assistant, api_key="s\u00e9cret") as served:
    models = lambda key: served.http.get("/v1/models", headers={"authorization": key})
    for key in ("", "Bearer", "Bearer wrong", "s\u00e9cret".encode(), b"Basic s\xc3\xa9cret",
                b"Bearer \xff\xfe"):
      check(models(key).status_code, models(key).text, 401, "invalid_api_key")
    check(served.post({}).status_code, served.post({}).text, 401)
    assert models("Bearer s\u00e9cret".encode()).status_code == 200
    assert served.http.get("/health").status_code == 200


# Bodies that are too long, too slow, or broken off.

def test_a_long_body_is_refused_by_its_header(served):
  with served.connect() as sock:
    sock.sendall(raw_request(b"{", length=21 << 20))  # the rest never comes
    assert b"413" in sock.recv(4096).split(b"\r\n")[0]
  with pytest.raises(openai.APIStatusError) as caught:  # who sends it all reads the answer too
    served.ask("x" * (25 << 20))
  assert caught.value.status_code == 413 and caught.value.code == "body_too_large"


def test_a_long_body_in_chunks_is_refused_while_it_comes(served):
  def endless():
    for _ in range(200):
      yield b" " * (1 << 18)
  response = served.http.post("/v1/chat/completions", content=endless(),
                              headers={"content-type": "application/json"})
  check(response.status_code, response.text, 413, "body_too_large")
  assert served.metric("mgjax_held_bytes") == 0


def test_bodies_that_are_too_many_together(assistant):
  with serving(assistant, held=9_600) as served:
    refused(served, 429, "queue_full", messages=[user("x" * 20_000)])
    assert served.ask().choices
    refused(served, 429, "queue_full", messages=[user("a", RED)])  # 9,408 when decoded


def test_slow_senders(assistant, monkeypatch):
  monkeypatch.setattr("mgjax.serve.server.GRACE_SECONDS", 0.5)
  with serving(assistant, body_seconds=0.5) as served:
    with served.connect() as body, served.connect() as head, served.connect() as silent:
      body.sendall(raw_request(b"{", length=100))
      head.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost:")
      begun = time.monotonic()
      for _ in range(4):
        time.sleep(0.1)
        body.sendall(b" ")
        head.sendall(b" ")
      said = b"".join(iter(lambda: body.recv(4096), b""))
      check(408, said.decode().partition("\r\n\r\n")[2], 408, "body_too_slow")
      assert b" 408 " in said.split(b"\r\n")[0] and time.monotonic() - begun < 2
      assert head.recv(100) == silent.recv(100) == b"" and time.monotonic() - begun < 3
    with served.connect() as sock:  # a body that nobody reads: refused, then cut
      sock.sendall(raw_request(b"{", length=100 << 20))
      assert b" 413 " in sock.recv(4096)
      eventually(lambda: _is_closed(sock), 3)
    assert served.ask().choices


def _is_closed(sock):
  try:
    sock.sendall(b" ")
  except OSError:
    return True


def test_requests_that_break_off(served):
  for raw in (raw_request(b"{", length=100), b"GET /v1/mod", b"\x00\x01\x02\r\n\r\n", b"",
              raw_request(b"{}", head="transfer-encoding: chunked\r\n")):
    with served.connect() as sock:
      sock.sendall(raw)
      if b"\x00" in raw:
        answer = sock.recv(4096)
        check(400, answer.decode().partition("\r\n\r\n")[2], 400, "invalid_http")
        assert b" 400 " in answer


# The program.

def test_two_servers_on_one_port(tmp_path):
  with socket.create_server(("127.0.0.1", 0)) as sock:
    port = sock.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "launch/serve.py", "--checkpoint", str(tmp_path), "--port", str(port)],
        cwd=CASES.parents[2], capture_output=True, text=True, timeout=120)
  assert done.returncode == 2 and not done.stdout
  assert done.stderr == f"error: cannot listen on 127.0.0.1 port {port}: Address already in use\n"


def test_arguments(tmp_path):
  run = lambda *a: subprocess.run([sys.executable, "launch/serve.py", *a], cwd=CASES.parents[2],
                                  capture_output=True, text=True, timeout=120)
  for arguments, message in ((["--rows", "0"], "0 is less than 1"), (["--port", "70000"], "--port"),
                             ([], "nowhere: no such folder")):
    done = run("--checkpoint", str(tmp_path / "nowhere"), "--port", "0", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_base64_of_a_url_may_name_any_type(served):
  for head in ("data:image/jpeg;base64,", "DATA:;BASE64,", "data:application/octet-stream;base64,"):
    assert served.ask("a", head + base64.b64encode(png()).decode()).choices


def test_parallel_nonsense(served):
  """200 clients at once, one in four with a good question."""
  import httpx2 as httpx

  async def all_of_them():
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=served.url, timeout=120, limits=limits) as client:
      good = {"messages": [user("Hello", RED)], "max_tokens": 3}
      bodies = [good, good | {"n": 2}, good | {"messages": [user("<image>")]},
                good | {"messages": [user("a", "file:///etc/passwd")]}]
      asked = [client.post("/v1/chat/completions", json=bodies[i % 4]) for i in range(200)]
      return [r.status_code for r in await asyncio.gather(*asked)]

  assert asyncio.run(all_of_them()) == [200, 400, 400, 400] * 50
