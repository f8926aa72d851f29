"""The generation subset: what is asked, what is kept, and every way in which it can go wrong."""
import asyncio
import dataclasses
import email.utils
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from records import talk
from stub_endpoint import KEY, PROMPT, REPLY, Stub, completion, error

from mgjax.config import ConfigError
from mgjax.data.conversation import TEMPLATES, render
from mgjax.data.drawing.inputs import read_inputs
from mgjax.data.drawing.run import PromptsConfig, make_prompts
from mgjax.data.drawing.texts import EXAMPLES, IN_CONTEXT, RECAPTION, Job, messages_for, read_reply
from mgjax.data.journal import Journal, JournalError, sole_user, write_whole
from mgjax.data.samples import DataError, check_structure
from mgjax.data.sources import load_samples
from mgjax.endpoint.client import EndpointConfig, EndpointError, retry_after
from mgjax.endpoint.pacing import Clock, Ledger, Limiter

REPO = pathlib.Path(__file__).parents[3]


@pytest.fixture
def stub(monkeypatch):
  server = Stub()
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  yield server
  server.close()


class FakeTime:
  def __init__(self):
    self.now = 1000.0
    self.clock = Clock(lambda: self.now, self.sleep)

  async def sleep(self, seconds):
    self.now += seconds
    await asyncio.sleep(0)


@pytest.fixture
def fake():
  return FakeTime()


@pytest.fixture
def make(tmp_path, stub, fake):
  """make(names, ...) asks for captions of these names; other arguments go to the configs."""
  names = {f.name for f in dataclasses.fields(EndpointConfig)}

  def run(captions=(), contexts=(), clock=fake.clock, **settings):
    for kind, records in ("captions", captions), ("contexts", contexts):
      if records:
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps([caption(r) if isinstance(r, str) else r for r in records]))
        settings[kind] = str(path)
    endpoint = {"model": "m", "base_url": stub.url, "timeout": 10.0}
    endpoint |= {k: settings.pop(k) for k in list(settings) if k in names}
    run.said = []
    config = PromptsConfig(**{"output": str(run.output), "concurrency": 1, **settings})
    return make_prompts(config, EndpointConfig(**endpoint), clock=clock,
                        report=run.said.append)
  run.output = tmp_path / "out"
  run.lines = lambda name: [json.loads(x) for x in (run.output / name).read_text().splitlines()]
  run.records = lambda: json.loads((run.output / "generation.json").read_text())
  return run


def caption(name):
  return {"id": name, "caption": f"A long description of item {name}."}


def context(name):
  return {"id": name, "conversations": talk("hello", "Hi!", f"tell me of item {name}", "Well...")}


def bad(text):
  return 200, completion(text), {}


def test_both_recipes_give_records_that_train(make, stub):
  outcome = make(["a", "b"], [context("c")], seed=7, temperature=0.25, shots=2)
  assert (outcome.made, outcome.failed, outcome.skipped, outcome.left) == (3, 0, 0, 0)
  for call in stub.calls:
    assert call.auth == f"Bearer {KEY}"
    assert (call.body["model"], call.body["seed"], call.body["temperature"]) == ("m", 7, 0.25)
    assert call.body["response_format"] == {"type": "json_object"}
    assert call.body["max_tokens"] == 600
  assert "item a" in stub.calls[0].body["messages"][1]["content"]
  assert "User: hello\n\nAssistant: Hi!" in stub.calls[2].body["messages"][1]["content"]
  answer = f"Here is your cat. <h>{PROMPT}</h>"
  assert make.records() == [
      {"id": "recaption-a", "recipe": "recaption",
       "conversations": talk("draw item a <GEN>", answer)},
      {"id": "recaption-b", "recipe": "recaption",
       "conversations": talk("draw item b <GEN>", answer)},
      {"id": "in-context-c", "recipe": "in-context", "conversations": talk(
          "hello", "Hi!", "tell me of item c", "Well...", "draw item c <GEN>", answer)}]

  samples, problems = load_samples(make.output / "generation.json")
  assert len(samples) == 3 and not problems
  for template in TEMPLATES.values():
    for sample in samples:
      if template.caption_only:
        continue
      assert check_structure(sample, template, slots=1) is None
      segments = render(template, sample.turns)
      asked, answered = segments[-2].text, segments[-1].text
      assert f" <GEN>{template.user_end}{template.assistant_start}" in asked
      assert segments[-1].trained and answered.split("</h>")[-2].split("<h>")[-1] == PROMPT


