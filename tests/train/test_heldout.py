"""The figures of held-out samples are those of the samples alone, and training knows nothing of
them."""
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several_devices
import test_meshes
from small_run import close, make_run, same, saved

from mgjax import trees
from mgjax.checkpoint import Checkpointer, load_model, load_params
from mgjax.config import ConfigError
from mgjax.data.pipeline import make_pipeline
from mgjax.data.samples import DataError
from mgjax.data.tokenizer import load_tokenizer
from mgjax.infer.engine import Engine, Prompt
from mgjax.infer.sampling import Sampling
from mgjax.sharding import make_mesh, mesh_context
from mgjax.train import heldout, metrics
from mgjax.train.compiled import mesh_of
from mgjax.train.config import HeldoutConfig, MeshConfig
from mgjax.train.hosts import Watch
from mgjax.train.loop import train
from mgjax.train.loss import judge_next_tokens, token_loss
from mgjax.train.optimizer import make_optimizer
from mgjax.train.state import TrainState, abstract_state

STEPS = 20
PACKED = dict(batching="packed", row_length=160, images_per_row=3, batch_size=4)


def looked(root, *, steps=STEPS, every=16):
  """The small run, measured on what it is trained on, with some answers changed."""
  config = make_run(root, steps=steps)
  file = pathlib.Path(root) / "heldout.json"
  if not file.exists():
    records = json.loads(pathlib.Path(config.data.path).read_text())
    for i in (1, 6, 7):  # wrong at the last word, or the first
      records[i]["conversations"][1]["value"] = f"It is {i}!" if i > 1 else f"That is {i}."
    for i in (0, 4):  # two turns
      records.append(dict(records[i], id=f"t{i}", conversations=[
          *records[i]["conversations"], {"from": "human", "value": "What is 8?"},
          {"from": "gpt", "value": "It is 8."}]))
    file.write_text(json.dumps(records))
  optimizer = dataclasses.replace(config.optimizer, learning_rate=4e-3)
  return dataclasses.replace(config, optimizer=optimizer,
                             heldout=HeldoutConfig(str(file), str(root), every))


def changed(config, part, **changes):
  return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part),
                                                                  **changes)})


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def measurement(config, run, devices=1):
  """A measurement, and the parameters of a run."""
  mesh = mesh_of(config, jax.devices()[:devices])
  with mesh_context(mesh):
    abstract = abstract_state(config, make_optimizer(config.optimizer, 1), mesh)[1]
    data = heldout.read(config, load_tokenizer(config.tokenizer))
    measure = heldout.compile_for(data, config, abstract, mesh)
    params, frozen = (trees.unflatten(load_params(run, trees.flatten(tree)))
                      for tree in (abstract.params, abstract.frozen))
  return measure, TrainState(0, params, frozen, None)


