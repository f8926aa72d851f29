"""Compares: this package with the original on a golden case, or two checkpoints with each other.

  python -m conversion.check --case ../shared/golden/llama
  python -m conversion.check --checkpoint A --reference B     # folders of any kind

Prints a table and exits with 0 only if everything holds.
"""
from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from conversion import mapping
from conversion.case import Case
from conversion.inspect import open_any
from conversion.tensors import FLOATS, ConversionError
from conversion.transfer import tool
from mgjax import trees
from mgjax.data.config import DataConfig
from mgjax.infer.beam import beam_search
from mgjax.infer.engine import Engine
from mgjax.infer.sampling import Sampling
from mgjax.models.convnext import concatenated_features
from mgjax.sharding import make_mesh, mesh_context
from mgjax.train import optimizer as optim
from mgjax.train.config import RunConfig
from mgjax.train.loss import token_loss
from mgjax.train.state import TrainState
from mgjax.train.step import batch_loss, make_train_step

# Limits in float32: the original's own noise on logits is 1.5e-5.
VALUES, GRADIENTS, LOSSES = 1e-4, 1e-3, 1e-4


@dataclasses.dataclass(frozen=True)
class Finding:
  """One line of the table; `relative` is to the largest absolute value expected."""

  stage: str
  what: str
  absolute: float
  relative: float
  limit: str
  holds: bool


