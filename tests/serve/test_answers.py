import concurrent.futures
import contextlib
import json
import threading

import openai
import pytest
from serving import data_url, eventually, png, raw_request, serving, user

from mgjax.data.conversation import GPT, HUMAN
from mgjax.infer.sampling import Sampling

ENDLESS = {"messages": [user("Tell me all")], "temperature": 1.3, "seed": 1}
RED, BLUE = data_url(png()), data_url(png((10, 20, 240)))


def alone(assistant, question, picture=None, hd=True, **sampling):
  """What the assistant says without a server; only while the server has nothing to do."""
  images = () if picture is None else (assistant.see(assistant.pixels(picture, hd=hd)),)
  prompt = assistant.prompt([(HUMAN, "<image>\n" * len(images) + question)], images)
  chat = assistant.engine.generate_batch(
      [prompt], Sampling(stop_ids=assistant.ends, **{"max_new_tokens": 8} | sampling))
  return assistant.tokenizer.decode([i for i in chat[0] if i not in assistant.ends]).strip()


def streamed(served, *args, **options):
  """Chunks of a streamed answer, and their text."""
  chunks = list(served.ask(*args, stream=True, **options))
  return chunks, "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


@pytest.mark.parametrize("sampling", [
    {}, {"temperature": 0.9, "seed": 5}, {"temperature": 1.2, "top_p": 0.7, "seed": 2**40 + 7}])
@pytest.mark.parametrize("images", [(), (RED,), ((RED, "low"),)])
def test_streamed_or_not_it_is_what_the_assistant_says(served, sampling, images):
  whole = served.ask("What is it?", *images, **sampling)
  chunks, text = streamed(served, "What is it?", *images, **sampling)
  own = {k: v % 2**32 if k == "seed" else v for k, v in sampling.items()}
  expected = alone(served.assistant, "What is it?", png() if images else None,
                   hd=images != ((RED, "low"),), **own)
  assert whole.choices[0].message.content == text == expected != ""
  assert whole.choices[0].message.role == chunks[0].choices[0].delta.role == "assistant"
  assert whole.object == "chat.completion" and chunks[0].object == "chat.completion.chunk"
  assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason
  assert len({c.id for c in chunks}) == 1 and whole.id != chunks[0].id
  assert len(chunks) > 3 or len(text) < 4


def test_the_bytes_of_a_stream(served):
  body = {"messages": [user("Hello")], "stream": True, "max_tokens": 3, "temperature": 0}
  response = served.post(body)
  assert response.headers["content-type"].startswith("text/event-stream")
  lines = response.text.split("\n\n")
  assert lines[-2:] == ["data: [DONE]", ""] and all(x.startswith("data: ") for x in lines[:-1])
  first = json.loads(lines[0].removeprefix("data: "))
  assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_usage_counts_tokens_and_what_was_known(served):
  question = "Count me, please, one two three four five six seven eight nine ten."
  first = served.ask(question, tokens=5)
  again, _ = streamed(served, question, tokens=5, stream_options={"include_usage": True})
  assert again[-1].choices == [] and all(c.usage is None for c in again[:-1])
  usage = again[-1].usage
  prompt = served.assistant.prompt([(HUMAN, question)], ())
  assert first.usage.prompt_tokens == usage.prompt_tokens == len(prompt)
  assert first.usage.completion_tokens == usage.completion_tokens == 5
  assert usage.total_tokens == len(prompt) + 5
  assert usage.prompt_tokens_details.cached_tokens == len(prompt) - 1
  assert first.usage.prompt_tokens_details.cached_tokens < len(prompt) - 1
  assert first.choices[0].finish_reason == "length"


def test_detail_chooses_the_size(served, monkeypatch):
  ask = lambda detail: served.ask("What?", (RED, detail)).usage.prompt_tokens
  small, large = 4, 20  # visual tokens of the tiny model
  assert ask("high") - ask("low") == large - small and ask("auto") == ask(None) == ask("high")
  sides, see = [], served.assistant.see
  monkeypatch.setattr(served.assistant, "see", lambda p: sides.append(len(p)) or see(p))
  served.ask("What?", (RED, "low"), (BLUE, "high"), (RED, "auto"))
  assert sides == [28, 56, 56]


