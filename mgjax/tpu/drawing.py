"""The programs that paint, lowered for the devices of a slice."""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mgjax.config import ConfigError
from mgjax.diffusion.config import SdxlConfig
from mgjax.diffusion.flops import drawing_flops
from mgjax.diffusion.painter import Painter, PaintError, Painting
from mgjax.tpu.compiler import Program, bytes_a_chip
from mgjax.tpu.report import Report
from mgjax.tpu.slices import Slice, describe


@dataclasses.dataclass(frozen=True)
class Drawing:
  """A program of `Painter.paint` for so many pictures at once, in bfloat16, the autoencoder in
  float32.  A `Job`.

  program: "encode", "sample" or "decode".
  runs: how often it runs for all pictures that are asked for.
  beside: bytes a chip of a language model that is kept meanwhile.
  """

  config: SdxlConfig
  program: str
  painting: Painting
  pictures: int
  runs: int = 1
  beside: int = 0

  def mesh(self, devices: Sequence) -> Mesh:
    """See `compiler.Job`."""
    return _painter(self.config, devices).mesh(self.program, self.painting, self.pictures)

  def lower(self, devices: Sequence) -> tuple[Program, jax.stages.Lowered]:
    """See `compiler.Job`."""
    painter, mesh = _painter(self.config, devices), self.mesh(devices)
    painting, n = self.painting, self.pictures
    height, width = painting.height or painter.side, painting.width or painter.side
    steps = painting.steps if self.program == "sample" else 0
    flops = drawing_flops(self.config, height, width, painting.steps, painting.guidance > 1)
    told = f"{self.program}, {n} picture{'s' * (n > 1)} of {width}x{height}"
    return Program(
        told + f", {steps} steps" * bool(steps), dict(mesh.shape), n * flops[self.program], 0, n,
        {"params": bytes_a_chip(painter.weights(mesh))}, loops=max(steps, 1), steps=steps,
        beside=self.beside), painter.lower(self.program, painting, n)


def drawings(config: SdxlConfig, painting: Painting, pictures: int, chosen: Slice,
             beside: int = 0) -> list[Drawing]:
  """What a slice runs to paint so many pictures.  Raises ConfigError for what cannot be painted."""
  painter = _painter(config, describe(chosen))
  try:
    painter.check(painting, pictures)
  except PaintError as error:
    raise ConfigError(str(error)) from error
  together = painter.decoded_at_once(pictures)
  make = functools.partial(Drawing, config, painting=painting, beside=beside)
  return [make("encode", pictures=pictures), make("sample", pictures=pictures),
          make("decode", pictures=together, runs=pictures // together)]


@functools.cache
def _painter(config: SdxlConfig, devices: Sequence) -> Painter:
  """Without weights or tokenizers: it cannot paint."""
  return Painter(Path(), config, (), dtype=jnp.bfloat16, vae_dtype=jnp.float32, devices=devices)


def summary(jobs: Sequence[Drawing], reports: Sequence[Report]) -> str:
  """Seconds from prompts to pictures, by program."""
  parts = [job.runs * r.step for job, r in zip(jobs, reports)]
  told = [f"{job.program} {part:.2f} s" + f" in {job.runs} runs" * (job.runs > 1)
          for job, part in zip(jobs, parts)]
  n = jobs[0].pictures
  return (f"{n} picture{'s' * (n > 1)} on {reports[0].slice}: {sum(parts):.2f} s by the estimate ("
          + ", ".join(told) + ")")
