"""One tiny SDXL for all: in diffusers' folder, and converted."""
import pathlib
import types

import pytest
from tiny_sdxl import make_pipeline


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
  """`pipeline` of diffusers, `source` its folder, and `folder` the converted model."""
  pytest.importorskip("diffusers")
  from conversion.from_hf import main
  root = tmp_path_factory.mktemp("sdxl")
  pipeline = make_pipeline(root / "files")
  pipeline.set_progress_bar_config(disable=True)
  source, folder = root / "source", root / "converted"
  pipeline.save_pretrained(source)
  assert main(["--sdxl", str(source), "--output", str(folder)]) == 0
  return types.SimpleNamespace(pipeline=pipeline, source=pathlib.Path(source), folder=folder)
