"""Each kind of bad input: one line that names it, exit code 2, and nothing left behind."""
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from folders import BF16, config_of, make_folder, make_towers, write_tensors

from conversion import from_hf, inspect, to_hf
from conversion.store import Writer
from conversion.transfer import finished_folder
from mgjax.checkpoint import load_params, parameter_homes

REPO = pathlib.Path(__file__).parents[2]
LAST = "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"


def refuse(capsys, folder, *needles, args=()):
  """The conversion fails with one line that holds all needles, and leaves nothing."""
  output = folder.parent / "out"
  assert from_hf.main(["--checkpoint", str(folder), "--output", str(output),
                       *map(str, args)]) == 2
  error = capsys.readouterr().err.strip()
  lines = [line for line in error.splitlines() if line.startswith("error:")]
  assert len(lines) == 1 and "Traceback" not in error
  for needle in needles:
    assert needle in lines[0], (needle, lines[0])
  assert sorted(p.name for p in folder.parent.glob("out*")) == []


@pytest.fixture
def good(tmp_path):
  """A sharded checkpoint, its tensors, and how to write it anew."""
  folder, config = tmp_path / "hf", config_of("llama")
  tensors = make_folder(folder, config, shards=2)
  return folder, config, tensors


def test_truncated_shard(good, capsys):
  folder, _, _ = good
  os.truncate(folder / LAST, (folder / LAST).stat().st_size - 5)
  refuse(capsys, folder, LAST, "cut off", "download it again")
  os.truncate(folder / LAST, 100)
  refuse(capsys, folder, LAST, "cut off in its header")


def test_shard_that_is_something_else(good, capsys):
  folder, _, _ = good
  (folder / LAST).write_bytes((20).to_bytes(8, "little") + b"not json at all, no!" * 10)
  refuse(capsys, folder, LAST, "not a safetensors file")


def test_spans_that_overlap(good, capsys):
  folder, _, _ = good
  data = (folder / LAST).read_bytes()
  length = int.from_bytes(data[:8], "little")
  header = json.loads(data[8:8 + length])
  names = [n for n in header if n != "__metadata__"]
  for offsets in ([0, 3], ["a", "b"], [1]):
    header[names[1]]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    (folder / LAST).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length:])
    refuse(capsys, folder, LAST)


def test_missing_shard(good, capsys):
  folder, _, _ = good
  (folder / LAST).unlink()
  refuse(capsys, folder, LAST, "no such file")


def edit_index(folder, change):
  path = folder / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  change(index["weight_map"])
  path.write_text(json.dumps(index))


def test_index_without_an_entry(good, capsys):
  folder, _, _ = good
  edit_index(folder, lambda m: m.pop(NORM))
  refuse(capsys, folder, "index.json", f"no entry for {NORM}", "model-0000")


def test_index_with_a_tensor_that_is_nowhere(good, capsys):
  folder, _, _ = good
  edit_index(folder, lambda m: m.update({"model.nothing": LAST}))
  refuse(capsys, folder, LAST, "model.nothing is not in it")
  edit_index(folder, lambda m: m.update({"model.nothing": "../outside.safetensors"}))
  refuse(capsys, folder, "is not a file name")


@pytest.mark.parametrize("change, needles", [
    (lambda t: t.update({NORM: np.ones(17, np.float32)}), [NORM, "(17,)", "expected (16,)"]),
    (lambda t: t.update({"model.layers.7.mlp.up_proj.weight": np.ones((2, 2), np.float32)}),
     ["unknown: model.layers.7.mlp.up_proj.weight", "model-0000"]),
    (lambda t: t.pop(NORM), ["missing: " + NORM, "152 of them found"]),
    (lambda t: t[NORM].__setitem__(3, np.nan), [NORM, "[3] is nan", "model-0000"]),
    (lambda t: t[NORM].__setitem__(0, np.inf), [NORM, "[0] is inf"]),
    (lambda t: t.update({NORM: t[NORM].astype(np.int8)}), [NORM, "int8", "expected float32"]),
    (lambda t: t.pop("model.vision_tower_aux.vision_stages.3.blocks.0.gamma"),
     ["vision_stages.3.blocks.0.gamma is missing"]),
    (lambda t: t.pop("model.vision_tower_aux.vision_stages.2.blocks.1.gamma"),
     ["missing: model.vision_tower_aux.vision_stages.2.blocks.1.gamma"]),
    (lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:30]}),
     ["model.embed_tokens.weight", "(30, 16)", "expected (40, 16)"])])
def test_wrong_tensors(good, capsys, change, needles):
  folder, _, tensors = good
  change(tensors)
  write_tensors(folder, tensors, shards=2)
  refuse(capsys, folder, *needles)
  assert inspect.main([str(folder)]) in (0, 1, 2)  # looks at headers alone; must not crash