def test_captions_come_in_three_forms(tmp_path):
  lines, llava = tmp_path / "a.jsonl", tmp_path / "b.json"
  lines.write_text("".join(json.dumps(caption(n)) + "\n" for n in "xy"))
  llava.write_text(json.dumps([{"id": 5, "image": "5.jpg", "conversations": talk(
      "<image>\nDescribe.", "A caption.")}]))
  jobs, problems = read_inputs(str(lines))
  assert [(j.id, j.text) for j in jobs] == [(n, caption(n)["caption"]) for n in "xy"]
  jobs, more = read_inputs(str(llava))
  assert [(j.recipe, j.id, j.text, j.turns) for j in jobs] == [(RECAPTION, "5", "A caption.", ())]
  assert not problems + more


def test_requests_are_the_same_every_time_and_show_examples():
  jobs = [Job(recipe, "1", "f", 0, "TEXT") for recipe in (RECAPTION, IN_CONTEXT)]
  for job in jobs:
    system, user = messages_for(job, (9, 41), EXAMPLES, 5, seed=1)
    assert [system, user] == messages_for(job, (9, 41), EXAMPLES, 5, seed=1)
    assert "9 to 41 words" in system["content"] and "JSON" in system["content"]
    assert all(f'"{key}"' in system["content"] for key in ("request", "answer", "prompt"))
    assert sum(example in user["content"] for example in EXAMPLES) == 5
    assert user["content"].endswith("TEXT")
    assert user != messages_for(job, (9, 41), EXAMPLES, 5, seed=2)[1]
    assert "too short" in messages_for(job, (9, 41), EXAMPLES, 5, 1, 1, "too short")[1]["content"]
  assert messages_for(jobs[0], (9, 41), EXAMPLES, 5, 1)[0] != messages_for(
      jobs[1], (9, 41), EXAMPLES, 5, 1)[0]


def test_examples_of_the_user_are_shown(make, stub, tmp_path):
  (tmp_path / "mine.txt").write_text("my first prompt\n\n  my   second prompt \n")
  make(["a"], examples=str(tmp_path / "mine.txt"))
  asked = stub.calls[0].body["messages"][1]["content"]
  assert "- my first prompt\n" in asked and "- my second prompt\n" in asked
  assert not any(example in asked for example in EXAMPLES)
  (tmp_path / "mine.txt").write_text("a <h>prompt</h>\n")
  with pytest.raises(DataError, match="mine.txt.*<h>"):
    make(["a"], examples=str(tmp_path / "mine.txt"))


def test_examples_built_in_are_prompts_themselves():
  for example in EXAMPLES:
    assert read_reply(json.dumps(REPLY | {"prompt": example}), (8, 55)).prompt == example


@pytest.mark.parametrize("change,said", [
    (None, "not JSON"),
    ([REPLY], "list"),
    ({"request": None}, "request is a NoneType"),
    ({"extra": "x"}, "expected an object with the keys request, answer, prompt"),
    ({"answer": " \n"}, "answer is empty"),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": PROMPT + " <h>"}, "'<h>'"),
    ({"prompt": PROMPT + "</h>"}, "'</h>'"),
    ({"request": "draw <GEN>"}, "'<GEN>'"),
    ({"request": "draw < gen >"}, "'< gen >'"),
    ({"answer": "<image> is here"}, "'<image>'"),
    ({"answer": "Here.</s>"}, "'</s>'"),
    ({"answer": "Here.<|im_end|>"}, "im_end"),
    ({"request": "a\0b"}, r"'\x00'"),
    ({"answer": "\ud83d"}, r"'\ud83d'"),
    ({"prompt": "too short a prompt"}, "4 words, expected 8 to 55"),
    ({"prompt": "word " * 56}, "56 words, expected 8 to 55"),
    ({"prompt": "word, " * 40}, "80 words and marks, but SDXL reads 75 tokens"),
    ({"prompt": "wooooooooooooooooooord " * 30}, "characters"),
    ({"request": "word " * 81}, "request has 81 words"),
])
def test_unusable_replies_are_told(change, said):
  value = REPLY | change if isinstance(change, dict) else change
  with pytest.raises(ValueError) as told:
    read_reply("```json\n{}```" if change is None else json.dumps(value), (8, 55))
  assert said in str(told.value)


