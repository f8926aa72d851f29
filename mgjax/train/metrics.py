"""What a run says of itself: a progress line, metrics.jsonl, TensorBoard."""
from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from mgjax.chips import chip_of


@dataclasses.dataclass(frozen=True)
class Usage:
  """What a step took in, over all hosts, and what its batch had room for."""

  tokens: int
  positions: int
  images: int
  slots: int
  samples: int
  flops: float         # that the model takes for all of the batch
  useful_flops: float  # for what it holds: no padding, no empty slots


class Metrics:
  """Writes one record a step; meant for process 0 alone (`enabled`)."""

  def __init__(self, workdir: Path, *, name: str, start: int, steps: int, enabled: bool):
    self._enabled = enabled
    self._last = time.perf_counter()
    self._heldout = ""  # the last figures
    if not enabled:
      return
    self._bar = tqdm(total=steps, initial=start, desc=name, unit="step", dynamic_ncols=True,
                     smoothing=0.1)
    device = jax.devices()[0]
    chip = chip_of(device.device_kind)
    self._peak = chip.peak * chip.share(device) if chip else None  # of a device
    self._file = open(workdir / "metrics.jsonl", "a", buffering=1)
    self._board = _tensorboard(workdir / "tensorboard")

  def restart_clock(self) -> None:
    """The first step begins now."""
    self._last = time.perf_counter()

  @contextlib.contextmanager
  def aside(self) -> Iterator[None]:
    """The time that the body takes is no step's."""
    started = time.perf_counter()
    try:
      yield
    finally:
      self._last += time.perf_counter() - started

  def write(self, step: int, values: dict, usage: Usage, *, waited: float, show: bool) -> None:
    """values: scalars of this step; waited: seconds that the device had to wait for data.

    Adds, over all devices: tokens_per_s, images_per_s and samples_per_s, padding left out;
    step_time (seconds since the last step ended); and the shares data/filled_tokens of the
    positions, data/filled_images of the image slots, and data/waiting of the time.
    For one device: tokens_per_s_per_device, images_per_s_per_device, and tflops_per_s_per_device,
    model FLOPs (`flops.py`) of all that a batch has room for: padding is computed like the rest.
    mfu is these by the chip's peak in bfloat16, and mfu_useful counts real tokens and pictures
    alone; both only where the chip is known.
    """
    if not self._enabled:
      return
    now = time.perf_counter()
    seconds, self._last = now - self._last, now
    record = {k: float(np.asarray(v)) for k, v in values.items()}
    record |= {"step_time": seconds, "tokens_per_s": usage.tokens / seconds,
               "images_per_s": usage.images / seconds, "samples_per_s": usage.samples / seconds,
               "data/filled_tokens": usage.tokens / usage.positions,
               "data/waiting": waited / seconds}
    record |= self._per_device(usage, seconds)
    if usage.slots:
      record["data/filled_images"] = usage.images / usage.slots
    self._bar.update()
    if not show:
      return
    self._file.write(json.dumps({"step": step} | record) + "\n")
    if self._board is not None:
      for key, value in record.items():
        self._board.add_scalar(key, value, step)
    if "heldout/loss" in record:
      self._heldout = (f"held-out loss {record['heldout/loss']:.4f}, exact "
                       f"{record['heldout/exact_match']:.1%}, ")
    self._bar.set_postfix_str(
        f"loss {record['loss']:.4f}, {self._heldout}lr {record['learning_rate']:.1e}, "
        f"{record['tokens_per_s']:,.0f} tok/s, {record['images_per_s']:,.0f} img/s, "
        + (f"MFU {record['mfu']:.1%}, " if "mfu" in record else "") + f"{seconds:.2f} s/step")

  def _per_device(self, usage: Usage, seconds: float) -> dict[str, float]:
    device_seconds = jax.device_count() * seconds
    record = {"tokens_per_s_per_device": usage.tokens / device_seconds,
              "images_per_s_per_device": usage.images / device_seconds,
              "tflops_per_s_per_device": usage.flops / device_seconds / 1e12}
    if self._peak:
      record["mfu"] = usage.flops / device_seconds / self._peak
      record["mfu_useful"] = usage.useful_flops / device_seconds / self._peak
    return record

  def close(self) -> None:
    """Flushes and ends the progress line."""
    if self._enabled:
      self._bar.close()
      self._file.close()
      if self._board is not None:
        self._board.close()


def _tensorboard(folder: Path):
  """An event-file writer where tensorboardX is installed (extra `tensorboard`), else None."""
  try:
    from tensorboardX import SummaryWriter
  except ImportError:
    return None
  return SummaryWriter(str(folder))


def truncate_after(path: Path, step: int) -> None:
  """Drops the records of steps that a resumed run will do again."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines(True):
    try:
      if not line.endswith("\n") or json.loads(line)["step"] > step:
        break
    except ValueError:  # cut short when the machine went
      break
    kept.append(line)
  unfinished = path.with_suffix(".part")
  unfinished.write_text("".join(kept))
  unfinished.rename(path)
