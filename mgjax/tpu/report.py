"""What a compiled program takes on a slice, as numbers and as text."""
from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh

from mgjax.chips import Chip
from mgjax.models.moe import EVEN_SHARES
from mgjax.tpu import hlo, links
from mgjax.tpu.calibration import SKETCH, WHOLE
from mgjax.tpu.compiler import Compiled, Program
from mgjax.tpu.roofline import NOT_COUNTED, Estimate, estimate
from mgjax.tpu.slices import Slice
from mgjax.tpu.slices import chip as chip_of_slice

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes a chip.  activations: everything that the program makes on the way, gradients too."""

  params: int
  frozen: int
  optimizer: int
  batch: int        # and other arguments
  activations: int
  code: int
  peak: int
  available: int
  beside: int = 0   # of another model, not this program's

  @property
  def fits(self) -> bool:
    return self.peak <= self.available


@dataclasses.dataclass(frozen=True)
class Report:
  """A program on a slice.  Times are estimates, in seconds, of one run; `step` is
  the calibrated one."""

  program: str
  slice: str
  chips: int
  mesh: dict[str, int]
  whole: bool                 # compiled to the end, or a sketch: products at an assumed rate
  compile_seconds: float
  memory: Memory
  model_flops: float          # a chip, by the mathematics
  compiled_flops: float       # a chip
  kernel_flops: float         # of these in Pallas kernels
  hbm_bytes: float
  reads: int                  # of these what a decode step must: weights and a full cache
  collectives: tuple[dict[str, Any], ...]
  products: float
  core: float
  compiler: float             # the compiler's estimated cycles, of the fusions that have them
  memory_time: float
  links: float
  exposed: float
  by_source: dict[str, float]
  by_part: dict[str, float]
  bound: float
  binds: str
  expected: float
  calibration: float
  step: float
  mfu_bound: float
  mfu: float
  tokens_per_s_per_chip: float
  images_per_s_per_chip: float
  useful: float | None        # share of positions that the paper's mixture fills, lengths assumed
  hours: float | None         # of an epoch of it
  steps: int                  # of a sampler, in one run; 0: another program

  @property
  def fits(self) -> bool:
    return self.memory.fits

  def as_json(self) -> dict[str, Any]:
    """All of it, and what is not counted."""
    return dataclasses.asdict(self) | {"fits": self.fits, "not_counted": NOT_COUNTED}

  def as_text(self) -> str:
    """For people."""
    return _text(self)


def report(program: Program, compiled: Compiled, mesh: Mesh, chosen: Slice) -> Report:
  """The account of a compiled program."""
  chip, chips = chip_of_slice(chosen), chosen.chips
  # Tokens spread evenly over experts are assumed: then so much of the room for rows is filled.
  guess = estimate(hlo.parse(compiled.text), chip, links.Network(mesh, chosen, chip),
                   1 / min(mesh.shape["expert"], EVEN_SHARES), program.loops)
  factor = (WHOLE if compiled.whole else SKETCH)[chosen.generation]
  needed, step = program.model_flops / chips, max(guess.expected * factor, guess.bound)
  return Report(
      program.what, chosen.name, chips, {a: n for a, n in program.mesh.items() if n > 1},
      compiled.whole, round(compiled.seconds, 1), memory(program, compiled, chip), needed,
      guess.flops, guess.kernel_flops, guess.hbm_bytes, program.reads, _collectives(guess),
      guess.products, guess.core, guess.compiler, guess.memory, guess.links, guess.exposed,
      guess.by_source, guess.by_part, guess.bound, guess.binds, guess.expected, factor, step,
      needed / chip.peak / guess.bound, needed / chip.peak / step,
      program.positions / chips / step, program.images / chips / step,
      program.fill and program.fill.tokens, program.fill and program.fill.batches * step / 3600,
      program.steps)


def memory(program: Program, compiled: Compiled, chip: Chip) -> Memory:
  """By the compiler's account; weights that the program does not read lie there too."""
  known = [program.arguments.get(k, 0) for k in ("params", "frozen", "optimizer")]
  arguments = compiled.arguments + max(0, sum(program.arguments.values()) - compiled.read)
  peak = arguments + compiled.temporary + compiled.code + program.beside
  return Memory(*known, arguments - sum(known), compiled.temporary, compiled.code, peak, chip.hbm,
                program.beside)


