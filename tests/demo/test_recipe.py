"""The whole demo, with a step or two of everything."""
import json
import sys

import pytest

from configs import demo
from mgjax.demo import recipe
from mgjax.infer.assistant import load
from mgjax.infer.sampling import Sampling

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("demo")
  config = demo.get_config("quick").to_dict()
  config["sizes"] = dict(crops=8, text=8, scenes=8, held_out=6)
  for run in config["runs"].values():
    run["steps"], run["data"]["batch_size"] = 1, 4
  # The twin's runs are of the same kinds.
  config["order"] = tuple(name for name in config["order"] if not name.endswith("_twin"))
  config["compare"] = config["compare"][:1]
  recipe.run_demo(config, workdir)
  written = {p: p.stat().st_mtime_ns for p in workdir.glob("*/checkpoints/*")}
  assert len(written) == len(config["order"])
  recipe.run_demo(config | {"compare": ()}, workdir)  # trains nothing again
  assert {p: p.stat().st_mtime_ns for p in workdir.glob("*/checkpoints/*")} == written
  return workdir


def test_it_leaves_a_table_pictures_and_a_model_that_answers(workdir):
  results = json.loads((workdir / "results.json").read_text())
  assert results["scores"].keys() == {"mining"}
  assert results["seconds"].keys() >= {"data", "stage1", "stage2", "evaluation", "all"}
  assert "| mining |" in (workdir / "table.md").read_text()
  assert (workdir / "contact_sheet.png").is_file() and (workdir / "loss_curves.png").is_file()


def test_answers_in_bulk_are_the_answers_of_a_chat(workdir):
  data = workdir / "data"
  records, told = recipe.ask(("stage2",), data, workdir)
  model = load(workdir / "stage2", rows=2)
  ask = [(data / r["image"], r["conversations"][0]["value"].removeprefix("<image>\n"))
         for r in records]
  assert model.chat_batch(ask, max_new_tokens=12) == told["stage2"]
  chat = model.conversation(Sampling(max_new_tokens=12))
  for (image, text), answer in zip(ask, told["stage2"], strict=True):
    chat.clear()
    chat.attach(image)
    list(chat.ask(text))
    assert chat.turns[-1][1] == answer


def test_names_are_imported_when_used():
  import subprocess
  script = ("import sys, mgjax; assert 'jax' not in sys.modules; "
            "assert all(getattr(mgjax, name) for name in mgjax.__all__)")
  subprocess.run([sys.executable, "-c", script], check=True)
