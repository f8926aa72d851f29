"""What an instruction of a compiled program costs: operations, bytes of main memory, seconds."""
from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter

import numpy as np

from mgjax.chips import Chip
from mgjax.tpu.hlo import Array, Instruction, Module

# Instructions that move or compute nothing by themselves.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
         "call", "after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency",
         "domain", "async-start", "async-update", "async-done", "copy-done", "slice-done",
         "dynamic-slice-done", "send", "send-done", "recv", "recv-done"}
_COPIES = ("copy-start", "slice-start", "dynamic-slice-start")
# What reads a part of its first operand, and what writes a part of it in place: the operand that it
# writes there.
_PARTS = ("slice", "dynamic-slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
# Products of groups of rows, see kernels/grouped.py.
_GROUPED = re.compile(r"(ragged-dot-none|t?gmm)")
# Custom calls that the compiler uses for bookkeeping.
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AsyncCollective",
               "GatherScatterIndicesBitpacked", "Sharding", "SPMD", "annotate_device_placement",
               "MoveToHost", "MoveToDevice", "PinToDevice")
# Parts of the peak rate that products are assumed to reach: plain ones carry no estimate of the
# compiler's, and that of fusions with products misses measured steps by a third (docs/tpu.md).
# Depthwise convolutions are not for the matrix unit: 0.4 % is what cycles come to on a v5e.
ATTENTION_RATE, GROUPED_RATE, PRODUCT_RATE, DEPTHWISE_RATE = 0.5, 0.8, 0.85, 0.004
# Kernels of our own whose code's schedule is known: cycles for a register (8 x 128 values) of the
# maps that they read, for ConvNeXt-L's maps of 768 pixels, bfloat16, v5e; and FLOPs for a value.
# By benchmarks/depthwise.py --tpu (38 to 46 cycles, 30 to 37, 33 to 39; the arithmetic alone is
# 24.5; LayerNorm 3 to 5, its gradient 9 to 10) and benchmarks/mining.py --tpu.
SCHEDULED = {"depthwise_norm": (39, 2 * 49), "depthwise_gradient": (32, 2 * 49),
             "depthwise": (34, 2 * 49), "mine_forward": (10, 2 * 2), "mine_backward": (12, 2 * 3),
             "mine_backward of maps too": (23, 2 * 6), "layer_norm": (5, 0),
             "layer_norm_gradient": (10, 0)}
