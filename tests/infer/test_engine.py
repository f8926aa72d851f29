import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mgjax.config import ClipVitConfig, DecoderConfig, ModelConfig
from mgjax.infer.engine import Engine, Prompt
from mgjax.infer.quantize import quantize
from mgjax.infer.sampling import Sampling
from mgjax.models.mini_gemini import MiniGemini
from mgjax.sharding import make_mesh, mesh_context

pytestmark = pytest.mark.usefixtures("highest_precision")
TINY = ModelConfig(
    vision=ClipVitConfig(28, 14, 16, 2, 2, 32), vision_hr=None, hr_size=56,
    decoder=DecoderConfig(97, 32, 2, 4, 2, 8, 48))
BUCKETS = (16, 64)


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(devices=jax.devices()[:1])


def make_model(mesh, config=TINY):
  with mesh_context(mesh):
    graphdef, state = nnx.split(nnx.eval_shape(
        lambda: MiniGemini(config, dtype=jnp.float32, rngs=nnx.Rngs(0))))
  rng = np.random.RandomState(0)

  def fill(x):  # lively norms and biases, and greedy text that does not repeat one token
    scale = x.shape[-2]**-0.5 if len(x.shape) > 1 else 0.1
    return jnp.asarray(rng.randn(*x.shape) * scale + (len(x.shape) == 1), x.dtype)

  return nnx.merge(graphdef, jax.tree.map(fill, state))


@pytest.fixture(scope="module")
def model(mesh):
  return make_model(mesh)


@pytest.fixture(scope="module")
def engine(model, mesh):
  return Engine(model, mesh=mesh, max_length=200, rows=4, buckets=BUCKETS)


PIXELS = np.random.RandomState(0).randint(0, 256, (2, 56, 56, 3), np.uint8)


@pytest.fixture(scope="module")
def images(engine):
  return engine.encode_images(PIXELS)


def make_prompt(seed, length, images=(), at=2):
  """Random ids with the images' tokens in a row from `at` on."""
  count = len(images) * TINY.visual_tokens
  tokens = np.random.RandomState(seed).randint(0, 97, length)
  index = np.full(length, -1)
  index[at:at + count] = np.arange(count)
  return Prompt(tokens, index, tuple(images))


def longer(prompt, ids):
  index = np.append(prompt.visual_index, np.full(len(ids), -1))
  return Prompt(np.append(prompt.tokens, ids), index, prompt.images)


def greedy(n, stop=()):
  return Sampling(max_new_tokens=n, stop_ids=tuple(stop))


@jax.jit
def _full_logits(model, tokens, index, visual, real):
  x = model.place(tokens, index, visual)
  hidden, _ = model.decoder(x, jnp.arange(tokens.shape[1])[None], real.astype(jnp.int32))
  return model.decoder.logits(hidden)[0]


def full_logits(model, mesh, prompt):
  """Scores [N, V] of one pass over everything, without a cache."""
  n = len(prompt)
  pad = lambda x: np.pad(x, (0, 140 - n))[None]
  visual = np.zeros((1, 2 * TINY.visual_tokens, TINY.decoder.width), np.float32)
  for slot, image in enumerate(prompt.images):
    visual[0, slot * TINY.visual_tokens:(slot + 1) * TINY.visual_tokens] = image
  with mesh_context(mesh):
    real = pad(np.ones(n, bool))
    return np.asarray(_full_logits(model, pad(prompt.tokens), pad(prompt.visual_index), visual,
                                   real))[:n]


@contextlib.contextmanager
def compilations():
  """The list of programs that XLA compiles meanwhile."""
  events = []
  watch = lambda name, *_, **__: events.append(name) if "backend_compile" in name else None
  jax.monitoring.register_event_duration_secs_listener(watch)
  try:
    yield events
  finally:
    jax.monitoring.unregister_event_duration_listener(watch)


# Against a pass without a cache, on a tiny random model.

