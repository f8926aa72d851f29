"""How long a compiled program takes, estimated from its text."""
from __future__ import annotations

import dataclasses
import re

from mgjax.chips import Chip
from mgjax.tpu.hlo import Instruction, Module
from mgjax.tpu.links import Collective, Network, collectives
from mgjax.tpu.ops import Cost, cost

# What the figures leave out; said wherever they are shown.
NOT_COUNTED = (
    "what the host does between steps, and input that comes too late",
    "latency of collectives and of starting kernels; congestion of links and of the network",
    "that collectives and products share HBM",
    "the longer branch of a condition: rows beyond twice an even share of the experts",
    "shape-dependent speed of Pallas kernels (a fixed share of the peak is assumed)",
)

# The model's parts, as `jax.named_scope` says in its code, and so each operation's name.
PARTS = ("clip", "convnext", "mining", "projector", "embedding", "decoder", "logits", "loss",
         "optimizer")


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Of one run of a program on every chip.  `products`, `memory`, `links` are seconds at the full
  rates of the chip: for the operations as compiled, the bytes of HBM, those of the collectives.
  `core` is an estimate: a share of the peak rate for products, the compiler's own model for other
  operations where it has one, and never less than the peak rate and the memory allow."""

  flops: float                     # as compiled: what is computed twice counts twice
  kernel_flops: float              # those of Pallas kernels among them
  hbm_bytes: float
  products: float
  core: float
  compiler: float                  # the compiler's own estimates, of the fusions that have one
  memory: float
  links: float
  exposed: float                   # part of `links` in which the core waits
  expected: float                  # step time: loops one after another, in each the longest of
                                   # core, memory and links, and what is exposed
  by_source: dict[str, float]      # seconds of the core by where the operations come from; of a
                                   # program without gradients by what they are
  by_part: dict[str, float]        # the same seconds by PARTS; "decoder attention" is apart
  collectives: tuple[tuple[Collective, float], ...]  # and how often they run

  @property
  def bound(self) -> float:
    """No run is faster: the longest of products, memory and links."""
    return max(self.products, self.memory, self.links)

  @property
  def binds(self) -> str:
    """Which of the three that is."""
    return max(("products", "memory", "links"), key=lambda name: getattr(self, name))


def estimate(module: Module, chip: Chip, network: Network, own_rows: float = 1,
             loops: int = 1) -> Estimate:
  """Of a program compiled for the chips of `network`; own_rows: as in `ops.cost`; loops: runs of a
  loop of which the program does not say how often it runs.

  Raises ValueError where the sum is below what the peak rate allows: the estimate is wrong then.
  """
  walk = _Walk(module, chip, network, own_rows, loops)
  expected = walk.region(module.entry, 1)
  links = sum(c.seconds * times for c, times in walk.found)
  result = Estimate(
      walk.flops, walk.kernel_flops, walk.bytes, walk.flops / chip.peak, walk.core, walk.compiler,
      walk.bytes / chip.hbm_bandwidth, links,
      sum(c.seconds * times for c, times in walk.found if not c.hidden), expected,
      walk.sources if len(walk.sources) > 1 else walk.kinds, walk.parts, tuple(walk.found))
  if result.core < 0.999 * result.products:
    raise ValueError(f"{result.core:.4f} s for {result.flops:.4g} operations is above the peak "
                     f"rate of a {chip.name}")
  return result


class _Walk:
  """Adds up costs while going through what is scheduled."""

  def __init__(self, module: Module, chip: Chip, network: Network, own_rows: float,
               loops: int):
    self._module, self._chip, self._network = module, chip, network
    self._own_rows, self._loops = own_rows, loops
    self.flops = self.kernel_flops = self.bytes = self.core = self.compiler = 0.0
    self.sources: dict[str, float] = {}
    self.kinds: dict[str, float] = {}
    self.parts: dict[str, float] = {}
    self.found: list[tuple[Collective, float]] = []

  def region(self, computation: str, times: float) -> float:
    """Seconds of one run of a computation: collectives are hidden behind what runs in the same
    iteration, as far as that lasts."""
    core = exposed = hidden = moved = inner = 0.0
    for i in self._module.computations[computation].values():
      own = collectives(self._module, computation, i, self._network)
      if own and i.opcode != "fusion":
        price = Cost()  # the links' time, not the core's
      else:
        price = cost(self._module, computation, i, self._chip, self._own_rows)
        if own and price.compiler is None:
          price = dataclasses.replace(price, seconds=0.0)
      self._add(i, price, own, times)
      core, moved = core + price.seconds, moved + price.bytes
      exposed += sum(c.seconds for c in own if not c.hidden)
      hidden += sum(c.seconds for c in own if c.hidden)
      if i.opcode == "while":
        trips = self._module.trip_count(i, self._loops)
        inner += trips * self.region(i.attribute("body").lstrip("%"), times * trips)
      elif i.opcode in ("call", "async-start"):
        inner += self.region(i.called()[-1], times)
      elif i.opcode == "conditional":
        inner += self.region(min(i.called(), key=self._alone), times)
    return max(core + exposed, hidden + exposed, moved / self._chip.hbm_bandwidth) + inner

  def _alone(self, computation: str) -> float:
    """Seconds of a computation, without counting it."""
    walk = _Walk(self._module, self._chip, self._network, self._own_rows, self._loops)
    return walk.region(computation, 1)

  def _add(self, i, price, own, times):
    self.flops += price.flops * times
    self.kernel_flops += price.kernel_flops * times
    self.bytes += price.bytes * times
    self.core += price.seconds * times
    self.compiler += (price.compiler or 0.0) * times
    self.found += [(c, times) for c in own]
    if price.seconds:
      for sums, key in ((self.sources, _source(i.op_name)), (self.kinds, _kind(i, price)),
                        (self.parts, _part(i.op_name))):
        sums[key] = sums.get(key, 0.0) + price.seconds * times


def _source(op_name: str) -> str:
  """Which pass an operation belongs to."""
  if "rematted_computation" in op_name:
    return "recomputed"
  if "transpose(" in op_name:
    return "backward"
  return "forward" if "jvp" in op_name else "other"


def _part(op_name: str) -> str:
  """Which of PARTS an operation belongs to.

  >>> _part("jit(step)/transpose(jvp(decoder))/while/body/checkpoint/attention/dot_general")
  'decoder attention'
  """
  scopes = re.findall(r"\w+", op_name)
  part = next((s for s in scopes if s in PARTS), "other")
  return "decoder attention" if part == "decoder" and "attention" in scopes else part


def _kind(i: Instruction, price: Cost) -> str:
  """What an operation mostly is."""
  if price.kernel_flops:
    return "kernels"
  if price.flops:
    return "convolutions" if "conv_general_dilated" in i.op_name else "products"
  return "other"
