"""Several hosts: they join or say why not, stop together, and none outlives one that is lost."""
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest
from jax.experimental import multihost_utils
from small_run import close, same, saved

from mgjax.checkpoint import Checkpointer
from mgjax.config import ConfigError
from mgjax.train import hosts, watcher
from mgjax.train.watcher import Host, verdict

REPO = pathlib.Path(__file__).parents[2]


# What the watchers make of what they hear.


def host(name, **known):
  return Host(name, **{"heard": 100.0, "doing": "step 7", "place": 20, "since": 99.0,
                       "limit": 60.0} | known)


def test_nothing_is_wrong():
  assert verdict({0: host("a"), 1: host("b")}, 101.0) == ""
  assert verdict({0: host("a"), 1: host("b", left=True, heard=0.0)}, 101.0) == ""


@pytest.mark.parametrize("first,second,now,said", [
    # A killed process is told at once, host 0's before those that jax ends with it.
    ({}, dict(gone_at=100.0), 101.5, "host 1 (b) ended without a word"),
    (dict(gone_at=100.1), dict(gone_at=100.0), 101.5, "host 0 (a) ended without a word"),
    # Silence, and an abort of whoever waited for the silent one.
    ({}, dict(heard=59.0), 100.0, "host 1 (b) did not answer for 41 s"),
    (dict(gone_at=100.0), dict(heard=70.0), 101.5, "host 1 (b) did not answer for 32 s"),
    # An error ends the others when they had time to end by themselves ...
    ({}, dict(failed="OSError: disk", failed_at=90.0), 100.0, "host 1 (b) stopped: OSError: disk"),
    ({}, dict(failed="OSError: disk", failed_at=99.0), 100.0, ""),
    # ... and one of the devices only if nothing else comes to light.
    ({}, dict(failed="XLA", failed_at=90.0, maybe_another=True), 100.0, ""),
    ({}, dict(failed="XLA", failed_at=50.0, maybe_another=True), 100.0, "host 1 (b) stopped: XLA"),
    (dict(failed="XLA", failed_at=98.0, maybe_another=True), dict(gone_at=98.5), 100.0,
     "host 1 (b) ended"),
    # A hang: the furthest behind is to blame, whoever is late.
    (dict(since=20.0), dict(since=30.0, place=19, doing="load"), 100.0,
     "host 1 (b) did not get past 'load' for 70 s"),
    (dict(since=20.0), dict(since=20.0), 100.0, "no host has got past 'step 7' for 80 s"),
    (dict(since=20.0, limit=900.0), dict(since=20.0, limit=900.0), 100.0, ""),
])
def test_who_is_to_blame(first, second, now, said):
  got = verdict({0: host("a", **first), 1: host("b", **second)}, now)
  assert (said in got) if said else got == ""


class Watched:
  """A watcher with this test in the place of the training process."""

  def __init__(self, number, **hello):
    self.process = subprocess.Popen(["sleep", "60"])
    self.watcher = subprocess.Popen([sys.executable, watcher.__file__], text=True,
                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    stderr=subprocess.PIPE)
    self.say(host=number, name=f"h{number}", pid=self.process.pid, token="secret",
             address="127.0.0.1", **hello)

  def say(self, **message):
    self.watcher.stdin.write(json.dumps(message) + "\n")
    self.watcher.stdin.flush()

  def hear(self):
    return json.loads(self.watcher.stdout.readline())

  def end(self):
    for process in (self.process, self.watcher):
      process.kill()
      process.wait()


@pytest.fixture
def pair():
  one = Watched(0)
  port = one.hear()["port"]
  two = Watched(1, judge=["127.0.0.1", port], judge_name="h0")
  for h in (one, two):
    h.say(doing="step 5", place=9, age=0.0, limit=60.0, step=4)
  yield one, two, port
  one.end()
  two.end()


