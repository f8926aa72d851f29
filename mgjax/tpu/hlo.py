"""The text of a compiled program (HLO) as data: instructions, shapes, and how often loops run."""
from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

_ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2,
               "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
               "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_LINE = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_END = re.compile(r"\}($|, execution_thread)")


@dataclasses.dataclass(frozen=True)
class Array:
  """One array: its dtype, its dimensions, and whether it lies in the chip's main memory (HBM)."""

  dtype: str
  dims: tuple[int, ...]
  in_hbm: bool

  @property
  def bytes(self) -> float:
    return math.prod(self.dims) * _ITEM_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Instruction:
  """`name = shape opcode(operands), attributes`; arrays: the leaves of the shape, in order."""

  name: str
  arrays: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  argument: str                   # what stands between the parentheses
  attributes: str

  def attribute(self, name: str) -> str | None:
    """The word or braced text behind `name=`, or None."""
    braced = r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}"
    found = re.search(rf"(?:^|[ ,]){name}=({braced}|[^\s,]+)", self.attributes)
    return found and found[1]

  @functools.cached_property
  def backend(self) -> dict:
    """What the backend noted."""
    start = self.attributes.find("backend_config=")
    if start < 0:
      return {}
    text = self.attributes[start + len("backend_config="):]
    try:
      return json.JSONDecoder().raw_decode(text)[0]
    except ValueError:
      return {}

  @property
  def cycles(self) -> int | None:
    """The compiler's own estimate, where it made one (of some it says "for ever")."""
    value = int(self.backend.get("window_config", {}).get("estimated_cycles") or -1)
    return value if 0 <= value < 2**50 else None

  @property
  def op_name(self) -> str:
    """The path of Python functions that it came from."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""

  def called(self) -> list[str]:
    """Names of the computations that it runs: a fusion's body, a loop's body and condition."""
    names = re.findall(r"(?:calls|to_apply|body|condition|called_computation)=%?([\w.-]+)",
                       self.attributes)
    for braced in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}",
                             self.attributes):
      names += re.findall(r"%?([\w.-]+)", braced)
    return names


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled program."""

  computations: dict[str, dict[str, Instruction]]   # by name, in the order of the schedule
  entry: str

  def trip_count(self, loop: Instruction, unknown: int = 1) -> int:
    """How often a while loop runs its body: `known_trip_count`, else read off its condition, which
    compares a counter that begins at 0 with a constant.  `unknown` if it cannot be told."""
    known = re.search(r'known_trip_count[^}]*?"?n"?[:=]\s*"?(\d+)', loop.attributes)
    if known:
      return int(known[1])
    condition = self.computations[loop.attribute("condition").lstrip("%")]
    root = next(reversed(condition.values()))
    limits = [int(i.argument) for i in condition.values()
              if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.argument)]
    if root.opcode == "fusion":
      inside = self.computations[root.called()[0]]
      limits += [int(i.argument) for i in inside.values()
                 if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.argument)]
      root = next(reversed(inside.values()))
    direction = root.attribute("direction")
    if root.opcode == "compare" and limits and direction in ("LT", "LE", "NE", "GT"):
      return max(limits) + (direction == "LE")
    return unknown


def parse(text: str) -> Module:
  """`compiled.as_text()` as a Module.  Raises ValueError if there is no entry computation."""
  computations, entry, current = {}, None, None
  for line in _whole_lines(text):
    if current is None:
      if found := _COMPUTATION.match(line):
        current = computations.setdefault(found[2], {})
        entry = found[2] if found[1] else entry
    elif _END.match(line):
      current = None
    elif found := _LINE.match(line):
      instruction = _instruction(found[1], line[found.end():])
      current[instruction.name] = instruction
  if entry is None:
    raise ValueError("not the text of a compiled program: no ENTRY")
  return Module(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
  """Lines of the text; what a kernel says of itself may break one into several."""
  whole, inside = "", False
  for line in text.splitlines():
    if not inside:
      inside = bool(_COMPUTATION.match(line))
      yield line
    elif _END.match(line):
      yield whole
      yield line
      whole, inside = "", False
    elif _LINE.match(line):
      if whole:
        yield whole
      whole = line
    else:
      whole += line


def _instruction(name: str, rest: str) -> Instruction:
  shape, rest = _shape(rest)
  opcode, _, rest = rest.partition("(")
  depth, end = 1, 0
  while depth:
    depth += {"(": 1, ")": -1}.get(rest[end], 0)
    end += 1
  argument = rest[:end - 1]
  operands = tuple(re.findall(r"%([\w.-]+)", argument))
  return Instruction(name, shape, opcode.strip(), operands, argument, rest[end:].lstrip(", "))


def _shape(text: str) -> tuple[tuple[Array, ...], str]:
  """The arrays of the shape that `text` begins with, and what follows it."""
  if not text.startswith("("):
    found = _SHAPE.match(text)
    return (_array(found),), text[found.end():].lstrip()
  depth, end = 0, 0
  while True:
    depth += {"(": 1, ")": -1}.get(text[end], 0)
    end += 1
    if not depth:
      break
  return tuple(_array(m) for m in _SHAPE.finditer(text[:end])), text[end:].lstrip()


def _array(found: re.Match) -> Array:
  dims = tuple(int(d) for d in found[2].split(",") if d)
  return Array(found[1], dims, "S(" not in (found[3] or ""))
