"""The ablation's config, its table and plot from results made by hand, and a small one whole."""
import json
import statistics

import numpy as np
import pytest
from PIL import Image

from configs import ablation as config_file
from mgjax.config import ConfigError
from mgjax.demo import recipe
from mgjax.demo.ablation import Result, mean_sd, plot, table
from mgjax.train.config import run_config

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module", params=["full", "quick"])
def values(request):
  return config_file.get_config(request.param).to_dict()


def test_runs_come_in_order_and_every_row_is_trained(values):
  order, rows = values["order"], recipe.rows_of(values)
  assert sorted(order) == sorted(values["runs"])  # all of them, each once
  done = set()
  for name in order:
    run = run_config(values["runs"][name])  # builds the model's config, which checks the sizes
    assert {source for _, source in run.init_from} <= done, name
    done.add(name)
  assert {run for row in rows for run in row.runs} <= done
  assert values["report"] == "ablation" and all(row.axis for row in rows)
  assert len({(row.axis, row.label) for row in rows}) == len(rows)


def test_the_first_axis_is_repeated_with_seeds_and_all_rows_differ_in_what_they_say(values):
  rows = recipe.rows_of(values)
  models = {row: {run_config(values["runs"][run]).model for run in row.runs} for row in rows}
  assert all(len(shapes) == 1 for shapes in models.values())  # a row is one model
  for row in rows:  # its runs differ by the seed, and in nothing else
    runs = [values["runs"][run] for run in row.runs]
    assert len({run["seed"] for run in runs}) == len(runs)
    assert all(run["seed"] == run["data"]["seed"] for run in runs)
    plain = [run | {"seed": 0, "init_from": "", "data": run["data"] | {"seed": 0}} for run in runs]
    assert all(run == plain[0] for run in plain)
    for run in row.runs:  # stage 1 has the seed of its stage 2
      assert values["runs"][values["runs"][run]["init_from"]]["seed"] == values["runs"][run]["seed"]
  shape = {row.label: next(iter(models[row])) for row in rows if row.axis == "mining"}
  alone, mining = shape.values()
  assert all(len(row.runs) >= 3 for row in rows if row.axis == "mining")
  assert alone.vision_hr is None and alone.visual_tokens == mining.visual_tokens == 16
  along = lambda axis, tell: [tell(next(iter(models[r]))) for r in rows if r.axis == axis]  # noqa: E731
  assert along("size of the HR view", lambda m: m.hr_size) == [64, 96, 128]
  features = along("HR encoder", lambda m: m.vision_hr.features)
  assert features == sorted(set(features)) and len(features) == 3
  assert along("visual tokens", lambda m: (m.visual_tokens, m.lr_size, m.hr_size)) == [
      (16, 56, 64), (16, 56, 128), (80, 112, 128)]


def test_what_no_run_can_give_is_refused_before_anything_is_made(values, tmp_path, monkeypatch):
  monkeypatch.setattr(recipe, "make", None)
  short = values | {"order": values["order"][:-1]}
  with pytest.raises(ConfigError, match=f"'{values['order'][-1]}', which is not in config.order"):
    recipe.run_demo(short, tmp_path)
  with pytest.raises(ConfigError, match="config.order has 'x'.*config.runs; there are: hr_tower"):
    recipe.run_demo(values | {"order": (*values["order"], "x")}, tmp_path)
  with pytest.raises(ConfigError, match="'none'; expected one of demo, ablation"):
    recipe.run_demo(values | {"report": "none"}, tmp_path)
  with pytest.raises(ConfigError, match=r"compare\[0\] \(empty\) has no runs"):
    recipe.rows_of(values | {"compare": (("empty", (), "axis"),)})
  assert not list(tmp_path.iterdir())


def scored(reading, control):
  return {"reading": (reading, 200), "control": (control, 100), "all": (reading + control, 300)}


RESULTS = [
    Result("mining", "alone", 16, (scored(30, 70), scored(36, 72), scored(42, 80)), (4, 5, 6)),
    Result("mining", "mined", 16, (scored(180, 90), scored(184, 90), scored(194, 90)), (8, 8, 8)),
    Result("tokens", "HD", 80, (scored(190, 91),), (12.25,))]


def test_means_and_spreads_are_those_of_the_seeds():
  reading = RESULTS[0].percent("reading")
  assert reading == (15, 18, 21)
  mean, sd = mean_sd([83.1, 91.9, 94.4])
  assert mean == pytest.approx(np.mean([83.1, 91.9, 94.4]))
  assert sd == pytest.approx(np.std([83.1, 91.9, 94.4], ddof=1))
  assert mean_sd([7.0]) == (7.0, None)
  summary = RESULTS[0].as_dict()["percent"]["all"]
  by_seed = [100 / 3, 36.0, 122 / 3]
  assert summary["by_seed"] == pytest.approx(by_seed)
  assert summary["mean"] == pytest.approx(statistics.mean(by_seed))
  assert summary["sd"] == pytest.approx(statistics.stdev(by_seed))
  assert json.loads(json.dumps(RESULTS[2].as_dict()))["percent"]["reading"]["sd"] is None
  with pytest.raises(ValueError, match="row 'alone': 1 scores and 0 times"):
    Result("mining", "alone", 16, (scored(1, 1),), ())