def test_a_reply_is_tidied():
  spaced = PROMPT.replace(", ", ",\n  ") + " "
  reply = read_reply(json.dumps({"request": " draw\nit ", "answer": "Here. ", "prompt": spaced}),
                     (8, 55))
  assert (reply.request, reply.answer, reply.prompt) == ("draw\nit", "Here.", PROMPT)


def test_unusable_replies_are_asked_again_and_then_listed(make, stub):
  texts = {"b": ["nonsense"] * 9, "c": ["nonsense"], "d": [json.dumps(REPLY)] * 9}

  def answer(call):
    if call.name == "d":
      return 200, completion(texts["d"][0], finish="length"), {}
    if call.nth < len(texts.get(call.name, ())):
      return bad(texts[call.name][call.nth])
  stub.answer = answer
  outcome = make(["a", "b", "c", "d"], retries=2, seed=10)
  assert stub.names == list("abbbccddd")
  assert [c.body["seed"] for c in stub.calls if c.name == "b"] == [10, 11, 12]
  assert (outcome.made, outcome.failed, outcome.left) == (2, 2, 0)
  assert [r["id"] for r in make.records()] == ["recaption-a", "recaption-c"]
  failed = make.lines("failed.jsonl")
  assert [(f["id"], f["index"], f["reply"][:8]) for f in failed] == [
      ("b", 1, "nonsense"), ("d", 3, '{"reques')]
  assert "not JSON" in failed[0]["reason"] and "length" in failed[1]["reason"]
  assert failed[0]["file"].endswith("captions.json")

  again = make(["a", "b", "c", "d"], retries=2, seed=10)  # nothing is missing
  assert len(stub.calls) == 9 and again == outcome
  stub.answer = lambda call: None
  assert make(["a", "b", "c", "d"], retry_failed=True).made == 4
  assert stub.names[9:] == ["b", "d"]
  assert make(["a", "b", "c", "d"]).failed == 0


@pytest.mark.parametrize("name", ["429", "500", "body", "html", "slow", "drop", "in_200"])
def test_what_passes_is_tried_again(make, stub, fake, name):
  trouble = {
      "429": lambda: (429, error("slow down"), {"Retry-After": "37"}),
      "500": lambda: (500, error("oh"), {}),
      "body": lambda: (200, '{"choices": [', {}),
      "html": lambda: (200, "<html>", {"Content-Type": "text/html"}),
      "slow": lambda: time.sleep(0.6),
      "drop": lambda: "drop",
      "in_200": lambda: (200, error("upstream"), {}),
  }[name]
  times = []

  def answer(call):
    times.append(fake.now)
    return trouble() if call.nth < 2 else None
  stub.answer = answer
  outcome = make(["a"], timeout=0.3 if name == "slow" else 10.0)
  assert outcome.made == 1 and stub.names == ["a"] * 3
  gaps = [after - before for before, after in itertools.pairwise(times)]
  if name == "429":
    assert gaps == [37, 37]
  else:
    assert 0.75 <= gaps[0] <= 1 and 1.5 <= gaps[1] <= 2
  state = json.loads((make.output / "state.json").read_text())
  billed = name not in ("429", "500")  # of what gave no usage, the most that it can have been
  assert state["calls"] == (3 if billed else 1) and state["unsure"] == (2 if billed else 0)
  assert (state["prompt_tokens"] > 100) == billed


def test_a_wait_that_the_server_asks_for_holds_for_all(make, stub):
  """The others do not run into the same refusal."""
  refused, early = threading.Event(), []

  def answer(call):
    if call.name == "a" and call.nth == 0:
      return 503, error("busy"), {"Retry-After": "0.6"}
    if call.name == "b" and call.nth == 0:  # under way already
      refused.wait(0.1)
      return None
    early.append(call.time - stub.calls[0].time < 0.5)
  stub.answer = answer
  assert make(list("abcdef"), clock=Clock(), concurrency=2).made == 6
  assert len(early) == 5 and not any(early)


def test_retry_after_is_read():
  assert retry_after({"retry-after": "1.5"}) == 1.5
  assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
  date = email.utils.formatdate(time.time() + 100, usegmt=True)
  assert 95 < retry_after({"retry-after": date}) <= 100
  assert retry_after({"retry-after": "soon"}) is None and retry_after({}) is None


