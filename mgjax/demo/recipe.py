"""The demo from nothing: make the data, train the runs in order, ask the held-out questions."""
from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterable
from pathlib import Path

import jax
from absl import logging

from mgjax.checkpoint import wait_for_hosts
from mgjax.config import ConfigError, build
from mgjax.demo import ablation, report
from mgjax.demo.make import IMAGE, Sizes, make
from mgjax.demo.world import World
from mgjax.evaluate.answers import answers
from mgjax.evaluate.benchmark import Question
from mgjax.infer.assistant import load
from mgjax.train.config import RunConfig, parse_init_from, run_config
from mgjax.train.hosts import STARTING
from mgjax.train.loop import train


@dataclasses.dataclass(frozen=True)
class Row:
  """What is compared with the other rows: runs alike but for the seed."""

  label: str
  runs: tuple[str, ...]
  axis: str = ""  # what it differs in from its neighbours; for report "ablation"


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What there is to report when all runs are trained and have answered."""

  workdir: Path
  world: World
  runs: dict[str, RunConfig]      # in the order of training
  rows: tuple[Row, ...]
  records: list[dict]             # the held-out questions
  answers: dict[str, list[str]]   # by run

  def scores(self, run: str) -> dict[str, tuple[int, int]]:
    return report.scores(self.records, self.answers[run])


def run_demo(config: dict, workdir: str | Path) -> None:
  """Everything that configs/demo.py or ablation.py describes, in `workdir`; what is done already
  is not redone.

  config: `world` and `sizes` of the data, `runs` (name -> run, trained in the order of `order`;
  `init_from` names other runs), `compare` (the fields of a Row, ...) asked the held-out questions,
  `report`, one of REPORTS.  Over several hosts it trains and asks nothing.
  """
  workdir = Path(workdir).absolute()
  data, clock = workdir / "data", Clock(workdir / "seconds.json")
  world = build(World, config["world"], "config.world")
  write_report, rows = reporter(config["report"]), rows_of(config)
  runs = {name: run_of(config, name, workdir) for name in config["order"]}
  with clock.measure("data"):
    if jax.process_index() == 0:
      made = make(world, str(data), build(Sizes, config["sizes"], "config.sizes"))
      logging.info("data: %s", made)
    wait_for_hosts("the demo's data", STARTING)
  for name, run in runs.items():
    with clock.measure(name):
      if train(run, workdir / name, name=name) < (run.steps or 0):
        return  # told to stop; the same command goes on from here
  if jax.process_count() > 1 or not rows:
    logging.info("all is trained; the same command on one host, with config.compare, asks the "
                 "held-out questions")
    return
  with clock.measure("evaluation"):
    names = dict.fromkeys(run for row in rows for run in row.runs)  # rows may share runs
    records, told = ask(names, data, workdir)
  write_report(Outcome(workdir, world, runs, rows, records, told), clock)


def rows_of(config: dict) -> tuple[Row, ...]:
  """`config.compare`.  Raises ConfigError for a row whose runs are not trained."""
  rows = tuple(build(Row, row, f"config.compare[{i}]") for i, row in enumerate(config["compare"]))
  for i, row in enumerate(rows):
    if lost := [run for run in row.runs if run not in config["order"]]:
      raise ConfigError(f"config.compare[{i}] ({row.label}) compares {lost[0]!r}, which is not in "
                        f"config.order; there are: {', '.join(config['order'])}")
    if not row.runs:
      raise ConfigError(f"config.compare[{i}] ({row.label}) has no runs; name one at least")
  return rows


def run_of(config: dict, name: str, workdir: Path) -> RunConfig:
  """A run of the recipe, its paths in `workdir`.  Raises ConfigError for one that is not there."""
  if name not in config["runs"]:
    raise ConfigError(f"config.order has {name!r}, which is not in config.runs; there are: "
                      f"{', '.join(config['runs'])}")
  values, data = config["runs"][name], workdir / "data"
  return run_config(values | {
      "tokenizer": str(data / "tokenizer"),
      "data": values["data"] | {"path": str(data / values["data"]["path"]),
                                "image_root": str(data)},
      "init_from": tuple((part, str(workdir / source))
                         for part, source in parse_init_from(values["init_from"]))})


def ask(names: Iterable[str], data: Path, workdir: Path) -> tuple[list[dict], dict[str, list[str]]]:
  """The held-out records, and what each of the runs answers to them."""
  records = json.loads((data / "heldout.json").read_text())
  questions = [Question(r["id"], r["conversations"][0]["value"].removeprefix(f"{IMAGE}\n"),
                        data / r["image"], r) for r in records]
  found = {}
  for name in names:
    assistant = load(workdir / name, rows=32, devices=jax.devices()[:1])
    texts = {question.key: text for question, text in answers(assistant, questions,
                                                              max_new_tokens=12)}
    found[name] = [texts[question.key] for question in questions]
  return records, found


def report_demo(done: Outcome, clock: Clock) -> None:
  """results.json, table.md, contact_sheet.png and loss_curves.png."""
  workdir, data = done.workdir, done.workdir / "data"
  told = {row.label: done.answers[row.runs[0]] for row in done.rows}
  with clock.measure("evaluation"):
    table = report.score_table(done.records, told)
    report.contact_sheet(done.records, told, str(data), str(workdir / "contact_sheet.png"),
                         done.world)
    curves = {name: str(workdir / name / "metrics.jsonl") for name in done.runs}
    report.loss_curves(curves, str(workdir / "loss_curves.png"))
  seconds = clock.seconds | {"all": sum(clock.seconds.values())}
  (workdir / "results.json").write_text(json.dumps(
      {"scores": {row.label: done.scores(row.runs[0]) for row in done.rows},
       "seconds": seconds, "answers": told}, indent=2))
  (workdir / "table.md").write_text(table)
  print(f"\nHeld-out photographs and signs, exact match:\n\n{table}")
  print("minutes: " + ", ".join(f"{k} {v / 60:.1f}" for k, v in seconds.items()))
  print(f"pictures: {workdir / 'contact_sheet.png'}, {workdir / 'loss_curves.png'}")
  print(f"talk to it: python launch/chat.py --checkpoint {workdir / done.rows[0].runs[0]} "
        f"--image {data / done.records[0]['image']}")


def report_ablation(done: Outcome, clock: Clock) -> None:
  """ablation.md, ablation.json and ablation.png."""
  own = {run: lineage(done.runs, run) for run in done.answers}
  minutes = {run: sum(clock.seconds[name] for name in names) / 60 for run, names in own.items()}
  results = [ablation.Result(
      row.axis, row.label, done.runs[row.runs[0]].model.visual_tokens,
      tuple(map(done.scores, row.runs)), tuple(minutes[run] for run in row.runs))
      for row in done.rows]
  stages = {name for names in own.values() for name in names}
  shared = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in clock.seconds.items()
                     if name not in stages)
  text = (f"{ablation.table(results)}\nExact match, {len(done.records)} questions; minutes: stages "
          f"1 and 2 of one seed.  Minutes shared by the rows: {shared}; "
          f"{sum(clock.seconds.values()) / 60:.1f} in all.\n")
  (done.workdir / "ablation.md").write_text(text)
  (done.workdir / "ablation.json").write_text(json.dumps(
      {"rows": [row | {"runs": r.runs} for row, r in zip(map(ablation.Result.as_dict, results),
                                                         done.rows)],
       "seconds": clock.seconds, "answers": done.answers}, indent=2))
  ablation.plot(results, str(done.workdir / "ablation.png"))
  print(f"\n{text}\nplot: {done.workdir / 'ablation.png'}")


def lineage(runs: dict[str, RunConfig], name: str) -> list[str]:
  """A run and those that it goes on from as a whole: stage 2 and its stage 1, but not the towers
  and the language model that these are put together from."""
  names = [name]
  while sources := [source for part, source in runs[names[-1]].init_from if part == ""]:
    names.append(Path(sources[0]).name)
  return names


REPORTS = {"demo": report_demo, "ablation": report_ablation}


def reporter(name: str):
  """The function of `config.report`."""
  if name not in REPORTS:
    raise ConfigError(f"config.report is {name!r}; expected one of {', '.join(REPORTS)}")
  return REPORTS[name]


class Clock:
  """Seconds by name, kept in a file: a demo that was stopped and went on knows its whole time."""

  def __init__(self, path: Path):
    self._path = path
    self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

  @contextlib.contextmanager
  def measure(self, name: str):
    """Adds what the body takes."""
    started = time.perf_counter()
    yield
    self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - started
    if jax.process_index():
      return
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._path.write_text(json.dumps(self.seconds, indent=2))