@pytest.mark.parametrize("length", [1, 15, 16, 17, 60, 126])  # 126: decoding crosses a block of 128
def test_decode_with_cache_is_the_full_forward(engine, model, mesh, images, length):
  prompt = make_prompt(length, length, images[:1] if length > 15 else ())
  programs, row = engine.programs, 2
  padded = lambda x, fill: np.pad(x, (0, 128 - length), constant_values=fill)
  step, cache = programs.prefill(
      padded(prompt.tokens, 5), padded(prompt.visual_index, -1), prompt.images, *programs.empty(),
      row=row, start=0, last=length - 1, sampling=greedy(5))
  scores, ids = [], []
  for n in range(5):
    scores.append(np.asarray(step.logits[row]))
    ids.append(int(step.token[row]))
    # Other rows are elsewhere, one of them in a later block.
    step, cache = programs.decode(step, [7, 150, length + n, 0], cache)
  want = full_logits(model, mesh, longer(prompt, ids))[length - 1:-1]
  np.testing.assert_allclose(np.stack(scores), want, atol=1e-5)
  assert ids == want.argmax(-1).tolist()
  assert list(engine.generate(prompt, greedy(5))) == ids


def run(engine, *asked):
  """Answers to (prompt, sampling) pairs that are asked at once."""
  answers = [engine.submit(*pair) for pair in asked]
  while engine.step():
    pass
  return answers


@pytest.fixture(scope="module")
def alone(model, mesh):
  return alone_with(model, mesh)


def alone_with(model, mesh):
  """What an engine of one row answers that has read nothing before."""
  one = Engine(model, mesh=mesh, max_length=200, buckets=BUCKETS)

  def answer(prompt, sampling):
    one._forget()
    return list(one.generate(prompt, sampling))
  return answer


def test_a_new_turn_reads_only_what_is_new(engine, alone, images):
  first = make_prompt(0, 30, images[:1])
  [answer] = run(engine, (first, greedy(6)))
  second = longer(first, [*answer.tokens, 7, 8, 9])
  [got] = run(engine, (second, greedy(6)))
  assert got.reused == 30 + 5  # the last token of an answer was never read
  assert got.tokens == alone(second, greedy(6))
  third = longer(second, [*got.tokens, 1])
  [last] = run(engine, (third, greedy(6)))
  assert last.tokens == alone(third, greedy(6)) and last.reused == len(second) + 5


def test_a_history_that_changed_is_read_again_from_there(model, mesh, images, alone):
  engine = Engine(model, mesh=mesh, max_length=200, buckets=BUCKETS)
  prompt = make_prompt(0, 40, images[:1])
  tokens = prompt.tokens.copy()
  tokens[25] += 1
  run(engine, (prompt, greedy(4)))
  for changed, reused in [
      (Prompt(tokens, prompt.visual_index, prompt.images), 25),   # another word
      (Prompt(tokens, prompt.visual_index, images[1:]), 2),       # another picture
      (make_prompt(0, 20, images[1:]), 19),                       # shorter; the last is always read
      (make_prompt(5, 12), 0)]:
    [answer] = run(engine, (changed, greedy(4)))
    assert answer.tokens == alone(changed, greedy(4)) and answer.reused == reused


def test_what_another_row_has_read_is_copied(engine, alone, images):
  """Many questions about one picture, one of them while another is still being answered."""
  begin = make_prompt(3, 50, images)
  asked = [longer(begin, [n, n + 1]) for n in range(6)]
  answers = run(engine, *((prompt, greedy(9)) for prompt in asked))
  assert [a.tokens for a in answers] == [alone(p, greedy(9)) for p in asked]
  assert [a.reused for a in answers[1:]] == [50] * 5


def test_an_answer_that_was_stopped_frees_its_row_at_once(model, mesh, alone):
  engine = Engine(model, mesh=mesh, max_length=200, buckets=BUCKETS)
  prompt = make_prompt(1, 20)
  stream = engine.generate(prompt, greedy(20))
  begun = [next(stream), next(stream)]
  stream.close()
  assert engine.growing == 0
  second = longer(prompt, [*begun, 4])
  [answer] = run(engine, (second, greedy(5)))
  assert answer.tokens == alone(second, greedy(5)) and answer.reused == 22
  waiting = [engine.submit(prompt, greedy(5)) for _ in range(3)]
  engine.cancel(waiting[1])  # before it was begun
  while engine.step():
    pass
  assert [a.ended for a in waiting] == ["length", "cancelled", "length"]
  assert waiting[1].tokens == [] and engine.waiting == 0


