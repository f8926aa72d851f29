"""One endpoint: a request, its retries, its errors in a line."""
from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import json
import math
import os
import pathlib
import random
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mgjax.config import ConfigError, at_least
from mgjax.endpoint.pacing import MINUTE, Clock, Ledger, Limiter, Sent, Stopped

LONGEST_WAIT = 3600.0  # seconds; a server that asks for more is not waited for
_TRANSIENT = (408, 409, 425, 429)  # and all from 500
_ONE_REQUEST = (400, 413, 422)  # may be due to the text of the one request

Messages = Sequence[Mapping[str, str]]


class EndpointError(Exception):
  """The endpoint cannot be used; one line tells why."""


class Refused(Exception):
  """The endpoint refuses this request (HTTP 400, 413, 422); another one may be taken."""


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
  """Where to ask, how fast, and for how much.

  base_url None: $OPENAI_BASE_URL, or OpenAI's.  body: fields of the request to add or, with None,
  to leave out.  Prices are per million tokens; the budget is in the same currency.
  """

  model: str
  base_url: str | None = None
  api_key_env: str = "OPENAI_API_KEY"
  temperature: float = 0.7
  max_tokens: int = 600
  body: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  timeout: float = 120.0  # seconds for one answer
  tries: int = 8          # for one answer, where the server or the network fails
  requests_per_minute: int | None = None
  tokens_per_minute: int | None = None
  price_in: float = 0.0
  price_out: float = 0.0
  budget: float | None = None

  def __post_init__(self):
    at_least(self, 0, "temperature", "price_in", "price_out", "budget")
    at_least(self, 1, "max_tokens", "tries", "requests_per_minute", "tokens_per_minute")
    if not self.timeout > 0:
      raise ConfigError(f"EndpointConfig: timeout is {self.timeout}, expected more than 0 seconds")
    if fixed := sorted({"model", "messages", "stream", "n"} & set(self.body)):
      raise ConfigError(f"EndpointConfig: body may not set {', '.join(fixed)}")
    if not (isinstance(self.longest_answer, int) and self.longest_answer > 0):
      raise ConfigError(f"EndpointConfig: body allows {self.longest_answer!r} tokens for an "
                        "answer, expected a whole number above 0")
    if self.budget is not None and not (self.price_in or self.price_out):
      raise ConfigError("a budget needs prices: give price_in and price_out, per million tokens")

  @property
  def longest_answer(self) -> int:
    """The tokens that an answer can have, as the server is told."""
    return self.body.get("max_completion_tokens") or self.body.get("max_tokens") or self.max_tokens


@dataclasses.dataclass(frozen=True)
class Answer:
  """The text of an answer ("" if there is none), and why it ended there."""

  text: str
  finish: str


class _Trouble(Exception):
  """Something that may pass; `wait` is how long the server asks for."""

  def __init__(self, message: str, wait: float | None = None):
    super().__init__(message)
    self.wait = wait


