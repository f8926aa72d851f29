"""One tiny SDXL for all tests here, and what diffusers makes of it."""
import pathlib
import types

import numpy as np
import pytest
from tiny_sdxl import write_folder


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
  """`source`, a diffusers folder, `folder`, the converted model, and `golden`, what diffusers gives
  (`diffusers_golden.py`)."""
  from conversion.from_hf import main
  root = tmp_path_factory.mktemp("sdxl")
  source, folder = write_folder(root / "source"), root / "converted"
  assert main(["--sdxl", str(source), "--output", str(folder)]) == 0
  golden = dict(np.load(pathlib.Path(__file__).with_name("golden.npz")))
  return types.SimpleNamespace(source=source, folder=folder, golden=golden)