@pytest.mark.parametrize("answer,tries,said", [
    ((429, error("later"), {"Retry-After": "9000"}), 1, "asks to wait 2.5 hours"),
    ((429, error("no money", code="insufficient_quota"), {}), 1, "no money"),
    ((402, error("balance"), {}), 1, "HTTP 402: balance"),
    ((404, error("no model m"), {}), 1, "no model m; is there a model 'm'"),
    ((403, error("country"), {}), 1, "HTTP 403: country"),
    ((500, error("oh"), {}), 8, "failed 8 times in a row: HTTP 500: oh"),
])
def test_what_does_not_pass_is_one_line(make, stub, answer, tries, said):
  stub.answer = lambda call: None if call.name == "a" else answer
  with pytest.raises(EndpointError) as told:
    make(list("abc"))
  assert said in str(told.value) and "\n" not in str(told.value)
  assert stub.names == ["a"] + ["b"] * tries
  stub.answer = lambda call: None
  assert make(list("abc")).made == 3 and stub.answered["a"] == 1  # what was done is kept


def test_no_server(make, stub, fake):
  stub.close()
  before = fake.now
  with pytest.raises(EndpointError, match="127.0.0.1.*cannot be reached.*--base-url"):
    make(["a"])
  assert fake.now == before  # it was not waited for


def test_requests_that_are_refused(make, stub, monkeypatch):
  monkeypatch.setattr("mgjax.data.drawing.run._REFUSALS", 5)
  refused = 400, error("maximum context length"), {}
  stub.answer = lambda call: refused if call.name in "ac" else None
  outcome = make(list("abcd"))  # some: those texts are at fault
  assert (outcome.made, outcome.failed) == (2, 2) and stub.names == list("abcd")
  assert "maximum context" in make.lines("failed.jsonl")[0]["reason"]
  stub.answer = lambda call: refused
  assert make(list("abcde")).failed == 3  # the last of them, in a later run
  make.output = make.output.with_name("more")
  stub.answer = lambda call: None if call.name == "a" else refused
  assert make(list("abcdefgh")).failed == 7  # all those others: the endpoint takes some
  stub.answer = lambda call: refused
  make.output = make.output.with_name("other")
  with pytest.raises(EndpointError, match="none of 5 requests .HTTP 400.*context.*--body"):
    make(list("abcdefghi"))
  stub.answer = lambda call: None
  assert make(list("abcdefghi")).made == 9  # the endpoint was at fault: nothing is written off


def test_fields_of_the_request_can_be_changed(make, stub):
  make(["a"], body={"max_tokens": None, "max_completion_tokens": 99, "seed": None, "top_p": 0.5})
  body = stub.calls[0].body
  assert (body["max_completion_tokens"], body["top_p"]) == (99, 0.5)
  assert not {"max_tokens", "seed"} & body.keys()


def crowded(times, key=lambda t: 1):
  """The most of `key` that 60 seconds saw."""
  return max(sum(key(u) for u in times if t <= u < t + 60) for t in times)


def test_requests_a_minute(make, stub, fake):
  stub.clock = lambda: fake.now
  make(list("abcdefgh"), requests_per_minute=3)
  times = [call.time for call in stub.calls]
  assert len(times) == 8 and crowded(times) == 3
  assert times[-1] - times[0] == pytest.approx(120, abs=1)  # and no slower than it may be


def test_tokens_a_minute(fake):
  async def send(limiter, sent, tokens, used):
    entry = await limiter.enter(tokens)
    sent.append((fake.now, used))
    entry.tokens = used

  async def main(sent, *sizes):
    limiter = Limiter(None, 1000, fake.clock)
    await asyncio.gather(*(send(limiter, sent, *size) for size in sizes))
  sent = []
  asyncio.run(main(sent, *[(400, 400)] * 7, (5000, 5000), (400, 400)))
  uses = dict.fromkeys(t for t, _ in sent)
  assert crowded(list(uses), lambda t: sum(n for u, n in sent if u == t and n < 5000)) <= 1000
  large = next(t for t, n in sent if n == 5000)  # more than the limit: alone
  assert [t for t, _ in sent if abs(t - large) < 60] == [large]
  sent.clear()
  asyncio.run(main(sent, *[(200, 50)] * 16))  # what is not used is free for others
  assert sent[-1][0] == sent[0][0]


