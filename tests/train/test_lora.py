"""Adapters: what they compute, what trains, and how a run with them is saved and goes on."""
import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several_devices
from flax import nnx
from small_run import make_run, same, saved, stop_at

import mgjax
from mgjax import trees
from mgjax.adapter_base import checksum_on_host, checksums
from mgjax.checkpoint import Checkpointer, CheckpointError, load_model, write_run
from mgjax.config import ConfigError, ModelConfig
from mgjax.data.packing import Format
from mgjax.data.pipeline import batch_arrays
from mgjax.infer.quantize import load_quantized
from mgjax.models.integers import FORMATS, dequantized, packed, quantized, unpacked
from mgjax.models.lora import ADAPTER, LoraConfig, kept_parts, set_dropout
from mgjax.sharding import batch_sharding, make_mesh, mesh_context
from mgjax.train.loop import train
from mgjax.train.optimizer import OptimizerConfig, Row, make_optimizer
from mgjax.train.state import abstract_state, init_state, model_builder
from mgjax.train.step import batch_loss, make_train_step

pytestmark = pytest.mark.usefixtures("highest_precision")
ADAPTERS = (Row("/lora_[ab]$"), Row("", None))
BASES = ("", *FORMATS)


def text_run(root, **changes):
  """A run of `tiny`'s language model alone, float32, on conversations without pictures."""
  config = make_run(root, steps=2)
  records = [{"id": f"s{i}", "conversations": [{"from": "human", "value": f"What is {i}?"},
                                               {"from": "gpt", "value": f"It is {i}."}]}
             for i in range(12)]
  (root / "data.json").write_text(json.dumps(records))
  data = dataclasses.replace(config.data, hr_size=768, tokens_per_image=576, images_per_row=0)
  return dataclasses.replace(
      config, model=ModelConfig(vision=None, vision_hr=None, decoder=config.model.decoder),
      data=data, optimizer=OptimizerConfig(1e-2, (Row(""),)), **changes)


def adapted(config, start, **lora):
  """That run with adapters on what the run `start` left."""
  return dataclasses.replace(
      config, init_from=(("", str(start)),), lora=LoraConfig(**{"rank": 4} | lora),
      optimizer=dataclasses.replace(config.optimizer, table=ADAPTERS))


def device():
  return make_mesh(devices=jax.devices()[:1])


def write_start(config, workdir):
  """What a run's folder holds at its start, adapters drawn as if they had learned something."""
  with mesh_context(device()) as mesh:
    tx = make_optimizer(config.optimizer, 1)
    state, base = init_state(config, tx, abstract_state(config, tx, mesh)[1])
  flat, rng = trees.flatten(state.params), np.random.default_rng(2)
  state.params = trees.unflatten({k: jnp.asarray(rng.normal(0, 0.02, v.shape), jnp.float32)
                                  if ADAPTER.search(k) else v for k, v in flat.items()})
  write_run(workdir, dataclasses.asdict(config), config.tokenizer)
  if base is not None:
    base.write(workdir)
  checkpointer = Checkpointer(workdir, every=1, keep=1)
  checkpointer.save(3, state.as_dict(base=config.lora.used), {"at": 0}, force=True)
  checkpointer.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A folder with the run "base", and for each way to keep a base a run on it: "on-" is trained."""
  root = tmp_path_factory.mktemp("lora")
  config = text_run(root)
  write_start(config, root / "base")
  train(adapted(dataclasses.replace(config, steps=3), root / "base"), root / "on-")
  for kept in FORMATS:
    write_start(adapted(config, root / "base", base=kept), root / f"on-{kept}")
  return root


def random_batch(config, mesh, rows=8):
  rng = np.random.default_rng(1)
  batch = {k: np.zeros(dims, dtype) for k, (dims, dtype) in
           batch_arrays(Format(rows, 32, 0, config.data.hr_size, 576)).items()}
  batch["tokens"] = rng.integers(0, 500, batch["tokens"].shape).astype(np.int32)
  batch["targets"] = rng.integers(0, 500, batch["targets"].shape).astype(np.int32)
  batch["positions"] = np.broadcast_to(np.arange(32, dtype=np.int32), (rows, 32))
  batch["visual_index"][:] = -1
  batch["segment_ids"][:] = batch["loss_mask"][:] = 1
  return {k: jax.device_put(v, batch_sharding(mesh)) for k, v in batch.items()}


def built(config, flat):
  """The model of a run as it trains, with these parameters."""
  return nnx.merge(graph(config), trees.unflatten({k: jnp.asarray(v) for k, v in flat.items()}))


@functools.partial(jax.jit, static_argnums=1)
def stands_for(w, base):
  return dequantized(quantized(w, base), jnp.float32)


def graph(config):
  return nnx.split(nnx.eval_shape(model_builder(config)))[0]


def params_of(run, step):
  return {k.split("/", 1)[1]: v for k, v in saved(run, step).items()
          if k.startswith(("params", "frozen"))}


def kept_as(flat, base):
  """Kernels of the base's blocks as they are kept."""
  out = {}
  for path, w in flat.items():
    if base and path.startswith("decoder/blocks/") and path.endswith("/kernel"):
      parts = jax.jit(kept_parts, static_argnums=1)(jnp.asarray(w), base)
      out |= {f"{path}/{i}": part for i, part in enumerate(parts)}
    else:
      out[path] = w
  return out