def test_a_conversation_with_pictures(served):
  messages = [user("What is it?", RED), {"role": "assistant", "content": "A <image> of red."},
              user("And this?", BLUE, (RED, "low"))]
  answer = served.openai.chat.completions.create(
      model="tiny", messages=messages, max_tokens=8, temperature=0)
  own = served.assistant
  images = [own.see(own.pixels(*p)) for p in ((png(),), (png((10, 20, 240)),), (png(), False))]
  prompt = own.prompt([(HUMAN, "<image>\nWhat is it?"), (GPT, "A  of red."),
                       (HUMAN, "<image>\n<image>\nAnd this?")], images)
  ids = own.engine.generate_batch([prompt], Sampling(max_new_tokens=8, stop_ids=own.ends))[0]
  assert answer.choices[0].message.content == own.tokenizer.decode(ids).strip()


def test_stop_strings_end_an_answer(served):
  whole = served.ask("Tell me", tokens=40).choices[0].message.content
  middle = whole[len(whole) // 2:len(whole) // 2 + 6]
  for stop in (middle, ["never in it", middle]):
    answer = served.ask("Tell me", tokens=40, stop=stop)
    chunks, text = streamed(served, "Tell me", tokens=40, stop=stop)
    assert answer.choices[0].message.content == text == whole[:whole.index(middle)].rstrip()
    assert answer.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 40
  eventually(lambda: served.metric("mgjax_rows_growing") == 0, 2)


def test_a_seed_repeats_and_none_does_not(served):
  say = lambda **o: served.ask("Tell", tokens=20, temperature=1.5, **o).choices[0].message.content
  assert say(seed=3) == say(seed=3) != say(seed=4)
  assert len({say() for _ in range(3)}) > 1


def test_a_top_p_of_0_is_the_likeliest_token_alone(served):
  asked = lambda **options: served.ask("What is it?", RED, **options).choices[0].message.content
  assert {asked(temperature=1.5, top_p=0, seed=n) for n in range(3)} == {asked()}
  assert asked(temperature=1.5, seed=0) != asked()


def test_many_clients_get_what_each_gets_alone(served):
  def ask(i):
    options = {"tokens": 6 + i % 7, "temperature": i % 3 * 0.6, "seed": i}
    images = ((), (RED,), (BLUE,), ((RED, "low"),))[i % 4]
    if i % 2:
      return streamed(served, f"Question {i % 5}", *images, **options)[1]
    return served.ask(f"Question {i % 5}", *images, **options).choices[0].message.content

  expected = [ask(i) for i in range(16)]
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    assert list(pool.map(ask, [*range(16), *range(16)])) == expected * 2
  assert len(set(expected)) > 8


def test_an_answer_without_a_limit_ends_at_the_context(served):
  answer = served.ask("Hello", max_tokens=None)
  assert answer.usage.total_tokens == 256 or answer.choices[0].finish_reason == "stop"


def test_models_health_and_metrics(served):
  assert [m.id for m in served.openai.models.list()] == ["tiny"]
  assert served.openai.models.retrieve("tiny").owned_by == "mgjax"
  with pytest.raises(openai.NotFoundError):
    served.openai.models.retrieve("gpt")
  assert served.http.get("/health").json() == {"status": "ok"}
  names = ["mgjax_generated_tokens_total", "mgjax_time_to_first_token_seconds_count",
           "mgjax_inter_token_latency_seconds_count", 'mgjax_requests_total{status="200"}',
           'mgjax_requests_total{status="400"}', "mgjax_prompt_tokens_total"]
  before = [served.metric(name) for name in names]
  tokens = served.ask(tokens=4).usage
  served.post({"messages": []})
  after = [served.metric(name) for name in names]
  assert [b - a for a, b in zip(before, after)] == [
      4, 1, 3, 1, 1, tokens.prompt_tokens]
  assert served.metric("mgjax_rows") == 3 and served.metric("mgjax_held_bytes") == 0


# Who leaves, and what fails.

@pytest.fixture
def slowly(served, monkeypatch):
  """Steps of the engine take 20 ms: the longest answer seconds."""
  step, never = served.assistant.engine.step, threading.Event()
  monkeypatch.setattr(served.assistant.engine, "step", lambda: (never.wait(0.02), step())[1])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(served, slowly, stream):
  with served.connect() as sock:
    sock.sendall(raw_request(ENDLESS | {"stream": stream}))
    eventually(lambda: served.metric("mgjax_rows_growing") == 1, 5)
    if stream:
      assert b"200 OK" in sock.recv(4096)
  assert eventually(lambda: served.metric("mgjax_rows_growing") == 0, 5) < 1


def test_a_client_that_leaves_while_it_waits_is_never_begun(served, slowly):
  with contextlib.ExitStack() as stack:
    for _ in range(3):
      stack.enter_context(served.connect()).sendall(raw_request(ENDLESS))
    eventually(lambda: served.metric("mgjax_rows_growing") == 3)
    with served.connect() as late:
      late.sendall(raw_request(ENDLESS))
      eventually(lambda: served.metric("mgjax_queue") == 1)
    assert eventually(lambda: served.metric("mgjax_queue") == 0) < 1
    assert served.metric("mgjax_rows_growing") == 3
  eventually(lambda: served.metric("mgjax_rows_growing") == 0)


@pytest.mark.parametrize("error, code", [
    (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), "no_memory"), (ValueError("a bug"), None)])
