"""The page to chat at, made with Gradio: what it shows, and what happens at a click.

A conversation is a tuple of `Turn`s that stays on the server, one for each window.  What the
browser shows of it is never read back, so a client can add a question and nothing else.
"""
from __future__ import annotations

import contextlib
import dataclasses
import html
import os
import pathlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import gradio as gr
from fastapi import FastAPI

from mgjax.data.images import ImageError
from mgjax.infer.assistant import Assistant
from mgjax.serve.errors import ApiError
from mgjax.serve.limits import Limits, is_key
from mgjax.serve.service import Service
from mgjax.serve.web_facts import DRAWING_EXAMPLE, examples, facts
from mgjax.serve.web_guard import Guarded
from mgjax.serve.web_settings import drawing_settings, settings_of_answers
from mgjax.serve.web_talk import Settings, Turn, answers, shown

DELETED_AFTER = 24 * 3600  # seconds; of files that were uploaded
FONTS = ("system-ui", "sans-serif")
# Gradio would share pictures with a site of its own.
CSS = """
.gradio-container {max-width: 1500px !important}
#talk {height: calc(100vh - 250px) !important; min-height: 360px}
#talk button[title="Share"] {display: none}
#talk .icon-button-wrapper:not(:has(button:not([title="Share"]))) {display: none}
#talk [data-testid="user"] img {max-height: 36vh; width: auto}
#talk [data-testid="bot"] img {max-height: 56vh; width: auto}
#facts * {border: 0 !important} #facts thead {display: none}
#facts td {padding: 2px 8px 2px 0; vertical-align: top}
"""
Talk = tuple[Turn, ...]


def make_page(service: Service, assistant: Assistant, limits: Limits,
              api_key: str | None) -> FastAPI:
  """The page as an application of its own, for `/`.  With a key it asks for it."""
  os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
  # A folder that only this process can read, and that goes with it; Gradio asks the environment.
  folder = tempfile.TemporaryDirectory(prefix="mgjax-web-")
  os.environ["GRADIO_TEMP_DIR"] = os.path.realpath(folder.name)
  page = _Page(title=assistant.name, analytics_enabled=False, fill_height=True,
               delete_cache=(600, DELETED_AFTER))
  _fill(page, service, assistant, limits)

  @contextlib.asynccontextmanager
  async def running(app):
    with folder:
      yield

  app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=running)
  gr.mount_gradio_app(
      app, page, path="/", footer_links=[], run_history=False, max_file_size=limits.picture,
      allowed_paths=[], ssr_mode=False, mcp_server=False, enable_monitoring=False, pwa=False,
      app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
      auth=None if api_key is None else lambda _, given: is_key(given.encode(), api_key),
      auth_message="Any user name; the password is the server's key.",
      theme=gr.themes.Soft(font=FONTS, font_mono=("ui-monospace", "monospace")), css=CSS)
  app.add_middleware(Guarded, longest=limits.body)
  app.state.end_streams = app.routes[-1].app.stop_event.set
  return app


class _Page(gr.Blocks):
  """Blocks that take no file but what was uploaded to them.

  Gradio checks that only in pages that it launches itself, and fetches what has a URL for a path.
  """

  async def preprocess_data(self, block_fn, inputs, state, explicit_call=False):
    for path in map(os.path.realpath, map(str, _paths(inputs))):
      folder = self.GRADIO_CACHE
      if os.path.commonpath((path, folder)) != folder or not os.path.isfile(path):
        raise gr.Error("that file is not here (any more); attach it again", print_exception=False)
    return await super().preprocess_data(block_fn, inputs, state, explicit_call)


def _paths(value) -> Iterator:
  """Of everything, however deep, that could be taken for a file."""
  if isinstance(value, dict):
    yield from [value["path"]] if "path" in value else []
    value = list(value.values())
  for item in value if isinstance(value, list | tuple) else ():
    yield from _paths(item)


