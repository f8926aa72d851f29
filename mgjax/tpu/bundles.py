"""What a Pallas kernel takes by the TPU compiler's own schedule: the instruction bundles that it
issues, one a cycle, read from a dump.  The text of a compiled program has no estimate of kernels.

Loops are multiplied by their trips.  Not counted: waiting for memory that computing does not hide,
stalls of the units.  Both sides of a branch are counted.
"""
from __future__ import annotations

import dataclasses
import re
from pathlib import Path

# What libtpu is told (in LIBTPU_INIT_ARGS, before it is first used) so that it writes the schedule.
DUMP_FLAGS = ("--xla_jf_dump_to={folder}", "--xla_jf_dump_llo_text=true",
              "--xla_jf_dump_llo_pass_label_regex=final_bundles")
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(?P<mark>[A-Z]*)\s*:\s*(?P<depth>>*)")
_REGION = re.compile(r"Start region (\d+)")
_BRANCH = re.compile(r"sbr\.rel \(!(%\w+)\) target = \$region(\d+)")
_TEST = re.compile(r"(%\w+) = scmp\.\w+\.s32\.totalorder (?:\(!?%\w+\), )?%\w+, (\d+) "
                   r"/\* loop exit test \*/")


@dataclasses.dataclass(frozen=True)
class Loop:
  """Bundles of a loop's body, its inner loops left out, and how often it runs in all."""

  depth: int
  bundles: int
  runs: int


def loops(text: str) -> list[Loop]:
  """The loops of a kernel in the order in which they begin, from the text of its final bundles;
  the first is the program itself, depth 0.

  Raises ValueError where it cannot be told how often a loop runs.
  """
  limits = {name: int(limit) for name, limit in _TEST.findall(text)}
  # A branch back names the region that its loop begins with; it may stand anywhere behind.
  trips = {region: limits[name] for name, region in _BRANCH.findall(text) if name in limits}
  made = [Loop(0, 0, 1)]
  open_loops = [0]  # by depth: what a bundle of that depth belongs to
  for line in text.splitlines():
    if not (found := _BUNDLE.match(line)):
      continue
    depth = len(found["depth"])
    if found["mark"] == "LB":
      own = next((trips[r] for r in _REGION.findall(line) if r in trips), None)
      if own is None:
        raise ValueError(f"no trips for the loop at: {line[:80]}")
      del open_loops[depth:]
      # The grid's own loop, the outermost, fetches a step ahead and stores one behind.
      runs = own - 2 if depth == 1 else own * made[open_loops[-1]].runs
      open_loops.append(len(made))
      made.append(Loop(depth, 0, runs))
    at = open_loops[min(depth, len(open_loops) - 1)]
    made[at] = dataclasses.replace(made[at], bundles=made[at].bundles + 1)
  return made


def cycles(text: str) -> int:
  """Of one run of a kernel, from the text of its final bundles."""
  return sum(loop.bundles * loop.runs for loop in loops(text))


def of_kernel(folder: Path, name: str) -> str:
  """The newest final bundles of a kernel of that name in a dump.  Raises FileNotFoundError."""
  found = [path for path in folder.glob(f"*-{name}.*-final_bundles.txt")
           if "schedule-analysis" not in path.name]
  if not found:
    raise FileNotFoundError(f"{folder} has no schedule of a kernel {name!r}")
  return max(found, key=lambda path: path.stat().st_mtime).read_text()
