"""What the page does not let others do."""
import os
import pathlib

import pytest
from serving import CASES, png, user
from windows import Window, serving_page

from mgjax.serve import web_talk


@pytest.fixture(scope="module")
def served(assistant):
  with serving_page(assistant) as served:
    yield served


@pytest.mark.parametrize("path", [
    "/etc/passwd", "README.md", "../../etc/passwd", "{folder}/../other.png",
    "http://127.0.0.1:{port}/health", "https://example.com/a.png", "{folder}", "{folder}/none.png",
    5, None])
def test_files_that_were_not_uploaded_are_refused(served, window, path, tmp_path):
  own = window.upload(png())
  folder = os.path.dirname(os.path.dirname(own))
  if isinstance(path, str):
    path = path.format(folder=folder, port=served.port)
  (tmp_path / "secret.png").write_bytes(png())
  file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png"}
  message = {"text": "What is it?", "files": [file]}
  number = window.number("multimodaltextbox", "submit")
  for where, data in ((number, [None, message, False]),
                        (number, [file, {"text": "a", "files": []}, False]),
                      (window.number("image", "input"), [{"text": "", "files": []}, file])):
    assert window.post(where, data).status_code == 500
  file["path"] = str(tmp_path / "secret.png")
  for files in ([file], [{"path": own, "inner": file}], {"path": own, "inner": [file]}):
    assert window.post(number, [None, {"text": "a", "files": files}, False]).status_code == 500
  assert not list(pathlib.Path(folder).rglob("secret.png"))
  window.do("chatbot", "undo", [None])
  assert window.chat == [] and not window.box.get("files")
  message["files"][0]["path"] = own
  window.do("multimodaltextbox", "submit", [None, message, False])
  assert window.chat[0]["content"][0]["file"]["path"] == own


def test_files_of_the_machine_are_not_served(served, window):
  for path in ("/etc/passwd", "README.md", "/proc/self/environ", f"{CASES}/small_yi",
               "https://example.com/a.png", f"http://127.0.0.1:{served.port}/health"):
    response = served.http.get(f"/gradio_api/file={path}")
    assert response.status_code in (400, 403, 404), (path, response.status_code)
  own = window.upload(b"<script>alert(1)</script>", "a.html")
  response = served.http.get(f"/gradio_api/file={own}")
  assert response.headers["content-disposition"].startswith("attachment")


def test_what_is_said_to_the_chatbot_changes_nothing(served, window):
  """No function reads back what a window shows."""
  kinds = {c["id"]: c["type"] for c in window.config["components"]}
  for dependency in window.config["dependencies"]:
    assert "chatbot" not in {kinds[i] for i in dependency["inputs"]}
    assert dependency["api_visibility"] == "private"
  assert served.http.get("/gradio_api/info").json() == {
      "named_endpoints": {}, "unnamed_endpoints": {}}


def test_the_key(assistant):
  with serving_page(assistant, api_key="s\u00e9cret") as served:
    http = served.http
    body = {"fn_index": 0, "data": [], "session_hash": "a"}

    def statuses():
      return [http.get("/config").status_code, http.get("/gradio_api/info").status_code,
              http.post("/gradio_api/queue/join", json=body).status_code,
              http.post("/gradio_api/run/predict", json=body).status_code,
              http.get("/gradio_api/queue/data?session_hash=a").status_code,
              http.post("/gradio_api/upload", files={"files": ("a.png", png())}).status_code,
              http.get("/gradio_api/file=/tmp/a.png").status_code]

    log_in = lambda key: http.post("/login", data={"username": "me", "password": key}).status_code
    assert set(statuses()) == {401} and "Temperature" not in http.get("/").text
    assert [log_in(key) for key in ("", "wrong", "secret", "s\u00e9cre", "S\u00e9cret")] == [
        422, 400, 400, 400, 400] and set(statuses()) == {401}
    assert log_in("s\u00e9cret") == 200 and 401 not in statuses()
    window = Window(served)
    assert window.ask("Hello", window.upload(png())) != ""
    assert served.post({"messages": [user("Hello")]}).status_code == 401  # it has its own way
    bearer = {"authorization": "Bearer s\u00e9cret".encode()}
    assert served.post({"messages": [user("a")], "max_tokens": 2}, headers=bearer).is_success
    http.cookies.clear()
    assert set(statuses()) == {401}


def test_hosts(served):
  for path in ("/", "/config", "/v1/models", "/health", "/gradio_api/heartbeat/a"):
    for host in ("evil.com", "127.0.0.1.evil.com", "evil.com:8000", "localhost@evil.com", "[::2]"):
      response = served.http.get(path, headers={"host": host})
      assert response.status_code == 400 and response.json()["error"]["code"] == "wrong_host"
  for host in ("localhost", "LOCALHOST:1", f"127.0.0.1:{served.port}", "[::1]:80", "[::1]"):
    assert served.http.get("/health", headers={"host": host}).status_code == 200


def test_other_sites_and_long_bodies(served, window):
  number = window.number("button", "click")
  send = lambda **headers: served.http.post(
      "/gradio_api/run/predict", headers={k.replace("_", "-"): v for k, v in headers.items()},
      json={"fn_index": number, "data": [], "session_hash": "a"}).status_code
  assert send() == send(sec_fetch_site="same-origin") == 200
  assert send(sec_fetch_site="cross-site") == send(sec_fetch_site="same-site") == 403
  upload = lambda **k: served.http.post("/gradio_api/upload", **k).status_code
  assert upload(files={"files": ("a.png", bytes(17 << 20))}) == 413  # a picture has 16 MiB
  assert upload(files=[("files", ("a.png", bytes(11 << 20)))] * 2) == 413  # a body 20
  assert upload(content=iter([b"a"])) == 411


def test_the_page_and_the_api_beside_it(served):
  page = served.http.get("/")
  assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
  assert served.http.get("/health").json() == {"status": "ok"}
  assert served.http.get("/v1/models").json()["data"][0]["id"] == "tiny"
  for path, status in (("/v1/nothing", 404), ("/v1/chat/completions", 405), ("/v1", 404)):
    response = served.http.get(path)
    assert response.status_code == status and response.json()["error"]["type"]
  for path in ("/docs", "/openapi.json", "/redoc", "/monitoring", "/gradio_api/docs"):
    assert served.http.get(path).status_code in (403, 404), path
  served.http.get("/surely/not/here")
  labels = {line.partition("{")[2].partition("}")[0] for line in served.http.get(
      "/metrics").text.splitlines() if line.startswith("mgjax_requests_total")}
  assert labels and all(label.startswith('status="') and len(label) == 12 for label in labels)


@pytest.mark.parametrize("text, expected", [
    ("a <script>alert(1)</script>", "a &lt;script>alert(1)&lt;/script>"),
    ("![x](http://evil.com/a)", "!&#91;x](http://evil.com/a)"), ("&lt; & b", "&amp;lt; & b"),
    ("`<b>` <b>", "`<b>` &lt;b>"), ("```\n<b>\n``` <b>", "```\n<b>\n``` &lt;b>"),
    ("```\n<b>", "```\n<b>"), ("**bold** 1 < 2", "**bold** 1 &lt; 2")])
def test_html_is_shown_as_text(text, expected):
  assert web_talk.literal(text) == expected
