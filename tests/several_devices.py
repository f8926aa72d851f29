"""Runs a function of a test file where the CPU looks like several devices."""
import os
import pathlib
import subprocess
import sys


def run(file: str, function: str, devices: int) -> None:
  """Calls `function()` of a test file in a process of its own; fails if it does."""
  here = pathlib.Path(file)
  env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices),
                      "PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path])}
  subprocess.run([sys.executable, "-c", f"import {here.stem}; {here.stem}.{function}()"], env=env,
                 check=True)
