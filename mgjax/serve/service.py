"""Answers requests: how many may wait, and what happens when a client leaves."""
from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import Any, TypeVar

import numpy as np
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from mgjax.diffusion.painter import Painting
from mgjax.infer.assistant import Assistant
from mgjax.infer.drawing import drawing_prompt
from mgjax.infer.studio import Studio
from mgjax.serve import images
from mgjax.serve.completions import Piece, Preparer, Reply
from mgjax.serve.drawing import Drawn, encoded
from mgjax.serve.errors import ApiError, as_json, busy, json_response, no_painter
from mgjax.serve.limits import Limits, Memory, Share, read_body, too_long
from mgjax.serve.metrics import Metrics
from mgjax.serve.parameters import Parameters
from mgjax.serve.worker import Job, PaintJob, Worker

CLIENT_LEFT = 499  # nobody sees it but /metrics
BEAT = 1.0         # seconds between two signs of life while a picture is painted
T = TypeVar("T")


class Service:
  """Answers requests with one model, and a studio where there is one.  For one event loop."""

  def __init__(self, assistant: Assistant, limits: Limits, studio: Studio | None = None):
    self.metrics, self.studio = Metrics(), studio
    self.worker = Worker(assistant, self.metrics, studio)
    self._assistant, self._limits = assistant, limits
    self._preparer, self._memory = Preparer(assistant, limits, studio), Memory(limits.held)
    self._open: set[Job] = set()  # given to the worker, and not ended
    self._painting: set[PaintJob] = set()
    watch = self.metrics.watch
    watch("queue", "Requests that wait for a row", lambda: self.worker.waiting)
    watch("rows_growing", "Answers that grow", lambda: self.worker.running)
    watch("rows", "Answers that can grow at once", lambda: assistant.engine.rows)
    watch("draw_queue", "Requests whose pictures wait or are painted", lambda: len(self._painting))
    watch("held_bytes", "Bytes of bodies and pixels that wait", lambda: self._memory.held)

  def close(self) -> None:
    """Jobs that are left fail."""
    self.worker.stop()
    self._preparer.close()

  async def complete(self, request: Request) -> Response:
    """The response to a request for a completion; ApiError if there is none."""
    self._check_queue()  # before the body is read
    return await self._answered(request, self._respond)

  async def paint(self, request: Request) -> Response:
    """The response to a request for pictures alone; ApiError if there is none."""
    if self.studio is None:
      raise no_painter(status=404)
    self._check_paintings()
    return await self._answered(request, self._painted_response)

  async def _answered(self, request: Request, respond) -> Response:
    with self._memory.share() as share:
      try:
        answer = respond(await read_body(request, self._limits, share), share)
        return await _unless_gone(request, answer)
      except ClientDisconnect:
        return Response(status_code=CLIENT_LEFT)

  async def stream(self, request: dict[str, Any]) -> AsyncIterator[tuple[Piece, str | None]]:
    """Answers a question of this process as if it had come over HTTP, and under the same limits.

    Gives pieces, each with why the text has ended, None before its last.  Closing it frees the row.
    ApiError before and between them, but for a picture that fails: that is the last piece.
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
        async with contextlib.aclosing(self._pieces(reply)) as pieces:
          async for piece in pieces:
            share.set(0)
            yield piece, reply.finish_reason
      except ApiError as error:
        if reply.finish_reason is None:
          raise
        yield Piece(drawn=Drawn(drawing_prompt(reply.text), error=error.message)), "stop"
      finally:
        self._close(job)

  def _check_queue(self):
    if not self.worker.alive:
      raise ApiError(503, "the engine has stopped")
    if len(self._open) >= self._assistant.engine.rows + self._limits.queue:
      raise busy(f"{self._limits.queue} requests wait already; try again")

  def _check_paintings(self):
    if not self.worker.alive:
      raise ApiError(503, "the engine has stopped")
    if len(self._painting) > self._limits.draw_queue:  # one of them is painted
      raise busy(f"{self._limits.draw_queue} requests wait to be painted already; try again")

  async def _begin(self, body: bytes, share: Share) -> tuple[Job, Reply, Parameters]:
    """Gives the worker what a body asks for; `_close` the job in the end."""
    begun = time.monotonic()
    question = await self._preparer.question(body)
    if question.draw:
      self._check_paintings()
    share.set(len(body) + self._preparer.size(question))
    job = await self._preparer.job(question, begun)
    share.set(sum(p.nbytes for p in job.pixels))
    self._check_queue()
    self._open.add(job)
    self.worker.submit(job)
    return job, Reply(self._assistant, question, job), question.parameters

  async def _pieces(self, reply: Reply) -> AsyncIterator[Piece]:
    """All that comes of an answer.  ApiError if the engine or the painter fails."""
    async for text in reply.pieces():
      yield Piece(text)
    if reply.draw is None:
      return
    prompt = drawing_prompt(reply.text)
    if prompt is None:
      yield Piece(drawn=Drawn(None))
      return
    yield Piece(paints=True)
    async with contextlib.aclosing(self._paint([prompt], reply.draw.painting)) as painted:
      async for pictures in painted:
        if pictures is None:
          yield Piece(paints=True)
        else:
          yield Piece(drawn=await self._preparer.run(self._drawn, prompt, pictures[0]))

  def _drawn(self, prompt: str, picture: np.ndarray) -> Drawn:
    return Drawn(prompt, encoded(picture), self.studio.painter.cut(prompt))

  async def _paint(self, prompts: list[str],
                   painting: Painting) -> AsyncIterator[np.ndarray | None]:
    """None every BEAT while they are painted, then the pictures.  Closing it gives up their place.
    ApiError."""
    job = PaintJob(prompts, painting, asyncio.get_running_loop())
    self._painting.add(job)
    self.worker.submit(job)
    waiting = asyncio.ensure_future(job.news.get())
    try:
      while not (await asyncio.wait((waiting,), timeout=BEAT))[0]:
        yield None
      news = waiting.result()
      if news.error:
        raise news.error
      yield news.pictures
    finally:
      waiting.cancel()
      self._painting.discard(job)
      self.worker.cancel(job)

  async def _painted_response(self, body: bytes, share: Share) -> Response:
    order = await self._preparer.run(images.read_order, body, self.studio, self._limits)
    share.set(0)
    self._check_paintings()
    painted = self._paint([order.prompt] * order.count, order.painting)
    async with contextlib.aclosing(painted):
      pictures = [p async for p in painted if p is not None][0]
    return json_response(await self._preparer.run(images.response, order, self.studio, pictures))

  def _close(self, job: Job) -> None:
    self._open.discard(job)
    self.worker.cancel(job)

  async def _respond(self, body: bytes, share: Share) -> Response:
    job, reply, parameters = await self._begin(body, share)
    del body  # with the pictures' files
    handed_over = False
    try:
      pieces = self._pieces(reply)
      first = await anext(pieces)  # until then an error has a status of its own
      share.set(0)
      if parameters.stream:
        handed_over = True
        events = reply.events(_chained(first, pieces), parameters.include_usage)
        return _EventStream(events, lambda: self._close(job))
      async with contextlib.aclosing(pieces):
        return json_response(reply.whole([first, *[piece async for piece in pieces]]))
    finally:
      if not handed_over:
        self._close(job)


async def _chained(first: Piece, rest: AsyncGenerator[Piece]) -> AsyncIterator[Piece]:
  async with contextlib.aclosing(rest):
    yield first
    async for piece in rest:
      yield piece


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