_SCHEDULED = re.compile(
    r"(depthwise(?:_norm|_gradient)?|mine_(?:for|back)ward|layer_norm(?:_gradient)?)(?:\.\d+)?$")


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one run of an instruction: operations of matrix products (those of Pallas kernels among
  them), bytes of HBM, seconds of the core.

  compiler: seconds by the compiler's own model, if it has one for the instruction; taken for what
  has no products of matrices, or only depthwise convolutions."""

  flops: float = 0
  bytes: float = 0
  seconds: float = 0
  compiler: float | None = None
  kernel_flops: float = 0


def cost(module: Module, computation: str, instruction: Instruction, chip: Chip,
         own_rows: float = 1) -> Cost:
  """The cost of an instruction by itself: what a loop or call runs is counted there.

  own_rows: the part of the rows of grouped products that are of the groups at hand; kernels leave
  out the others."""
  i = instruction
  if (i.opcode in _FREE or (i.opcode == "custom-call" and _is_free_call(i))
      or i.name.startswith("async-collective-")):  # the links' work, see links.py
    return Cost()
  moved = hbm_bytes(module, computation, i)
  if i.opcode in _COPIES:
    return Cost(0, moved)  # by the memory's own engine, behind the core's back
  by_rate = op_flops(module, computation, i, own_rows)
  flops = sum(by_rate.values())
  kernel_flops = by_rate[ATTENTION_RATE] + by_rate[GROUPED_RATE]
  if found := _scheduled(module, computation, i):
    seconds = found[0] / (chip.clock * chip.cores)
    return Cost(flops, moved, max(seconds, moved / chip.hbm_bandwidth), None, flops)
  compiler = None if i.cycles is None else i.cycles / chip.clock
  if compiler is not None and flops == by_rate[DEPTHWISE_RATE]:
    return Cost(flops, moved, max(compiler, flops / chip.peak), compiler, kernel_flops)
  at_rates = sum(n / rate for rate, n in by_rate.items()) / chip.peak
  return Cost(flops, moved, max(at_rates, moved / chip.hbm_bandwidth), compiler, kernel_flops)


def is_kernel(i: Instruction) -> bool:
  """Whether it is a Pallas kernel."""
  return i.opcode == "custom-call" and "tpu_custom_call" in i.attributes


def _is_free_call(i):
  return any(name in (i.attribute("custom_call_target") or "") for name in _FREE_CALLS)


def op_flops(module: Module, computation: str, i: Instruction,
             own_rows: float = 1) -> Counter[float]:
  """Operations of products of matrices and convolutions, a multiplication and an addition each 2,
  by the part of the peak rate that is assumed for them; what a fusion holds is counted."""
  operands = module.computations[computation]
  if i.opcode == "fusion":
    body = i.called()[0]
    return sum((op_flops(module, body, inner, own_rows)
                for inner in module.computations[body].values()), Counter())
  if i.opcode == "convolution":
    lhs, rhs = (operands[name].arrays[0] for name in i.operands)
    depthwise = int(i.attribute("feature_group_count") or 1) > 1
    return Counter({DEPTHWISE_RATE if depthwise else PRODUCT_RATE: _convolution_flops(i, lhs, rhs)})
  if i.opcode == "dot":
    lhs = operands[i.operands[0]].arrays[0]
    contracted = (i.attribute("lhs_contracting_dims") or "{}").strip("{}")
    depth = math.prod(lhs.dims[int(d)] for d in contracted.split(",") if d)
    return Counter({PRODUCT_RATE: 2 * math.prod(i.arrays[0].dims) * depth})
  if i.opcode == "custom-call" and _GROUPED.match(i.name):
    return Counter({GROUPED_RATE: own_rows * _grouped_flops(operands, i)})
  if found := _scheduled(module, computation, i):
    return Counter({DEPTHWISE_RATE: found[1]})
  return Counter({ATTENTION_RATE: _attention_flops(operands, i)} if is_kernel(i) else {})


def _scheduled(module: Module, computation: str, i: Instruction) -> tuple[float, float] | None:
  """Cycles of all cores and FLOPs of a kernel in SCHEDULED, also of one with which a collective
  goes on in a fusion; None for anything else."""
  if i.opcode == "fusion":
    body = i.called()[0]
    found = (_scheduled(module, body, inner) for inner in module.computations[body].values())
    return next(filter(None, found), None)
  if not is_kernel(i) or not (found := _SCHEDULED.match(i.name)):
    return None
  operands = module.computations[computation]
  name, arrays = found[1], [operands[operand].arrays[0] for operand in i.operands]
  maps = arrays[:1]
  if name.startswith("mine"):  # behind queries, and what comes back for them
    maps = [a for a in arrays[1 if name == "mine_forward" else 2:] if len(a.dims) == 4]
    name += " of maps too" * (name == "mine_backward" and len(i.arrays) > 1)
  registers = sum(math.prod(a.dims[:-2]) * -(-a.dims[-2] // 8) * -(-a.dims[-1] // 128)
                  for a in maps)
  cycles, flops = SCHEDULED[name]
  return cycles * registers, flops * sum(math.prod(a.dims) for a in maps)


def _grouped_flops(operands, i: Instruction) -> float:
  rows, columns = i.arrays[0].dims[-2:]
  shapes = [operands[name].arrays[0].dims for name in i.operands]
  if len(i.arrays[0].dims) == 3:  # a matrix a group: the sum over rows
    return 2 * rows * columns * max(dims[0] for dims in shapes if len(dims) == 2)
  return 2 * rows * columns * max(dims[1] for dims in shapes if len(dims) == 2 and dims[0] == rows)


def _attention_flops(operands, i: Instruction) -> float:
  """Of a splash attention kernel: two products forward, five backward (all gradients in one), over
  the blocks that its mask leaves.  Of `short_attention`: two, of all queries with all keys.  0 for
  another kernel."""
  products = 2 if "splash_mha_fwd" in i.name else 5 if "splash_mha_dkv" in i.name else 0
  arrays = [operands[name].arrays[0] for name in i.operands]
  if i.name.startswith("short_attention"):  # [rows, queries, width], keys and values likewise
    (rows, queries, width), (_, keys, _) = arrays[0].dims, arrays[1].dims
    return 2 * 2 * rows * queries * keys * width
  queries = next((a for a in arrays if len(a.dims) >= 3 and a.dtype in ("bf16", "f32")), None)
  if not products or queries is None:
    return 0
  *heads, length, width = queries.dims
  # With a mask that leaves blocks out comes a table of the blocks [.., queries, keys at most].
  tables = [a.dims for a in arrays if a.dtype in ("s8", "s16", "s32") and len(a.dims) == 3]
  share = 1.0
  if tables:
    n, most = max(tables[0][-2:]), min(tables[0][-2:])
    share = min(n * most, n * (n + 1) / 2) / n**2
  return products * 2 * math.prod(heads) * length**2 * width * share


def _convolution_flops(i: Instruction, lhs: Array, rhs: Array) -> float:
  """2 x output features x input features of a group x batch x, for each spatial dimension, the
  pairs of an output and a tap that fall inside the input.  (A TPU's products of matrices are
  convolutions; a batch dimension of a product is a window of which one tap hits.)"""
  labels = i.attribute("dim_labels")
  left, _, rest = labels.partition("_")
  right, _, out = rest.partition("->")
  window = _window(i.attribute("window") or "")
  spatial = [c for c in out if c.isdigit()]
  pairs = 1.0
  for n, label in enumerate(spatial):
    pairs *= _pairs(lhs.dims[left.index(label)], rhs.dims[right.index(label)],
                    i.arrays[0].dims[out.index(label)],
                    {k: v[n] for k, v in window.items() if n < len(v)})
  groups = int(i.attribute("batch_group_count") or 1)
  batch = lhs.dims[left.index("b")] // groups
  return 2 * pairs * batch * rhs.dims[right.index("i")] * rhs.dims[right.index("o")]


def _window(text):
  fields = dict(part.split("=") for part in text.strip("{}").split() if "=" in part)
  return {name: value.split("x") for name, value in fields.items()}


def _pairs(size, taps, outputs, window) -> int:
  """Pairs (output, tap) that read a real element of the input."""
  stride = int(window.get("stride", 1))
  low = int(window.get("pad", "0_0").split("_")[0])
  spread, apart = int(window.get("lhs_dilate", 1)), int(window.get("rhs_dilate", 1))
  at = (np.arange(outputs)[:, None] * stride - low + np.arange(taps)[None, :] * apart)
  return int(np.count_nonzero((at >= 0) & (at < (size - 1) * spread + 1) & (at % spread == 0)))


def hbm_bytes(module: Module, computation: str, i: Instruction) -> float:
  """Bytes read from and written to HBM.  Of an operand of which a part is taken, the part; of
  one that is updated in place, the update."""
  operands = module.computations[computation]
  arrays = lambda name: operands[name].arrays if name in operands else ()
  if i.opcode in _COPIES:
    source, result = arrays(i.operands[0])[0], i.arrays[i.opcode != "copy-start"]
    return result.bytes * (source.in_hbm + result.in_hbm)
  if i.opcode != "fusion":
    if i.opcode in _UPDATES:
      return 2 * arrays(i.operands[_UPDATES[i.opcode]])[0].bytes * i.arrays[0].in_hbm
    if i.opcode in _PARTS:
      return i.arrays[0].bytes * (i.arrays[0].in_hbm + arrays(i.operands[0])[0].in_hbm)
    # A kernel may take an array several times, to see different parts of it.
    names = dict.fromkeys(i.operands) if is_kernel(i) else i.operands
    return sum(a.bytes for a in i.arrays if a.in_hbm) + sum(
        a.bytes for name in names for a in arrays(name) if a.in_hbm)
  body = module.computations[i.called()[0]]
  total = 0.0
  for inner in body.values():
    if inner.opcode == "parameter" and (index := int(inner.argument)) < len(i.operands):
      total += sum(_read(module, body, inner, a) for a in arrays(i.operands[index]) if a.in_hbm)
  root = next(reversed(body.values()))
  leaves = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
  for array, leaf in zip(i.arrays, leaves):
    leaf = _behind_bitcasts(body, leaf)
    written = (body[leaf.operands[_UPDATES[leaf.opcode]]].arrays[0] if leaf.opcode in _UPDATES
               else array)
    total += written.bytes * array.in_hbm
  return total


def _behind_bitcasts(body, i):
  while i.opcode in ("bitcast", "copy") and i.operands and i.operands[0] in body:
    i = body[i.operands[0]]
  return i


def _read(module, body, parameter, array) -> float:
  """Bytes of an operand of a fusion that are read: slices of it, as far as only these are taken."""
  seen, given_on = _taken(module, body, parameter, array)
  return array.bytes if given_on else seen


def _taken(module, body, parameter, array) -> tuple[float, bool]:
  """Bytes of an operand that are read within a fusion, and whether it is what that gives, too."""
  names, seen = [parameter.name], 0.0
  for name in names:
    for user in body.values():
      if name not in user.operands:
        continue
      if user.opcode == "bitcast" or "output_to_operand_aliasing" in user.attributes:
        names.append(user.name)
      elif user.opcode in _PARTS and user.operands[0] == name:
        seen += user.arrays[0].bytes
      elif user.opcode in _UPDATES and user.operands[0] == name:
        pass
      elif user.opcode == "fusion":
        inside = module.computations[user.called()[0]]
        places = [str(n) for n, operand in enumerate(user.operands) if operand == name]
        for inner in inside.values():
          if inner.opcode == "parameter" and inner.argument in places:
            own, given_on = _taken(module, inside, inner, array)
            seen += own
            names += [user.name] * given_on
      else:
        seen = array.bytes
  return min(array.bytes, seen), next(reversed(body)) in names