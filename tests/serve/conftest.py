import pytest
from serving import serving, tiny_assistant
from windows import Window

from mgjax.serve.warm import warm_up


@pytest.fixture(scope="session")
def assistant():
  assistant = tiny_assistant()
  warm_up(assistant)
  return assistant


@pytest.fixture(scope="session")
def served(assistant):
  programs = set(assistant.engine.programs.compiled)
  with serving(assistant) as served:
    yield served
  assert set(assistant.engine.programs.compiled) == programs, "a request needed a new program"


@pytest.fixture
def window(served):
  """Of the page, for files whose server has one."""
  return Window(served)


@pytest.fixture(autouse=True)
def still_answers(request):
  """Whatever a test did: the server answers afterwards, and has compiled nothing again."""
  if "served" not in request.fixturenames:
    yield
    return
  served = request.getfixturevalue("served")
  yield
  assert served.ask().usage.completion_tokens > 0
  assert set(served.assistant.engine.programs.compiled.values()) == {1}
