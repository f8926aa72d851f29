"""What accelerator chips can do, as data: peak rates, memory, links, and the names that jax gives
them.

Rates are those of the vendors' data sheets.  `hbm` is what the TPU compiler has for a program
(libtpu 0.0.42: "available HBM"), less than what is soldered on.  `ici` and `dcn` are what one can
plan with: the links' raw rate is about a tenth higher.
"""
from __future__ import annotations

import dataclasses
from typing import Any

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip.  A jax device may be a part of it: see `share`."""

  name: str
  kinds: tuple[str, ...]      # `device_kind` as jax reports it
  peak: float                 # bfloat16 FLOP/s
  hbm: int                    # bytes that a program can have
  hbm_bandwidth: float        # bytes/s
  cores: int = 1              # that do matrix products
  clock: float | None = None  # Hz: what turns the compiler's cycles into seconds
  ici: float | None = None    # bytes/s of one link between chips, one way
  ici_axes: int = 0           # of the torus; each has a link in both directions
  dcn: float | None = None    # bytes/s to other slices, this chip's share of its host's cards

  def share(self, device: Any) -> float:
    """The part of the chip that `device` (of jax) is: 1 unless each core is a device of its own."""
    return (getattr(device, "num_cores", None) or self.cores) / self.cores


CHIPS = (
    Chip("v4", ("TPU v4",), 275e12, int(30.75 * _GIB), 1.2e12, cores=2, clock=1.05e9,
         ici=4.5e10, ici_axes=3, dcn=6.25e9),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, int(15.75 * _GIB), 8.2e11, clock=1.5e9,
         ici=4.5e10, ici_axes=2, dcn=3.125e9),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, int(95.74 * _GIB), 2.765e12, cores=2, clock=1.75e9,
         ici=9e10, ici_axes=3, dcn=6.25e9),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, int(31.25 * _GIB), 1.638e12, clock=1.75e9,
         ici=9e10, ici_axes=2, dcn=1.25e10),
    Chip("a100", ("NVIDIA A100-SXM4-40GB",), 312e12, 40 * 10**9, 1.555e12),
    Chip("a100-80g", ("NVIDIA A100-SXM4-80GB",), 312e12, 80 * 10**9, 2.039e12),
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989.4e12, 80 * 10**9, 3.35e12),
    Chip("h200", ("NVIDIA H200",), 989.4e12, 141 * 10**9, 4.8e12),
)


def chip_of(device_kind: str) -> Chip | None:
  """The chip that jax calls `device_kind`; None if it is not in the table."""
  return next((chip for chip in CHIPS if device_kind in chip.kinds), None)