def test_rank_0_and_a_fresh_adapter_are_the_base_exactly(root):
  config, mesh = text_run(root), device()
  none = dataclasses.replace(config, lora=LoraConfig(rank=0))
  with mesh_context(mesh):
    batch, base = random_batch(config, mesh), params_of(root / "base", 3)
    want = jax.jit(lambda m, b: m(b))(built(config, base), batch)
    assert graph(none) == graph(config)
    run = adapted(config, root / "base")
    tx = make_optimizer(run.optimizer, 1)
    drawn = trees.flatten(init_state(run, tx, abstract_state(run, tx, mesh)[1])[0].params)
    bound = 64**-0.5  # Kaiming-uniform with sqrt(5), as in peft
    a = np.asarray(drawn["decoder/blocks/q/lora_a"])
    assert a.shape == (2, 64, 4) and 0.9 * bound < np.abs(a).max() <= bound
    np.testing.assert_array_equal(
        jax.jit(lambda m, b: m(b))(built(run, base | drawn), batch), want)


@pytest.mark.parametrize("base", BASES)
def test_merged_it_says_what_the_adapted_model_does(root, base):
  """Merged by hand and as it is loaded.  The model on a quantised base computes what the matrices
  do that the integers stand for."""
  config, mesh = adapted(text_run(root), root / "base", base=base), device()
  plain, adapters = params_of(root / "base", 3), params_of(root / f"on-{base}", 3)
  with mesh_context(mesh):
    batch, say = random_batch(config, mesh), jax.jit(lambda m, b: m(b))
    want = say(built(config, kept_as(plain, base) | adapters), batch)
    by_hand = dict(plain)
    for path in (k for k in plain if k.replace("kernel", "lora_a") in adapters):
      a, b = (adapters[path.replace("kernel", f"lora_{x}")] for x in "ab")
      w = jnp.asarray(plain[path])
      w = np.asarray(stands_for(w, base)) if base else w
      by_hand[path] = w + 16 / 4 * np.einsum("ldr,lrf->ldf", a, b)
    np.testing.assert_allclose(say(built(text_run(root), by_hand), batch), want, atol=1e-5,
                               rtol=0)
    loaded = load_model(root / f"on-{base}", mesh, dtype=jnp.float32).model
    np.testing.assert_allclose(say(loaded, batch), want, atol=1e-5, rtol=0)
    assert np.abs(say(built(text_run(root), plain), batch) - want).max() > 0.02


@pytest.mark.slow  # launch/chat.py's engine is made
def test_it_answers(root):
  assert not mgjax.load(root / "on-").sees


