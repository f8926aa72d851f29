"""A converted checkpoint is a normal one: it answers on any mesh, trains, and goes back."""
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from folders import BF16, config_of, make_folder

from configs import stage2
from conversion import from_hf, inspect, to_hf
from conversion.tensors import open_tensors
from mgjax.checkpoint import load_model, read_run
from mgjax.config import ConfigError
from mgjax.sharding import make_mesh, mesh_context
from mgjax.train.config import run_config
from mgjax.train.loop import train

REPO = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  """A folder with `hf`, `run`, and the data of two samples."""
  root = tmp_path_factory.mktemp("use")
  config = config_of("llama", vocab_size=1024, torch_dtype="bfloat16")
  make_folder(root / "hf", config, BF16, shards=2)
  for file in (REPO / "tests/data/cases/small_yi").iterdir():
    shutil.copy(file, root / "hf")
  shutil.copy(REPO / "tests/data/cases/odd_75x102.png", root / "a.png")
  record = {"id": "a", "image": "a.png", "conversations": [
      {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A dog."}]}
  (root / "data.json").write_text(json.dumps([record, record | {"id": "b"}]))
  assert from_hf.main(["--checkpoint", str(root / "hf"), "--output", str(root / "run")]) == 0
  return root


def test_what_travels(converted):
  run = read_run(converted / "run")[1]
  assert run["chat_template"] == "chatml_direct"  # its tokenizer has <|im_end|>
  assert (run["chat_stop_ids"], run["chat_aspect"]) == ([2, 5], "pad")
  assert run["data"]["max_length"] == 128


def ask(checkpoint, devices: int) -> str:
  env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
  done = subprocess.run(
      [sys.executable, "launch/chat.py", "--checkpoint", str(checkpoint), "--image",
       str(checkpoint.parent / "a.png"), "--prompt", "What is this?", "--max_new_tokens", "8"],
      cwd=REPO, env=env, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_answers_alike_on_any_mesh(converted):
  assert ask(converted / "run", 1) == ask(converted / "run", 8) != "\n"


def test_trains_and_goes_back(converted, tmp_path):
  values = stage2.get_config(str(converted / "run")).to_dict()
  assert values["init_from"] == str(converted / "run")
  values |= {"steps": 1, "mesh": {"fsdp": 1}}
  values["data"] |= {"path": str(converted / "data.json"), "image_root": str(converted),
                     "batch_size": 2}
  values["optimizer"] |= {"warmup_ratio": 0.0}
  assert train(run_config(values), tmp_path / "tuned") == 1
  assert read_run(tmp_path / "tuned")[1]["chat_stop_ids"] == [2, 5]
  args = ["--checkpoint", str(tmp_path / "tuned"), "--output"]
  assert to_hf.main([*args, str(tmp_path / "mgm"), "--dtype", "bfloat16"]) == 0
  assert inspect.main([str(tmp_path / "mgm")]) == 0
  before, after = open_tensors(converted / "hf"), open_tensors(tmp_path / "mgm")
  assert set(before.headers) == set(after.headers)
  moved = {n for n in after.headers if (after.read(n) != before.read(n)).any()}
  assert moved and not any("vision_tower" in n for n in moved)  # frozen towers stay bit for bit
  config = json.loads((converted / "hf/config.json").read_text())
  assert json.loads((tmp_path / "mgm/config.json").read_text()) == config
  assert (tmp_path / "mgm/tokenizer.model").is_file()
  # What trains is kept in float32, and goes out as such unless asked otherwise.
  assert to_hf.main([*args, str(tmp_path / "wide")]) == 0
  assert open_tensors(tmp_path / "wide").headers["lm_head.weight"].dtype == np.float32


def test_a_language_model_alone(converted, tmp_path):
  make_folder(tmp_path / "hf", config_of("mixtral", text=True, vocab_size=1024), BF16)
  for file in (REPO / "tests/data/cases/small_yi").iterdir():
    shutil.copy(file, tmp_path / "hf")
  assert from_hf.main(["--llm", str(tmp_path / "hf"), "--output", str(tmp_path / "run")]) == 0
  mesh = make_mesh()
  with mesh_context(mesh):
    model = load_model(tmp_path / "run", mesh, dtype=np.float32).model
  assert model.config.visual_tokens == 0 and model.vision is None
  values = stage2.get_config(str(tmp_path / "run")).to_dict()
  text = [{"id": "t", "conversations": [{"from": "human", "value": "What is 1?"},
                                        {"from": "gpt", "value": "A number."}]}]
  (tmp_path / "text.json").write_text(json.dumps(text))
  values["data"] |= {"path": str(tmp_path / "text.json"), "batch_size": 1}
  values |= {"steps": 1, "router_loss": 0.01, "mesh": {"fsdp": 1}}
  assert train(run_config(values), tmp_path / "tuned") == 1
  values["data"]["images_per_row"] = 1
  with pytest.raises(ConfigError, match="language model alone"):
    run_config(values)
