"""The one thread that owns the devices: answers grow there, and pictures are painted."""
from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import queue
import threading
import time

import jax
import numpy as np

from mgjax.diffusion.painter import PaintError, Painting
from mgjax.infer.assistant import Assistant
from mgjax.infer.engine import Answer, Prompt
from mgjax.infer.sampling import Sampling
from mgjax.infer.studio import Studio, out_of_memory
from mgjax.serve.errors import ApiError
from mgjax.serve.metrics import Metrics

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class News:
  """What has become of a job: new tokens; how it ended ("stop" or "length"), or the error."""

  tokens: tuple[int, ...] = ()
  ended: str | None = None
  error: ApiError | None = None
  reused: int = 0
  pictures: np.ndarray | None = None  # uint8 [N, H, W, 3]


@dataclasses.dataclass(eq=False)
class Job:
  """A question on its way.  `news` is for the event loop, the rest for the engine's thread."""

  tokens: np.ndarray        # int [N], as in `engine.Prompt`
  visual_index: np.ndarray  # int [N]
  pixels: list[np.ndarray]  # of each picture; those that were seen are dropped
  sampling: Sampling
  loop: asyncio.AbstractEventLoop
  begun: float              # time.monotonic() of the request
  news: asyncio.Queue[News] = dataclasses.field(default_factory=asyncio.Queue)
  images: tuple[jax.Array, ...] = ()
  answer: Answer | None = None
  given: int = 0            # tokens of the answer that were given out
  last: float = 0.0         # when


@dataclasses.dataclass(eq=False)
class PaintJob:
  """Pictures on their way; the fields are those of a `Job`."""

  prompts: list[str]
  painting: Painting
  loop: asyncio.AbstractEventLoop
  news: asyncio.Queue[News] = dataclasses.field(default_factory=asyncio.Queue)
  answer: None = None


