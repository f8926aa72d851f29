"""However many devices and hosts there are, it is the same run."""
import os
import socket
import subprocess
import sys

import pytest
from small_run import close, make_run

# argv: folder, name of the run, devices, mesh, steps, process, processes, port
SCRIPT = """
import dataclasses, pathlib, sys
import jax
folder, name, devices, mesh, steps, process, processes, port = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
jax.config.update("jax_default_matmul_precision", "highest")
if processes != "1":
  jax.distributed.initialize(f"localhost:{port}", int(processes), int(process))
from mgjax.train.config import MeshConfig
from mgjax.train.loop import train
from small_run import make_run
run = make_run(folder, steps=int(steps))
run = dataclasses.replace(run, mesh=MeshConfig(*map(int, mesh.split("x"))))
train(run, pathlib.Path(folder) / name)
"""


def run_processes(root, name, *, devices=1, mesh="1x1x1x1", steps=3, processes=1):
  """A small run in processes of its own, with so many devices each."""
  here = os.path.dirname(os.path.abspath(__file__))
  env = os.environ | {"PYTHONPATH": os.pathsep.join([here, os.getcwd()]), "JAX_PLATFORMS": "cpu"}
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  started = [subprocess.Popen([sys.executable, "-c", SCRIPT, *map(str, (
      root, name, devices, mesh, steps, process, processes, port))], env=env)
             for process in range(processes)]
  assert [p.wait(timeout=300) for p in started] == [0] * processes


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  """A run of three steps on one device, called "one"."""
  root = tmp_path_factory.mktemp("processes")
  make_run(root, steps=3)
  run_processes(root, "one")
  return root


def test_eight_devices_equal_one(one):
  run_processes(one, "eight", devices=8, mesh="2x2x2x1")
  close(one, "one", "eight", 3)


@pytest.mark.slow  # tests/train/test_hosts.py too
def test_two_hosts_equal_one(one):
  run_processes(one, "two", mesh="2x1x1x1", processes=2)
  close(one, "one", "two", 3)


@pytest.mark.slow
def test_two_hosts_hand_over_to_one(tmp_path):
  make_run(tmp_path, steps=4)
  run_processes(tmp_path, "first", mesh="2x1x1x1", steps=2, processes=2)
  run_processes(tmp_path, "alone", steps=2)
  for name in ("first", "alone"):
    run_processes(tmp_path, name, steps=4)
  close(tmp_path, "alone", "first", 4)
