"""The whole demo, with a step or two of everything."""
import json
import sys

import jax
import pytest

from configs import demo
from mgjax.data.samples import DataError
from mgjax.data.sources import load_samples
from mgjax.demo import recipe
from mgjax.evaluate.answers import answer_first_questions
from mgjax.infer.assistant import load
from mgjax.infer.sampling import Sampling
from mgjax.sharding import make_mesh

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
  recipe.run_demo(config, workdir)
  written = {p: p.stat().st_mtime_ns for p in workdir.glob("*/checkpoints/*")}
  assert len(written) == len(config["order"])
  recipe.run_demo(config, workdir)  # trains nothing again
  assert {p: p.stat().st_mtime_ns for p in workdir.glob("*/checkpoints/*")} == written
  return workdir


def test_it_leaves_a_table_pictures_and_a_model_that_answers(workdir):
  results = json.loads((workdir / "results.json").read_text())
  assert results["scores"].keys() == {"mining", "low resolution alone"}
  assert results["seconds"].keys() >= {"data", "stage2", "stage2_twin", "evaluation", "all"}
  assert "| mining |" in (workdir / "table.md").read_text()
  assert (workdir / "contact_sheet.png").is_file() and (workdir / "loss_curves.png").is_file()


def test_answers_in_bulk_are_the_answers_of_a_chat(workdir):
  data = workdir / "data"
  samples, _ = load_samples(data / "heldout.json")
  mesh = make_mesh((1, 1, 1, 1), jax.devices()[:1])
  bulk = answer_first_questions(workdir / "stage2", samples, data, mesh, max_new_tokens=6, rows=4)
  model = load(workdir / "stage2", rows=2)
  ask = [(data / s.images[0], s.turns[0][1].removeprefix("<image>\n")) for s in samples]
  assert model.chat_batch(ask, max_new_tokens=6) == bulk
  chat = model.conversation(Sampling(max_new_tokens=6))
  for sample, answer in zip(samples, bulk, strict=True):
    chat.clear()
    chat.attach(data / sample.images[0])
    list(chat.ask(sample.turns[0][1].removeprefix("<image>\n")))
    assert chat.turns[-1][1] == answer
  gone = [s.__class__(s.index, s.id, ("none.jpg",), s.turns) for s in samples[:1]]
  with pytest.raises(DataError, match=r"#0 \(id heldout-000000\).*none.jpg"):
    answer_first_questions(workdir / "stage2", gone, data, mesh)


def test_names_are_imported_when_used():
  import subprocess
  script = ("import sys, mgjax; assert 'jax' not in sys.modules; "
            "assert all(getattr(mgjax, name) for name in mgjax.__all__)")
  subprocess.run([sys.executable, "-c", script], check=True)