@pytest.mark.slow
def test_it_is_loaded_and_finds_its_base_where_both_have_moved(root, tmp_path):
  shutil.copytree(root / "base", tmp_path / "base")
  shutil.copytree(root / "on-", tmp_path / "on-")
  told = json.loads((tmp_path / "on-/base.json").read_text())
  told["folders"][0]["path"] = "/nowhere"
  (tmp_path / "on-/base.json").write_text(json.dumps(told))
  with mesh_context(device()) as mesh:
    one, moved = (nnx.state(load_model(f / "on-", mesh).model) for f in (root, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, one, moved)
    quantised = load_quantized(tmp_path / "on-", mesh, dtype=jnp.float32, name="int8").model
    matrix = quantised.decoder.blocks[1].up[...]
    want = load_model(root / "on-", mesh, dtype=jnp.float32).model.decoder.blocks.up.kernel[1]
    np.testing.assert_allclose(matrix, want, atol=np.abs(want).max() / 250)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(CheckpointError, match="the base model at /nowhere, which is not there"):
      load_model(tmp_path / "on-", mesh)


def test_only_adapters_train_and_are_saved(root):
  state = saved(root / "on-", 3)
  layers = {f"decoder/blocks/{n}/lora_{x}" for n in ("q", "k", "v", "out", "gate", "up", "down")
            for x in "ab"}
  assert {k.removeprefix("params/") for k in state if k.startswith("params")} == layers
  assert not any(k.startswith("frozen") for k in state)
  moments = [k for k in state if k.startswith("opt_state") and state[k].ndim]
  assert len(moments) == 2 * len(layers)
  config, mesh = adapted(text_run(root), root / "base"), device()
  with mesh_context(mesh):
    tx = make_optimizer(config.optimizer, 2)
    start = trees.flatten(init_state(config, tx, abstract_state(config, tx, mesh)[1])[0].params)
  for path in layers:
    assert (np.asarray(start[path]) != state[f"params/{path}"]).any(), path


def test_resume_is_bit_identical(root, tmp_path, monkeypatch):
  config = dataclasses.replace(adapted(text_run(root), root / "base", base="int4", dropout=0.5),
                               steps=4)
  train(config, tmp_path / "straight")
  with monkeypatch.context() as patch:
    stop_at(patch, 2)
    assert train(config, tmp_path / "broken") == 2
  assert train(config, tmp_path / "broken") == 4
  same(saved(tmp_path / "straight", 4), saved(tmp_path / "broken", 4))


def test_gradients_are_those_of_the_merged_form(root):
  config, mesh = adapted(text_run(root), root / "base"), device()
  plain, adapters = params_of(root / "base", 3), params_of(root / "on-", 3)
  with mesh_context(mesh):
    batch = random_batch(config, mesh)
    graphdef, bare = graph(config), graph(text_run(root))

    def loss(adapters, graphdef=graphdef):
      return batch_loss(nnx.merge(graphdef, trees.unflatten(plain | adapters)), batch, None)[0]

    def merged_loss(adapters):
      flat = dict(plain)
      for path in (k for k in plain if k.replace("kernel", "lora_a") in adapters and "kernel" in k):
        a, b = (adapters[path.replace("kernel", f"lora_{x}")] for x in "ab")
        flat[path] = plain[path] + 4 * a @ b
      return batch_loss(nnx.merge(bare, trees.unflatten(flat)), batch, None)[0]

    got, want = jax.jit(jax.grad(loss))(adapters), jax.jit(jax.grad(merged_loss))(adapters)
  for path, g in want.items():
    np.testing.assert_allclose(got[path], g, atol=1e-4 * np.abs(g).max(), rtol=0, err_msg=path)


def test_dropout_is_of_the_step_and_off_without_a_key(root):
  config, mesh = adapted(text_run(root), root / "base", dropout=0.5), device()
  flat = params_of(root / "base", 3) | params_of(root / "on-", 3)
  with mesh_context(mesh):
    batch = random_batch(config, mesh)

    @jax.jit
    def say(model, batch, seed):
      set_dropout(model, None if seed is None else jax.random.key(seed))
      return model(batch)

    off, one, again, two = (say(built(config, flat), batch, s) for s in (None, 1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != two).any() and (one != off).any()
    layer = built(config, flat).decoder.blocks.q
    layer = jax.tree.map(lambda x: x[0], layer)
    x = jnp.ones((4000, 64))
    layer.key = nnx.data(jax.random.key(0))
    kernel = flat["decoder/blocks/q/kernel"][0]
    low = layer.product(x) - x @ kernel
    layer.key = nnx.data(None)
    full = layer.product(x) - x @ kernel
    np.testing.assert_allclose(low.mean(0), full.mean(0), atol=0.05 * np.abs(full).max())
    assert (np.std(low, axis=0) > 0).all() and np.std(full, axis=0).max() < 1e-5


def test_int4_two_to_a_byte():
  values = jnp.arange(-8, 8, dtype=jnp.int4).reshape(2, 4, 2)
  assert packed(values).shape == (2, 2, 2)
  np.testing.assert_array_equal(unpacked(packed(values)), values.astype(jnp.int8))


def check_meshes():
  import pathlib
  import tempfile
  root = pathlib.Path(tempfile.mkdtemp())
  jax.config.update("jax_default_matmul_precision", "highest")
  config = text_run(root)
  write_start(config, root / "base")
  run, results = adapted(config, root / "base", base="int8", dropout=0.3), []
  for shape, devices in (((1, 1, 1, 1), jax.devices()[:1]), ((2, 2, 2, 1), jax.devices())):
    mesh = make_mesh(shape, devices)
    with mesh_context(mesh):
      tx = make_optimizer(run.optimizer, 10)
      graphdef, abstract = abstract_state(run, tx, mesh)
      state, found = init_state(run, tx, abstract)
      step = jax.jit(make_train_step(run, graphdef, tx, 10))
      batch = random_batch(run, mesh)
      for _ in range(3):
        state, metrics = step(state, batch)
      results.append((jax.device_get(state.params), float(metrics["loss"]), found))
      for path, s in trees.flatten(abstract.params).items():
        assert "fsdp" in s.sharding.spec, (path, s)
  (one, loss_1, base_1), (eight, loss_8, base_8) = results
  assert base_1 == base_8 and abs(loss_1 - loss_8) < 1e-5
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=0), one, eight)


