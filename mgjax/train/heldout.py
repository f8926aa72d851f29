"""How well a model does, amid its training, on samples that it is not trained on.

Nothing is generated: the reference is read, and every trained token of it looked at given what is
before it.  A sample is exact if each of them is the likeliest there.  That is what 'the greedy
answer is the reference' means (up to rounding): where the first token is the likeliest the greedy
answer begins with it, so that the second is asked for behind the same text, and so on to the token
that ends the turn.  Of several turns each is answered behind the references of those before it.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from mgjax import trees
from mgjax.checkpoint import abstract_params
from mgjax.data.packing import Format
from mgjax.data.pipeline import Pipeline, make_planner
from mgjax.data.rows import Loader
from mgjax.data.samples import DataError
from mgjax.data.scan import scan
from mgjax.data.sources import open_sources
from mgjax.data.tokenizer import Tokenizer
from mgjax.train.compiled import abstract_batch
from mgjax.train.config import RunConfig
from mgjax.train.hosts import Watch
from mgjax.train.loss import judge_next_tokens
from mgjax.train.prefetch import Prefetcher, put
from mgjax.train.state import TrainState, model_builder
from mgjax.xla import compiler_options

WAY_OUT = ("All held-out samples, of config.heldout.path, have to be usable.  Repair or remove the "
           "bad ones; is config.heldout.image_root the right folder?")


def read(config: RunConfig, tokenizer: Tokenizer) -> Pipeline:
  """The held-out samples by training's rules, in one order: an epoch has each of them once.

  A batch has the rows of a micro-batch, so that measuring takes no more memory than training; the
  rows that the last one lacks are empty.  Raises DataError, naming the samples, unless all can be
  used: all pictures are decoded, since a broken one would otherwise come to light hours later.
  """
  chosen = config.heldout
  data = dataclasses.replace(
      config.data, path=chosen.path, image_root=chosen.image_root, sources=(), resolutions=(),
      batch_size=config.data.batch_size // config.accumulate, shuffle=False,
      workers=0,           # threads: processes would have to start each time
      on_error="skip")     # what fails later: see `Measure`
  samples = open_sources(data.all_sources)
  if not len(samples):
    raise DataError(f"config.heldout.path {chosen.path}: there are no samples in it")
  if chosen.samples:
    samples = dataclasses.replace(
        samples, taken=(np.arange(min(chosen.samples, len(samples))),))
  loader = Loader(data, tokenizer, samples)
  report = scan(loader, processes=config.data.workers, images="decode")
  if bad := report.problems + report.late:
    raise DataError.of(bad, len(samples), WAY_OUT)
  return Pipeline(data, loader, report, make_planner(loader, report), jax.process_index(),
                  jax.process_count())


def compile_for(data: Pipeline, config: RunConfig, abstract: TrainState, mesh: Mesh) -> Measure:
  """The measurement of what `read` gives, ready to run.  Call it inside the mesh.

  abstract: the state, whose parameters are taken as they lie there.
  """
  programs, started = {}, time.perf_counter()
  for shape in data.formats_of_epoch(0):
    graphdef, _ = abstract_params(model_builder(config, shape.hr_size), mesh)
    lowered = jax.jit(functools.partial(batch_sums, graphdef)).lower(
        abstract.params, abstract.frozen, abstract_batch(shape, mesh))
    programs[shape] = lowered.compile(compiler_options(mesh))
  logging.info("%d held-out samples (%d of them cut to max_length) in %d batches, every %d steps; "
               "compiled in %.0f s", len(data.samples), data.report.truncated,
               data.steps_per_epoch, config.heldout.every, time.perf_counter() - started)
  return Measure(data, programs, mesh)


def batch_sums(graphdef: nnx.GraphDef, params: dict, frozen: dict, batch: dict) -> jax.Array:
  """What a batch gives, float32 [4]: summed cross entropy, tokens that it sums, samples, exact
  samples.  Rows and samples that are not there count nowhere."""
  model = nnx.merge(graphdef, trees.merge(params, frozen))
  mask, segments = batch["loss_mask"], batch["segment_ids"]                     # [B, L]
  hidden, _ = model.hidden(batch)                                               # [B, L, D]
  losses, likeliest = judge_next_tokens(
      hidden, *model.decoder.head_weights(), batch["targets"], mask)            # [B, L]
  by_sample = jax.vmap(functools.partial(                                       # [B, L] -> [B, L+1]
      jax.ops.segment_sum, num_segments=segments.shape[1] + 1))
  trained, wrong = (by_sample(x.astype(jnp.int32), segments) for x in (mask, mask & ~likeliest))
  there = trained > 0
  rows = [losses, mask, there, there & (wrong == 0)]
  # One reduction over the devices: the CPU's get mixed up between hosts where nothing orders them.
  return jnp.stack([jnp.sum(x, axis=1, dtype=jnp.float32) for x in rows], axis=1).sum(axis=0)


@dataclasses.dataclass(frozen=True)
class Measure:
  """Measures a state on the held-out samples; holds nothing from one time to the next.

  programs: `batch_sums` for each format of their batches, compiled.
  """

  data: Pipeline
  programs: dict[Format, Any]
  mesh: Mesh

  def __call__(self, state: TrainState, step: int, watch: Watch,
               stop: Callable[[], bool]) -> dict[str, float] | None:
    """heldout/loss, the mean over all trained tokens of all samples (without router_loss), and
    heldout/exact_match, the share of the samples that are exact.

    None if `stop()` said, before one of the batches, that there is no time.  Nothing, with a
    warning, if a sample can no longer be read: training shall not end for that.
    """
    batches, sums = self.data.steps_per_epoch, np.zeros(4)
    load = lambda batch: put(batch, self.mesh)
    with contextlib.closing(Prefetcher(iter(self.data), load, batches)) as fetched:
      for i in range(batches):
        if stop():
          return None
        watch.at(f"held-out batch {i + 1} of {batches} after step {step}")
        batch = next(fetched)
        program = self.programs[self.data.format_of(batch.host)]
        sums += jax.device_get(program(state.params, state.frozen, batch.device))
    loss, tokens, samples, exact = sums.tolist()
    if samples != (expected := len(self.data.samples)):
      logging.warning("step %d: no held-out figures, %d of %d samples could not be read", step,
                      expected - samples, expected)
      return {}
    return {"heldout/loss": loss / tokens, "heldout/exact_match": exact / samples}