def test_watchers_tell_of_a_death_and_end_who_does_not(pair):
  one, two, port = pair
  with socket.create_connection(("127.0.0.1", port)) as stranger:
    stranger.sendall(b'{"token": "guessed", "host": 1, "name": "x"}\n')
    assert stranger.recv(100) == b""
  time.sleep(1.0)  # both are connected
  two.watcher.stdin.close()  # as its process is killed
  told = one.hear()["end"]
  assert "host 1 (h1) ended without a word" in told and "last step done here: 4" in told
  # This one does not end itself, as if it were stopped.
  assert one.process.wait(20) == -signal.SIGKILL
  assert two.watcher.wait(20) == 0
  assert "host 1 (h1) ended" in two.watcher.stderr.read()


def test_watchers_leave_with_their_processes(pair):
  one, two, _ = pair
  time.sleep(1.0)
  for h in (two, one):
    h.say(left=True)
  assert [h.watcher.wait(20) for h in (two, one)] == [0, 0]
  assert two.watcher.stderr.read() == two.watcher.stdout.read() == ""


# Joining.


@pytest.mark.parametrize("address,count,which,said", [
    ("", 2, 0, "--coordinator is ''"), ("machine", 2, 0, "expected HOST:PORT"),
    ("machine:80", 0, 0, "--hosts is 0"), ("machine:80", 2, -1, "--host is -1"),
    ("machine:80", 2, 2, "0 to 1")])
def test_addresses_that_do_not_fit(address, count, which, said):
  with pytest.raises(ConfigError, match=said):
    hosts.check_address(address, count, which)


def test_a_pod_is_known_by_its_metadata(monkeypatch):
  told, asked = {}, []
  monkeypatch.setattr(hosts, "_metadata", lambda key: (asked.append(key), told.get(key, ""))[1])
  monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: name == "libtpu")
  monkeypatch.setattr(hosts.glob, "glob", lambda pattern: [])
  for name in ("JAX_PLATFORMS", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES",
               "MEGASCALE_NUM_SLICES"):
    monkeypatch.delenv(name, raising=False)
  assert not hosts.is_tpu_pod() and not asked  # no TPU here: nobody is asked
  monkeypatch.setattr(hosts.glob, "glob", lambda pattern: ["/dev/accel0"] * ("accel" in pattern))
  assert not hosts.is_tpu_pod()  # nobody answers
  told["worker-network-endpoints"] = "unknown:0:10.0.0.2"
  assert not hosts.is_tpu_pod()
  told["worker-network-endpoints"] += ",unknown:1:10.0.0.3"
  assert hosts.is_tpu_pod()
  told["worker-network-endpoints"] = "unknown:0:10.0.0.2"
  told["tpu-env"] = "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n"
  assert hosts.is_tpu_pod()
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert not hosts.is_tpu_pod()


CONFIG = """
import dataclasses, json, pathlib, time
from ml_collections import ConfigDict
from small_run import make_run
from mgjax.data.samples import DataError
from mgjax.train import loop
from mgjax.train.optimizer import Row

def get_config(how=""):
  root = pathlib.Path(__file__).parent
  run = make_run(root, steps=6)
  text = root / "text.json"
  if not text.exists():
    text.write_text(json.dumps([{"id": str(i), "conversations": [
        {"from": "human", "value": f"What is {i}?"}, {"from": "gpt", "value": f"It is {i}."}]}
        for i in range(24)]))
  config = ConfigDict(dataclasses.asdict(dataclasses.replace(
      run, model=dataclasses.replace(run.model, vision=None, vision_hr=None),
      data=dataclasses.replace(run.data, path=str(text), images_per_row=0),
      optimizer=dataclasses.replace(run.optimizer, table=(Row("^decoder/"),)))))
  config.mesh.data = 8
  usage, following, calls = loop.usage, loop.Prefetcher.__next__, []
  def waits(*args):  # at the end of a step
    calls.append(None)
    time.sleep({"slow": 1, "hang": 10_000 * (len(calls) == 3)}[how])
    return usage(*args)
  def breaks(self):
    calls.append(None)
    if len(calls) == 4:
      raise DataError("sample #9 is broken")
    return following(self)
  if how in ("slow", "hang"):
    loop.usage = waits
  if how == "bad":
    loop.Prefetcher.__next__ = breaks
  return config
"""


def free_port():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