def compare(stage: str, what: str, got, want, *, limit: float, relative: bool = False) -> Finding:
  """The largest differences of two arrays."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  if got.shape != want.shape:
    return Finding(stage, f"{what}: shape {got.shape}, expected {want.shape}", np.inf, np.inf,
                   "equal", False)
  off = np.abs(got - want).max(initial=0.0)
  scale = np.abs(want).max(initial=0.0)
  share = off / scale if scale else (0.0 if off == 0 else np.inf)
  holds = bool((share if relative else off) <= limit)  # nan does not hold
  return Finding(stage, what, float(off), float(share),
                 f"{limit:.0e} {'relative' if relative else 'absolute'}", holds)


STAGES = ("tower", "aux", "mined", "visual tokens", "logits", "loss", "gradients", "trajectory",
          "generation")


def check_case(folder: Path, stages: Iterable[str] = STAGES) -> Iterator[Finding]:
  """Everything that the case tells of the asked stages.  Raises ConversionError."""
  case = Case(folder)
  checks = {"tower": towers, "aux": towers, "mined": towers, "visual tokens": towers,
            "logits": scores, "loss": scores, "gradients": gradients, "trajectory": trajectories,
            "generation": generation}
  with (mesh_context(make_mesh(devices=jax.devices()[:1])),
        jax.default_matmul_precision("highest")):
    model = case.model()
    for check in dict.fromkeys(checks[stage] for stage in stages):
      yield from (f for f in check(case, model) if f.stage in stages)


def towers(case: Case, model) -> Iterator[Finding]:
  """Both towers, what mining gathers, and the tokens that enter the language model."""
  config, want, (tiles, hr) = case.config, case.outputs, case.views()
  count = tiles.shape[0]
  features = jax.jit(model.vision)(tiles.reshape(-1, *tiles.shape[2:]))  # [N*tiles, t, D]
  by_picture = np.asarray(features).reshape(count, -1, *features.shape[1:])
  # There all tiles of all pictures come first, then the global views.
  ours = by_picture.reshape(-1, *features.shape[1:])
  if config.global_view:
    ours = np.concatenate([by_picture[:, 1:].reshape(-1, *features.shape[1:]), by_picture[:, 0]])
  yield compare("tower", "vision_features", ours, want["vision_features"], limit=VALUES)
  if hr is not None:
    maps = jax.jit(lambda m, x: m(x))(model.vision_hr, hr)
    whole = np.moveaxis(np.asarray(jax.jit(concatenated_features)(maps)), -1, 1)
    for name, ours in (("aux_features", whole), ("aux_features_sub4", whole[:, :, 1::4, 2::4])):
      if name in want:
        yield compare("aux", name, ours[:len(want[name])], want[name], limit=VALUES)
    if "mined" in want:
      mined = jax.jit(lambda m, x, maps: m._mine(m.mining, x, maps))(model, features, maps)
      yield compare("mined", "mined", np.asarray(mined).reshape(want["mined"].shape), want["mined"],
                    limit=VALUES)
  encode = jax.jit(lambda m, t, h: m.encode_views(t, h))
  yield compare("visual tokens", "image_tokens", encode(model, tiles, hr), want["image_tokens"],
                limit=VALUES)
  if "noglobal.image_tokens" in want and config.global_view:
    model.config = dataclasses.replace(config, global_view=False)
    yield compare("visual tokens", "noglobal.image_tokens", encode(model, tiles[:, 1:], hr),
                  want["noglobal.image_tokens"], limit=VALUES)
    model.config = config


def scores(case: Case, model) -> Iterator[Finding]:
  """Logits at real positions, and the loss, of every scenario that has them."""
  run = jax.jit(lambda m, b: m(b))
  for scenario, facts in case.facts["scenarios"].items():
    want = case.outputs.get(f"{scenario}.logits")
    if want is None:
      continue
    batch = case.batch(scenario)
    got, ours = np.asarray(run(model, batch)), batch["segment_ids"] > 0
    real = case.outputs.get(f"{scenario}.new_attention_mask", np.ones(want.shape[:2])).astype(bool)
    if (real.sum(1) != ours.sum(1)).any():
      yield Finding("logits", f"{scenario}: rows of {ours.sum(1)} positions, expected "
                    f"{real.sum(1)}", np.inf, np.inf, "equal", False)
      continue
    yield compare("logits", scenario, got[ours], want[real], limit=VALUES)
    if facts.get("loss") is not None:
      total, terms = token_loss(got, batch["targets"], batch["loss_mask"])
      yield compare("loss", scenario, total / terms, facts["loss"], limit=LOSSES)


def gradients(case: Case, model) -> Iterator[Finding]:
  """Gradients of the mean loss by tensor, and the norms of all."""
  batch, (graphdef, state) = case.batch(), nnx.split(model)

  def mean_loss(params):
    total, terms = batch_loss(nnx.merge(graphdef, params), batch, None)
    return total / terms

  grads = trees.flatten(jax.jit(jax.grad(mean_loss))(trees.pure(state)))
  ours = mapping.to_tensors({k: np.asarray(v) for k, v in grads.items()}, case.rows)
  for key, want in case.outputs.items():
    head, _, rest = key.partition("right.grad")
    if head or not rest:
      continue
    kind, _, tensor = rest.partition(".")
    got = np.linalg.norm(ours[tensor], axis=1) if kind == "_rows" else ours[tensor]
    if np.abs(want).max() > 1e-6:  # a bias whose true gradient is zero holds rounding noise
      yield compare("gradients", tensor, got, want, limit=GRADIENTS, relative=True)
  norms = case.facts["scenarios"]["right"].get("grad_norm_per_param") or {}
  norms = {n: v for n, v in norms.items() if v and v > 1e-6}
  off = lambda n: np.nan_to_num(abs(np.linalg.norm(ours[n]) / norms[n] - 1), nan=np.inf)
  worst = max(norms, key=off, default=None)
  if worst:
    yield compare("gradients", f"norms of {len(norms)}, worst {worst}",
                  np.linalg.norm(ours[worst]), norms[worst], limit=GRADIENTS, relative=True)


def trajectories(case: Case, model) -> Iterator[Finding]:
  """Losses and gradient norms of training runs on one batch."""
  batch, (graphdef, state) = case.batch(), nnx.split(model)
  for name, run in (case.facts.get("trajectories") or {}).items():
    table, steps = training_table(case, run), run["steps"]
    # The norms of Mixtral's class are decayed (R4.4).
    decayed = "input_layernorm" in str(case.facts.get("decay_params_by_hf_rule"))
    left_alone = "/bias$|^(vision|vision_hr|mining)/.*norm[^/]*/scale$"
    optimizer = optim.OptimizerConfig(
        run["lr"], table, run["schedule"], run["warmup_steps"] / steps, *run["betas"], run["eps"],
        run["weight_decay"], run["clip"] or None,
        no_decay=left_alone if decayed else optim.NO_DECAY)
    data = DataConfig("", hr_size=case.config.hr_size, tokens_per_image=case.config.visual_tokens)
    config = RunConfig(case.config, data, "", optimizer, dtype="float32", frozen_dtype="float32")
    tx = optim.make_optimizer(optimizer, steps)
    params, frozen = optim.split_frozen(jax.tree.map(jnp.array, trees.pure(state)), table)
    train = TrainState(jnp.zeros((), jnp.int32), params, frozen, tx.init(params))
    step = jax.jit(make_train_step(config, graphdef, tx, steps))
    losses, norms = [], []
    for _ in range(steps + 1):  # the last entry is the loss after all updates
      train, metrics = step(train, batch)
      losses.append(metrics["loss"])
      norms.append(metrics["grad_norm"])
    yield compare("trajectory", f"{name}: losses", losses, run["losses"], limit=LOSSES)
    yield compare("trajectory", f"{name}: gradient norms", norms[:steps],
                  run["grad_norm_before_clip"], limit=GRADIENTS, relative=True)


def training_table(case: Case, run) -> tuple[optim.Row, ...]:
  """What a run trains, and at which rates (R4.2, R4.4)."""
  factors = dict(pair.split(":") for pair in (run["lr_multi"] or "").split(",") if pair)
  rate = lambda name: float(next((f for key, f in factors.items() if key in name), 1))
  rows = [optim.Row("^projector/", rate("model.mm_projector."))]
  if case.config.vision_hr is not None:
    rows.append(optim.Row("^mining/", rate("model.vlm_uni_query_projector.")))
  if isinstance(run["trainable"], list):  # stage 1
    return (*rows, optim.Row("", None))
  rows.append(optim.Row("^decoder/"))
  if case.llm.get("optimize_vision_tower"):  # the second half of CLIP
    rows.append(optim.Row("^vision/blocks/", layers=(case.config.vision.depth // 2, None)))
  if case.llm.get("optimize_vision_tower_aux"):  # the last block of each stage
    rows.append(optim.Row("^vision_hr/stages/[0-9]+/blocks/", layers=(-1, None)))
  return (*rows, optim.Row("", None))


def generation(case: Case, model) -> Iterator[Finding]:
  """Greedy answers, singly and as a batch, and the scores of the first."""
  scenarios = case.facts.get("generation") or {}
  tiles, hr = case.views()
  visual = jax.jit(lambda m, t, h: m.encode_views(t, h))(model, tiles, hr)
  mesh = make_mesh(devices=jax.devices()[:1])
  leads = [len(s["raw_sequences"][0]) - len(s["tokens"][0]) for s in scenarios.values()
           if "tokens" in s and "raw_sequences" in s]  # some versions repeat BOS
  lead = leads[0] if leads else 1
  rows = {name: [case.prompt(s, r, visual) for r in range(len(s["prompt_ids"]))]
          for name, s in scenarios.items()}
  wanted = {name: scenarios[name].get("tokens") or [
      ids[lead:] for ids in scenarios[name]["raw_sequences"]] for name in rows}
  if not rows:
    return
  longest = max(len(p) for prompts in rows.values() for p in prompts) + max(
      len(ids) for want in wanted.values() for ids in want)
  beams = {name: s["num_beams"] for name, s in scenarios.items() if s.get("num_beams")}
  engine = Engine(model, mesh=mesh, max_length=longest,
                  rows=max([*map(len, rows.values()), *beams.values()]), buckets=())
  for name, prompts in rows.items():
    stop = [i for i in (scenarios[name].get("eos_token_id"),) if i is not None]
    sampling = Sampling(max_new_tokens=max(map(len, wanted[name])), stop_ids=tuple(stop))
    if name in beams:
      found = [beam_search(engine, p, beams=beams[name], stop_ids=stop,
                           max_new_tokens=sampling.max_new_tokens) for p in prompts]
      single, scores = zip(*found)
      yield compare("generation", f"{name}: scores", np.array(scores),
                    np.array(scenarios[name]["sequences_scores"]), limit=VALUES)
    else:
      single = [list(engine.generate(p, sampling)) for p in prompts]
    together = engine.generate_batch(prompts, sampling) if len(prompts) > 1 else None
    for how, got in (("", single), (", batched", together))[:1 + (len(prompts) > 1)]:
      same = total = 0
      for ids, want in zip(got, wanted[name]):
        # Where a row ends early, its id is the last and only padding follows.
        want = want[:len(ids)] if stop and ids[-1] in stop else want
        total += max(len(want), len(ids))
        same += sum(a == b for a, b in zip(ids, want))
      yield Finding("generation", f"{name}{how}: {same} of {total} ids", float(total - same),
                    (total - same) / total, "identical", same == total)
  want = case.outputs.get("gen.image_b1.scores")
  if want is not None and "image_b1" in rows:
    yield compare("generation", "image_b1: scores", _scores(engine, rows["image_b1"][0],
                                                            len(want[0])), want[0], limit=VALUES)


def _scores(engine: Engine, prompt, steps: int) -> np.ndarray:
  """Logits of `steps` greedy steps, [steps, V]."""
  programs, n = engine.programs, len(prompt)
  step, cache = programs.prefill(
      prompt.tokens, prompt.visual_index, prompt.images, *programs.empty(), row=0, start=0,
      last=n - 1, sampling=Sampling())
  logits = [step.logits[0]]
  for i in range(steps - 1):
    step, cache = programs.decode(step, np.full(programs.rows, n + i), cache)
    logits.append(step.logits[0])
  return np.stack(logits)


def check_checkpoints(checkpoint: Path, reference: Path) -> Iterator[Finding]:
  """Two checkpoints tensor by tensor, bit by bit."""
  ours, theirs = open_any(checkpoint), open_any(reference)
  for name in sorted(set(ours.headers) | set(theirs.headers)):
    if name not in ours.headers or name not in theirs.headers:
      yield Finding("tensor", f"{name}: only in "
                    f"{checkpoint if name in ours.headers else reference}", np.inf, np.inf,
                    "identical", False)
      continue
    a, b = ours.read(name), theirs.read(name)
    if a.shape != b.shape or a.dtype != b.dtype:
      what = f"{name}: {a.dtype.name} {a.shape}, reference {b.dtype.name} {b.shape}"
      yield Finding("tensor", what, np.inf, np.inf, "identical", False)
      continue
    same = np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))
    if same or a.dtype not in FLOATS:
      off = 0.0 if same else np.inf
      yield Finding("tensor", name, off, off, "identical", same)
    else:
      yield dataclasses.replace(compare("tensor", name, a, b, limit=0), limit="identical",
                                holds=False)


def print_table(findings: Iterable[Finding], *, only_bad: bool = False,
                stages: Iterable[str] = ()) -> bool:
  """Prints findings as they come, and which of `stages` had none; whether there were any and all
  hold."""
  count, bad, untold = 0, 0, list(stages)
  worst = 0.0
  print(f"{'stage':14} {'absolute':>9} {'relative':>9}  {'limit':16} verdict  what")
  for f in findings:
    count, bad, worst = count + 1, bad + (not f.holds), max(worst, f.absolute)
    untold = [stage for stage in untold if stage != f.stage]
    if not (only_bad and f.holds):
      print(f"{f.stage:14} {f.absolute:9.1e} {f.relative:9.1e}  {f.limit:16} "
            f"{'ok' if f.holds else 'DIFFERS':8} {f.what}", flush=True)
  for stage in untold:
    print(f"{stage:14} the case has nothing to compare")
  print(f"{count} compared, {bad} differ" + (f"; largest difference {worst:.1e}" if bad else ""))
  return count > 0 and not bad


def main(argv: list[str] | None = None) -> int:
  """The program; returns its exit code."""
  parser = argparse.ArgumentParser(
      prog="python -m conversion.check", description=__doc__, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--case", type=Path, metavar="DIR", help="a golden case")
  parser.add_argument("--checkpoint", type=Path, metavar="DIR",
                      help="an mgjax run or a HuggingFace folder")
  parser.add_argument("--reference", type=Path, metavar="DIR", help="what it should equal")
  args = parser.parse_args(argv)
  if args.case is None and (args.checkpoint is None or args.reference is None):
    parser.error("give --case, or --checkpoint with --reference")
  if args.case is not None and (args.checkpoint or args.reference):
    parser.error("--case goes alone")
  with tool() as outcome:
    if args.case:
      try:
        holds = print_table(check_case(args.case), stages=STAGES)
      except KeyError as e:
        raise ConversionError(f"{args.case}: {e} is missing; it is no golden case") from e
    else:
      holds = print_table(check_checkpoints(args.checkpoint, args.reference), only_bad=True)
    outcome.code = 0 if holds else 1
  return outcome.code


if __name__ == "__main__":
  sys.exit(main())
