"""The web application: who may ask, how many may wait, and who has left."""
from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Collection
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from mgjax.infer.assistant import Assistant
from mgjax.serve import errors
from mgjax.serve.completions import Preparer, Reply
from mgjax.serve.errors import ApiError, as_json, busy, error_response, json_response
from mgjax.serve.limits import Limits, Memory, Share, is_key, read_body, too_long
from mgjax.serve.metrics import Metrics
from mgjax.serve.parameters import Parameters
from mgjax.serve.worker import Job, Worker

CLIENT_LEFT = 499  # nobody sees it but /metrics
T = TypeVar("T")


def make_app(assistant: Assistant, limits: Limits, api_key: str | None = None, *,
             hosts: Collection[str] = (), web: bool = False) -> FastAPI:
  """The application that serves one model.  While it runs the engine is its own.

  hosts: names that requests must be addressed to, in lower case; none: any.
  web: whether there is a page to chat at `/`.
  """
  service, page = Service(assistant, limits), None
  if web:
    from mgjax.serve.web import make_page  # not everybody has Gradio
    page = make_page(service, assistant, limits, api_key)

  @contextlib.asynccontextmanager
  async def running(app):
    service.worker.start()
    async with page.router.lifespan_context(page) if page else contextlib.nullcontext():
      yield
    service.close()

  async def authorised(request: Request):
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Starlette reads headers as latin-1.
    if api_key is not None and not (
        is_key(given.strip().encode("latin-1"), api_key) and scheme.lower() == "bearer"):
      raise ApiError(401, "no API key, or a wrong one; send the header Authorization: Bearer KEY",
                     code="invalid_api_key", headers={"www-authenticate": "Bearer"})

  app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False,
                lifespan=running)
  app.state.end_streams = page.state.end_streams if page else lambda: None
  errors.install(app)
  v1 = APIRouter(prefix="/v1", dependencies=[Depends(authorised)])
  card = {"id": assistant.name, "object": "model", "created": int(time.time()),
          "owned_by": "mgjax"}

  @v1.get("/models")
  async def models():
    return json_response({"object": "list", "data": [card]})

  @v1.get("/models/{name:path}")
  async def model(name: str):
    if name != assistant.name:
      raise ApiError(404, f"there is no model {name!r}", "model", "model_not_found")
    return json_response(card)

  @v1.post("/chat/completions")
  async def completions(request: Request):
    return await service.complete(request)

  @app.get("/health")
  async def health():
    if not service.worker.alive:
      raise ApiError(503, "the engine has stopped")
    return json_response({"status": "ok"})

  @app.get("/metrics")
  async def metrics():
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

  app.include_router(v1)
  app.add_middleware(_Counted, metrics=service.metrics)
  if page:
    app.add_middleware(_Elsewhere, page=page)
  if hosts:
    app.add_middleware(_Addressed, hosts=hosts)
  return app