class Endpoint:
  """Asks; one object a run, used as `async with`."""

  def __init__(self, config: EndpointConfig, state: pathlib.Path, clock: Clock = Clock()):  # noqa: B008
    """Raises ConfigError without the openai package, or the key in the environment."""
    try:
      import openai
    except ImportError as error:
      raise ConfigError(f"the openai package is missing ({error}): pip install -e '.[generate]'"
                        ) from error
    self._key = os.environ.get(config.api_key_env, "").strip()
    if not self._key:
      raise ConfigError(f"no key in the environment variable {config.api_key_env}; export it (any "
                        "text where the server asks for none), or name another with --api-key-env")
    if not (self._key.isascii() and self._key.isprintable()):
      raise ConfigError(f"the key in {config.api_key_env} holds characters that no header can have")
    self._openai, self.config, self._clock = openai, config, clock
    self.ledger = Ledger(state, config.price_in, config.price_out, config.budget)
    self._limiter = Limiter(config.requests_per_minute, config.tokens_per_minute, clock)
    self._jitter = random.Random(0)
    self._reached = False  # the server has answered before: it exists
    self.calling: set[asyncio.Task] = set()  # tasks whose request is under way
    self.closed = False  # no request is begun any more

  async def __aenter__(self) -> Endpoint:
    timeout = self._openai.Timeout(self.config.timeout, connect=min(10.0, self.config.timeout))
    try:
      self._client = self._openai.AsyncOpenAI(
          api_key=self._key, base_url=self.config.base_url, timeout=timeout,
          max_retries=0)  # every try is to be paced and counted here
      self._url = re.sub("//[^/@]*@", "//", str(self._client.base_url))  # no password in errors
      if not re.match(r"https?://[^/]", self._url):
        raise ValueError("it does not begin with http:// or https:// and a host")
    except Exception as error:  # a URL that is none
      raise ConfigError(f"base URL {self.config.base_url!r}: {self._told(error)}; expected "
                        "something like http://localhost:8000/v1") from error
    return self

  async def __aexit__(self, *_) -> None:
    await self._client.close()

  async def ask(self, messages: Messages, seed: int,
                temperature: float | None = None) -> Answer:
    """One answer.  What may pass is tried again: 429, 5xx, timeouts, lost connections.

    temperature: that of the config if None.

    Raises Refused for this request only; EndpointError where going on is useless; Stopped once
    `closed`, or before the budget is exceeded.
    """
    for attempt in range(self.config.tries):
      if self.closed:
        raise Stopped("stopped")
      try:
        return await self._call(messages, seed, temperature)
      except _Trouble as error:
        trouble = error
      if attempt + 1 < self.config.tries and not self.closed:
        if trouble.wait:
          self._limiter.pause(trouble.wait)  # all requests: the server is the same
        else:
          await self._clock.sleep(min(2.0 ** attempt, MINUTE) * self._jitter.uniform(0.75, 1))
    raise EndpointError(f"{self._url} failed {self.config.tries} times in a row: {trouble}; run "
                        "the same command again later, what is done is kept")

  async def _call(self, messages: Messages, seed: int, temperature: float | None) -> Answer:
    body = {"temperature": self.config.temperature if temperature is None else temperature,
            "seed": seed, "max_tokens": self.config.max_tokens}
    body = {k: v for k, v in {**body, **self.config.body}.items() if v is not None}
    # A token is at least a byte; each message has a frame.
    bound = sum(len(m["content"].encode()) + 16 for m in messages) + 16, self.config.longest_answer
    held, task = await self.ledger.hold(*bound), asyncio.current_task()
    # From the answer on nothing here may await: a reply that is paid for would be lost on a stop.
    try:
      sent = await self._limiter.enter(sum(bound))
      self.calling.add(task)
      try:
        async with asyncio.timeout(self.config.timeout):
          response = await self._client.chat.completions.with_raw_response.create(
              model=self.config.model, messages=list(messages), extra_body=body)
      except asyncio.CancelledError:
        self.ledger.add(*bound, unsure=True)
        raise
      except (TimeoutError, self._openai.APIError) as error:
        raise self._failure(error, sent, bound) from error
      self._reached = True
      return self._read(response.text, sent, bound)
    finally:
      self.calling.discard(task)
      self.ledger.release(held)

  def _read(self, text: str, sent: Sent, bound: tuple[int, int]) -> Answer:
    """The answer in a response's body, its tokens counted."""
    try:
      value = json.loads(text)
    except (ValueError, RecursionError):
      value = None
    value = value if isinstance(value, dict) else {}
    usage = value.get("usage") if isinstance(value.get("usage"), dict) else {}
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if all(isinstance(n, int) and n >= 0 for n in counts):
      self.ledger.add(*counts)
      sent.tokens = min(sent.tokens, sum(counts))
    else:
      self.ledger.add(*bound, unsure=True)
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
      raise _Trouble(f"its answer is no chat completion ({self._told(value.get('error') or text)})")
    content = message.get("content")
    return Answer(content if isinstance(content, str) else "",
                  "refusal" if message.get("refusal") else str(choice.get("finish_reason")))

  def _failure(self, error: Exception, sent: Sent, bound: tuple[int, int]) -> Exception:
    """What to raise for a request without an answer."""
    if isinstance(error, self._openai.APIStatusError):
      sent.tokens = 0
      return self._status_failure(error)
    cause = error.__cause__ or error
    if type(cause).__name__ in ("ConnectError", "ConnectTimeout"):  # nothing was sent
      sent.tokens = 0
      told = f"{self._url} cannot be reached ({self._told(cause)})"
      return _Trouble(told) if self._reached else EndpointError(
          f"{told}; is the server running, and --base-url right?")
    self.ledger.add(*bound, unsure=True)
    if isinstance(error, TimeoutError | self._openai.APITimeoutError):
      return _Trouble(f"no answer within {self.config.timeout:g} s")
    return _Trouble(f"the connection was lost ({self._told(cause)})")

  def _status_failure(self, error) -> Exception:
    status = error.status_code
    told = f"HTTP {status}: {self._told(error.body or error)}"
    where = f"{self._url} answers {told}"
    if status in (401, 403):
      return EndpointError(f"{where}; is the key in {self.config.api_key_env} the right one?")
    if status == 404:
      return EndpointError(f"{where}; is there a model {self.config.model!r}, and is --base-url "
                           "right (most end in /v1)?")
    if error.code == "insufficient_quota":  # a 429 that no waiting ends
      return EndpointError(where)
    if status in _ONE_REQUEST:
      return Refused(told)
    if status in _TRANSIENT or status >= 500:
      self._reached = True
      wait = retry_after(error.response.headers)
      if wait is not None and wait > LONGEST_WAIT:
        return EndpointError(f"{where}, and asks to wait {wait / 3600:.1f} hours; run the same "
                             "command again then, what is done is kept")
      return _Trouble(told, wait)
    return EndpointError(where)

  def _told(self, what: object) -> str:
    """What an error says, in one line and without the key, which servers like to quote."""
    if isinstance(what, dict):
      what = what.get("message") or what.get("error") or what.get("detail") or what
    text = " ".join(str(what).split()) or type(what).__name__
    return (text.replace(self._key, "***") if len(self._key) > 5 else text)[:300]


def retry_after(headers: Mapping[str, str]) -> float | None:
  """Seconds that a response asks to wait: Retry-After as a number or a date, or retry-after-ms."""
  for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
    value = headers.get(name)
    if value is None:
      continue
    try:
      seconds = float(value) * unit
    except ValueError:
      try:
        seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
      except (ValueError, OverflowError):
        continue
    if not math.isnan(seconds):
      return max(0.0, seconds)
  return None
