"""Time and memory of launch/check_data.py on a large data file, made on the spot.

    python benchmarks/doctor.py [--records 1000000] [--images none,headers] [--tokenizer DIR]

Records are like those of LLaVA: a question of about 15 words with a picture, an answer of about 80
words (lognormal), one in eight without a picture.  Memory is the sum over the check's processes,
sampled from /proc; PSS counts what several of them share once.  The minutes of CPU tell what a
machine that others use hides.
"""
import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

REPO = Path(__file__).parents[1]
PICTURES = 256


def make_data(root: Path, records: int) -> int:
  """Writes data.json and pictures; returns the bytes of the file."""
  rng = np.random.default_rng(0)
  for k in range(PICTURES):
    path = root / "images" / f"{k % 16:02d}" / f"{k:04d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(path)
  text = "".join(p.read_text() for p in [REPO / "README.md", *REPO.glob("mgjax/**/*.py")])
  words = np.array(re.findall(r"\b[A-Za-z]{1,12}\b[,.]?", text))
  with open(root / "data.json", "w") as file:
    file.write("[\n")
    for i in range(records):
      asked = max(3, rng.poisson(15))
      said = int(np.clip(rng.lognormal(np.log(63), 0.7), 1, 1000))  # 80 on average
      some = words[rng.integers(0, len(words), asked + said)].tolist()
      picture = i % 8 > 0
      record = {"id": f"{i:09d}"} | ({"image": f"{i % 16:02d}/{i % PICTURES:04d}.jpg"}
                                     if picture else {})
      record["conversations"] = [
          {"from": "human", "value": "<image>\n" * picture + " ".join(some[:asked]) + "?"},
          {"from": "gpt", "value": " ".join(some[asked:])}]
      file.write((",\n" if i else "") + json.dumps(record))
    file.write("\n]\n")
  return (root / "data.json").stat().st_size


def memory(pid: int) -> tuple[int, int]:
  """(resident, proportional) bytes of a process and all below it."""
  resident = shared = 0
  for task in Path(f"/proc/{pid}/task").glob("*/children"):
    for child in task.read_text().split():
      found = memory(int(child))
      resident, shared = resident + found[0], shared + found[1]
  told = Path(f"/proc/{pid}/smaps_rollup").read_text()
  size = lambda name: int(re.search(rf"^{name}:\s+(\d+)", told, re.M)[1]) * 1024
  return resident + size("Rss"), shared + size("Pss")


def run(root: Path, images: str, tokenizer: Path) -> tuple[float, int, int]:
  """Seconds, peak of resident and of proportional bytes."""
  command = [sys.executable, "launch/check_data.py", "--config=configs/stage2.py:mgm-7b",
             f"--config.tokenizer={tokenizer}", f"--config.data.path={root}/data.json",
             f"--config.data.image_root={root}/images", f"--report={root}/report",
             f"--images={images}"]
  started = time.perf_counter()
  process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
  peaks = (0, 0)
  while process.poll() is None:
    try:
      peaks = tuple(map(max, peaks, memory(process.pid)))
    except (OSError, TypeError):  # one that has just ended
      pass
    time.sleep(0.2)
  seconds = time.perf_counter() - started
  print(process.stdout.read())
  if process.returncode:
    sys.exit(f"{' '.join(command)}: exit status {process.returncode}")
  return seconds, *peaks


def cpu_seconds() -> float:
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--records", type=int, default=1_000_000)
  parser.add_argument("--images", default="none", help="one or several of none, headers, decode")
  parser.add_argument("--tokenizer", type=Path, default=REPO / "tests/data/cases/small_llama")
  parser.add_argument("--folder", type=Path, help="for the data; default: a temporary one")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=args.folder) as root:
    size = make_data(Path(root), args.records)
    for images in args.images.split(","):
      before = cpu_seconds()
      seconds, resident, shared = run(Path(root), images, args.tokenizer)
      cpu = cpu_seconds() - before
      print(f"--images={images}: {args.records:,} records, {size / 1e9:.2f} GB of JSON: "
            f"{seconds / 60:.2f} minutes ({cpu / 60:.2f} of CPU), {args.records / seconds:,.0f} "
            f"records/s; peak memory {resident / 1e9:.2f} GB (RSS), {shared / 1e9:.2f} GB (PSS)",
            flush=True)


if __name__ == "__main__":
  main()