def test_tokens_that_were_not_used_are_free_again(make, stub, fake):
  stub.clock = lambda: fake.now
  make(list("abcdef"), tokens_per_minute=5000)  # 150 each; the most it can be: above 3000
  assert len({call.time for call in stub.calls}) == 1


def test_the_budget_stops_and_a_higher_one_goes_on(make, stub):
  price = dict(price_in=1000.0, price_out=2000.0)  # 1.6 a call; the most it can be: about 4
  stub.answer = lambda call: (200, completion(json.dumps(REPLY), usage=(1000, 300)), {})
  names = list("abcdefgh")
  outcome = make(names, budget=9.0, concurrency=3, **price)
  state = json.loads((make.output / "state.json").read_text())
  assert 0 < outcome.made < 8 and outcome.left == 8 - outcome.made and "budget of 9" in outcome.why
  assert state["cost"] == pytest.approx(1.6 * outcome.made) and state["cost"] <= 9
  assert not (make.output / "generation.json").exists()
  none = make(names, budget=9.0, **price)
  assert len(stub.calls) == outcome.made and (none.made, none.left) == (outcome.made, outcome.left)
  assert make(names, budget=60.0, concurrency=3, **price).made == 8
  assert sorted(stub.names) == names
  state = json.loads((make.output / "state.json").read_text())
  assert (state["calls"], state["prompt_tokens"], state["completion_tokens"]) == (8, 8000, 2400)
  assert any("cost 12.8000" in line for line in make.said)


def test_the_budget_holds_at_the_dearest_replies(make, stub):
  """Replies as long as max_tokens allows, several at a time."""
  stub.answer = lambda call: (200, completion(json.dumps(REPLY), usage=(10, 600)), {})
  outcome = make(list("abcdefgh"), budget=4.0, concurrency=8, price_out=1000.0)
  assert json.loads((make.output / "state.json").read_text())["cost"] == pytest.approx(3.6)
  assert outcome.made == 6


def test_a_count_that_is_damaged_is_told(tmp_path):
  (tmp_path / "state.json").write_text('{"calls": "many"}')
  with pytest.raises(JournalError, match="state.json.*delete it"):
    Ledger(tmp_path / "state.json")


def test_order_and_bytes_do_not_depend_on_who_answers_first(make, stub):
  names = list("abcdefghij")
  stub.answer = lambda call: time.sleep((ord(call.name) * 7 % 5) / 100)
  make(names, concurrency=5)
  first = (make.output / "generation.json").read_bytes()
  assert [r["id"][-1] for r in make.records()] == names
  make(names, concurrency=5)
  assert (make.output / "generation.json").read_bytes() == first and len(stub.calls) == 10


def test_an_edited_input_is_asked_again(make, stub):
  make(["a", "b"])
  make([caption("a") | {"caption": "Now item z."}, "b", "c"])
  assert stub.names == ["a", "b", "z", "c"]
  assert [r["conversations"][0]["value"] for r in make.records()] == [
      "draw item z <GEN>", "draw item b <GEN>", "draw item c <GEN>"]


def test_a_half_written_line_is_no_harm(make, stub):
  make(["a", "b"])
  path = make.output / "replies.jsonl"
  whole = path.read_bytes()
  path.write_bytes(whole[:-9])
  assert make(["a", "b"]).made == 2
  assert stub.names == ["a", "b", "b"] and path.read_bytes() == whole
  path.write_bytes(b"{" + whole)
  with pytest.raises(JournalError, match="replies.jsonl: line 1 is damaged.*delete that line"):
    make(["a", "b"])
  path.write_text('{"x": 1}\n')
  with pytest.raises(JournalError, match="lacks 'recipe'.*--output"):
    make(["a", "b"])