class Run:
  """launch/train.py on a text model in `count` processes of 8 / count devices each."""

  def __init__(self, root, name, *flags, count=2, configs=None, port=None):
    (root / "config.py").write_text(CONFIG)
    self.workdir, address = root / name, f"localhost:{port or free_port()}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(8 // count),
                        "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests/train")])}
    how = configs or {}
    if count > 1:
      flags += (f"--coordinator={address}", f"--hosts={count}")
    self.processes = [subprocess.Popen(
        [sys.executable, "launch/train.py", f"--config={root / 'config.py'}{how.get(i, '')}",
         f"--workdir={self.workdir}", *flags, *([f"--host={i}"] if count > 1 else [])],
        cwd=REPO, env=env, stderr=subprocess.PIPE, text=True) for i in range(count)]

  def steps(self):
    file = self.workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

  def reach(self, step):
    while len(self.steps()) < step:
      assert all(p.poll() is None for p in self.processes), self.end()
      time.sleep(0.05)

  def end(self, within=300):
    """Exit statuses and last lines."""
    said = [p.communicate(timeout=within)[1] for p in self.processes]
    return [p.returncode for p in self.processes], [s.strip().splitlines()[-1:] for s in said]


def one_host(root, port, number):
  """Exit status and output of a host that nobody joins."""
  run = Run(root, "run", "--join_timeout=2", port=port)
  for i, p in enumerate(run.processes):
    if i != number:
      p.kill()
      p.communicate()
  return run.processes[number].communicate(timeout=60)[1], run.processes[number].returncode


def test_a_checkpoint_asks_nobody_whether_to_stop(tmp_path, monkeypatch):
  """Hosts agree on a place by counting how often they asked: nobody else may."""
  asked = []
  monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
  checkpointer = Checkpointer(tmp_path, every=1, keep=1)
  for step in (1, 2):
    checkpointer.save(step, {"a": jnp.zeros(3)}, {"at": step})
  checkpointer.close()
  assert (tmp_path / "checkpoints/2").is_dir() and not asked


def test_hosts_that_do_not_come_are_told_in_time(tmp_path):
  port = free_port()
  said, status = one_host(tmp_path, port, 1)
  assert status == 1 and "Traceback" not in said
  assert f"--coordinator localhost:{port} could not be reached for 2 s" in said.splitlines()[-1]
  said, status = one_host(tmp_path, port, 0)
  assert status == 1 and "Traceback" not in said
  assert f"waited 2 s for the other hosts, of which there should be 2, at localhost:{port}" in said


# Whole runs.


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """A run of six steps over two hosts that nothing broke."""
  root = tmp_path_factory.mktemp("hosts")
  run = Run(root, "straight")
  assert run.end()[0] == [0, 0]
  return root


@pytest.mark.slow
def test_two_hosts_of_four_devices_are_one_of_eight(straight):
  assert Run(straight, "one", count=1).end()[0] == [0]
  close(straight, "one", "straight", 6)


def goes_on(root, name):
  """The run that was broken, started again, is the one that was not."""
  assert Run(root, name).end()[0] == [0, 0]
  same(saved(root / "straight", 6), saved(root / name, 6))
  losses = [[(x["step"], x["loss"]) for x in map(json.loads, (root / n / "metrics.jsonl")
                                                 .read_text().splitlines())]
            for n in ("straight", name)]
  assert losses[0] == losses[1]


SLOW = {0: ":slow", 1: ":slow"}


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_host_ends_the_other_and_both_go_on(straight, victim):
  name = f"killed{victim}"
  run = Run(straight, name, "--config.checkpoint.every=1", configs=SLOW)
  run.reach(3)
  killed, pid = time.monotonic(), run.processes[victim].pid
  run.processes[victim].kill()
  status, said = run.end()
  assert time.monotonic() - killed < 60
  assert status[victim] == -signal.SIGKILL and status[1 - victim] != 0
  for line in said:  # the watcher of the killed one speaks as well
    assert f"error: the process of host {victim} (" in line[0] and f"pid {pid})" in line[0]
    assert "last step done here: " in line[0] and "same --workdir" in line[0]
  goes_on(straight, name)


