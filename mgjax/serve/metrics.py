"""What a server counts, for Prometheus."""
from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_FIRST = (.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 25, 60, 120)
_PAINTING = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_BETWEEN = (.002, .005, .01, .02, .03, .05, .075, .1, .2, .5, 1, 2)


class Metrics:
  """The figures of one server."""

  def __init__(self):
    self._registry = registry = CollectorRegistry()
    self.first_token = Histogram(
        "mgjax_time_to_first_token_seconds", "From the whole request to its first token",
        buckets=_FIRST, registry=registry)
    self.between_tokens = Histogram(
        "mgjax_inter_token_latency_seconds", "Between two tokens of an answer", buckets=_BETWEEN,
        registry=registry)
    self.requests = Counter("mgjax_requests", "Requests by status; 499: the client left",
                            ["status"], registry=registry)
    self.read = Counter("mgjax_prompt_tokens", "Tokens of prompts that were begun",
                        registry=registry)
    self.reused = Counter("mgjax_prompt_tokens_reused", "Of those, tokens that were known already",
                          registry=registry)
    self.written = Counter("mgjax_generated_tokens", "Tokens of answers", registry=registry)
    self.painted = Counter("mgjax_painted_pictures", "Pictures painted", registry=registry)
    self.painting = Histogram(
        "mgjax_painting_seconds", "To paint what one request asks for, waiting not counted",
        buckets=_PAINTING, registry=registry)

  def watch(self, name: str, help: str, value: Callable[[], float]) -> None:
    """Adds a figure that is asked for whenever somebody looks."""
    Gauge(f"mgjax_{name}", help, registry=self._registry).set_function(value)

  def text(self) -> bytes:
    """All figures in Prometheus' text form."""
    return generate_latest(self._registry)
