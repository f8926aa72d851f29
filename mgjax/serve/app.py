"""The web application: who may ask, how many may wait, and who has left."""
from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from mgjax.infer.assistant import Assistant
from mgjax.serve import errors
from mgjax.serve.completions import Preparer, Reply
from mgjax.serve.errors import ApiError, busy, json_response
from mgjax.serve.limits import Limits, Memory, Share, read_body
from mgjax.serve.metrics import Metrics
from mgjax.serve.worker import Job, Worker

CLIENT_LEFT = 499  # nobody sees it but /metrics
T = TypeVar("T")


def make_app(assistant: Assistant, limits: Limits, api_key: str | None = None) -> FastAPI:
  """The application that serves one model.  While it runs the engine is its own."""
  service = Service(assistant, limits)

  @contextlib.asynccontextmanager
  async def running(app):
    service.worker.start()
    yield
    service.close()

  async def authorised(request: Request):
    if api_key is not None and not _is_key(request.headers.get("authorization", ""), api_key):
      raise ApiError(401, "no API key, or a wrong one; send the header Authorization: Bearer KEY",
                     code="invalid_api_key", headers={"www-authenticate": "Bearer"})

  app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False,
                lifespan=running)
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
  return app


def _is_key(header: str, key: str) -> bool:
  scheme, _, given = header.partition(" ")
  # Starlette reads headers as latin-1; comparing takes the same time wherever they differ.
  same = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
  return same and scheme.lower() == "bearer"


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
        body = await read_body(request, self._limits, share)
        return await _unless_gone(request, self._answer(body, share))
      except ClientDisconnect:
        return Response(status_code=CLIENT_LEFT)

  def _check_queue(self):
    if not self.worker.alive:
      raise ApiError(503, "the engine has stopped")
    if len(self._open) >= self._assistant.engine.rows + self._limits.queue:
      raise busy(f"{self._limits.queue} requests wait already; try again")

  async def _answer(self, body: bytes, share: Share) -> Response:
    begun = time.monotonic()
    question = await self._preparer.question(body)
    share.set(len(body) + self._preparer.size(question))
    job = await self._preparer.job(question, begun)
    del body
    parameters, reply = question.parameters, Reply(self._assistant, question, job)
    del question  # with the pictures' files
    share.set(sum(p.nbytes for p in job.pixels))
    self._check_queue()
    self._open.add(job)
    self.worker.submit(job)
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

  def _close(self, job: Job) -> None:
    self._open.discard(job)
    self.worker.cancel(job)


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