def test_bad_inputs_stop_or_are_left_out(make, stub):
  contexts = [
      context("ok"),
      {"id": "r", "conversations": talk("question without answer")},
      {"id": "i", "image": "x.jpg", "conversations": talk("<image>\nhi", "x")},
      {"id": "t", "conversations": talk("hi <GEN>", "<h>x</h>")},
      context("ok"),
      {"id": "e", "conversations": talk("hi", " ")}]
  captions = ["a", {"id": "n"}, {"id": "z", "caption": "  "}, [],
              {"id": "two", "conversations": talk("a", "b", "c", "d")}]
  with pytest.raises(DataError) as told:
    make(captions, contexts)
  assert "9 of 11 samples" in str(told.value) and "--on-error skip" in str(told.value)
  assert "captions.json #1 (id n): format: caption is None" in str(told.value)
  assert not stub.calls
  outcome = make(captions, contexts, on_error="skip")
  assert (outcome.made, outcome.skipped) == (2, 9) and sorted(stub.names) == ["a", "ok"]
  assert [(p["index"], p["kind"]) for p in make.lines("skipped.jsonl")] == [
      (1, "format"), (2, "empty_answer"), (3, "format"), (4, "roles"),
      (1, "roles"), (2, "image_count"), (3, "control_token"), (4, "duplicate_id"),
      (5, "empty_answer")]
  with pytest.raises(DataError, match="no such data file"):
    make_prompts(PromptsConfig(str(make.output), captions="nowhere.json"), EndpointConfig("m"))


def test_settings_that_cannot_be(make, stub, monkeypatch):
  for settings, said in [({"budget": 1.0}, "price_in"), ({"words": (9, 3)}, "words"),
                         ({"base_url": "localhost:1/v1"}, "expected something like http://"),
                         ({"body": {"stream": True}}, "stream"), ({"timeout": 0.0}, "timeout"),
                         ({"on_error": "cry"}, "stop or skip"),
                         ({"concurrency": 0}, "concurrency")]:
    with pytest.raises(ConfigError, match=said):
      make(["a"], **settings)
  with pytest.raises(ConfigError, match="captions, contexts, or both"):
    make()
  monkeypatch.delenv("OPENAI_API_KEY")
  with pytest.raises(ConfigError, match="OPENAI_API_KEY.*--api-key-env"):
    make(["a"])
  monkeypatch.setitem(sys.modules, "openai", None)
  with pytest.raises(ConfigError, match=re.escape("pip install -e '.[generate]'")):
    make(["a"])


def test_two_runs_do_not_share_a_folder(make):
  with sole_user(make.output), pytest.raises(JournalError, match="another run is at work"):
    make(["a"])
  assert make(["a"]).made == 1


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  write_whole(tmp_path / "f", "old")

  def full(_):
    raise OSError(28, "No space left on device")
  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="No space left.*kept"):
    write_whole(tmp_path / "f", "new")
  assert (tmp_path / "f").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f"]


# The command itself.

@pytest.fixture
def command(tmp_path, stub):
  """command(names, *flags): the command for these captions, as for subprocess."""
  def line(names, *flags):
    (tmp_path / "captions.json").write_text(json.dumps([caption(n) for n in names]))
    return [sys.executable, "launch/prepare_data.py", "prompts", "--captions",
            str(tmp_path / "captions.json"), "--output", str(tmp_path / "out"), "--model", "m",
            "--base-url", stub.url, "--concurrency", "1", *flags]
  return line


def call(line):
  return subprocess.run(line, cwd=REPO, capture_output=True, text=True, timeout=60)


def start(line):
  return subprocess.Popen(line, cwd=REPO, stdout=subprocess.PIPE, text=True)


def wait_for(condition, process):
  while not condition():
    assert process.poll() is None, "it ended by itself"
    time.sleep(0.01)


def test_a_wrong_key_is_one_line_and_is_never_shown(command, tmp_path, monkeypatch):
  monkeypatch.setenv("OTHER_KEY", "sk-wrong-secret")
  result = call(command(["a"], "--api-key-env", "OTHER_KEY"))
  assert result.returncode == 1 and result.stderr.count("\n") == 1
  assert result.stderr.startswith("error: http://127.0.0.1") and "HTTP 401" in result.stderr
  assert "Incorrect API key provided: Bearer ***; is the key in OTHER_KEY" in result.stderr
  written = "".join(p.read_text() for p in (tmp_path / "out").iterdir())
  assert "secret" not in result.stdout + result.stderr + written


