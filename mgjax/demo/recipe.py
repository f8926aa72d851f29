"""The demo from nothing: make the data, train the runs in order, ask the held-out questions."""
from __future__ import annotations

import json
import time
from pathlib import Path

from absl import logging

from mgjax.config import build
from mgjax.data.sources import load_samples
from mgjax.demo import report
from mgjax.demo.make import Sizes, make
from mgjax.demo.world import World
from mgjax.evaluate.answers import answer_first_questions
from mgjax.train.config import run_config
from mgjax.train.loop import train


def run_demo(config: dict, workdir: str | Path) -> None:
  """Everything that configs/demo.py describes, in `workdir`; what is done already is not redone.

  config: `world` and `sizes` of the data, `runs` (name -> run, trained in the order of `order`;
  `init_from` names other runs), `compare` ((label, run), ...) asked the held-out questions.
  Writes results.json, table.md, contact_sheet.png and loss_curves.png.
  """
  workdir, started = Path(workdir).absolute(), time.perf_counter()
  data = workdir / "data"
  world = build(World, config["world"], "config.world")
  logging.info("data: %s", make(world, str(data), build(Sizes, config["sizes"], "config.sizes")))
  seconds = {"data": time.perf_counter() - started}
  for name in config["order"]:
    before, values = time.perf_counter(), config["runs"][name]
    values = values | {
        "tokenizer": str(data / "tokenizer"),
        "data": values["data"] | {"path": str(data / values["data"]["path"]),
                                  "image_root": str(data)},
        "init_from": tuple((part, str(workdir / source)) for part, source in values["init_from"])}
    run = run_config(values)
    if train(run, workdir / name, name=name) < (run.steps or 0):
      return  # told to stop; the same command goes on from here
    seconds[name] = time.perf_counter() - before
  compare(dict(config["compare"]), data, workdir, world, seconds, started)


def compare(models: dict[str, str], data: Path, workdir: Path, world: World,
            seconds: dict[str, float], started: float) -> None:
  """Asks each model the held-out questions; prints the table and writes the pictures."""
  before = time.perf_counter()
  records = json.loads((data / "heldout.json").read_text())
  samples, _ = load_samples(data / "heldout.json")
  answers = {label: answer_first_questions(workdir / run, samples, data, max_new_tokens=12)
             for label, run in models.items()}
  table = report.score_table(records, answers)
  report.contact_sheet(records, answers, str(data), str(workdir / "contact_sheet.png"), world)
  curves = {path.parent.name: str(path) for path in sorted(workdir.glob("*/metrics.jsonl"))}
  report.loss_curves(curves, str(workdir / "loss_curves.png"))
  seconds |= {"evaluation": time.perf_counter() - before, "all": time.perf_counter() - started}
  (workdir / "results.json").write_text(json.dumps(
      {"scores": {k: report.scores(records, v) for k, v in answers.items()},
       "seconds": seconds, "answers": answers}, indent=2))
  (workdir / "table.md").write_text(table)
  print(f"\nHeld-out photographs and signs, exact match:\n\n{table}")
  print("minutes: " + ", ".join(f"{k} {v / 60:.1f}" for k, v in seconds.items()))
  print(f"pictures: {workdir / 'contact_sheet.png'}, {workdir / 'loss_curves.png'}")
  print(f"talk to it: python launch/chat.py --checkpoint {workdir / list(models.values())[0]} "
        f"--image {data / records[0]['image']}")
