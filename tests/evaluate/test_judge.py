"""The judge: what is asked, what is kept, and what may fail."""
import asyncio
import json

import pytest
from stub_endpoint import KEY, Stub, completion, error

from mgjax.endpoint.client import EndpointConfig, EndpointError
from mgjax.endpoint.pacing import Clock
from mgjax.evaluate.benchmark import Answered, EvaluationError, Judging, Question
from mgjax.evaluate.judge import judged

JUDGING = Judging("official", lambda a, n: f"item {a.question.key}: {a.text} try {n}"
                  if a.text != "skip" else "", str.isdigit, (0.0, 0.5, 1.0), max_tokens=3)


@pytest.fixture
def stub(monkeypatch):
  server = Stub()
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  server.answer = lambda call: (200, completion("1"), {})
  yield server
  server.close()


@pytest.fixture
def judge(stub, tmp_path):
  async def sleep(seconds):
    judge.slept.append(seconds)
    judge.now += seconds
    await asyncio.sleep(0)

  def judge(*texts, **config):
    answered = [Answered(Question(f"q{n}", "?"), text) for n, text in enumerate(texts)]
    endpoint = EndpointConfig(**{"model": "m", "base_url": stub.url, "timeout": 10.0} | config)
    return [a.verdict for a in judged(JUDGING, answered, endpoint, tmp_path, report=str,
                                      clock=Clock(lambda: judge.now, sleep))]
  judge.slept, judge.now = [], 0.0
  return judge


def test_replies_belong_to_answers_and_are_asked_for_once(judge, stub):
  stub.answer = lambda call: (200, completion(str(len(call.body["messages"][0]["content"]))), {})
  assert judge("a", "skip", "long") == ["16", "", "19"]
  assert sorted(stub.names) == ["q0", "q2"]
  assert judge("a", "skip", "long") == ["16", "", "19"] and len(stub.calls) == 2
  # Another answer, and another judge, are other things to mark.
  assert judge("b", "skip", "long") == ["16", "", "19"] and len(stub.calls) == 3
  assert judge("b", model="other") == ["16"] and len(stub.calls) == 4
  body = stub.calls[0].body
  assert (body["max_tokens"], body["temperature"]) == (3, 0.0) and "response_format" not in body


def test_what_is_not_accepted_is_asked_again_hotter(judge, stub):
  stub.answer = lambda call: (200, completion(["zero", "", "3"][call.nth]), {})
  assert judge("a") == ["3"]
  assert [c.body["temperature"] for c in stub.calls] == [0.0, 0.5, 1.0]
  assert stub.calls[2].body["messages"][0]["content"] == "item q0: a try 2"
  stub.answer = lambda call: (200, completion("never"), {})
  assert judge("b") == ["never"] and len(stub.calls) == 6  # the last one, for the score to see


def test_rate_limits_are_waited_for(judge, stub):
  stub.answer = lambda call: ((429, error("slow down"), {"Retry-After": "30"}) if call.nth < 2
                              else (503, error("busy"), {}) if call.nth == 2
                              else (200, completion("1"), {}))
  assert judge("a") == ["1"] and len(stub.calls) == 4
  assert sum(judge.slept) >= 60


def test_a_judge_that_fails_keeps_what_it_said(judge, stub, tmp_path):
  broken = True
  stub.answer = lambda call: ((200, completion("1"), {}) if call.name == "q0" or not broken
                              else (500, error("no"), {}))
  assert judge("a") == ["1"]
  with pytest.raises(EndpointError, match="failed 2 times in a row"):
    judge("a", "b", "c", tries=2)
  kept = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
  assert [entry["key"] for entry in kept] == ["q0"]
  broken = False
  assert judge("a", "b", "c") == ["1", "1", "1"] and stub.names.count("q0") == 1


def test_refused_answers_are_told_and_the_others_kept(judge, stub):
  stub.answer = lambda call: ((400, error("filtered"), {}) if call.name == "q1"
                              else (200, completion("1"), {}))
  with pytest.raises(EvaluationError, match="refuses 1 of 3 answers, first that to question q1"):
    judge("a", "b", "c")
  stub.answer = lambda call: (200, completion("1"), {})
  assert judge("a", "b", "c") == ["1"] * 3 and sorted(stub.names) == ["q0", "q1", "q1", "q2"]
  # An endpoint that takes nothing is not asked a thousand times.
  stub.calls.clear()
  stub.answer = lambda call: (400, error("no such parameter"), {})
  with pytest.raises(EvaluationError, match="no such parameter"):
    judge(*map(str, range(100)))
  assert len(stub.calls) < 30
