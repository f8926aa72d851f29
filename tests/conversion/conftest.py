import pathlib

import pytest


@pytest.fixture(scope="session")
def committed_case() -> pathlib.Path:
  """The original's smallest case, without what nothing compares."""
  return pathlib.Path(__file__).with_name("cases") / "llama"