class Service:
  """Answers requests with one model.  For one event loop."""

  def __init__(self, assistant: Assistant, limits: Limits):
    self.metrics = Metrics()
    self.worker = Worker(assistant, self.metrics)
    self._assistant, self._limits = assistant, limits
    self._preparer, self._memory = Preparer(assistant, limits), Memory(limits.held)
    self._open: set[Job] = set()  # given to the worker, and not ended
    watch = self.metrics.watch
    watch("queue", "Requests that wait for a row", lambda: self.worker.waiting)
    watch("rows_growing", "Answers that grow", lambda: self.worker.running)
    watch("rows", "Answers that can grow at once", lambda: assistant.engine.rows)
    watch("held_bytes", "Bytes of bodies and pixels that wait", lambda: self._memory.held)

  def close(self) -> None:
    """Jobs that are left fail."""
    self.worker.stop()
    self._preparer.close()

  async def complete(self, request: Request) -> Response:
    """The response to a request for a completion; ApiError if there is none."""
    self._check_queue()  # before the body is read
    with self._memory.share() as share:
      try:
        answer = self._respond(await read_body(request, self._limits, share), share)
        return await _unless_gone(request, answer)
      except ClientDisconnect:
        return Response(status_code=CLIENT_LEFT)

  async def stream(self, request: dict[str, Any]) -> AsyncIterator[tuple[str, str | None]]:
    """Answers a question of this process as if it had come over HTTP, and under the same limits.

    Gives pieces of text, each with why the answer has ended, None before the last.  Closing it
    frees the row.  ApiError before and between them.
    """
    self._check_queue()
    with self._memory.share() as share:
      body = (await asyncio.to_thread(as_json, request)).encode()
      if len(body) > self._limits.body:
        raise too_long(self._limits)
      share.set(len(body))
      job, reply, _ = await self._begin(body, share)
      del request, body  # with the pictures' files
      try:
        async for text in reply.pieces():
          share.set(0)
          yield text, reply.finish_reason
      finally:
        self._close(job)

  def _check_queue(self):
    if not self.worker.alive:
      raise ApiError(503, "the engine has stopped")
    if len(self._open) >= self._assistant.engine.rows + self._limits.queue:
      raise busy(f"{self._limits.queue} requests wait already; try again")

  async def _begin(self, body: bytes, share: Share) -> tuple[Job, Reply, Parameters]:
    """Gives the worker what a body asks for; `_close` the job in the end."""
    begun = time.monotonic()
    question = await self._preparer.question(body)
    share.set(len(body) + self._preparer.size(question))
    job = await self._preparer.job(question, begun)
    share.set(sum(p.nbytes for p in job.pixels))
    self._check_queue()
    self._open.add(job)
    self.worker.submit(job)
    return job, Reply(self._assistant, question, job), question.parameters

  def _close(self, job: Job) -> None:
    self._open.discard(job)
    self.worker.cancel(job)

  async def _respond(self, body: bytes, share: Share) -> Response:
    job, reply, parameters = await self._begin(body, share)
    del body  # with the pictures' files
    handed_over = False
    try:
      pieces = reply.pieces()
      first = await anext(pieces)  # until then an error has a status of its own
      share.set(0)
      if parameters.stream:
        handed_over = True
        events = reply.events(_chained(first, pieces), parameters.include_usage)
        return _EventStream(events, lambda: self._close(job))
      return json_response(reply.whole(first + "".join([text async for text in pieces])))
    finally:
      if not handed_over:
        self._close(job)


async def _chained(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
  yield first
  async for text in rest:
    yield text


class _EventStream(StreamingResponse):
  """Server-sent events; `end` is called when they end, the client's leaving included."""

  media_type = "text/event-stream"

  def __init__(self, events, end):
    super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
    self._end = end

  async def __call__(self, scope, receive, send):
    try:
      await super().__call__(scope, receive, send)
    finally:
      self._end()


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
  """What the work gives.  It is cancelled, and ClientDisconnect raised, if the client leaves."""
  async def gone():
    while (await request.receive())["type"] != "http.disconnect":
      pass

  task, left = asyncio.ensure_future(work), asyncio.ensure_future(gone())
  try:
    await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
      raise ClientDisconnect
    return task.result()
  finally:
    for t in (task, left):
      t.cancel()
    await asyncio.gather(task, left, return_exceptions=True)


class _Counted:
  """Counts requests by status, but those of whoever watches."""

  def __init__(self, app, metrics: Metrics):
    self._app, self._metrics = app, metrics

  async def __call__(self, scope, receive, send):
    if scope["type"] != "http" or scope["path"] in ("/health", "/metrics"):
      return await self._app(scope, receive, send)

    async def counted(message):
      if message["type"] == "http.response.start":
        self._metrics.requests.labels(str(message["status"])).inc()
      await send(message)
    try:
      await self._app(scope, receive, counted)
    except Exception:  # what is sent then is sent further out
      self._metrics.requests.labels("500").inc()
      raise


class _Addressed:
  """Refuses requests that are addressed to another host.

  A web page can give its own name an address of this machine, and so becomes a page of this server
  to the browser that shows it (DNS rebinding); what it sends still carries that name.  Only
  programs that are no browsers send none.
  """

  def __init__(self, app, hosts: Collection[str]):
    self._app, self._hosts = app, hosts

  async def __call__(self, scope, receive, send):
    if scope["type"] == "http" and (host := Headers(scope=scope).get("host")):
      if re.sub(r":\d*$", "", host).lower() not in self._hosts:
        refused = ApiError(400, f"this server is not called {host[:200]!r}; it listens to "
                                f"{', '.join(sorted(self._hosts))}", code="wrong_host")
        return await error_response(refused)(scope, receive, send)
    await self._app(scope, receive, send)


class _Elsewhere:
  """Gives whatever is no path of the API to the page."""

  def __init__(self, app, page: FastAPI):
    self._app, self._page = app, page

  async def __call__(self, scope, receive, send):
    own = scope["type"] != "http" or re.fullmatch("/(v1(/.*)?|health|metrics)", scope["path"])
    await (self._app if own else self._page)(scope, receive, send)
