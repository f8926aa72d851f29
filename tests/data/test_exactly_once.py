"""An epoch under kills, with other numbers of workers and hosts, is the epoch undisturbed."""
import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from records import talk

from mgjax.data.pipeline import make_pipeline

READER = """
import dataclasses, json, pathlib, pickle, sys, time
from mgjax.data.pipeline import make_pipeline
from mgjax.data.tokenizer import load_tokenizer

def main():
  folder, host, hosts, workers = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:])
  config = pickle.loads((folder / "config.pkl").read_bytes())
  pipeline = make_pipeline(dataclasses.replace(config, workers=workers),
                           load_tokenizer(sys.argv[0]), host=host, hosts=hosts)
  batches = iter(pipeline)
  journal = folder / f"host{host}.jsonl"
  lines = journal.read_text().splitlines() if journal.exists() else []
  if lines:
    batches.set_state(json.loads(lines[-1])["state"])
  with open(journal, "a", buffering=1) as file:
    for step in range(len(lines), pipeline.steps_per_epoch):
      batch = next(batches)
      rows = [[int(n) for n in row if n >= 0] for row in batch["sample_index"]]
      file.write(json.dumps({"step": step, "rows": rows, "pixels": int(batch["images"].sum()),
                             "state": batches.get_state()}) + "\\n")
      time.sleep(0.02)
  batches.close()

if __name__ == "__main__":
  main()
"""


def whole_lines(path):
  """The journal of a host; a last line that was cut short is none."""
  lines = path.read_text().splitlines(True) if path.exists() else []
  return [line for line in lines if line.endswith("\n")]


def agree(folder, hosts):
  """What all hosts have read, as a common checkpoint would: later lines are dropped."""
  journals = [folder / f"host{h}.jsonl" for h in range(hosts)]
  common = min(len(whole_lines(j)) for j in journals)
  for journal in journals:
    journal.write_text("".join(whole_lines(journal)[:common]))
  return common


def run(folder, script, hosts, workers, stop_at=None):
  """One life of the readers; killed once the slowest has read `stop_at` batches."""
  env = os.environ | {"PYTHONPATH": os.getcwd()}
  processes = [subprocess.Popen([sys.executable, script, str(folder), str(h), str(hosts),
                                 str(workers)], env=env, start_new_session=True)
               for h in range(hosts)]
  try:
    deadline = time.monotonic() + 120
    while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
      if stop_at is not None and all(
          len(whole_lines(folder / f"host{h}.jsonl")) >= stop_at for h in range(hosts)):
        for p in processes:
          p.kill()
        break
      time.sleep(0.005)
    codes = [p.wait(timeout=60) for p in processes]
    # A host that is far ahead of the other may be through when that one is killed.
    assert set(codes) <= ({0} if stop_at is None else {0, -signal.SIGKILL}), codes
    deadline = time.monotonic() + 30
    while any(map(group_lives, processes)) and time.monotonic() < deadline:
      time.sleep(0.02)
    assert not any(map(group_lives, processes)), "workers outlive the run that was killed"
  finally:
    for p in processes:  # their workers too
      try:
        os.killpg(p.pid, signal.SIGKILL)
      except ProcessLookupError:
        pass


def group_lives(process):
  """Whether a process that `process` started, or one of theirs, is still there."""
  try:
    os.killpg(process.pid, 0)
  except ProcessLookupError:
    return False
  return True


@pytest.fixture
def epoch(dataset, tmp_path, llama, cases):
  """A packed data set of 150 samples, and the rows of its unbroken first epoch."""
  rng, records = np.random.default_rng(0), []
  for i in range(150):
    tag = "<image>\n" if i % 4 else ""
    records.append({"id": f"s{i}", "conversations": talk(
        f"{tag}Q {i}?", "word " * int(rng.integers(1, 12)))})
    if tag:
      records[-1]["image"] = f"{i % 3}.png"
  config = dataset(records, batching="packed", row_length=400, images_per_row=4, batch_size=2)
  (tmp_path / "config.pkl").write_bytes(pickle.dumps(config))
  # argv[0] names the tokenizer's folder too: a script inside a copy of it
  tokenizer = tmp_path / "small_llama"
  tokenizer.mkdir()
  for file in (cases / "small_llama").iterdir():
    (tokenizer / file.name).write_bytes(file.read_bytes())
  (tokenizer / "__main__.py").write_text(READER)
  pipeline = make_pipeline(config, llama)
  iterator = iter(pipeline)
  batches = [next(iterator) for _ in range(pipeline.steps_per_epoch)]
  return tmp_path, str(tokenizer), [
      ([[int(n) for n in row if n >= 0] for row in b["sample_index"]], int(b["images"].sum()))
      for b in batches]


def test_every_sample_once_under_kills(epoch):
  folder, script, expected = epoch
  steps = len(expected)
  rng = random.Random(time.time_ns())
  kills = sorted(rng.sample(range(1, steps - 8), 4))  # a reader may be some batches further
  seen = []
  # (hosts, workers, killed at); the last life ends by itself
  for hosts, workers, stop_at in ((1, 2, kills[0]), (1, 0, kills[1]), (2, 1, kills[2]),
                                  (2, 0, kills[3]), (2, 0, None)):
    if hosts == 2 and not (folder / "host1.jsonl").exists():
      (folder / "host1.jsonl").write_text((folder / "host0.jsonl").read_text())
    begin = agree(folder, hosts)
    if stop_at is not None:
      stop_at = max(stop_at, begin + 1)  # the life before may have passed it
    run(folder, script, hosts, workers, stop_at)
    end = agree(folder, hosts)
    assert end > begin, (kills, hosts, workers)
    lines = [[json.loads(x) for x in whole_lines(folder / f"host{h}.jsonl")[begin:end]]
             for h in range(hosts)]
    for per_host in zip(*lines):
      rows = [None] * 2
      for h, line in enumerate(per_host):
        rows[h::hosts] = line["rows"]
      seen.append((rows, sum(line["pixels"] for line in per_host)))
  assert seen == expected, kills
  assert sorted(n for rows, _ in seen for row in rows for n in row) == list(range(150))


def test_a_killed_worker_is_replaced(epoch, llama, monkeypatch):
  folder, _, expected = epoch
  config = pickle.loads((folder / "config.pkl").read_bytes())
  told = []
  monkeypatch.setattr("mgjax.data.pipeline.logging.warning", lambda text, *args: told.append(text))
  batches = iter(make_pipeline(dataclasses.replace(config, workers=2), llama))
  seen = []
  try:
    for step in range(len(expected)):
      if step in (3, 9):
        child = multiprocessing.active_children()[0]
        os.kill(child.pid, signal.SIGKILL)
      batch = next(batches)
      seen.append(([[int(n) for n in row if n >= 0] for row in batch["sample_index"]],
                   int(batch["images"].sum())))
  finally:
    batches.close()
  assert seen == expected
  assert any("a worker was killed" in text for text in told)
