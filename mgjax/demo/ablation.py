"""What the ablation leaves: a table and a plot of rows that differ in one thing, over seeds."""
from __future__ import annotations

import dataclasses
import statistics

GROUPS = ("reading", "control", "all")
READ, SEEN = "#6f9bd1", "#8a5a00"  # pale bars: what lies over them must be seen


@dataclasses.dataclass(frozen=True)
class Result:
  """A row of the ablation, trained once a seed."""

  axis: str     # what this row and its neighbours differ in
  label: str
  tokens: int   # visual tokens of a picture
  scores: tuple[dict[str, tuple[int, int]], ...]  # a seed's (right, asked) by group: report.scores
  minutes: tuple[float, ...]  # what a seed's stages took

  def __post_init__(self):
    if not self.scores or len(self.scores) != len(self.minutes):
      raise ValueError(f"row {self.label!r}: {len(self.scores)} scores and {len(self.minutes)} "
                       "times, expected one of each for every seed, and a seed at least")

  def percent(self, group: str) -> tuple[float, ...]:
    """Exact match in percent, by seed."""
    return tuple(100 * hits / asked for hits, asked in (table[group] for table in self.scores))

  def as_dict(self) -> dict:
    """For ablation.json."""
    summary = {group: dict(zip(("mean", "sd"), mean_sd(self.percent(group))))
               | {"by_seed": self.percent(group)} for group in GROUPS}
    return dataclasses.asdict(self) | {"percent": summary}


def mean_sd(values) -> tuple[float, float | None]:
  """Mean and standard deviation (of a sample: n - 1); None where there is one value alone."""
  return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def with_spread(values) -> str:
  """
  >>> with_spread([94.0, 95.0, 96.0]), with_spread([94.0])
  ('95.0 ± 1.0', '94.0')
  """
  mean, sd = mean_sd(values)
  return f"{mean:.1f}" if sd is None else f"{mean:.1f} ± {sd:.1f}"


def by_axis(results: list[Result]) -> dict[str, list[Result]]:
  """The rows under each axis, both in the order given."""
  axes: dict[str, list[Result]] = {}
  for result in results:
    axes.setdefault(result.axis, []).append(result)
  return axes


def table(results: list[Result]) -> str:
  """Markdown: percent of each group and minutes, mean ± standard deviation over the seeds."""
  lines = ["| axis | row | tokens | seeds | reading % | control % | all % | minutes |",
           "|---|---|---:|---:|---:|---:|---:|---:|"]
  for axis, rows in by_axis(results).items():
    for i, row in enumerate(rows):
      cells = [f"**{axis}**" if i == 0 else "", row.label, str(row.tokens), str(len(row.scores)),
               *(with_spread(row.percent(group)) for group in GROUPS),
               f"{statistics.fmean(row.minutes):.1f}"]
      lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def plot(results: list[Result], path: str) -> None:
  """A PNG: a bar a row for reading, a diamond for the controls, with the standard deviation over
  the seeds and a dot for each seed; rows of an axis stand together."""
  from matplotlib.figure import Figure  # no pyplot: no global state and no display needed

  heights, labels, headings, at = [], [], [], 0.0
  for axis, rows in by_axis(results).items():
    headings.append((at, axis))
    for row in rows:
      at += 1
      heights.append(at)
      labels.append(f"{row.label}  ({row.tokens} tokens)")
    at += 1.4
  rows = [row for rows in by_axis(results).values() for row in rows]
  figure = Figure(figsize=(9, 1.3 + 0.34 * at), dpi=110, facecolor="white", layout="constrained")
  axes = figure.subplots()
  style = dict(fmt="none", elinewidth=1.3, capsize=3, zorder=4)
  for y, row in zip(heights, rows):
    seen, _ = mean_sd(row.percent("control"))
    mean, sd = mean_sd(row.percent("reading"))
    axes.barh(y, mean, height=0.62, color=READ, label="reading")
    axes.plot(seen, y, "D", color=SEEN, markersize=6, markeredgecolor="white", zorder=3,
              label="control")
    axes.errorbar(mean, y, xerr=sd, ecolor="black", **style)
    axes.errorbar(seen, y, xerr=mean_sd(row.percent("control"))[1], ecolor=SEEN, **style)
    if sd is not None:
      axes.plot(row.percent("reading"), [y] * len(row.scores), "o", markersize=3, color="white",
                markeredgecolor="black", markeredgewidth=0.7, zorder=5)
    axes.text(102, y, with_spread(row.percent("reading")), va="center", fontsize=9)
  axes.set_yticks(heights, labels, fontsize=9)
  for y, axis in headings:
    axes.text(0, y, axis, va="center", fontsize=10, weight="bold")
  axes.set_ylim(at - 0.8, -0.7)
  axes.set_xlim(0, 100)
  axes.set_xlabel("exact match on held-out photographs and signs, %")
  axes.grid(axis="x", alpha=0.25)
  axes.set_axisbelow(True)
  axes.spines[["top", "right", "left"]].set_visible(False)
  axes.tick_params(axis="y", length=0)
  handles, names = axes.get_legend_handles_labels()
  once = dict(zip(names, handles))
  figure.legend(once.values(), once.keys(), loc="outside upper right", ncols=2, frameon=False,
                fontsize=9)
  figure.savefig(path)
