"""Meshes, rows and remat policies of a config on a slice, ranked by what their sketches say."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from mgjax.config import ConfigError
from mgjax.tpu.account import of_job
from mgjax.tpu.aot import requests
from mgjax.tpu.report import Report
from mgjax.tpu.slices import Slice
from mgjax.train.config import MeshConfig, RunConfig

# From the fastest on, where memory allows it; the first that fits is the best of a mesh.
POLICIES = ("save_products", "save_qkv_attention", "save_attention", "nothing_saveable", "offload")


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A config, and the flags of launch/train.py that make it out of the one given."""

  config: RunConfig
  flags: str


def sweep(config: RunConfig, chosen: Slice, *, show: Callable[[str], None]) -> list[Report]:
  """Sketches of what fits, the fastest (in samples a second: images, else positions) first.

  show: gets a line for each candidate as it is known, and the ranking.
  Raises ConfigError if nothing can be tried.
  """
  found, tried = [], 0
  for group in candidates(config, chosen):
    for candidate in group:
      tried += 1
      try:
        made = of_job(requests(candidate.config, "train")[0], chosen, sketched=True)
      except ConfigError as error:
        show(f"{candidate.flags}: {error}")
        break
      if not made.fits:
        show(f"{candidate.flags}: does not fit, {made.needed / 2**30:.1f} GiB")
        continue
      show(f"{candidate.flags}: {1e3 * made.step:.0f} ms, MFU {made.mfu:.1%}")
      found.append((candidate, made))
      break  # what keeps less is slower
  if not tried:
    raise ConfigError(f"sweep: no mesh of {chosen.chips} chips suits the heads of the decoder")
  found.sort(key=lambda pair: -_rate(pair[1]))
  show("\n" + table(found))
  return [made for _, made in found]


def _rate(made: Report) -> float:
  return made.images_per_s_per_chip or made.tokens_per_s_per_chip


def candidates(config: RunConfig, chosen: Slice) -> Iterator[list[Candidate]]:
  """Groups that differ in remat alone, from what keeps most to what keeps least."""
  for mesh in meshes(config, chosen):
    for rows, more in _rows(config, mesh):
      flags = " ".join(f"--config.mesh.{f.name}={getattr(mesh, f.name)}"
                       for f in dataclasses.fields(mesh))
      yield [Candidate(dataclasses.replace(rows, mesh=mesh, remat=dataclasses.replace(
          rows.remat, decoder=policy)), f"{flags}{more} --config.remat.decoder={policy}")
             for policy in POLICIES]


def meshes(config: RunConfig, chosen: Slice) -> list[MeshConfig]:
  """Ways to cut the slice: data over slices and at most 4 ways within, tensor up to 8, experts."""
  decoder, result = config.model.decoder, []
  for tensor in (1, 2, 4, 8):
    if decoder.heads % tensor or decoder.kv_heads % tensor:
      continue
    for expert in (1, 2, 4, 8):
      if max(decoder.experts, 1) % expert:
        continue
      for data in (chosen.count, 2 * chosen.count, 4 * chosen.count):
        fsdp, left = divmod(chosen.chips, data * tensor * expert)
        if fsdp and not left:
          result.append(MeshConfig(data, fsdp, tensor, expert))
  return result


def _rows(config: RunConfig, mesh: MeshConfig) -> Iterator[tuple[RunConfig, str]]:
  """The config with rows that the mesh can share: as they are, cut in halves with half of the
  pictures each, or in micro-batches; always as many pictures a step."""
  shards, data = mesh.data * mesh.fsdp * mesh.expert, config.data
  if data.resolutions:
    yield config, ""
    return
  for cut in (1, 2, 4):
    if data.images_per_row % cut or data.batch_size * cut % shards:
      continue
    length = -(-data.row_length // cut // 128) * 128
    rows = dataclasses.replace(
        data, batch_size=data.batch_size * cut, images_per_row=data.images_per_row // cut,
        row_length=length, max_length=min(data.max_length, length))
    flags = "" if cut == 1 else (
        f" --config.data.batch_size={rows.batch_size} --config.data.row_length={length} "
        f"--config.data.images_per_row={rows.images_per_row} "
        f"--config.data.max_length={rows.max_length}")
    for accumulate in (1, 2, 4):
      if rows.batch_size // accumulate % shards == 0:
        yield (dataclasses.replace(config, data=rows, accumulate=accumulate),
               flags + (f" --config.accumulate={accumulate}" if accumulate > 1 else ""))
    return  # rows as long as the mesh allows


def table(found: list[tuple[Candidate, Report]]) -> str:
  """The ranking."""
  lines = ["rank  step ms    MFU  MFU bound  binds    GiB  links exposed  flags"]
  for n, (candidate, r) in enumerate(found, 1):
    lines.append(f"{n:4} {1e3 * r.step:8.0f} {r.mfu:6.1%} {r.mfu_bound:10.1%}  {r.binds:7} "
                 f"{r.memory.peak / 2**30:5.1f} {r.exposed / r.step:14.1%}  {candidate.flags}")
  return "\n".join(lines)