def test_the_table_has_a_line_a_row_and_names_an_axis_once():
  assert table(RESULTS) == """\
| axis | row | tokens | seeds | reading % | control % | all % | minutes |
|---|---|---:|---:|---:|---:|---:|---:|
| **mining** | alone | 16 | 3 | 18.0 ± 3.0 | 74.0 ± 5.3 | 36.7 ± 3.7 | 5.0 |
|  | mined | 16 | 3 | 93.0 ± 3.6 | 90.0 ± 0.0 | 92.0 ± 2.4 | 8.0 |
| **tokens** | HD | 80 | 1 | 95.0 | 91.0 | 93.7 | 12.2 |
"""


def test_the_plot_shows_every_row_at_its_height(tmp_path, monkeypatch):
  from matplotlib.figure import Figure
  drawn, save = [], Figure.savefig
  monkeypatch.setattr(Figure, "savefig", lambda self, path: (drawn.append(self), save(self, path)))
  plot(RESULTS, str(tmp_path / "plot.png"))
  with Image.open(tmp_path / "plot.png") as image:
    assert image.format == "PNG" and image.width > 800
  axes = drawn[0].axes[0]
  assert [bar.get_width() for bar in axes.patches] == pytest.approx([18, 93, 95])
  names = [label.get_text() for label in axes.get_yticklabels()]
  assert names == ["alone  (16 tokens)", "mined  (16 tokens)", "HD  (80 tokens)"]
  written = {text.get_text() for text in axes.texts}
  assert written == {"mining", "tokens", "18.0 ± 3.0", "93.0 ± 3.6", "95.0"}
  # The bars of error: mean ± sd where there are seeds.
  reach = [path[:, 0].tolist() for group in axes.collections for path in group.get_segments()]
  assert pytest.approx([15, 21]) in reach and pytest.approx([90, 90]) in reach


def test_around_the_training(tmp_path, monkeypatch, capsys):
  """Runs by name, told minutes, rows that share a run: with runs that are not trained, and answers
  that are known (test_recipe.py has a recipe trained whole)."""
  values = config_file.get_config("quick").to_dict()
  values["sizes"] = dict(crops=2, text=2, scenes=2, held_out=36)
  trained, asked = [], []

  def train(run, workdir, name):
    trained.append(name)
    assert run.data.path.startswith(str(tmp_path / "data")) and str(workdir).endswith(name)
    for _, source in run.init_from:
      assert source.removeprefix(f"{tmp_path}/") in trained
    return run.steps - (name == stop_at)  # short of its steps: it was told to stop

  def ask(names, data, workdir):
    asked.extend(names)
    records = json.loads((data / "heldout.json").read_text())
    truths = [r["conversations"][1]["value"] for r in records]
    return records, {name: ["?"] * 18 * ("alone" in name) + truths[18 * ("alone" in name):]
                     for name in names}

  monkeypatch.setattr(recipe, "train", train)
  monkeypatch.setattr(recipe, "ask", ask)
  seconds = {name: 60.0 for name in values["runs"]} | {"stage1_hr64_s0": 120.0}
  (tmp_path / "seconds.json").write_text(json.dumps(seconds))  # of the time before it was stopped
  stop_at = "stage2_hr96_s0"
  recipe.run_demo(values, tmp_path)
  assert trained[-1] == stop_at and not asked and not (tmp_path / "ablation.md").exists()
  stop_at = ""
  trained.clear()
  recipe.run_demo(values, tmp_path)
  assert tuple(trained) == values["order"]
  assert len(asked) == len(set(asked)) == 11  # no run is asked twice, whatever rows show it

  text = (tmp_path / "ablation.md").read_text()
  assert "| **mining** | 56 px alone | 16 | 3 | 50.0 ± 0.0 |" in text
  assert "| 56 px, mining 128 px | 16 | 3 | 100.0 ± 0.0 | 100.0 ± 0.0 | 100.0 ± 0.0 | 2.0 |" in text
  # High definition goes on from another row's stage 1, of two minutes.
  assert "|  | HD: 112 px, mining 128 px | 80 | 1 | 100.0 | 100.0 | 100.0 | 3.0 |" in text
  shared = text.split("shared by the rows: ")[1]
  assert "language 1.0" in shared and "hr_tower_large 1.0" in shared and "stage" not in shared
  assert text in capsys.readouterr().out
  done = json.loads((tmp_path / "ablation.json").read_text())
  assert [row["label"] for row in done["rows"]] == [label for label, _, _ in config_file.ROWS]
  assert done["rows"][0]["runs"] == [f"stage2_alone_s{seed}" for seed in (0, 1, 2)]
  assert done["rows"][0]["percent"]["reading"] == {"mean": 50, "sd": 0, "by_seed": [50, 50, 50]}
  with Image.open(tmp_path / "ablation.png") as image:
    assert image.format == "PNG"
