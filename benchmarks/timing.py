"""Timing one call on this machine."""
import time

import jax


def seconds(f, *args, repeats: int = 5) -> float:
  """Median wall time of f(*args), compiled and warm."""
  jax.block_until_ready(f(*args))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    times.append(time.perf_counter() - start)
  return sorted(times)[len(times) // 2]