def test_an_interrupted_program_costs_only_the_cache(model, mesh, monkeypatch):
  engine = Engine(model, mesh=mesh, max_length=200, buckets=BUCKETS)
  prompt = make_prompt(1, 20)
  want = list(engine.generate(prompt, greedy(5)))
  with monkeypatch.context() as patch:
    patch.setattr(engine.programs, "decode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    answer = engine.submit(longer(prompt, [3]), greedy(5))
    with pytest.raises(KeyboardInterrupt):
      while engine.step():
        pass
  assert answer.ended == "failed"
  [again] = run(engine, (prompt, greedy(5)))
  assert again.tokens == want and again.reused == 0


def test_the_window_of_a_late_turn_stays_inside_the_cache(model, mesh, alone):
  # 100 are kept and 20 are new: a window of 64 from 100 on would end past the last of 128 slots.
  small = Engine(model, mesh=mesh, max_length=128, buckets=(64,))
  prompt = make_prompt(2, 100)
  [answer] = run(small, (prompt, greedy(1)))
  prompt = longer(prompt, [*answer.tokens, *range(19)])
  [answer] = run(small, (prompt, greedy(8)))
  assert answer.tokens == alone(prompt, greedy(8)) and answer.reused == 100


def requests(images, n, seed):
  """Prompts of all lengths, some with a beginning in common, and how to answer them."""
  rng = np.random.RandomState(seed)
  begin = make_prompt(99, 45, images[:1])
  for i in range(n):
    kind = rng.randint(3)
    prompt = (make_prompt(rng.randint(10**6), rng.randint(1, 150)) if kind == 0 else
              make_prompt(rng.randint(10**6), rng.randint(40, 150), images[:rng.randint(3)])
              if kind == 1 else longer(begin, rng.randint(0, 97, rng.randint(1, 40))))
    hot = dict(temperature=1.5, top_p=0.9, top_k=int(rng.randint(2) * 20), seed=i)
    yield prompt, Sampling(max_new_tokens=rng.randint(1, 20), stop_ids=tuple(rng.randint(0, 97, 2)),
                           **(hot if rng.randint(4) == 0 else {}))


def check_continuous_batching(engine, alone, images, n, seed=0):
  rng, answers, left = np.random.RandomState(seed), [], list(requests(images, n, seed))
  while left or engine.growing or engine.waiting:
    for _ in range(rng.poisson(0.4)):
      if left:
        answers.append(engine.submit(*left.pop()))
    if answers and rng.rand() < 0.02:
      engine.cancel(answers[rng.randint(len(answers))])
    engine.step()
  assert len(answers) == n and sum(a.ended == "cancelled" for a in answers) < n / 4
  for a in answers:
    want = alone(a.prompt, a.sampling)
    assert a.tokens == (want[:len(a.tokens)] if a.ended == "cancelled" else want)
    assert a.ended == "cancelled" or (a.ended == "stop") == (a.tokens[-1] in a.sampling.stop_ids)


def test_answers_that_grow_together_are_those_that_grow_alone(engine, alone, images):
  check_continuous_batching(engine, alone, images, 60)


@pytest.mark.slow
@pytest.mark.parametrize("decoder, name", [
    ({}, None), ({"tied_head": True, "norm_offset": 1.0, "scale_inputs": True,
                  "activation": "gelu", "kv_heads": 1}, None),
    ({"sliding_window": 40}, None), ({"experts": 4}, None), ({}, "int8"), ({"experts": 4}, "int4")])
def test_a_thousand_requests(mesh, decoder, name):
  """Not so with an int8 cache: what the batch changes in the last bit can round to another integer,
  and a near tie then falls the other way (1 of 1,000 with these experts)."""
  model = make_model(mesh, dataclasses.replace(
      TINY, decoder=dataclasses.replace(TINY.decoder, **decoder)))
  if name:
    with mesh_context(mesh):
      quantize(model, name)
  engine = Engine(model, mesh=mesh, max_length=200, rows=4, buckets=BUCKETS)
  check_continuous_batching(engine, alone_with(model, mesh), engine.encode_images(PIXELS), 1000)


def test_batch_equals_singles(engine, images, alone):
  prompts = [make_prompt(0, 5), make_prompt(1, 50, images), make_prompt(2, 130),
             make_prompt(3, 12, images[1:]), make_prompt(4, 1), make_prompt(5, 60, images[:1])]
  want = [alone(p, greedy(6)) for p in prompts]
  assert engine.generate_batch(prompts, greedy(6)) == want
  assert engine.generate_batch([], greedy(6)) == []


def test_stop_ids_end_an_answer_and_are_its_last_id(engine):
  prompts = [make_prompt(seed, 20) for seed in range(4)]
  whole = [list(engine.generate(p, greedy(12))) for p in prompts]
  stop = {whole[0][3], whole[1][0], whole[2][11]}
  cut = lambda ids: ids[:next((n + 1 for n, i in enumerate(ids) if i in stop), 12)]
  want = [cut(ids) for ids in whole]
  assert {len(w) for w in want} != {12}
  assert [list(engine.generate(p, greedy(12, stop))) for p in prompts] == want
  assert engine.generate_batch(prompts, greedy(12, stop)) == want


def test_sampling_is_decided_by_the_seed(engine, alone):
  prompt = make_prompt(0, 20)
  hot = Sampling(temperature=2.0, max_new_tokens=12, seed=5)
  once = list(engine.generate(prompt, hot))
  assert once == list(engine.generate(prompt, hot)) == alone(prompt, hot)
  assert once != list(engine.generate(prompt, dataclasses.replace(hot, seed=6)))
  assert once != list(engine.generate(prompt, greedy(12)))


def test_nothing_is_compiled_beyond_the_buckets(model, mesh):
  engine = Engine(model, mesh=mesh, max_length=100, rows=2, buckets=BUCKETS)
  pixels = np.zeros((1, 56, 56, 3), np.uint8)
  image = engine.encode_images(pixels)
  for length in (10, 40):  # buckets 16 and 64
    for given in ((), image):
      run(engine, *[(make_prompt(0, length, given), greedy(3))] * 2)
  assert sorted(engine.programs.compiled) == [
      "copy", "decode", "encode 1, 56", "prefill 16", "prefill 64", "show 16, 4", "show 64, 4"]
  with compilations() as compiled:
    image = engine.encode_images(pixels + 1)
    for length in (9, 15, 16, 17, 64, 90):
      list(engine.generate(make_prompt(1, length), greedy(length % 5 + 1)))
      hot = Sampling(temperature=0.3 + length, top_p=0.5, top_k=length, seed=length,
                     max_new_tokens=4, stop_ids=(1, 2))
      list(engine.generate(make_prompt(2, length, image), hot))
    prompt = make_prompt(3, 20, image)
    for _ in range(2):
      answer = list(engine.generate(prompt, greedy(4)))
      prompt = longer(prompt, [*answer, *range(20)])
    for n in (2, 3, 5):  # pictures in one prompt
      list(engine.generate(make_prompt(n, 60 + n, image * n), greedy(2)))
  assert not compiled
  assert set(engine.programs.compiled.values()) == {1}
  with compilations() as compiled:  # the watch itself works
    engine.encode_images(np.zeros((2, 56, 56, 3), np.uint8))
  assert compiled and engine.programs.compiled["encode 2, 56"] == 1


def test_what_does_not_fit_is_refused_before_anything_runs(engine, images):
  fits = make_prompt(0, 195)
  assert len(list(engine.generate(fits, greedy(5)))) == 5
  with pytest.raises(ValueError, match=r"195 tokens and up to 6 new ones make 201, but max_length "
                                       r"is 200;.*lower max_new_tokens to 5"):
    engine.generate(fits, greedy(6))
  with pytest.raises(ValueError, match="prompt 1: 195 tokens"):
    engine.generate_batch([make_prompt(0, 3), fits], greedy(6))
  with pytest.raises(ValueError, match="refers to 8 visual tokens, but its 1 images have 4"):
    engine.generate(dataclasses.replace(make_prompt(0, 30, images), images=images[:1]), greedy(1))


@pytest.mark.parametrize("pixels", [
    np.zeros((1, 56, 56, 3), np.float32), np.zeros((56, 56, 3), np.uint8),
    np.zeros((1, 28, 28, 3), np.uint8)])
def test_images_of_another_shape_are_refused(engine, pixels):
  with pytest.raises(ValueError, match=r"expected uint8 \[N, 56, 56, 3\]"):
    engine.encode_images(pixels)


def test_images_of_one_call_equal_singles(engine):
  pixels = np.random.RandomState(1).randint(0, 256, (3, 56, 56, 3), np.uint8)
  together = engine.encode_images(pixels)
  assert len(together) == 3
  for one, x in zip(together, pixels):
    np.testing.assert_allclose(one, engine.encode_images(x[None])[0], atol=1e-5)
  assert engine.encode_images(pixels[:0]) == ()


def test_the_model_given_stays_as_it_is(engine, model, mesh):
  assert full_logits(model, mesh, make_prompt(0, 4)).shape == (4, 97)