def _collectives(guess: Estimate) -> tuple[dict[str, Any], ...]:
  rows = [{"kind": kind, "axes": "+".join(axes), "over": "DCN" if over_dcn else "ICI",
           "bytes": size, "seconds": seconds} for (kind, axes, over_dcn), (size, seconds)
          in links.total(list(guess.collectives)).items()]
  return tuple(sorted(rows, key=lambda row: -row["seconds"]))


def _ms(seconds: float) -> str:
  return f"{1e3 * seconds:.1f} ms"


def _shares(seconds: dict[str, float]) -> str:
  return ", ".join(f"{k} {_ms(v)}" for k, v in sorted(seconds.items(), key=lambda kv: -kv[1]))


def _text(r: Report) -> str:
  gib, ms = lambda n: f"{n / _GIB:.2f} GiB", _ms
  m, mesh = r.memory, " x ".join(f"{a} {n}" for a, n in r.mesh.items()) or "one device"
  lines = [
      f"{r.program}: {'compiled' if r.whole else 'scheduled (a sketch)'} for {r.slice} ({r.chips} "
      f"chips, mesh {mesh}) in {r.compile_seconds:.0f} s; nothing was run",
      "",
      f"memory a chip   {gib(m.peak)} of {gib(m.available)}: "
      + (f"fits, {gib(m.available - m.peak)} left" if m.fits else
         f"DOES NOT FIT, {gib(m.peak - m.available)} too much"),
      f"                params {gib(m.params)}, frozen {gib(m.frozen)}, optimizer "
      f"{gib(m.optimizer)}, batch {gib(m.batch)}, activations and gradients {gib(m.activations)}, "
      f"code {gib(m.code)}" + f", another model beside it {gib(m.beside)}" * bool(m.beside),
      f"FLOPs a chip    {r.model_flops / 1e12:.2f} T by the mathematics, "
      f"{r.compiled_flops / 1e12:.2f} T as compiled ({r.kernel_flops / 1e12:.2f} T in Pallas "
      "kernels)",
      f"HBM traffic     {r.hbm_bytes / 1e9:.2f} GB" + (
          f", {r.hbm_bytes / r.reads:.2f} times weights and full cache" if r.reads else ""),
      "collectives     " + ("\n                ".join(
          f"{c['kind']} over {c['axes'] or 'a few chips'} ({c['over']}): "
          f"{c['bytes'] / 1e9:.2f} GB, {ms(c['seconds'])}" for c in r.collectives) or "none"),
      "",
      f"at full rates   products {ms(r.products)}, memory {ms(r.memory_time)}, links {ms(r.links)}",
      f"lower bound     {ms(r.bound)} ({r.binds} bind{'s' * (r.binds == 'memory')}): MFU at most "
      f"{r.mfu_bound:.1%}",
      f"estimates       core {ms(r.core)} ({_shares(r.by_source)}), links that it waits for "
      f"{ms(r.exposed)}",
      f"                the core by part: {_shares(r.by_part)}",
      *([f"                the compiler's cycles: {ms(r.compiler)}, on fusions only"]
        if r.compiler else []),
      f"estimated time  {ms(r.step)} (model {ms(r.expected)} x calibration {r.calibration:.2f}): "
      f"MFU {r.mfu:.1%}, "
      + (f"{ms(r.step / r.steps)} for each of {r.steps} steps, " if r.steps else "")
      + (f"{r.tokens_per_s_per_chip:,.0f} positions/s/chip, " if r.tokens_per_s_per_chip else "")
      + f"{r.images_per_s_per_chip:.2f} images/s/chip",
      *([] if r.useful is None else [
          f"rows            {r.useful:.1%} filled by the paper's mixture (text lengths are "
          f"assumed); an epoch of it: {r.hours:.1f} hours"]),
      "",
      "not counted: " + "; ".join(NOT_COUNTED),
  ]
  return "\n".join(lines)