@pytest.mark.parametrize("where", ["prefill", "decode", "encode"])
def test_what_the_engine_raises_is_a_500_and_the_server_goes_on(
    served, monkeypatch, error, code, where):
  def fail(*_, **__):
    raise error

  fresh = data_url(png((1, len(where + str(error)), "pde".index(where[0]))))  # not seen before
  with monkeypatch.context() as patch:
    patch.setattr(served.assistant.engine.programs, where, fail)
    with pytest.raises(openai.InternalServerError) as caught:
      served.ask("Hello", fresh)
  assert caught.value.status_code == 500 and caught.value.code == code
  assert "a bug" not in str(caught.value) and "Traceback" not in str(caught.value)
  assert served.ask("Hello", fresh).choices[0].message.content


def test_an_error_in_the_middle_of_a_stream_is_told(served, monkeypatch):
  programs, count = served.assistant.engine.programs, iter(range(100))
  decode = programs.decode
  with monkeypatch.context() as patch:
    patch.setattr(programs, "decode",
                  lambda *a: decode(*a) if next(count) < 4 else 1 / 0)
    chunks = []
    with pytest.raises(openai.APIError, match="the model failed"):
      for chunk in served.ask("Hello", tokens=30, stream=True):
        chunks.append(chunk)
  assert len(chunks) > 1


def test_a_full_queue_refuses_and_serves_those_who_wait_in_order(assistant):
  with serving(assistant, queue=2) as served:
    engine = assistant.engine
    step, go = engine.step, threading.Event()
    engine.step = lambda: (go.wait(20), step())[1]
    begun, submit = [], engine.submit
    engine.submit = lambda prompt, *a: begun.append(prompt) or submit(prompt, *a)
    ask = lambda i: served.ask(f"Number {i}", tokens=4)
    try:
      with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = []
        for i in range(5):  # 3 rows and 2 who wait
          asked.append(pool.submit(ask, i))
          eventually(lambda n=i: served.metric("mgjax_rows_growing")
                     + served.metric("mgjax_queue") == n + 1)
        with pytest.raises(openai.RateLimitError) as caught:
          served.ask()
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "queue_full"
        go.set()
        for future in asked:
          future.result(30)
      said = [assistant.tokenizer.decode(prompt.tokens) for prompt in begun]
      assert all(f"Number {i}" in text for i, text in enumerate(said)) and len(said) == 5
    finally:
      go.set()
      engine.step, engine.submit = step, submit
    assert served.ask().choices
