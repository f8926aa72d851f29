import pytest
from serving import serving, tiny_assistant

from mgjax.serve.warm import warm_up


@pytest.fixture(scope="session")
def assistant():
  assistant = tiny_assistant()
  warm_up(assistant)
  return assistant


@pytest.fixture(scope="session")
def served(assistant):
  with serving(assistant) as served:
    yield served


@pytest.fixture(autouse=True)
def still_answers(request):
  """Whatever a test did: the server answers afterwards, and has compiled nothing again."""
  if "served" not in request.fixturenames:
    yield
    return
  served = request.getfixturevalue("served")
  yield
  compiled = served.assistant.engine.programs.compiled
  before = dict(compiled)
  assert served.ask().usage.completion_tokens > 0
  assert compiled == before and compiled["decode"] == compiled["copy"] == 1
