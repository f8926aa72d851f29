"""What to read, and how it becomes batches."""
from __future__ import annotations

import dataclasses

from mgjax.config import ConfigError, at_least
from mgjax.data.conversation import get_template
from mgjax.data.images import ASPECTS
from mgjax.data.packing import BATCHING, Format
from mgjax.data.sources import Source


@dataclasses.dataclass(frozen=True)
class Resolution:
  """A second size of pictures in the same run, with rows and batches of its own."""

  hr_size: int               # H; a multiple of the model's
  tokens_per_image: int = 0  # T; 0 = as the model makes them
  max_length: int = 4096     # of a sample
  row_length: int = 0        # L of packed rows; 0 = max_length
  images_per_row: int = 1    # S
  batch_size: int = 256      # rows over all hosts

  def __post_init__(self):
    at_least(self, 1, "hr_size", "batch_size")
    at_least(self, 0, "tokens_per_image", "images_per_row")
    at_least(self, 2, "max_length")
    if self.row_length and self.row_length < self.max_length:
      raise ConfigError(f"data: row_length {self.row_length} is less than max_length "
                        f"{self.max_length}: not every sample would fit in a row")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What to read and how.  `hr_size` and `tokens_per_image` come from the model's config."""

  path: str = ""                  # a data file (see `records.open_records`); "" = sources
  image_root: str = ""            # the folder that its `image` paths are relative to
  template: str = "vicuna_v1"
  max_length: int = 2048          # of a sample, visual tokens included
  aspect: str = "pad"             # 'pad' | 'square' (shorter side fitted, middle cut out)
  hr_size: int = 768              # H
  tokens_per_image: int = 576     # T
  images_per_row: int = 1         # S; 0 = a run without images
  batch_size: int = 256           # rows over all hosts
  seed: int = 0
  shuffle: bool = True
  on_error: str = "stop"          # 'stop' | 'skip': leave bad samples out, count them
  truncate: bool = False          # cut over-long samples on the right instead of refusing them
  workers: int = 0                # processes that load; 0 = threads of this one
  threads: int = 4                # per process
  scan_limit: int = 50_000        # samples whose pictures are opened before step 1
  sources: tuple[Source, ...] = ()  # a mixture; where path is given, that alone is read
  batching: str = "single"        # 'packed': several samples a row; 'single': one, in random order;
                                  # 'grouped': one, batches of one modality, short ones shorter
  row_length: int = 0             # L of packed rows; 0 = max_length, as in other batching
  buckets: tuple[int, ...] = ()   # grouped: lengths that batches may have, beside max_length
  resolutions: tuple[Resolution, ...] = ()  # other sizes of pictures, for sources that name them

  def __post_init__(self):
    for name, value, allowed in (("aspect", self.aspect, ASPECTS),
                                 ("batching", self.batching, BATCHING),
                                 ("on_error", self.on_error, ("stop", "skip"))):
      if value not in allowed:
        raise ConfigError(f"data: {name} is {value!r}, expected one of {', '.join(allowed)}")
    at_least(self, 1, "hr_size", "tokens_per_image", "threads")
    at_least(self, 0, "workers", "scan_limit")
    get_template(self.template)
    for i, resolution in enumerate(self.all_resolutions):
      if resolution.hr_size in [r.hr_size for r in self.all_resolutions[:i]]:
        raise ConfigError(f"data: hr_size {resolution.hr_size} is there twice; give one of "
                          "data.resolutions another")
    if self.buckets and self.batching != "grouped":
      raise ConfigError(f"data: buckets are for batching 'grouped', not {self.batching!r}")
    if list(self.buckets) != sorted(set(self.buckets)) or any(b < 2 for b in self.buckets):
      raise ConfigError(f"data: buckets is {self.buckets}; expected rising lengths")
    weighted = [s.label for s in self.sources if s.weight]
    if weighted and len(weighted) < len(self.sources):
      raise ConfigError(f"data: only {', '.join(weighted)} have a weight; give all sources one, or "
                        "none")
    for source in self.sources:
      self.resolution_of(source)

  @property
  def all_sources(self) -> tuple[Source, ...]:
    """The one file, or else the mixture.  Raises ConfigError where there is neither."""
    if not (self.sources or self.path):
      raise ConfigError("data: nothing to read; set config.data.path (and config.data.image_root) "
                        "or config.data.sources")
    return (Source(self.path, self.image_root),) if self.path else self.sources

  @property
  def all_resolutions(self) -> tuple[Resolution, ...]:
    """The run's own first."""
    own = Resolution(self.hr_size, self.tokens_per_image, self.max_length, self.row_length,
                     self.images_per_row, self.batch_size)
    return (own, *self.resolutions)

  def resolution_of(self, source: Source) -> int:
    """Index into `all_resolutions`; ConfigError if the source names another."""
    if not source.hr_size:
      return 0
    sizes = [r.hr_size for r in self.all_resolutions]
    if source.hr_size not in sizes:
      raise ConfigError(f"data: source {source.label} has hr_size {source.hr_size}, expected one "
                        f"of {sizes}; add it to config.data.resolutions")
    return sizes.index(source.hr_size)

  @property
  def formats(self) -> tuple[tuple[Format, ...], ...]:
    """Shapes that batches of each resolution may have; the one that takes every sample first."""
    every = []
    for r in self.all_resolutions:
      packed = self.batching == "packed"
      lengths = [r.row_length if packed and r.row_length else r.max_length]
      slots = [r.images_per_row]
      if self.batching == "grouped":  # batches of text alone need no pictures
        lengths += [b for b in self.buckets if b < r.max_length]
        slots += [0] if r.images_per_row else []
      every.append(tuple(Format(r.batch_size, length, s, r.hr_size, r.tokens_per_image)
                         for s in slots for length in lengths))
    return tuple(every)