def figures(measure, state):
  return measure(state, 1, Watch(1.0), lambda: False)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Folder of a run, "run", that nearly learns its samples, and never saw held-out ones."""
  root = tmp_path_factory.mktemp("heldout")
  train(dataclasses.replace(looked(root), heldout=HeldoutConfig()), root / "run")
  return root


@pytest.fixture(scope="module")
def alone(root):
  """Of each sample, by the model in plain form: summed loss, terms, whether it is exact; and
  whether greedy decoding by the engine gives it."""
  config = looked(root)
  config = changed(config, "data", path=config.heldout.path, batch_size=1, shuffle=False)
  mesh = make_mesh(devices=jax.devices()[:1])
  with mesh_context(mesh):
    model = load_model(root / "run", mesh, dtype=jnp.float32).model
    score = jax.jit(lambda batch: model(batch))
    engine = Engine(model, mesh=mesh, max_length=80, buckets=(64,))
    pipeline = make_pipeline(config.data, load_tokenizer(config.tokenizer))
    batches, found = iter(pipeline), []
    for _ in range(len(pipeline.samples)):
      batch = next(batches)
      logits = score({k: jnp.asarray(v) for k, v in batch.items() if k != "sample_index"})
      total, terms = token_loss(logits, batch["targets"], batch["loss_mask"])
      tokens, targets, mask = (batch[k][0] for k in ("tokens", "targets", "loss_mask"))
      visual = batch["visual_index"][0]
      images = engine.encode_images(batch["images"][0]) if (visual >= 0).any() else ()
      greedy = True
      for begin in np.flatnonzero(mask & ~np.append(False, mask[:-1])):  # each answer
        n = int((~mask[begin:]).argmax())
        answer = engine.generate(Prompt(tokens[:begin + 1], visual[:begin + 1], images),
                                 Sampling(max_new_tokens=n))
        greedy &= list(answer) == targets[begin:begin + n].tolist()
      exact = bool((np.asarray(logits.argmax(-1))[0] == targets)[mask].all())
      found.append((float(total), int(terms), exact, greedy))
  return [np.array(x) for x in zip(*found)]


def test_packed_figures_are_those_of_each_sample_alone(root, alone, caplog):
  config = dataclasses.replace(changed(looked(root), "data", **PACKED), accumulate=2)
  measure, state = measurement(config, root / "run")
  assert [shape.rows for shape in measure.programs] == [2]  # of a micro-batch
  total, terms, _, greedy = alone
  assert 3 <= greedy.sum() <= 11
  got = figures(measure, state)
  assert got["heldout/loss"] == pytest.approx(total.sum() / terms.sum(), rel=1e-5)
  assert got["heldout/exact_match"] == greedy.sum() / 14
  # A picture that is lost meanwhile ends nothing, and what comes after is as it was.
  (root / "3.png").rename(root / "lost")
  with caplog.at_level("WARNING", logger="absl"):
    assert figures(measure, state) == {}
  assert "step 1: no held-out figures, 1 of 14 samples could not be read" in caplog.text
  (root / "lost").rename(root / "3.png")
  assert figures(measure, state) == got


def test_batches_of_several_formats_and_few_samples(root, alone):
  """Also fewer samples than a batch has rows."""
  config = changed(looked(root), "data", batching="grouped", buckets=(28,), batch_size=4)
  measure, state = measurement(config, root / "run")
  assert len(measure.programs) == 2
  total, terms, _, greedy = alone
  for count in (0, 9, 1):
    few = changed(config, "heldout", samples=count)
    data = heldout.read(few, load_tokenizer(config.tokenizer))
    got = figures(dataclasses.replace(measure, data=data), state)
    first = slice(count or None)
    assert got["heldout/loss"] == pytest.approx(total[first].sum() / terms[first].sum(), rel=1e-5)
    assert got["heldout/exact_match"] == greedy[first].mean()


def test_exact_is_what_greedy_decoding_gives(alone):
  np.testing.assert_array_equal(alone[2], alone[3])


def judge(axes, chunk_bytes):
  """Scores that are small whole numbers: most tokens have equals."""
  rng = np.random.default_rng(0)
  hidden = rng.integers(-1, 2, (8, 13, 16)).astype(np.float32)
  weights = rng.integers(-1, 2, (16, 40)).astype(np.float32)
  scores = hidden @ weights
  targets, mask = scores.argmax(-1), rng.random((8, 13)) < 0.7  # the first of equals
  later = scores.shape[-1] - 1 - scores[..., ::-1].argmax(-1)   # the last of them
  f = jax.jit(lambda *x: judge_next_tokens(*x[:2], axes, *x[2:], chunk_bytes=chunk_bytes))
  for wanted in (targets, later, rng.integers(0, 40, (8, 13))):
    losses, likeliest = f(hidden, weights if axes[1] == "vocab" else weights.T, wanted, mask)
    np.testing.assert_array_equal(np.asarray(likeliest), wanted == targets)
    np.testing.assert_allclose(losses.sum(), token_loss(scores, wanted, mask)[0], rtol=1e-5)
    assert not np.asarray(losses)[~mask].any()
  assert 0.2 < (later == targets).mean() < 0.8


@pytest.mark.parametrize("axes", [("embed", "vocab"), ("vocab", "embed")])
def test_the_likeliest_is_the_first_of_equals(axes):
  with mesh_context(make_mesh(devices=jax.devices()[:1])):
    judge(axes, 40 * 4 * 30)


def on_eight_devices():
  mesh = (2, 2, 2, 1)
  with mesh_context(make_mesh(mesh)):
    judge(("embed", "vocab"), 40 * 4 * 10)
  root = pathlib.Path(os.environ["HELDOUT_ROOT"])
  config = dataclasses.replace(looked(root), mesh=MeshConfig(*mesh))
  eight, one = figures(*measurement(config, root / "run", 8)), json.loads(os.environ["HELDOUT"])
  assert 0 < one["heldout/exact_match"] == eight["heldout/exact_match"] < 1
  np.testing.assert_allclose(eight["heldout/loss"], one["heldout/loss"], rtol=1e-5)


@pytest.mark.slow
def test_eight_devices_give_the_same(root, alone, monkeypatch):
  total, terms, _, greedy = alone
  monkeypatch.setenv("HELDOUT_ROOT", str(root))
  monkeypatch.setenv("HELDOUT", json.dumps({"heldout/loss": total.sum() / terms.sum(),
                                            "heldout/exact_match": greedy.mean()}))
  several_devices.run(__file__, "on_eight_devices", 8)


def test_training_is_the_same_with_figures_and_a_stop_amid_them(root, alone, monkeypatch, caplog):
  total, terms, _, greedy = alone
  config, doing, at, hour = looked(root), [], Watch.at, [0]
  clock = type("Clock", (), {"perf_counter": lambda: time.perf_counter() + hour[0]})
  monkeypatch.setattr(metrics, "time", clock)

  def stop(watch, what, **more):
    doing.append(what)
    if what.startswith("held-out batch 1 of 2"):
      hour[0] += 3600
      os.kill(os.getpid(), signal.SIGTERM)
    at(watch, what, **more)
  monkeypatch.setattr(Watch, "at", stop)
  assert train(config, root / "broken") == 16
  assert [p.name for p in (root / "broken/checkpoints").iterdir()] == ["16"]
  assert doing.count("held-out batch 1 of 2 after step 16") == 1
  assert "held-out batch 2 of 2 after step 16" not in doing
  with caplog.at_level("WARNING", logger="absl"):  # those of the last step are finished
    assert train(changed(config, "heldout", every=100), root / "broken") == STEPS
  assert "other settings" not in caplog.text

  same(saved(root / "run", STEPS), saved(root / "broken", STEPS))
  keys = ("step", "loss", "grad_norm", "terms", "learning_rate")
  one, other = ([[x[k] for k in keys] for x in lines(root / n)] for n in ("run", "broken"))
  assert one == other
  records = lines(root / "broken")
  assert max(x["step_time"] for x in records) < 3600
  assert [x["step"] for x in records if "heldout/loss" in x] == [STEPS]
  assert records[-1]["heldout/loss"] == pytest.approx(total.sum() / terms.sum(), rel=1e-5)
  assert records[-1]["heldout/exact_match"] == greedy.sum() / 14
  assert train(config, root / "broken") == STEPS  # nothing left to do, nothing to measure
  assert lines(root / "broken") == records


def test_a_step_is_saved_once(tmp_path):
  """By its number, and once more by force."""
  checkpointer = Checkpointer(tmp_path, every=1, keep=2)
  for force in (False, True):
    checkpointer.save(1, dict(x=jnp.ones(3)), dict(place=3), force=force)
  checkpointer.close()
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_figures_take_no_time_of_a_step(tmp_path, monkeypatch):
  now = iter((0.0, 10.0, 11.0, 18.0, 21.0))
  monkeypatch.setattr(metrics, "time", type("Clock", (), {"perf_counter": lambda: next(now)}))
  log = metrics.Metrics(tmp_path, name="x", start=0, steps=1, enabled=True)
  log.restart_clock()
  with log.aside():
    pass
  used = metrics.Usage(tokens=400, positions=400, images=0, slots=0, samples=1, flops=1,
                       useful_flops=1)
  log.write(1, {"loss": 1.0, "learning_rate": 0.1, "heldout/loss": 2.0, "heldout/exact_match": 0.5},
            used, waited=1.0, show=True)
  assert "held-out loss 2.0000, exact 50.0%" in log._bar.postfix
  log.close()
  [record] = lines(tmp_path)
  assert (record["step_time"], record["tokens_per_s"], record["data/waiting"]) == (4, 100, 0.25)


def told(root, **more):
  """`looked`, by a host that gets a stop signal amid its first figures."""
  at = Watch.at

  def stop(watch, what, **limits):
    at(watch, what, **limits)
    if what == "held-out batch 1 of 2 after step 1":
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(3)
  Watch.at = stop
  return looked(root, every=1, **more)


@pytest.mark.slow
def test_two_hosts_equal_one(tmp_path, monkeypatch):
  """Also where one of them is told to stop amid the figures."""
  looked(tmp_path)
  script = test_meshes.SCRIPT.replace("from small_run import make_run", """
