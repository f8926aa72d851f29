"""The notebook's code, cell by cell, on a tiny HD checkpoint."""
import ast
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from small_run import make_run

from mgjax.presets import find
from mgjax.train import loop

REPO = pathlib.Path(__file__).parents[1]
NOTEBOOK = REPO / "notebooks" / "mgjax_inference.ipynb"
RUN = """
import json, sys
names = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1]))["cells"]:
  if cell["cell_type"] == "code":
    exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
"""


@pytest.fixture(scope="module")
def notebook():
  return json.loads(NOTEBOOK.read_text())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """An HD model after one step."""
  root = tmp_path_factory.mktemp("run")
  config = make_run(root, steps=1)
  preset = find("tiny-hd")
  data = dataclasses.replace(config.data, hr_size=256, tokens_per_image=80, max_length=256,
                             batch_size=1)
  loop.train(dataclasses.replace(config, model=preset.model, data=data), root / "work")
  return root / "work"


def test_it_runs_from_the_first_cell_to_the_last(checkpoint, tmp_path):
  env = os.environ | {"MGJAX_CHECKPOINT": str(checkpoint), "PYTHONPATH": str(REPO)}
  done = subprocess.run([sys.executable, "-c", RUN, str(NOTEBOOK)], cwd=tmp_path, env=env,
                        capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  out = done.stdout
  assert out.count("> ") == 2 and out.count("pictures/") == 3
  assert "128 x 128 pixels, 16 visual tokens" in out and "256 x 256 pixels, 80 visual" in out
  heat = np.asarray(Image.open(tmp_path / "pictures" / "mining.png")).astype(int)
  assert heat.shape == (256, 256, 3) and (heat.max(-1) - heat.min(-1)).max() > 50


def test_it_is_kept_without_outputs(notebook):
  assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
  ids = [cell["id"] for cell in notebook["cells"]]
  assert len(set(ids)) == len(ids)
  for cell in notebook["cells"]:
    if cell["cell_type"] == "code":
      assert cell["outputs"] == [] and cell["execution_count"] is None
      ast.parse("".join(cell["source"]))
  code = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
  assert "MGJAX_CHECKPOINT" in code[0]