def test_a_kill_in_the_middle_asks_for_nothing_twice(command, stub, tmp_path):
  names, hold, reached = list("abcdefg"), threading.Event(), threading.Event()

  def answer(call):
    if call.name == "d" and call.nth == 0:
      reached.set()
      hold.wait(30)
      return "drop"
  stub.answer = answer
  process = start(command(names))
  assert reached.wait(30)
  process.kill()
  process.wait()
  hold.set()
  kept = (tmp_path / "out" / "replies.jsonl").read_text()
  assert kept.count("\n") == 3 and not (tmp_path / "out" / "generation.json").exists()
  again = call(command(names))
  assert again.returncode == 0, again.stderr
  assert "7 inputs: 3 made before, 4 to ask" in again.stdout
  assert stub.answered == dict.fromkeys(names, 1)
  assert (tmp_path / "out" / "replies.jsonl").read_text().startswith(kept)
  records = json.loads((tmp_path / "out" / "generation.json").read_text())
  assert [r["id"][-1] for r in records] == names
  assert json.loads((tmp_path / "out" / "state.json").read_text())["calls"] == 7


def test_a_signal_lets_requests_under_way_end(command, stub, tmp_path):
  """What they bring is kept; what would need another request is left."""
  hold, reached = threading.Event(), threading.Barrier(3)

  def answer(call):
    if call.name in "bc":
      reached.wait(30)
      hold.wait(30)
    return bad("nonsense") if call.name == "c" else None
  stub.answer = answer
  line = command(list("abcd"), "--concurrency", "2")
  process = start(line)
  reached.wait(30)
  process.send_signal(signal.SIGTERM)
  for line in process.stdout:
    if line.startswith("SIGTERM"):
      break
  hold.set()
  said = process.stdout.read()
  assert process.wait(30) == 3
  assert "stopped (SIGTERM): 2 made, 2 left; the same command goes on" in said
  assert sorted(stub.names) == ["a", "b", "c"]


def test_a_signal_does_not_wait_for_the_pacing(command, stub, tmp_path):
  line = command(list("abc"), "--requests-per-minute", "1", "--concurrency", "3")
  process = start(line)
  journal = tmp_path / "out" / "replies.jsonl"
  wait_for(lambda: journal.exists() and journal.read_text(), process)
  process.send_signal(signal.SIGTERM)
  assert process.wait(10) == 3 and "1 made, 2 left" in process.stdout.read()


def test_a_second_signal_does_not_wait(command, stub, tmp_path):
  hold = threading.Event()
  stub.answer = lambda call: hold.wait(30) and None if call.name == "b" else None
  process = start(command(list("abc")))
  wait_for(lambda: "b" in stub.names, process)
  process.send_signal(signal.SIGINT)
  for line in process.stdout:
    if line.startswith("SIGINT"):
      break
  began = time.monotonic()
  process.send_signal(signal.SIGINT)
  said = process.stdout.read()
  assert process.wait(10) == 3 and "stopped (SIGINT): 1 made, 2 left" in said
  assert time.monotonic() - began < 15  # less than a first one waits
  hold.set()
  assert json.loads((tmp_path / "out" / "state.json").read_text())["unsure"] == 1


def test_a_full_disk_is_one_line_and_loses_nothing(command, stub, tmp_path):
  """A limit on the size of files stands for the disk: a line is written in part, then no more."""
  limited = ("import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900)); "
             "os.execv(sys.argv[1], sys.argv[1:])")
  result = call([sys.executable, "-c", limited, *command(list("abcdefgh"))])
  assert result.returncode == 1 and result.stderr.count("\n") == 1
  assert "File too large; what was done before is kept" in result.stderr
  journal = tmp_path / "out" / "replies.jsonl"
  kept = [json.loads(line)["id"] for line in journal.read_text().splitlines()]
  assert 0 < len(kept) < 8 and stub.names == [*kept, stub.names[-1]]
  before = len(stub.calls)
  assert call(command(list("abcdefgh"))).returncode == 0
  assert stub.names[before:] == list("abcdefgh")[len(kept):]


def test_a_nearly_full_disk_stops_before_a_reply_is_paid_for(make, stub, monkeypatch):
  monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
  with pytest.raises(OSError, match="only 1,000 bytes are free"):
    make(["a"])
  assert not stub.calls


def test_a_journal_takes_back_what_it_could_not_write(tmp_path, monkeypatch):
  journal, write = Journal(tmp_path / "j"), os.write
  journal.append({"n": 1})

  def half(file, data):
    if len(data) < 6:
      raise OSError(28, "No space left on device")
    return write(file, data[:4])
  monkeypatch.setattr(os, "write", half)
  with pytest.raises(OSError, match="No space left on device; what was done before is kept"):
    journal.append({"n": 2})
  journal.close()
  assert (tmp_path / "j").read_text() == '{"n": 1}\n'
