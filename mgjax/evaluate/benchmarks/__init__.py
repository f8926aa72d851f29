"""The benchmarks, one file each: prompt, parse, score, official files."""
from __future__ import annotations

import difflib

from mgjax.evaluate.benchmark import Benchmark, EvaluationError
from mgjax.evaluate.benchmarks import (
    gqa,
    mathvista,
    mmbench,
    mme,
    mmmu,
    mmvet,
    pope,
    scienceqa,
    seed,
    textvqa,
)

# The paper's first, then those of LLaVA's that its code has scorers for.
BENCHMARKS: dict[str, Benchmark] = {
    b.name: b for module in (textvqa, mmbench, mme, mmvet, mmmu, mathvista, pope, scienceqa, gqa,
                             seed)
    for b in module.BENCHMARKS}


def find(name: str) -> Benchmark:
  """The benchmark of that name.  Raises EvaluationError naming the nearest and all others."""
  if name in BENCHMARKS:
    return BENCHMARKS[name]
  near = difflib.get_close_matches(name, BENCHMARKS, 1)
  hint = f"did you mean {near[0]!r}?  " if near else ""
  raise EvaluationError(f"benchmark {name!r} does not exist; {hint}There are: "
                        f"{', '.join(BENCHMARKS)}")
