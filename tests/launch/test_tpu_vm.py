"""launch/tpu_vm.sh: the commands that it would run."""
import os
import pathlib
import shlex
import subprocess

import pytest

REPO = pathlib.Path(__file__).parents[2]


@pytest.fixture
def call(tmp_path):
  """Runs it with a gcloud that only fails, whatever is installed here."""
  (tmp_path / "gcloud").write_text("#!/bin/sh\nexit 9\n")
  (tmp_path / "gcloud").chmod(0o755)
  env = {k: v for k, v in os.environ.items() if not k.startswith("TPU_")}
  env |= {"PATH": f"{tmp_path}:{env['PATH']}"}
  return lambda *args: subprocess.run(["bash", "launch/tpu_vm.sh", *args], cwd=REPO, env=env,
                                      capture_output=True, text=True, timeout=60)


PLACE = ("--name=mine", "--zone=us-east5-a", "--dry-run")


def commands(result):
  assert result.returncode == 0, result.stderr
  return [shlex.split(line) for line in result.stdout.splitlines()]


def test_one_slice_from_making_it_to_deleting_it(call):
  kind = ("--type=v5p-64", "--version=v2-alpha-tpuv5")
  vm = "gcloud compute tpus tpu-vm".split()
  assert commands(call("create", *PLACE, *kind, "--project=p", "--spot")) == [
      [*vm, "create", "mine", "--zone=us-east5-a", "--project=p", "--accelerator-type=v5p-64",
       "--version=v2-alpha-tpuv5", "--spot"]]
  on_all = [*vm, "ssh", "mine", "--zone=us-east5-a", "--worker=all"]
  assert [c[:-1] for c in commands(call("install", *PLACE))] == [on_all]
  tar, scp, unpack, clean = commands(call("copy", *PLACE))
  assert tar[0] == "tar" and f"{REPO}" in tar and "--exclude=./.venv" in tar
  assert scp[:6] == [*vm, "scp", tar[tar.index("-czf") + 1]] and "--worker=all" in scp
  assert unpack[:-1] == on_all and clean == ["rm", scp[5]]
  assert commands(call("delete", *PLACE)) == [[*vm, "delete", "mine", "--zone=us-east5-a"]]


def test_training_gets_its_arguments_whole(call):
  flags = ["--config=configs/stage2.py:mgm-7b", "--config.optimizer.table=((\"^a/\", 1.0),)"]
  for name, added in (("train", []), ("resume", []), ("profile", ["--config.profile.steps=10:13"])):
    remote = commands(call(name, *PLACE, "--", *flags))[0][-1].removeprefix("--command=")
    words = shlex.split(remote)  # as the worker's shell takes it
    start = words.index("launch/train.py")
    assert words[start + 1:words.index(">")] == added + flags
  assert "launch/train.py behind --" in call("train", *PLACE).stderr


def test_several_slices(call):
  queue, = commands(call("queue", *PLACE, "--slices=2", "--type=v6e-32", "--version=v"))
  assert queue[:6] == "gcloud compute tpus queued-resources create mine".split()
  assert {"--node-count=2", "--node-prefix=mine", "--runtime-version=v"} < set(queue)
  for name in ("install", "stop", "logs"):
    assert [c[5] for c in commands(call(name, *PLACE, "--slices=2"))] == ["mine-0", "mine-1"]


@pytest.mark.parametrize("args,said", [
    (["create"], "--name is missing"), (["create", *PLACE], "--type is missing"),
    (["logs", *PLACE, "--slices=0"], "--slices is 0"), (["fly", *PLACE], "unknown command fly"),
    (["logs", "--zonk"], "unknown flag --zonk"),
    (["create", *PLACE, "--slices=2", "--type=t", "--version=v"], "queue --slices=2")])
def test_mistakes_are_one_line(call, args, said):
  result = call(*args)
  assert result.returncode == 2 and said in result.stderr
  assert len(result.stderr.splitlines()) == 1


def test_a_worker_that_fails_is_told(call):
  assert call("logs", "--name=mine", "--zone=z", "--slices=2").returncode == 1
  assert "usage" in call("--help").stdout and call("--help").returncode == 0
