"""How fast requests may go out, and what they may cost."""
from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Awaitable, Callable

from mgjax.data.journal import JournalError, write_whole

MINUTE = 60.0


class Stopped(Exception):
  """No further request is sent; says why."""


@dataclasses.dataclass(frozen=True)
class Clock:
  """Time as the pacing sees it; a test may have another."""

  time: Callable[[], float] = time.monotonic
  sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


@dataclasses.dataclass
class Sent:
  """A request in the limiter's window; `tokens` may be set to less once the answer is there."""

  time: float
  tokens: int


class Limiter:
  """Holds requests back so that no 60 seconds see more of them, or of their tokens, than allowed.

  A single request with more tokens than allowed goes alone.
  """

  def __init__(self, requests: int | None, tokens: int | None, clock: Clock):
    self._requests, self._tokens, self._clock = requests, tokens, clock
    self._window: collections.deque[Sent] = collections.deque()
    self._closed_until = -math.inf
    self._turn = asyncio.Lock()  # first come, first served

  async def enter(self, tokens: int) -> Sent:
    """Returns when a request that may use so many tokens can be sent."""
    async with self._turn:
      while (wait := self._wait(tokens)) > 0:
        await self._clock.sleep(min(wait, 1.0))  # an answer may free tokens meanwhile
      self._window.append(Sent(self._clock.time(), tokens))
      return self._window[-1]

  def pause(self, seconds: float) -> None:
    """Nothing is sent for so long."""
    self._closed_until = max(self._closed_until, self._clock.time() + seconds)

  def _wait(self, tokens: int) -> float:
    now, window = self._clock.time(), self._window
    while window and window[0].time + MINUTE - now <= 0:
      window.popleft()
    wait = self._closed_until - now
    if self._requests is not None and (over := len(window) + 1 - self._requests) > 0:
      wait = max(wait, window[over - 1].time + MINUTE - now)
    if self._tokens is not None:
      total = tokens + sum(sent.tokens for sent in window)
      for sent in window:
        if total <= self._tokens:
          break
        total -= sent.tokens
        wait = max(wait, sent.time + MINUTE - now)
    return wait


@dataclasses.dataclass(frozen=True)
class Spent:
  """What all runs together used.

  unsure: calls whose tokens the server did not tell (it was cut off, say): they are counted as the
  most that they can have been.
  """

  calls: int = 0
  prompt_tokens: int = 0
  completion_tokens: int = 0
  cost: float = 0.0
  unsure: int = 0


class Ledger:
  """Counts tokens and money in a file, and keeps to the budget."""

  def __init__(self, path: pathlib.Path, price_in: float = 0.0, price_out: float = 0.0,
               budget: float | None = None):
    """Prices are per million tokens.  JournalError if what the file holds is not a count."""
    self._path, self._prices, self._budget = path, (price_in, price_out), budget
    self._held: list[float] = []  # the most that requests under way can cost
    self._freed = asyncio.Event()
    try:
      self.spent = Spent(**json.loads(path.read_text())) if path.exists() else Spent()
      sum(dataclasses.astuple(self.spent))
    except (ValueError, TypeError) as error:
      raise JournalError(f"{path}: not the count of what was spent ({error}); delete it to count "
                         "from 0") from error

  async def hold(self, prompt: int, completion: int) -> float:
    """Sets money aside for a request; Stopped if the budget has not that much left."""
    cost, budget = self._cost(prompt, completion), self._budget
    if budget is not None:
      while self.spent.cost + sum(self._held) + cost > budget:
        if not self._held:
          raise Stopped(f"the budget of {budget:g} is used up but for "
                        f"{max(0.0, budget - self.spent.cost):.4g}, and a request may cost "
                        f"{cost:.4g}")
        self._freed.clear()
        await self._freed.wait()
    self._held.append(cost)
    return cost

  def release(self, held: float) -> None:
    """What was set aside is free again."""
    self._held.remove(held)
    self._freed.set()

  def add(self, prompt: int, completion: int, *, unsure: bool = False) -> None:
    """Counts a call, on disk before anything else comes of it."""
    old = self.spent
    self.spent = Spent(old.calls + 1, old.prompt_tokens + prompt,
                       old.completion_tokens + completion,
                       old.cost + self._cost(prompt, completion), old.unsure + unsure)
    write_whole(self._path, json.dumps(dataclasses.asdict(self.spent)) + "\n")

  def _cost(self, prompt: int, completion: int) -> float:
    return (prompt * self._prices[0] + completion * self._prices[1]) / 1e6
