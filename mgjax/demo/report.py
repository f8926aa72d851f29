"""What a person looks at after the demo: a table of scores and two pictures."""

import json
import os

from .world import CONTROL, READING, World


def truth(record: dict) -> str:
  """The answer of a one-question record."""
  return record["conversations"][1]["value"]


def right(record: dict, answer: str) -> bool:
  """Exact match, but for white space around and between words."""
  return answer.split() == truth(record).split()


def check(records: list[dict], answers_by_model: dict[str, list[str]]) -> None:
  """Each model must have answered each record."""
  for name, answers in answers_by_model.items():
    if len(answers) != len(records):
      raise ValueError(
        f"answers_by_model[{name!r}]: {len(answers)} answers, expected {len(records)}, one for "
        "each record in the same order"
      )


def scores(records: list[dict], answers: list[str]) -> dict[str, tuple[int, int]]:
  """(right, asked) of each kind, and of "reading", "control" and "all"."""
  groups = {"reading": READING, "control": CONTROL, "all": READING + CONTROL}
  groups |= {kind: (kind,) for kind in READING + CONTROL}
  table = {}
  for group, kinds in groups.items():
    marks = [right(r, a) for r, a in zip(records, answers) if r["kind"] in kinds]
    if marks:
      table[group] = (sum(marks), len(marks))
  return table


def score_table(records: list[dict], answers_by_model: dict[str, list[str]]) -> str:
  """Exact match by kind and overall, as Markdown; the sums over reading and controls in bold."""
  check(records, answers_by_model)
  by_model = {name: scores(records, answers) for name, answers in answers_by_model.items()}
  lines = [
    "| question | asked | " + " | ".join(by_model) + " |",
    "|---|---:|" + "---:|" * len(by_model),
  ]
  for group in (*READING, "reading", *CONTROL, "control", "all"):
    rows = [table[group] for table in by_model.values() if group in table]
    if rows:
      bold = "**" if group in ("reading", "control", "all") else ""
      cells = [f"{bold}{100 * hits / asked:.1f} %{bold}" for hits, asked in rows]
      lines.append(f"| {bold}{group}{bold} | {rows[0][1]} | " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def contact_sheet(
  records: list[dict],
  answers_by_model: dict[str, list[str]],
  image_root: str,
  path: str,
  world: World | None = None,
  limit: int = 16,
) -> None:
  """A PNG of held-out images: high- and low-resolution view, question, truth, each reading.

  Shows the first `limit` records. Right answers are green, wrong ones red.
  """
  import numpy as np
  from matplotlib.figure import Figure
  from PIL import Image

  from .render import low_resolution

  check(records, answers_by_model)
  world = world or World()
  records = records[:limit]
  columns = min(4, len(records))
  rows = -(-len(records) // columns)
  height = 2.55 + 0.19 * len(answers_by_model)
  # Figure, not pyplot: no global state and no display needed.
  figure = Figure(figsize=(4.1 * columns, height * rows), dpi=110, facecolor="white")
  for i, record in enumerate(records):
    row, column = divmod(i, columns)
    pixels = np.asarray(Image.open(os.path.join(image_root, record["image"])).convert("RGB"))
    views = (pixels, low_resolution(world, pixels) / 255)
    # Everything in inches from the tile's top left corner.
    left, top = 4.1 * column, height * (rows - row)
    for j, (view, title) in enumerate(zip(views, (f"{len(pixels)} px", f"{world.lr} px"))):
      x = left + 0.12 + 1.95 * j
      box = (x / (4.1 * columns), (top - 2.1) / (height * rows))
      axes = figure.add_axes((*box, 1.88 / (4.1 * columns), 1.88 / (height * rows)))
      axes.imshow(view, interpolation="nearest")
      axes.set_axis_off()
      axes.set_title(title, fontsize=7, color="0.45", pad=2)
    question = record["conversations"][0]["value"].split("\n")[-1]

    def line(n, text, colour="black", left=left, top=top, **style):
      at = ((left + 0.12) / (4.1 * columns), (top - 2.25 - 0.185 * n) / (height * rows))
      figure.text(*at, text, color=colour, fontsize=9, va="center", **style)

    line(0, f"{question}  {truth(record)}", weight="bold")
    for n, (name, answers) in enumerate(answers_by_model.items(), 1):
      good = right(record, answers[i])
      colour = "#0a7d2c" if good else "#c4151c"
      line(n, f"{'✓' if good else '✗'} {name}: {answers[i]}", colour)
  figure.savefig(path)


def loss_curves(metrics_jsonl_by_run: dict[str, str], path: str) -> None:
  """A PNG with one panel a run: loss over steps, each step pale and their running mean dark.

  A metrics file has one JSON object a line; lines without `step` and `loss` are passed over.
  """
  import numpy as np
  from matplotlib.figure import Figure

  runs = metrics_jsonl_by_run
  figure = Figure(figsize=(4 * len(runs), 3), dpi=110, facecolor="white", layout="constrained")
  for axes, (name, source) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items()):
    with open(source) as f:
      lines = [json.loads(line) for line in f if line.strip()]
    points = [(m["step"], m["loss"]) for m in lines if "step" in m and "loss" in m]
    if not points:
      raise ValueError(f"{source}: no line with step and loss; expected the run's metrics JSONL")
    steps, losses = np.array(points, float).T
    window = max(1, len(losses) // 25)
    mean = np.convolve(losses, np.ones(window) / window, "valid")
    axes.plot(steps, losses, color="#9db7d5", linewidth=0.8)
    axes.plot(steps[window // 2 :][: len(mean)], mean, color="#1f4e8c", linewidth=1.6)
    axes.set_title(name, fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
  figure.axes[0].set_ylabel("loss")
  figure.savefig(path)
