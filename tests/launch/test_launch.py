"""The commands as a user types them: train, resume, stop, chat, and mistakes."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from small_run import TOKENIZER, make_run

REPO = pathlib.Path(__file__).parents[2]
ENV = os.environ | {"JAX_PLATFORMS": "cpu"}


def command(root, *flags, config="stage2.py:tiny"):
  return [sys.executable, "launch/train.py", f"--config=configs/{config}", f"--workdir={root}/run",
          f"--config.data.path={root}/data.json", f"--config.data.image_root={root}",
          f"--config.tokenizer={TOKENIZER}", "--config.data.batch_size=4",
          "--config.remat.decoder=none",
          "--config.mesh.fsdp=1", "--config.dtype=float32", "--config.frozen_dtype=float32",
          "--config.data.max_length=64", "--config.data.row_length=128",
          "--config.data.images_per_row=2", *flags]


def call(args):
  return subprocess.run(args, cwd=REPO, env=ENV, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  root = tmp_path_factory.mktemp("launch")
  make_run(root, steps=1)
  # Stopped by SIGTERM on the way, then the same command again.
  args = command(root, "--config.steps=12")
  process = subprocess.Popen(args, cwd=REPO, env=ENV, stderr=subprocess.PIPE, text=True)
  metrics = root / "run" / "metrics.jsonl"
  for _ in range(2000):
    if metrics.exists() and len(metrics.read_text().splitlines()) >= 2:
      break
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert process.returncode == 0
  stopped = len(metrics.read_text().splitlines())
  assert 2 <= stopped < 12
  assert (root / "run" / "checkpoints" / str(stopped)).is_dir()
  again = call(args)
  assert again.returncode == 0, again.stderr
  steps = [json.loads(x)["step"] for x in metrics.read_text().splitlines()]
  assert steps == list(range(1, 13))
  return root


def test_a_run_leaves_what_it_should(trained):
  run = trained / "run"
  assert json.loads((run / "config.json").read_text())["model"]["hr_size"] == 128
  assert (run / "tokenizer" / "tokenizer.model").is_file()
  assert "12" in [p.name for p in (run / "checkpoints").iterdir()]
  assert list((run / "tensorboard").iterdir())
  record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
  assert {"loss", "learning_rate", "grad_norm", "tokens_per_s", "images_per_s",
          "step_time"} <= record.keys()


def test_chat_answers_from_the_checkpoint(trained):
  chat = [sys.executable, "launch/chat.py", "--checkpoint", str(trained / "run"),
          "--prompt", "What is 1?", "--max_new_tokens", "4"]
  with_image = call([*chat, "--image", str(trained / "1.png")])
  assert with_image.returncode == 0, with_image.stderr
  missing = call([*chat, "--image", "nowhere.png"])
  assert missing.returncode == 2 and "nowhere.png" in missing.stderr
  assert "Traceback" not in missing.stderr


@pytest.mark.parametrize("flags,said", [
    (["--config.mesh.fsdp=3"], "fsdp=3"),
    (["--config.optimizer.lerning_rate=1"], "learning_rate"),
    (["--config=configs/stage2.py:mgm-7c"], "did you mean 'mgm-7b'"),
    (["--config=configs/nowhere.py"], "nowhere.py"),
    (["--config.init_from=vision="], "config.init_from"),
    (["--config.init_from=nowhere"], "nowhere: no checkpoint found"),
    (["--workdir=gs://bucket/run"], "gs://bucket/run"),
    (["--config.data.path=nowhere.json"], "nowhere.json"),
    (["--config.tokenizer="], "config.tokenizer is empty"),
])
def test_mistakes_are_one_line(tmp_path, flags, said):
  make_run(tmp_path, steps=1)
  result = call(command(tmp_path, *flags))
  assert result.returncode != 0
  assert said in result.stderr
  assert "Traceback" not in result.stderr


def test_bad_samples_stop_or_are_skipped(tmp_path):
  make_run(tmp_path, steps=1)
  records = json.loads((tmp_path / "data.json").read_text())
  records[1]["image"] = "../outside.png"
  records[2]["image"] = "missing.png"
  (tmp_path / "data.json").write_text(json.dumps(records))
  stopped = call(command(tmp_path, "--config.steps=1"))
  assert stopped.returncode != 0 and "Traceback" not in stopped.stderr
  for said in ("#1 (id s1)", "#2 (id s2)", "missing.png", "on_error=skip"):
    assert said in stopped.stderr
  skipped = call(command(tmp_path, "--config.steps=1", "--config.data.on_error=skip"))
  assert skipped.returncode == 0, skipped.stderr
  assert "missing_image 1" in skipped.stderr and "path_escape 1" in skipped.stderr
  told = [json.loads(x) for x in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
  assert [(x["index"], x["kind"]) for x in told] == [(1, "path_escape"), (2, "missing_image")]
