"""What every test needs: JAX on the CPU, and the original's outputs where this machine has them."""
import os
import pathlib

_REPO = pathlib.Path(__file__).resolve().parents[1]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests, and the processes that they start, compile the same small programs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_REPO / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Compiling is most of the time that the tests take; what they compile runs for an instant.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import pytest  # noqa: E402


def pytest_collection_modifyitems(items):
  """Files that take minutes come first, so that no worker ends with one of them alone."""
  long = ("test_resume", "test_check", "test_packed", "train", "conversion", "demo", "launch")
  rank = lambda item: min((n for n, name in enumerate(long) if name in item.nodeid),
                          default=len(long))
  items.sort(key=rank)


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