@pytest.mark.parametrize("dtype", [BF16, np.float16])
def test_nan_in_half_precision(tmp_path, capsys, dtype):
  tensors = make_folder(tmp_path / "hf", config_of("llama"), dtype)
  tensors[NORM][5] = np.nan
  write_tensors(tmp_path / "hf", tensors)
  refuse(capsys, tmp_path / "hf", NORM, "[5] is nan")


@pytest.mark.parametrize("change, needles", [
    (lambda c: c.pop("hidden_size"), ["config.json: hidden_size is missing"]),
    (lambda c: c.pop("image_size_aux"), ["image_size_aux is missing"]),
    (lambda c: c.pop("mm_vision_select_layer"), ["mm_vision_select_layer is missing"]),
    (lambda c: c.update(model_type="qwen9"), ["model_type is 'qwen9'", "mgm_mixtral"]),
    (lambda c: c.update(hidden_size="big"), ["hidden_size is 'big'; expected int"]),
    (lambda c: c.update(num_attention_heads=0), ["num_attention_heads"]),
    (lambda c: c.update(num_hidden_layers=3), ["missing: model.layers.2"]),
    (lambda c: c.update(attention_bias=True), ["attention_bias is True"]),
    (lambda c: c.update(rope_scaling={"type": "yarn", "factor": 2}), ["'yarn'", "llama3"]),
    (lambda c: c.update(hidden_act="relu"), ["'relu'"]),
    (lambda c: c.update(mm_projector_type="identity"), ["mm_projector_type is 'identity'"]),
    (lambda c: c.update(quantization_config={"bits": 4}), ["quantization_config"]),
    (lambda c: c.update(mm_hidden_size=64), ["mm_hidden_size is 64", "32"]),
    (lambda c: c.update(mm_hidden_size_aux=2880), ["mm_hidden_size_aux is 2880", "24"]),
    (lambda c: c.update(image_size_aux=60), ["hr_size 60"]),
    (lambda c: c.update(image_size_aux="64"), ["image_size_aux is '64'; expected int"]),
    (lambda c: c.update(image_grid="2"), ["image_grid is '2'; expected int"]),
    (lambda c: c.update(mm_vision_tower=["a"]), ["mm_vision_tower is ['a']; expected str"]),
    (lambda c: c.pop("mm_vision_tower"), ["mm_vision_tower is missing"]),
    (lambda c: c.update(rope_scaling="linear"), ["rope_scaling is 'linear'; expected dict"]),
    (lambda c: c.update(rope_scaling={"type": "linear", "factor": None}), ["factor is None"]),
    (lambda c: c.update(rope_scaling={"type": "linear", "factor": 0.5}), ["factor is 0.5"]),
    (lambda c: c.update(hidden_size=16.5), ["hidden_size is 16.5; expected int"]),
    (lambda c: c.update(mm_vision_tower="zoo/clip-vit-large-patch14-336"),
     ["clip-vit-large-patch14-336", "28 pixels", "another tower"])])
def test_wrong_config(good, capsys, change, needles):
  folder, config, _ = good
  change(config)
  (folder / "config.json").write_text(json.dumps(config))
  refuse(capsys, folder, str(folder), *needles)


def test_config_that_is_no_json(good, capsys):
  folder, _, _ = good
  (folder / "config.json").write_text("{")
  refuse(capsys, folder, "config.json", "cannot be read")
  (folder / "config.json").unlink()
  refuse(capsys, folder, "config.json", "no such file")


def test_towers_missing_or_wrong(tmp_path, capsys):
  config = config_of("llama")
  tensors = make_folder(tmp_path / "whole", config)
  bare = tmp_path / "bare"
  make_folder(bare, config, drop="model.vision_tower")
  refuse(capsys, bare, "towers are not in it", "--towers")
  refuse(capsys, bare, "no such folder", args=["--towers", tmp_path / "nowhere"])
  (tmp_path / "empty").mkdir()
  refuse(capsys, bare, "neither a CLIP nor an OpenCLIP", args=["--towers", tmp_path / "empty"])
  clip, openclip = make_towers(tmp_path / "zoo", config, tensors)
  (openclip / "open_clip_model.safetensors").unlink()
  refuse(capsys, bare, "no OpenCLIP weights", args=["--towers", tmp_path / "zoo"])
  narrow = {n: t[..., :2] if n.startswith("model.vision_tower_aux.vision_stages.3") else t
            for n, t in tensors.items()}
  make_towers(tmp_path / "other", config, narrow)
  refuse(capsys, bare, "mm_hidden_size_aux", args=["--towers", tmp_path / "other"])