class Worker:
  """Runs jobs on an assistant's engine, and paints in a studio, first come, first served.

  Answers stand still while something is painted: a painting is one program, and the devices run one
  after another.  So that they come on, they have at least as long between two paintings as the
  first of them took.

  `start` it once; `submit` and `cancel` may be called from any thread.
  """

  def __init__(self, assistant: Assistant, metrics: Metrics, studio: Studio | None = None):
    self._assistant, self._engine, self._metrics = assistant, assistant.engine, metrics
    self._studio = studio
    self._orders: queue.SimpleQueue[tuple[str, Job | PaintJob | None]] = queue.SimpleQueue()
    self._waiting: collections.deque[Job] = collections.deque()
    self._running: list[Job] = []
    self._to_paint: collections.deque[PaintJob] = collections.deque()
    self._rested = 0.0  # when the answers have had their time since the last painting
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

  @property
  def alive(self) -> bool:
    """Whether jobs are being worked on."""
    return self._thread.is_alive()

  @property
  def waiting(self) -> int:
    """Jobs that no row is free for."""
    return len(self._waiting) + self._orders.qsize()

  @property
  def running(self) -> int:
    """Jobs whose answers grow."""
    return len(self._running)

  def start(self) -> None:
    """Begins to work."""
    self._thread.start()

  def stop(self) -> None:
    """Ends after the step at hand; jobs that are left fail."""
    self._orders.put(("stop", None))
    self._thread.join()

  def submit(self, job: Job | PaintJob) -> None:
    """Its `news` will tell."""
    self._orders.put(("submit", job))

  def cancel(self, job: Job | PaintJob) -> None:
    """Frees its row, or its place; nothing if it has ended, or is being painted."""
    self._orders.put(("cancel", job))

  def _run(self):
    try:
      self._work()
    finally:
      self._fail([*self._running, *self._waiting, *self._to_paint],
                 ApiError(503, "the server is shutting down"))

  def _work(self):
    while self._obey():
      try:
        self._prepare()
        if self._running:
          self._engine.step()
        self._report()
        self._paint()
      except Exception as error:  # a bug, or out of memory: the others that wait go on
        log.exception("the engine failed; %d requests with it", len(self._running))
        self._fail(self._running, _failure(error))
        self._running = []

  def _obey(self) -> bool:
    """Takes the orders that have come, and waits for one if nothing is to do; False at the end."""
    while True:
      try:
        order, job = self._orders.get(
            block=not self._running and not self._waiting and not self._to_paint)
      except queue.Empty:
        return True
      if order == "stop":
        return False
      if order == "submit":
        (self._to_paint if isinstance(job, PaintJob) else self._waiting).append(job)
      elif job in self._to_paint:
        self._to_paint.remove(job)
      elif job in self._waiting:
        self._waiting.remove(job)
      elif job in self._running:
        self._engine.cancel(job.answer)
        self._running.remove(job)

  def _prepare(self):
    """Gives jobs to the engine while rows are free, and looks at one picture of theirs.

    One picture a step: answers that grow must not wait for eight.  Nothing is given before a row is
    free, so that what waits holds no memory of the devices.
    """
    looked = False
    while self._waiting and not looked and len(self._running) < self._engine.rows:
      job = self._waiting[0]
      try:
        if looked := bool(job.pixels):
          job.images += (self._assistant.see(job.pixels[0]),)
          del job.pixels[0]
        if not job.pixels:
          job.answer = self._engine.submit(Prompt(job.tokens, job.visual_index, job.images),
                                           job.sampling)
          self._running.append(self._waiting.popleft())
      except Exception as error:
        log.exception("a request failed before its answer was begun")
        self._fail([self._waiting.popleft()], _failure(error))

  def _report(self):
    """Gives out what the step has brought."""
    now, news = time.monotonic(), []
    for job in self._running:
      answer, new = job.answer, tuple(job.answer.tokens[job.given:])
      if new:
        self._count(job, now, len(new))
      if new or answer.ended:
        news.append((job, News(new, answer.ended, reused=answer.reused or 0)))
    self._running = [job for job in self._running if not job.answer.ended]
    _tell(news)

  def _paint(self):
    """Paints what waits longest, if it is time to."""
    if not self._to_paint or (self._running and time.monotonic() < self._rested):
      return
    job, begun = self._to_paint.popleft(), time.monotonic()
    try:
      news = News(pictures=self._studio.paint(job.prompts, job.painting))
    except Exception as error:
      log.exception("a picture failed")
      news = News(error=_failure(error))
    took = time.monotonic() - begun
    self._rested = begun + 2 * took
    if news.pictures is not None:
      self._metrics.painted.inc(len(news.pictures))
      self._metrics.painting.observe(took)
    _tell([(job, news)])
    if self._engine.is_aside:  # only a new process helps
      log.critical("the language model found no room to come back to the devices; stopping")
      self._orders.put(("stop", None))

  def _count(self, job, now, new):
    if not job.given:
      self._metrics.first_token.observe(now - job.begun)
      self._metrics.read.inc(len(job.tokens))
      self._metrics.reused.inc(job.answer.reused)
    else:
      self._metrics.between_tokens.observe((now - job.last) / new)
    self._metrics.written.inc(new)
    job.given, job.last = job.given + new, now

  def _fail(self, jobs, error):
    for job in jobs:
      if job.answer is not None:
        self._engine.cancel(job.answer)
    _tell([(job, News(error=error)) for job in jobs])


def _failure(error: Exception) -> ApiError:
  if isinstance(error, PaintError):
    return ApiError(500, str(error), code="not_painted")
  if out_of_memory(error):
    return ApiError(500, "the model ran out of memory; try again, or with less", code="no_memory")
  return ApiError(500, "the model failed on this request; the server's log says why")


def _tell(news: list[tuple[Job, News]]) -> None:
  """Puts news into their queues, all those of one event loop at once."""
  def put(items):
    for job, item in items:
      job.news.put_nowait(item)

  for loop in {job.loop for job, _ in news}:
    try:
      loop.call_soon_threadsafe(put, [(job, item) for job, item in news if job.loop is loop])
    except RuntimeError:  # that loop is closed: nobody waits any more
      pass