sys.path.append("tests")
from test_heldout import looked, told
make_run = told if name == "told" and process == "1" else lambda *a, **k: looked(*a, every=1, **k)
""")
  monkeypatch.setattr(test_meshes, "SCRIPT", script)
  two = dict(mesh="2x1x1x1", processes=2)
  test_meshes.run_processes(tmp_path, "one")
  test_meshes.run_processes(tmp_path, "two", **two)
  close(tmp_path, "one", "two", 3)
  for one, other in zip(lines(tmp_path / "one"), lines(tmp_path / "two")):
    assert one["heldout/loss"] == pytest.approx(other["heldout/loss"], rel=1e-5)
    assert one["heldout/exact_match"] == other["heldout/exact_match"]
  test_meshes.run_processes(tmp_path, "told", **two)
  [record] = lines(tmp_path / "told")
  assert "heldout/loss" not in record
  assert [p.name for p in (tmp_path / "told/checkpoints").iterdir()] == ["1"]
  test_meshes.run_processes(tmp_path, "told", **two)
  same(saved(tmp_path / "two", 3), saved(tmp_path / "told", 3))


def test_bad_samples_are_told_before_the_first_step(tmp_path):
  config = looked(tmp_path)
  tokenizer = load_tokenizer(config.tokenizer)
  change = lambda **changes: changed(config, "heldout", **changes)
  with pytest.raises(DataError, match="nothing.json"):
    heldout.read(change(path=str(tmp_path / "nothing.json")), tokenizer)
  with pytest.raises(DataError, match="(?s)missing_image.*config.heldout.image_root the r"):
    heldout.read(change(image_root=str(tmp_path / "elsewhere")), tokenizer)
  (tmp_path / "empty.json").write_text("[]")
  with pytest.raises(DataError, match="empty.json.*no samples"):
    heldout.read(change(path=str(tmp_path / "empty.json")), tokenizer)
  (tmp_path / "other").mkdir()
  for picture in tmp_path.glob("*.png"):
    shutil.copy(picture, tmp_path / "other")
  (tmp_path / "other/6.png").write_bytes((tmp_path / "6.png").read_bytes()[:-200])
  cut = change(image_root=str(tmp_path / "other"))
  assert len(heldout.read(changed(cut, "heldout", samples=6), tokenizer).samples) == 6
  with pytest.raises(DataError, match=r"(?s)1 of 14 .*heldout.json #6 \(id s6\): broken_image"):
    train(changed(cut, "data", on_error="skip", scan_limit=0), tmp_path / "run")
  assert not (tmp_path / "run/metrics.jsonl").exists()


def test_wrong_settings(tmp_path):
  for values, said in ((dict(every=5), "heldout.every is 5, but config.heldout.path is empty"),
                       (dict(image_root="x"), "heldout.image_root is 'x', but .*path is empty"),
                       (dict(path="x"), "heldout.path is 'x', but config.heldout.every is 0"),
                       (dict(path="x", every=-1), "every is -1, expected at least 0"),
                       (dict(path="x", every=1, samples=-1), "samples is -1, expected at least 0")):
    with pytest.raises(ConfigError, match=said):
      HeldoutConfig(**values)
  with pytest.raises(ConfigError, match="heldout.path is .*, but config.objective is 'tags:vis"):
    dataclasses.replace(looked(tmp_path), objective="tags:vision")