def test_bin_without_torch(tmp_path, capsys, monkeypatch):
  folder = tmp_path / "hf"
  make_folder(folder, config_of("llama"))
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  monkeypatch.setitem(sys.modules, "torch", None)
  refuse(capsys, folder, "pytorch_model.bin", "pip install -e '.[torch]'")


def test_a_pickle_is_not_executed(tmp_path, capsys):
  torch = pytest.importorskip("torch")
  folder, trace = tmp_path / "hf", tmp_path / "executed"
  make_folder(folder, config_of("llama"))
  (folder / "model.safetensors").unlink()

  class Evil:
    def __reduce__(self):
      return os.mkdir, (str(trace),)

  torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
  refuse(capsys, folder, "pytorch_model.bin", "not a file of tensors alone")
  assert not trace.exists()


def test_output_that_exists(good, capsys, tmp_path):
  folder, _, _ = good
  (tmp_path / "out").mkdir()
  assert from_hf.main(["--checkpoint", str(folder), "--output", str(tmp_path / "out")]) == 2
  assert "exists already" in capsys.readouterr().err


def test_disk_too_small(good, capsys, monkeypatch, tmp_path):
  folder, _, _ = good
  usage = type("Usage", (), {"free": 1000})
  monkeypatch.setattr("conversion.transfer.shutil.disk_usage", lambda p: usage)
  refuse(capsys, folder, "GB are to be written", "GB free")


def test_disk_full_while_writing(tmp_path):
  """A limit on the size of a file stands in for a disk that fills up."""
  make_folder(tmp_path / "hf", config_of("llama", vocab_size=40000), shards=2)

  def limit():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

  run = lambda module, *args: subprocess.run(
      [sys.executable, "-m", module, *map(str, args)], cwd=REPO, capture_output=True, text=True,
      preexec_fn=limit, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": ""})
  done = run("conversion.from_hf", "--checkpoint", tmp_path / "hf", "--output", tmp_path / "out")
  assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
  assert "error:" in done.stderr and "embedding" in done.stderr
  assert not list(tmp_path.glob("out*"))

  from_hf.main(["--checkpoint", str(tmp_path / "hf"), "--output", str(tmp_path / "run")])
  done = run("conversion.to_hf", "--checkpoint", tmp_path / "run", "--output", tmp_path / "out")
  assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
  assert "error:" in done.stderr and "out.part" in done.stderr
  assert not list(tmp_path.glob("out*"))


def test_interrupted(good, capsys, monkeypatch, tmp_path):
  folder, _, tensors = good
  write, calls = Writer.write, []

  def interrupted(self, *args):
    calls.append(1)
    if len(calls) == 20:
      raise KeyboardInterrupt
    write(self, *args)

  monkeypatch.setattr(Writer, "write", interrupted)
  assert from_hf.main(["--checkpoint", str(folder), "--output", str(tmp_path / "out")]) == 130
  assert not list(tmp_path.glob("out*"))
  monkeypatch.undo()
  # A run that was killed leaves a folder that nothing takes for whole, and the next one clears it.
  part, args = tmp_path / "out.part", ["--checkpoint", str(folder), "--output",
                                       str(tmp_path / "out")]
  (part / "checkpoints/0").mkdir(parents=True)
  assert from_hf.main(args) == 2 and (part / "checkpoints").exists()  # not ours, as it seems
  assert "no conversion left it" in capsys.readouterr().err
  (part / ".being-written").touch()
  with finished_folder(tmp_path / "out"):
    assert from_hf.main(args) == 2
    assert "another conversion" in capsys.readouterr().err
  shutil.rmtree(tmp_path / "out")
  (part / "checkpoints/0").mkdir(parents=True)
  (part / ".being-written").touch()
  assert from_hf.main(args) == 0
  assert [p.name for p in tmp_path.glob("out*")] == ["out"]
  assert len(parameter_homes(tmp_path / "out")) > 30
  with pytest.raises(ValueError, match="another model"):
    load_params(tmp_path / "out", {"decoder/nothing": None})


def test_damaged_checkpoint_on_the_way_back(good, capsys, tmp_path):
  folder, _, _ = good
  assert from_hf.main(["--checkpoint", str(folder), "--output", str(tmp_path / "run")]) == 0
  array = tmp_path / "run/checkpoints/0/state/params.decoder.norm.scale"
  (array / "c/0").unlink()
  args = ["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "back")]
  assert to_hf.main(args) == 2
  assert "decoder/norm/scale" in capsys.readouterr().err
  assert not list(tmp_path.glob("back*"))
  assert to_hf.main(["--checkpoint", str(tmp_path / "none"), "--output", "x"]) == 2
