"""A model's figures beside those that the paper has for it."""
from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping

from mgjax.data.journal import write_whole
from mgjax.evaluate.benchmark import Score
from mgjax.evaluate.published import COLUMNS, published

_SCORE = "score.json"


@dataclasses.dataclass(frozen=True)
class Entry:
  """A benchmark's result in the report."""

  name: str
  title: str
  questions: int
  score: Score
  settings: Mapping[str, object]


def table(headline: Mapping[str, float], model: str, preset: str) -> str:
  """Markdown: the model's figures, the published ones of `preset` below, and the difference."""
  columns = ([c for c in COLUMNS if c in headline] + [c for c in headline if c not in COLUMNS])
  lines = [_row(("model", *columns)), _row(("---", *("---:" for _ in columns))),
           _row((model, *(figure(headline[c]) for c in columns)))]
  if theirs := published(preset):
    lines.append(_row((f"{preset}, published", *(figure(theirs.get(c)) for c in columns))))
    lines.append(_row(("difference", *(
        figure(headline[c] - theirs[c], "+") if c in theirs else "-" for c in columns))))
  return "\n".join(lines) + "\n"


def report(entries: Iterable[Entry], model: str, preset: str) -> str:
  """The whole report as Markdown."""
  entries = list(entries)
  headline = {c: v for entry in entries for c, v in entry.score.headline.items()}
  parts = [f"# {model}\n\n{table(headline, model, preset)}"]
  for entry in entries:
    settings = ", ".join(f"{k} {v}" for k, v in entry.settings.items())
    parts.append(f"## {entry.title}\n\n{entry.questions:,} questions; {settings}\n")
    parts += [f"* {note}\n" for note in entry.score.notes]
    parts += [group_table(name, rows) for name, rows in entry.score.groups.items()]
  return "\n".join(parts)


def group_table(name: str, rows: Mapping[str, float]) -> str:
  """Markdown: one line a row."""
  lines = [_row((name, "")), _row(("---", "---:")),
           *(_row((k, figure(v))) for k, v in rows.items())]
  return "\n".join(lines) + "\n"


def keep(entry: Entry, folder: pathlib.Path) -> None:
  """Writes a benchmark's score.json."""
  write_whole(folder / _SCORE, json.dumps(dataclasses.asdict(entry), indent=2))


def save(output: pathlib.Path, model: str, preset: str) -> str:
  """Writes report.md and report.json of all benchmarks that `output` has a score of; returns the
  Markdown."""
  entries = [_read(path) for path in sorted(output.glob(f"*/{_SCORE}"))]
  text = report(entries, model, preset)
  write_whole(output / "report.md", text)
  write_whole(output / "report.json", json.dumps({
      "model": model, "preset": preset, "published": published(preset),
      "benchmarks": {e.name: {"questions": e.questions, "settings": dict(e.settings),
                              "headline": e.score.headline, "groups": e.score.groups,
                              "notes": e.score.notes} for e in entries}}, indent=2))
  return text


def _read(path: pathlib.Path) -> Entry:
  values = json.loads(path.read_text())
  return Entry(**values | {"score": Score(**values["score"])})


def figure(value: float | None, sign: str = "") -> str:
  """Two decimals, or one from 1,000 on, where MME's are."""
  if value is None:
    return "-"
  return f"{value:{sign}.1f}" if abs(value) >= 1000 else f"{value:{sign}.2f}"


def _row(cells) -> str:
  escaped = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
  return f"| {' | '.join(escaped)} |"