@pytest.mark.slow
def test_a_stopped_host_ends_both(straight):
  run = Run(straight, "stopped", configs=SLOW)
  run.reach(2)
  os.kill(run.processes[1].pid, signal.SIGSTOP)
  status, said = run.end(within=100)
  assert status[0] != 0 and status[1] == -signal.SIGKILL
  for line in said:
    assert "error: host 1 (" in line[0] and ") did not answer for 4" in line[0]


@pytest.mark.slow
def test_a_host_that_hangs_ends_both(straight):
  run = Run(straight, "hung", "--config.hang_timeout=8", configs={1: ":hang"})
  status, said = run.end(within=100)
  assert status == [1, 1]
  for line in said:
    assert "error: host 1 (" in line[0] and "did not get past 'save step 3' for " in line[0]


@pytest.mark.slow
def test_a_notice_to_one_host_stops_all_at_the_same_step(straight):
  run = Run(straight, "told", configs=SLOW)
  run.reach(2)
  run.processes[1].send_signal(signal.SIGTERM)
  assert run.end()[0] == [0, 0]
  steps = [x["step"] for x in run.steps()]
  assert 2 <= steps[-1] < 6
  assert [p.name for p in (run.workdir / "checkpoints").iterdir()] == [str(steps[-1])]
  goes_on(straight, "told")


@pytest.mark.slow
def test_bad_data_on_one_host_stop_all_and_lose_nothing(straight):
  run = Run(straight, "bad", configs={1: ":bad"})
  status, said = run.end()
  assert status == [1, 1]
  assert "host 1 could not load its next batch" in said[0][0]
  assert said[1][0].endswith("error: sample #9 is broken")
  assert [p.name for p in (run.workdir / "checkpoints").iterdir()] == ["3"]
  goes_on(straight, "bad")


ANY_MESH = """
import pathlib, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from mgjax import trees
from mgjax.checkpoint import Checkpointer
from mgjax.sharding import make_mesh, mesh_context
from mgjax.train.optimizer import make_optimizer
from mgjax.train.state import abstract_state, init_state
from small_run import make_run
root = pathlib.Path(sys.argv[1])
config = make_run(root, steps=2)
tx = make_optimizer(config.optimizer, 2)

def abstract(shape, devices):
  mesh = make_mesh(shape, devices)
  with mesh_context(mesh):
    return mesh, abstract_state(config, tx, mesh)[1]

def filled(spec, rng):  # the optimizer's zeros would show nothing
  value = (rng.standard_normal(spec.shape) * 100).astype(spec.dtype)
  return jax.make_array_from_callback(spec.shape, spec.sharding, lambda i: value[i])

rng = np.random.default_rng(0)
before = jax.tree.map(lambda s: filled(s, rng), abstract((8, 1, 1, 1), jax.devices())[1].as_dict())
saver = Checkpointer(root / "run", every=1, keep=1)
saver.save(1, before, {"place": 3}, force=True)
saver.close()
for shape in ((2, 4, 1, 1), (4, 2, 1, 1), (1, 2, 2, 2), (1, 1, 1, 1)):
  count = int(np.prod(shape))
  wanted = abstract(shape, jax.devices()[:count])[1].as_dict()
  reader = Checkpointer(root / "run", every=1, keep=1)
  after, place = reader.restore(wanted)
  reader.close()
  assert place == {"place": 3}
  split = 0
  for (key, a), (_, b), (_, w) in zip(*(sorted(trees.flatten(t).items()) for t in
                                        (before, after, wanted))):
    assert b.sharding.is_equivalent_to(w.sharding, b.ndim), key
    split += not b.sharding.is_fully_replicated
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=key)
  assert (split > 0) == (max(shape[1:]) > 1)
"""


@pytest.mark.slow
def test_a_checkpoint_goes_onto_any_mesh(tmp_path):
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(
      [str(REPO), str(REPO / "tests/train")])}
  subprocess.run([sys.executable, "-c", ANY_MESH, str(tmp_path)], env=env, check=True, timeout=300)
