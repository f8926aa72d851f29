"""A request's parameters: what they mean here, and which are refused."""
from __future__ import annotations

import dataclasses
import json
import math
import secrets
from collections.abc import Collection
from typing import Any

from mgjax.infer.sampling import Sampling
from mgjax.serve.errors import ApiError, wrong

STOPS = 4  # stop strings at most, as at OpenAI
# Known, but without effect here: accepted where they ask for nothing.
_NEUTRAL: dict[str, tuple] = {
    "n": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,),
    "logit_bias": ({},), "logprobs": (False,), "top_logprobs": (0,), "tools": ([],),
    "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"), "store": (False,),
}
# With "image" they ask for a picture; see `drawing.read_draw`.
_MODALITIES = {"modalities": (["text"], ["text", "image"], ["image", "text"])}
# Labels, which change nothing whatever they say.
_LABELS = {"user": str, "safety_identifier": str, "prompt_cache_key": str, "metadata": dict}
_USED = ("messages", "model", "stream", "stream_options", "temperature", "top_p", "top_k", "seed",
         "stop", "max_tokens", "max_completion_tokens", "draw")


@dataclasses.dataclass(frozen=True)
class Parameters:
  """How a request is answered.  new_tokens: None if it does not say."""

  temperature: float
  top_p: float
  top_k: int
  seed: int
  stop: tuple[str, ...]
  new_tokens: int | None
  stream: bool
  include_usage: bool

  def sampling(self, new_tokens: int, stop_ids: tuple[int, ...]) -> Sampling:
    """For the engine.  ApiError where a value means nothing."""
    try:
      sampling = Sampling(self.temperature, self.top_p or 1.0, self.top_k, new_tokens, self.seed,
                          stop_ids)
    except ValueError as error:
      raise wrong(str(error), str(error).partition(" ")[0]) from error
    # At OpenAI top_p may be 0 too: the likeliest token alone.
    return sampling if self.top_p else dataclasses.replace(sampling, temperature=0.0)


def read_json(body: bytes) -> dict[str, Any]:
  """The request's object.  ApiError unless it is strict JSON in UTF-8 and an object."""
  def refuse(name):
    raise ValueError(f"{name} is no JSON")

  try:
    request = json.loads(body.decode(), parse_constant=refuse)
  except (ValueError, RecursionError) as error:
    raise wrong(f"the body is not JSON ({str(error)[:200]})", code="not_json") from error
  if not isinstance(request, dict):
    raise wrong("the body is not a JSON object", code="not_json")
  return request


def read_parameters(request: dict[str, Any], model: str) -> Parameters:
  """All but the messages.

  ApiError naming the parameter: unknown ones, known ones that ask for what is not done here, and
  wrong values; 404 for another model than `model`.
  """
  check_names(request, _USED, _NEUTRAL | _MODALITIES, _LABELS)
  check_model(request, model)
  options = typed(request, "stream_options", dict, {})
  if unknown := options.keys() - {"include_usage", "include_obfuscation"}:
    raise wrong(f"unknown option {min(unknown)[:200]!r}", "stream_options", "unknown_parameter")
  longest = {typed(request, name, int, None) for name in ("max_tokens", "max_completion_tokens")}
  longest.discard(None)
  if len(longest) > 1:
    raise wrong("max_tokens and max_completion_tokens differ; give one", "max_tokens")
  if longest and min(longest) < 1:
    raise wrong(f"max_tokens is {min(longest)}, expected at least 1", "max_tokens")
  seed = typed(request, "seed", int, None)
  return Parameters(
      temperature=typed(request, "temperature", float, 1.0),
      top_p=typed(request, "top_p", float, 1.0), top_k=typed(request, "top_k", int, 0),
      seed=secrets.randbits(32) if seed is None else seed % 2**32,
      stop=_stops(request.get("stop")), new_tokens=min(longest, default=None),
      stream=typed(request, "stream", bool, False),
      include_usage=typed(options, "include_usage", bool, False))


def check_model(request: dict[str, Any], model: str) -> None:
  """ApiError (404) if the request names another model."""
  named = typed(request, "model", str, model)
  if named != model:
    raise ApiError(404, f"the model {named[:200]!r} does not exist here; there is {model!r}",
                   "model", "model_not_found")


def check_names(request: dict[str, Any], used: Collection[str], neutral: dict[str, tuple],
                labels: dict[str, type], at: str = "") -> None:
  """ApiError for a name that is not known, and for one that asks for what is not done.

  neutral: values that ask for nothing; labels: names whose value, of that type, changes nothing;
  at: what errors call them by in front of the name.
  """
  for name, value in request.items():
    if value is None or name in used:
      continue
    called = f"{at}{name[:200]}"
    if name in labels:
      typed(request, name, labels[name], None, at)
    elif name not in neutral:
      raise wrong(f"unknown parameter {called!r}", called, "unknown_parameter")
    elif not any(value == v and isinstance(value, bool) == isinstance(v, bool)
                 for v in neutral[name]):
      allowed = " or ".join(map(json.dumps, neutral[name]))
      raise wrong(f"{called} is not supported: leave it out, or at {allowed}", called,
                  "unsupported_parameter")


def typed(request: dict[str, Any], name: str, kind: type, default: Any, at: str = "") -> Any:
  """The value of that kind; `default` if there is none, or null.  ApiError calls it at + name."""
  value = request.get(name)
  name = at + name
  if value is None:
    return default
  accepted = (int, float) if kind is float else kind
  if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
    names = {str: "a string", dict: "an object", int: "an integer", float: "a number",
             bool: "true or false"}
    raise wrong(f"{name} must be {names[kind]}", name, "invalid_type")
  if kind is float:
    try:
      value = float(value)
    except OverflowError:
      value = math.inf
    if not math.isfinite(value):
      raise wrong(f"{name} is not finite", name)
  return value


def _stops(stop) -> tuple[str, ...]:
  stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
  if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
    raise wrong("stop must be a string or a list of them", "stop", "invalid_type")
  if len(stops) > STOPS or not all(stops):
    raise wrong(f"stop takes up to {STOPS} strings, none of them empty", "stop")
  return tuple(stops)