@pytest.mark.slow
def test_eight_devices_equal_one():
  several_devices.run(__file__, "check_meshes", 8)


def test_towers_projector_and_mining_are_left_to_the_table(tmp_path):
  config = make_run(tmp_path, steps=1)
  table = (Row("/lora_[ab]$"), Row("^(mining|projector)/", 0.1), Row("", None))
  config = dataclasses.replace(config, lora=LoraConfig(rank=4), frozen_dtype="bfloat16",
                               optimizer=dataclasses.replace(config.optimizer, table=table))
  with mesh_context(device()) as mesh:
    abstract = abstract_state(config, make_optimizer(config.optimizer, 1), mesh)[1]
  trained, frozen = trees.flatten(abstract.params), trees.flatten(abstract.frozen)
  assert {k.split("/")[0] for k in trained} == {"decoder", "mining", "projector"}
  assert {k for k in trained if k.startswith("decoder")} == {k for k in trained
                                                             if ADAPTER.search(k)}
  assert {v.dtype for v in frozen.values()} == {jnp.dtype("bfloat16")}
  assert {v.dtype for v in trained.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("lora, table, message", [
    (dict(pattern="decoder/blocks/query"), ADAPTERS,
     "'decoder/blocks/query' matches no dense layer; the nearest of 8: .*decoder/blocks/q"),
    (dict(pattern="^decoder/"), ADAPTERS, "takes decoder/head, which cannot be adapted: the loss"),
    (dict(), (Row(""),), "trains decoder/blocks/down/kernel whole, which config.lora keeps frozen"),
    (dict(base="int8"), (Row(""),), r"trains decoder/blocks/down/kernel whole.*\(7 such\)"),
    (dict(rank=0), ADAPTERS, r"rank is 0, .* the row '/lora_\[ab\]\$' .* give a rank"),
    (dict(), (Row("^decoder/norm/"), Row("", None)), "trains no adapter"),
])
def test_what_does_not_fit_is_told(root, lora, table, message):
  config = adapted(text_run(root), root / "base", **lora)
  config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, table=table))
  with mesh_context(device()) as mesh, pytest.raises(ConfigError, match=message):
    abstract_state(config, make_optimizer(config.optimizer, 1), mesh)


