"""The demo from nothing: make the data, train the runs in order, ask the held-out questions."""
from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import jax
from absl import logging

from mgjax.checkpoint import wait_for_hosts
from mgjax.config import build
from mgjax.data.samples import DataError
from mgjax.data.sources import load_samples
from mgjax.demo import report
from mgjax.demo.make import Sizes, make
from mgjax.demo.world import World
from mgjax.evaluate.answers import answer_first_questions
from mgjax.sharding import make_mesh
from mgjax.train.config import parse_init_from, run_config
from mgjax.train.hosts import STARTING
from mgjax.train.loop import train


def run_demo(config: dict, workdir: str | Path) -> None:
  """Everything that configs/demo.py describes, in `workdir`; what is done already is not redone.

  config: `world` and `sizes` of the data, `runs` (name -> run, trained in the order of `order`;
  `init_from` names other runs), `compare` ((label, run), ...) asked the held-out questions.
  Writes results.json, table.md, contact_sheet.png and loss_curves.png; over several hosts it trains
  and asks nothing.
  """
  workdir = Path(workdir).absolute()
  data, clock = workdir / "data", Clock(workdir / "seconds.json")
  world = build(World, config["world"], "config.world")
  with clock.measure("data"):
    if jax.process_index() == 0:
      made = make(world, str(data), build(Sizes, config["sizes"], "config.sizes"))
      logging.info("data: %s", made)
    wait_for_hosts("the demo's data", STARTING)
  for name in config["order"]:
    values = config["runs"][name]
    values = values | {
        "tokenizer": str(data / "tokenizer"),
        "data": values["data"] | {"path": str(data / values["data"]["path"]),
                                  "image_root": str(data)},
        "init_from": tuple((part, str(workdir / source))
                           for part, source in parse_init_from(values["init_from"]))}
    run = run_config(values)
    with clock.measure(name):
      if train(run, workdir / name, name=name) < (run.steps or 0):
        return  # told to stop; the same command goes on from here
  if jax.process_count() > 1:
    logging.info("all is trained; the same command on one host asks the held-out questions")
    return
  models = dict(config["compare"])
  with clock.measure("evaluation"):
    records, answers = compare(models, data, workdir)
    table = report.score_table(records, answers)
    report.contact_sheet(records, answers, str(data), str(workdir / "contact_sheet.png"), world)
    curves = {name: str(workdir / name / "metrics.jsonl") for name in config["order"]}
    report.loss_curves(curves, str(workdir / "loss_curves.png"))
  seconds = clock.seconds | {"all": sum(clock.seconds.values())}
  (workdir / "results.json").write_text(json.dumps(
      {"scores": {k: report.scores(records, v) for k, v in answers.items()},
       "seconds": seconds, "answers": answers}, indent=2))
  (workdir / "table.md").write_text(table)
  print(f"\nHeld-out photographs and signs, exact match:\n\n{table}")
  print("minutes: " + ", ".join(f"{k} {v / 60:.1f}" for k, v in seconds.items()))
  print(f"pictures: {workdir / 'contact_sheet.png'}, {workdir / 'loss_curves.png'}")
  print(f"talk to it: python launch/chat.py --checkpoint {workdir / list(models.values())[0]} "
        f"--image {data / records[0]['image']}")


def compare(models: dict[str, str], data: Path,
            workdir: Path) -> tuple[list[dict], dict[str, list[str]]]:
  """The held-out records, and what each model (label -> run) answers to them."""
  path = data / "heldout.json"
  samples, unread = load_samples(path)
  if unread:
    raise DataError.of(unread, len(samples), f"Remove {data} and run again.")
  mesh = make_mesh((1, 1, 1, 1), jax.devices()[:1])
  return json.loads(path.read_text()), {
      label: answer_first_questions(workdir / run, samples, data, mesh, max_new_tokens=12)
      for label, run in models.items()}


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
