"""What every test needs: JAX on the CPU, and the original's outputs where this machine has them."""
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest  # noqa: E402

_REPO = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
  """`golden/` of the shared folder (MGJAX_SHARED, else ../shared); the test is skipped without."""
  folder = pathlib.Path(os.environ.get("MGJAX_SHARED", _REPO.parent / "shared")) / "golden"
  if not folder.is_dir():
    pytest.skip("no golden outputs here; point MGJAX_SHARED at the folder that holds golden/")
  return folder


@pytest.fixture(scope="module")
def highest_precision():
  """Exact float32 products, as the goldens were made."""
  import jax
  with jax.default_matmul_precision("highest"):
    yield