def test_experts_are_not_adapted(root):
  config = adapted(text_run(root), root / "base")
  decoder = dataclasses.replace(config.model.decoder, experts=4)
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder))
  with mesh_context(device()) as mesh, pytest.raises(
      ConfigError, match=r"takes decoder/blocks/experts/gate, .*\(q\|k\|v\|out\)"):
    abstract_state(config, make_optimizer(config.optimizer, 1), mesh)


@pytest.mark.parametrize("bad, message", [
    (dict(rank=-1), "rank is -1"), (dict(base="int3"), "expected one of int8, int4"),
    (dict(pattern="("), "no regular expression"), (dict(dropout=1.0), "0 <= dropout < 1")])
def test_a_bad_setting_is_told(bad, message):
  with pytest.raises(ConfigError, match=message):
    LoraConfig(**bad)


def test_adapters_meet_no_other_base(root, tmp_path):
  config = text_run(root)
  for name in ("base", "on-"):
    shutil.copytree(root / name, tmp_path / name)
  shutil.rmtree(tmp_path / "base/checkpoints")
  write_start(dataclasses.replace(config, seed=5), tmp_path / "base")
  with pytest.raises(CheckpointError, match="not what the adapters were trained on; .*another"):
    mgjax.load(tmp_path / "on-")
  more = dataclasses.replace(adapted(config, root / "base"), steps=4)
  with pytest.raises(CheckpointError, match="not what the adapters were trained on"):
    train(more, tmp_path / "on-")
  with pytest.raises(ConfigError, match="lora.rank was 4 and is 8"):
    train(dataclasses.replace(adapted(config, root / "base", rank=8), steps=4), root / "on-")


def test_a_lost_base_file_is_told(root, tmp_path):
  shutil.copytree(root / "on-", tmp_path / "on-")
  (tmp_path / "on-/base.json").unlink()
  with mesh_context(device()) as mesh, pytest.raises(CheckpointError, match="base.json.* is lost"):
    load_model(tmp_path / "on-", mesh)


def test_checksums_are_the_same_on_the_host():
  rng = np.random.default_rng(0)
  arrays = {"stack": rng.normal(size=(3, 5, 7)), "many": rng.normal(size=(600, 1000)), "one": 2.5}
  arrays = {f"{k} {t.__name__}": np.asarray(v, t) for t in (np.float32, jnp.bfloat16)
            for k, v in arrays.items()}
  for name, got in checksums({k: jnp.asarray(v) for k, v in arrays.items()}).items():
    assert got == checksum_on_host(arrays[name]), name


def test_a_base_has_to_be_named_and_have_its_own_weights(root, tmp_path):
  config = adapted(text_run(root), root / "base")
  with pytest.raises(CheckpointError, match="is frozen and comes from no checkpoint"):
    train(dataclasses.replace(config, init_from=()), tmp_path / "run")
  with pytest.raises(CheckpointError, match="has adapters itself"):
    train(dataclasses.replace(config, init_from=(("", str(root / "on-")),)), tmp_path / "run")


def test_a_merged_run_trains_on_whole(root):
  config = dataclasses.replace(text_run(root), init_from=(("", str(root / "on-")),))
  with mesh_context(device()) as mesh:
    tx = make_optimizer(config.optimizer, 1)
    state, found = init_state(config, tx, abstract_state(config, tx, mesh)[1])
  got, base = trees.flatten(state.params), params_of(root / "base", 3)
  assert found is None and got.keys() == base.keys()
  a, b = (params_of(root / "on-", 3)[f"decoder/blocks/up/lora_{x}"] for x in "ab")
  np.testing.assert_allclose(got["decoder/blocks/up/kernel"] - base["decoder/blocks/up/kernel"],
                             4 * a @ b, atol=1e-6)
  np.testing.assert_array_equal(got["decoder/head/kernel"], base["decoder/head/kernel"])
