"""Programs compiled for slices that nobody has here, against what is known of them.

Skipped where the TPU compiler is missing.
"""
import importlib.util
import json
import os
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mgjax.sharding import make_mesh
from mgjax.tpu import compiler, hlo, links, roofline, slices

REPO = pathlib.Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                    reason="no TPU compiler: pip install -e '.[tpu]'")


@needs_compiler
def test_a_scan_of_gathered_weights():
  """Operations, collectives and their bytes of four layers over 4 chips, counted by hand."""
  chosen, (rows, d, f, layers) = slices.parse_slice("v5e:2x2"), (1024, 1024, 4096, 4)
  mesh, chip = make_mesh((1, 4, 1, 1), slices.describe(chosen)), slices.chip(chosen)
  shape = lambda dims, *spec: jax.ShapeDtypeStruct(
      dims, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

  def run(x, up, down):
    whole = lambda w: jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
    layer = lambda x, w: (jax.nn.relu(x @ whole(w[0])) @ whole(w[1]), None)
    return jax.lax.scan(layer, x, (up, down))[0]

  compiled = jax.jit(run).lower(
      shape((4 * rows, d), "fsdp"), shape((layers, d, f), None, "fsdp"),
      shape((layers, f, d), None, "fsdp")).compile()
  guess = roofline.estimate(hlo.parse(compiled.as_text()), chip, links.Network(mesh, chosen, chip))
  assert guess.flops == layers * 2 * 2 * rows * d * f
  assert guess.core >= guess.products == guess.flops / chip.peak
  assert guess.bound <= guess.expected
  total = links.total(list(guess.collectives))
  assert set(total) == {("all-gather", ("fsdp",), False)}
  size, seconds = total["all-gather", ("fsdp",), False]
  assert size == layers * 2 * d * f * 2
  # A 2x2 slice: one link to each of two neighbours, 45 GB/s.
  assert seconds == pytest.approx(size * 3 / 4 / 9e10)
  # A chip's part of the weights, and its rows, are read at least once.
  assert guess.hbm_bytes >= layers * 2 * d * f * 2 / 4 + rows * d * 2


@needs_compiler
def test_what_goes_between_slices():
  """A gradient over two slices of 4 chips: summed within a slice, and its parts across."""
  chosen, (rows, d) = slices.parse_slice("v5e:2x2", 2), (1024, 2048)
  mesh = make_mesh((2, 4, 1, 1), slices.describe(chosen))
  x = jax.ShapeDtypeStruct((8 * rows, d), jnp.bfloat16,
                           sharding=NamedSharding(mesh, P(("data", "fsdp"))))
  compiled = jax.jit(lambda x: x.T @ x, out_shardings=NamedSharding(mesh, P())).lower(x).compile()
  guess = roofline.estimate(hlo.parse(compiled.as_text()), slices.chip(chosen),
                            links.Network(mesh, chosen, slices.chip(chosen)))
  across = {key: at for key, at in links.total(list(guess.collectives)).items() if key[2]}
  [(kind, axes, _)] = across
  assert (kind, axes) == ("all-reduce", ("data",))
  size, seconds = across[kind, axes, True]
  assert size in (2 * d * d, 2 * d * d / 4)  # of each chip: all of it, or its part
  assert seconds == pytest.approx(2 * size / 2 / slices.chip(chosen).dcn)


def command(*args, topology="v5e:2x2", config="configs/stage2.py:tiny"):
  named = [f"--config={config}"] if config else []
  return subprocess.run(
      [sys.executable, "launch/compile.py", f"--topology={topology}", *named, *args],
      cwd=REPO, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": "."})


@needs_compiler
def test_the_command_on_a_tiny_model(tmp_path):
  done = command(f"--out={tmp_path / 'r.json'}", "--config.data.batch_size=8", "--sketch")
  assert done.returncode == 0, done.stderr
  assert "MFU" in done.stdout and "not counted" in done.stdout
  told = json.loads((tmp_path / "r.json").read_text())
  assert told["fits"] and told["chips"] == 4 and told["mesh"] == {"fsdp": 4}
  assert told["step"] >= told["bound"] > 0
  assert {*roofline.PARTS, "decoder attention"} - {"logits"} <= told["by_part"].keys()
  assert sum(told["by_part"].values()) == pytest.approx(told["core"])
  done = command(f"--out={tmp_path / 'e.json'}", "--encode", "--rows=8", "--sketch")
  assert done.returncode == 0, done.stderr
  told = json.loads((tmp_path / "e.json").read_text())
  assert told["program"] == "encode, 8 pictures of 128 pixels"
  assert {"clip", "convnext", "mining", "projector"} <= told["by_part"].keys()
  assert "decoder" not in told["by_part"]


@pytest.mark.parametrize("kwargs, said", [
    (dict(topology="v5e:7x7"), "near it: v5e-"), (dict(topology="tpu"), "generations are"),
    (dict(config="configs/stage2.py:mgm-8b,what"), "what"),
    (dict(config=None), "only --draw needs none"),
    (dict(config=None, args=["--draw", "--decode"]), "--draw: without"),
    (dict(args=["--encode", "--decode"]), "one program at a time"),
    (dict(config=None, args=["--draw", "--size=big"]), "--size: 'big' is no size")])
def test_mistakes_are_one_line(kwargs, said):
  done = command(*kwargs.pop("args", ()), **kwargs)
  assert done.returncode == 2 and said in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


@needs_compiler
def test_a_mesh_that_does_not_match_the_slice():
  done = command("--config.mesh.fsdp=3", "--sketch")
  assert done.returncode == 2 and "does not cover the 4 devices" in done.stderr


def test_without_the_compiler_the_extra_is_named(tmp_path):
  (tmp_path / "libtpu.py").write_text("raise ImportError('hidden')")
  (tmp_path / "sitecustomize.py").write_text("import os; os.environ['TPU_LIBRARY_PATH'] = '/none'")
  done = subprocess.run(
      [sys.executable, "launch/compile.py", "--config=configs/stage2.py:tiny",
       "--topology=v5e:2x2"], cwd=REPO, capture_output=True, text=True, timeout=120,
      env=os.environ | {"PYTHONPATH": f"{tmp_path}:."})
  assert done.returncode == 2 and ".[tpu]" in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize("said, needed, there", [
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 46.19G of 15.75G hbm. "
     "Exceeded hbm capacity by 30.44G.", 46.19, 15.75),
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
     "(23.80G) exceeds available HBM (15.75G).", 23.8, 15.75)])
def test_memory_that_the_compiler_misses_is_understood(said, needed, there):
  program = compiler.Program("train step", {}, 1.0, 1, 1, {})
  error = compiler._explained(program, RuntimeError(said))
  assert isinstance(error, compiler.DoesNotFit)
  again = pickle.loads(pickle.dumps(error))  # as it comes from the sketching process
  assert again.needed == needed * 2**30 and again.available == there * 2**30
  assert "GiB" in str(again)