def _fill(page: gr.Blocks, service: Service, assistant: Assistant, limits: Limits) -> None:
  folder, studio = pathlib.Path(page.GRADIO_CACHE), service.studio
  sees, ocr_pool = assistant.sees, ThreadPoolExecutor(1, "ocr")
  offered = examples(folder, pictures=sees, draws=studio is not None)

  with page:
    talk = gr.State(())
    with gr.Row():
      with gr.Column(scale=3, min_width=340):
        chat = gr.Chatbot(
            label=assistant.name, elem_id="talk", buttons=["copy"], allow_tags=False,
            feedback_options=None, allow_file_downloads=False,
            placeholder="Ask something, or begin with one of these.",
            examples=[{"text": text, "files": list(files)} for text, files in offered])
        chat.keep_in_cache.update(file for _, files in offered for file in files)
        box = gr.MultimodalTextbox(
            show_label=False, sources=["upload"] if sees else [], file_count="multiple",
            file_types=["image"], max_lines=8,
            max_plain_text_length=1_000_000, autofocus=True,
            placeholder="Ask, and add pictures" if sees else "Ask")
        with gr.Row():
          new = gr.Button("New chat", size="sm")
          draw = (gr.Checkbox(False, label="Draw a picture", container=False) if studio else
                  gr.State(False))
        if sees:
          _camera(box)
      with gr.Column(scale=1, min_width=280):
        with gr.Accordion("Parameters"):
          settings = settings_of_answers(assistant, limits)
        if studio:
          with gr.Accordion("Drawing", open=False):
            settings += drawing_settings(studio, limits)
        with gr.Accordion("Model"):
          gr.Markdown(facts(assistant, studio), elem_id="facts")

    def begin(talk: Talk, turn: Turn):
      return (*talk, turn), shown((*talk, turn)), _busy()

    def ask(talk: Talk, message, draw: bool):
      turn = Turn(message["text"].strip(), tuple(message["files"]), draw=bool(draw))
      return begin(talk, turn) if turn.question or turn.pictures else (gr.skip(),) * 3

    def ask_again(talk: Talk, force: bool = False):
      if not talk:
        return (gr.skip(),) * 3
      turn = talk[-1].fresh()
      return begin(talk[:-1], dataclasses.replace(turn, force=True) if force else turn)

    def draw_anyway(talk: Talk):
      return ask_again(talk, force=True) if talk and talk[-1].refused else (gr.skip(),) * 3

    def ask_example(select: gr.SelectData):
      text, files = offered[select.index]
      return begin((), Turn(text, files, draw=text == DRAWING_EXAMPLE))

    async def answer(talk: Talk, *values):
      """Answers the last turn.  Where that fails, its question is given back."""
      if not talk or talk[-1].answer or talk[-1].ended:
        yield gr.skip(), gr.skip(), _ready()
        return
      *before, last = talk
      try:
        async with contextlib.aclosing(answers(
            service, assistant, ocr_pool, before, last, Settings(*values), folder)) as turns:
          async for turn in turns:
            grown = (*before, turn)
            yield (grown, shown(grown), gr.skip()) if turn != last else (gr.skip(),) * 3
            last = turn
        yield gr.skip(), gr.skip(), _ready()
      except (ApiError, ImageError) as error:
        gr.Warning(html.escape(str(error)), duration=None)
        yield give_back(talk)

    def stopped(talk: Talk):
      if talk:
        talk = (*talk[:-1], talk[-1].stopped())
      return talk, shown(talk), _ready()

    def give_back(talk: Talk):
      """Without the last turn, its question in the box again."""
      if not talk:
        return (), [], _ready()
      given = {"text": talk[-1].question, "files": list(talk[-1].pictures)}
      return talk[:-1], shown(talk[:-1]), _ready(value=given)

    def failed(talk: Talk):
      """A bug, or a value that Gradio refuses; for a browser what was stopped has failed, too."""
      kept = talk and (talk[-1].halted or talk[-1].answer)
      return (gr.skip(), gr.skip(), _ready()) if kept else give_back(talk)

    whole, now = [talk, chat, box], {"queue": False, "api_visibility": "private"}
    growing = [begun.then(answer, [talk, *settings], whole, show_progress="hidden",
                          concurrency_limit=None, api_visibility="private") for begun in (
        box.submit(ask, [talk, box, draw], whole, **now),
        chat.retry(ask_again, [talk], whole, **now),
        chat.option_select(draw_anyway, [talk], whole, **now),
        chat.example_select(ask_example, None, whole, **now))]
    for event in growing:
      event.failure(failed, [talk], whole, **now)
    box.stop(stopped, [talk], whole, cancels=growing, **now)
    chat.undo(give_back, [talk], whole, cancels=growing, **now)
    gr.on([new.click, chat.clear], lambda: ((), [], _ready()), None, whole, cancels=growing, **now)
  # As many answers may wait as the server lets wait; it says so itself where there are too many.
  page.max_threads = assistant.engine.rows + limits.queue + 8
  page.queue(default_concurrency_limit=None, api_open=False)
  page._queue.sleep_when_free = 0.01  # seconds; a thousand looks a second would slow the answers


def _busy():
  return gr.MultimodalTextbox(value=None, interactive=False, submit_btn=False, stop_btn=True)


def _ready(**value):
  return gr.MultimodalTextbox(interactive=True, submit_btn=True, stop_btn=False, **value)


def _camera(box: gr.MultimodalTextbox) -> None:
  """A camera whose pictures are added to the question."""
  with gr.Accordion("Camera", open=False):
    # Not mirrored, so that what is written can be read; of a phone the one on its back.
    camera = gr.Image(
        show_label=False, sources=["webcam"], type="filepath", image_mode=None, height=320,
        webcam_options=gr.WebcamOptions(
            mirror=False, constraints={"video": {"facingMode": {"ideal": "environment"}}}))

  def take(message, picture):
    return {**message, "files": [*message["files"], picture]} if picture else gr.skip(), None

  camera.input(take, [box, camera], [box, camera], queue=False, api_visibility="private")
