"""A server with the page to chat at, and windows that speak with it as the page's script does."""
import contextlib
import functools
import json
import secrets
from unittest import mock

from gradio_client.utils import apply_diff
from serving import serving

from mgjax.serve.app import make_app

HOSTS = ("127.0.0.1", "localhost", "[::1]")
SETTINGS = {"temperature": 0, "top_p": 1, "top_k": 0, "max_tokens": 8, "seed": -1, "hd": True,
            "ocr": False}
DRAWING = {"draw_size": "64x64", "draw_steps": 5, "draw_guidance": 4}  # where the page draws
SKIP = {"__type__": "update"}


@contextlib.contextmanager
def serving_page(assistant, api_key=None, **options):
  made = functools.partial(make_app, web=True, hosts=HOSTS)
  with mock.patch("serving.make_app", made), serving(assistant, api_key, **options) as served:
    yield served


class Window:
  """One window; `chat` is what it shows, `box` what stands in its box, `told` the warnings."""

  def __init__(self, served):
    self._http, self._session = served.http, secrets.token_hex(5)
    self.config = served.http.get("/config").json()
    self._kinds = {c["id"]: c["type"] for c in self.config["components"]}
    self.chat, self.box, self.told = [], {}, []

  def number(self, kind, event):
    """Of the function that an event of a component calls first."""
    return next(d["id"] for d in self.config["dependencies"] if d["backend_fn"]
                and any(self._kinds.get(i) == kind and e == event for i, e in d["targets"]))

  def upload(self, file, name="a.png"):
    response = self._http.post("/gradio_api/upload", files={"files": (name, file)})
    assert response.status_code == 200, response.text
    return response.json()[0]

  def post(self, number, data, url="run/predict", **more):
    return self._http.post(f"/gradio_api/{url}", json={
        "fn_index": number, "data": data, "session_hash": self._session} | more)

  def do(self, kind, event, data, **more):
    """An event that is over at once."""
    response = self.post(self.number(kind, event), data, **more)
    assert response.status_code == 200, response.text
    self._take(response.json()["data"])

  def _take(self, data):
    chat, box = data[1:] if len(data) == 3 else (SKIP, data[0])  # the first is the server's state
    if chat != SKIP:
      self.chat = chat
    self.box = box.get("value", self.box) if box else self.box

  def begin(self, text, *files, draw=False):
    """Sends a question, which `growing` answers then."""
    files = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in files]
    self.do("multimodaltextbox", "submit", [None, {"text": text, "files": files}, draw])

  def ask(self, text, *files, **settings):
    """The answer as it is shown in the end."""
    self.begin(text, *files)
    return self.finish(**settings)

  def again(self, **settings):
    self.do("chatbot", "retry", [None], event_data={"index": 0, "value": ""})
    return self.finish(("chatbot", "retry"), **settings)

  def finish(self, *event, **settings):
    for _ in self.growing(*event, **settings):
      pass
    return self.said()

  def said(self):
    """The last message, if it is the model's, without a note of the page."""
    last = self.chat[-1] if self.chat else {"role": None}
    return last["content"][0]["text"] if last["role"] == "assistant" else ""

  def cut(self):
    """Whether the page says that the answer was."""
    return "cut here" in self.chat[-1]["content"][-1]["text"]

  def growing(self, event=("multimodaltextbox", "submit"), **settings):
    """Answers what was begun; gives the text of the last message several times a second."""
    begun = self.number(*event)
    number = next(d["id"] for d in self.config["dependencies"] if d["trigger_after"] == begun)
    draws = any(c["props"].get("label") == "Guidance" for c in self.config["components"])
    values = list((SETTINGS | (DRAWING if draws else {}) | settings).values())
    self.event = self.post(number, [None, *values], "queue/join").json()["event_id"]
    self.running = number
    data = []
    with self._http.stream("GET", "/gradio_api/queue/data",
                           params={"session_hash": self._session}) as stream:
      for line in stream.iter_lines():
        if not line.startswith("data: "):
          continue
        message = json.loads(line.removeprefix("data: "))
        if message["msg"] == "log":
          self.told.append(message["log"])
        elif message["msg"] == "close_stream":
          return
        elif message["msg"] in ("process_generating", "process_completed"):
          assert message["success"], message
          new = message["output"].get("data")
          if new and message["msg"] == "process_generating":
            data = [apply_diff(*p) for p in zip(data, new)] if data else new
            self._take(data)
            yield self.said()

  def stop(self):
    """What the button does."""
    self._http.post("/gradio_api/cancel", json={
        "session_hash": self._session, "fn_index": self.running, "event_id": self.event})
    self.do("multimodaltextbox", "stop", [None])
