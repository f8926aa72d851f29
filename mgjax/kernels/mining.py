"""Patch info mining on a TPU: what each query gathers from its window, of feature maps that are
read once and never upsampled.

A window of the fine grid sees, of a coarser map, the positions that cover it and one neighbour on
each side.  Upsampling is linear, u_f = sum_c U_fc a_c, so that everything that mining needs of the
fine candidates can be had of the coarse ones (in real arithmetic the same):

    q . u_f         = sum_c U_fc (q . a_c)             products first, then upsampled
    sum(u_f)        = sum_c U_fc sum(a_c)              likewise
    |u_f|^2         = sum_cd U_fc U_fd (a_c . a_d)     neighbours' products, never of more than 4
    sum_f p_f u_f   = sum_c (sum_f U_fc p_f) a_c       weights brought down, then the sum

and likewise backward.  U is a product of taps along rows, added up one by one, and of a matrix
along columns.  A program goes through the rows of windows of a picture; logits of one are kept as
[queries, columns] for each fine row, with those of other windows masked: the matrix unit has to
take in all positions anyhow, and there are few queries.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mgjax.kernels.mining_plan import SUBLANES, column_matrix, plan_of, taps, vmem_bytes


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def mine_maps(q: jax.Array, maps: tuple[jax.Array, ...], eps: float, interpret: bool) -> jax.Array:
  """sum_j p_j n_j over the window of each query, for one device's pictures.

  The candidates a_j are the maps upsampled to the grid of the first, half-pixel bilinear with
  clamped edges, channels one behind the other; n_j = (a_j - mean_j) / sqrt(variance_j + eps);
  p = softmax_j(q . n_j).

  q [N, P, P, C]; maps [N, P*w/f, P*w/f, C_r], f a divisor of w, for the first 1; C = sum of C_r;
  all of one dtype -> float32 [N, P, P, C].  interpret: run the kernel's steps as ordinary
  operations, on any platform.

  The gradient of maps is computed where somebody asks for it.
  """
  plan = plan_of(q, maps, eps)
  out = _call(plan, _forward_kernel, "mine_forward", interpret, [q], maps, False)[0]
  return out[:, :, :plan.side]


def _forward(q, maps, eps, interpret):
  wanted = any(m.perturbed for m in maps)
  q, maps = q.value, tuple(m.value for m in maps)
  return mine_maps(q, maps, eps, interpret), (q, maps, () if wanted else None)


def _backward(eps, interpret, saved, g):
  q, maps, wanted = saved
  plan, wanted = plan_of(q, maps, eps), wanted is not None
  dq, *d_maps = _call(plan, _backward_kernel, "mine_backward", interpret,
                      [q, g.astype(q.dtype)], maps, wanted)
  return dq[:, :, :plan.side].astype(q.dtype), tuple(d_maps) if wanted else (None,) * len(maps)


mine_maps.defvjp(_forward, _backward, symbolic_zeros=True)


def _call(plan, kernel, name, interpret, by_query, maps, gradients):
  """The kernel over all rows of windows.  by_query: arrays [N, P, P, C]; what it gives for each
  query, float32 [N, P, padded P, C], and where `gradients` are wanted those of the maps."""
  n, lag, last = maps[0].shape[0], plan.lag, plan.side - 1
  pad = ((0, 0), (0, 0), (0, plan.queries - plan.side), (0, 0))
  at = lambda shift: lambda n, i: (n, jnp.clip(i - shift, 0, last), 0, 0)
  block = lambda m, shift: pl.BlockSpec((None, m.rows, m.columns, m.channels), at(shift))
  whole = lambda a: pl.BlockSpec(a.shape, lambda n, i: (0, 0))
  matrices = [_matrix(plan, part, k) for part in plan.parts
              for k, m in enumerate(part.maps) if m.coarse]
  own = pl.BlockSpec((None, None, plan.queries, plan.channels), at(lag))
  out_specs = [own]
  out_shape = [jax.ShapeDtypeStruct((n, plan.side, plan.queries, plan.channels), jnp.float32)]
  ring = [pltpu.VMEM((m.held, m.columns, m.channels), plan.dtype) for m in plan.maps if m.coarse]
  if gradients:  # those of a coarse map are whole when the windows below are through
    out_specs += [block(m, lag + m.coarse) for m in plan.maps]
    out_shape += [jax.ShapeDtypeStruct(m.shape, m.dtype) for m in maps]
    ring += [pltpu.VMEM((m.rows + 1, m.columns, m.channels), jnp.float32)
             for m in plan.maps if m.coarse]
  return pl.pallas_call(
      functools.partial(kernel, plan=plan), grid=(n, plan.side + lag + (lag and gradients)),
      in_specs=[*(own for _ in by_query), *(block(m, 0 if m.coarse else lag) for m in plan.maps),
                *map(whole, matrices)],
      out_specs=out_specs, out_shape=out_shape, scratch_shapes=ring, name=name,
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes(plan),
          # Else XLA lets weights be gathered beside it, in an operation that may take less memory.
          has_side_effects=True),
      interpret=interpret)(*(jnp.pad(x, pad) for x in by_query), *maps, *matrices)


def _matrix(plan, part, k):
  """The part of the matrix of map k that its columns and fine columns of `part` have."""
  m, whole = part.maps[k], plan.maps[k]
  first = part.first * part.window
  matrix = column_matrix(m.factor, whole.columns)
  matrix = matrix[m.left:m.left + m.columns, first:first + part.columns]
  return jnp.asarray(matrix, plan.dtype)


def _forward_kernel(q_ref, *refs, plan):
  maps, matrices, (out_ref, *rings) = _split(plan, refs)

  def windows(_):
    for part, own in zip(plan.parts, matrices):
      rows, queries = _rows(part, maps, rings), part.among(plan)
      z, _, r, _ = _logits(part, rows, own, [q_ref[queries]])
      weights = [a * b for a, b in zip(_softmax(part, z), r)]
      out_ref[queries] = _gathered(part, weights, rows, own)

  _step(plan, maps, rings, windows)


def _backward_kernel(q_ref, g_ref, *refs, plan):
  maps, matrices, (dq_ref, *others) = _split(plan, refs)
  coarse = sum(m.coarse for m in plan.maps)
  d_refs = others[:len(maps)] if len(others) > coarse else []
  rings = others[len(d_refs):len(d_refs) + coarse]
  partial_refs = others[len(d_refs) + coarse:]

  def windows(j):
    found = [[0.0] * m.held for m in plan.maps]
    for part, own in zip(plan.parts, matrices):
      rows, queries = _rows(part, maps, rings), part.among(plan)
      q, g = q_ref[queries], g_ref[queries]
      both, mean, r, lhs = _logits(part, rows, own, [q, g])
      k = part.queries
      z, dp = [x[:k] for x in both], [x[k:] for x in both]
      p = _softmax(part, z)
      total = jnp.sum(sum(a * b for a, b in zip(p, dp)), axis=1, keepdims=True)  # [K, 1]
      dz = [a * (b - total) for a, b in zip(p, dp)]
      dq_ref[queries] = _gathered(part, [a * b for a, b in zip(dz, r)], rows, own)
      if d_refs:
        spread = _spread(part, p, dz, z, dp, mean, r, q, g)
        _add_gradients(plan, part, spread, lhs, rows, own, found)
    if d_refs:
      _write_gradients(plan, j, found, d_refs, partial_refs)

  _step(plan, maps, rings, windows)
  if partial_refs:
    @pl.when(pl.program_id(1) == plan.side + 1)
    def _():
      for d_ref, ref in zip((d for m, d in zip(plan.maps, d_refs) if m.coarse), partial_refs):
        d_ref[...] = ref[:-1].astype(d_ref.dtype)


def _split(plan, refs):
  """The maps, for each part the matrix of each (None: it is fine), and what else there is."""
  n = len(plan.maps)
  others = iter(refs[n:])
  matrices = [[next(others)[...] if m.coarse else None for m in plan.maps] for _ in plan.parts]
  return refs[:n], matrices, list(others)


def _step(plan, maps, rings, windows):
  """windows(j), with rows in `rings` that row j of windows sees: neighbour above, own, neighbour
  below, which at the edges is the nearest own."""
  if not plan.lag:
    return windows(pl.program_id(1))
  i = pl.program_id(1)
  own = list(zip([ref for m, ref in zip(plan.maps, maps) if m.coarse], rings, strict=True))

  @pl.when((i > 0) & (i <= plan.side))
  def _():
    for ref, ring in own:
      last = ring.shape[0] - 1
      ring[last] = jnp.where(i == plan.side, ring[last - 1], ref[0])
    windows(i - 1)

  for ref, ring in own:
    ring[0] = jnp.where(i == 0, ref[0], ring[ring.shape[0] - 2])
    ring[1:-1] = ref[...]


def _rows(part, maps, rings):
  """[columns, channels] for each row that a row of windows sees, for each map."""
  rings = iter(rings)
  refs = [next(rings) if m.coarse else ref for m, ref in zip(part.maps, maps)]
  return [[ref[y, m.left:m.left + m.columns] for y in range(m.held)]
          for m, ref in zip(part.maps, refs)]


def _dot(a, b, contracted, dtype):
  """Product in float32 of operands rounded to `dtype`."""
  return jax.lax.dot_general(
      a.astype(dtype), b.astype(dtype), (((contracted[0],), (contracted[1],)), ((), ())),
      precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
      preferred_element_type=jnp.float32)


def _upsampled(x, matrix):
  """x [R, n] @ matrix [n, W], x float32 as far as it matters: in two parts."""
  if matrix.dtype == jnp.float32:
    return _dot(x, matrix, (1, 0), matrix.dtype)
  high = x.astype(matrix.dtype)
  return (_dot(high, matrix, (1, 0), matrix.dtype)
          + _dot(x - high.astype(jnp.float32), matrix, (1, 0), matrix.dtype))


def _lifted(m, parts, matrix):
  """[R, columns] for each row of the map -> [R, W] for each fine row."""
  if not m.coarse:
    return parts
  r = parts[0].shape[0]
  wide = _upsampled(jnp.concatenate(parts, axis=0), matrix)
  return [sum(weight * wide[y * r:(y + 1) * r] for y, weight in pair)
          for pair in taps(m.factor, m.rows)]


def _lowered(m, fine, matrix):
  """The transpose of `_lifted`: [R, W] for each fine row -> [R, columns] for each of the map."""
  if not m.coarse:
    return fine
  r, mixed = fine[0].shape[0], [0.0] * m.held
  for x, pair in zip(fine, taps(m.factor, m.rows)):
    for y, weight in pair:
      mixed[y] += weight * x
  out = _dot(jnp.concatenate(mixed, axis=0), matrix, (1, 1), matrix.dtype)
  return [out[y * r:(y + 1) * r] for y in range(m.held)]


def _squares(m, rows, matrix):
  """Sums of squares of the upsampled rows: [1, W] for each fine row."""
  if not m.coarse:
    n = m.columns
    diagonal = (jax.lax.broadcasted_iota(jnp.int32, (n, n), 0)
                == jax.lax.broadcasted_iota(jnp.int32, (n, n), 1))
    sums = (jnp.sum(jnp.square(a.astype(jnp.float32)), axis=1, keepdims=True) for a in rows)
    return [jnp.sum(jnp.where(diagonal, s, 0.0), axis=0, keepdims=True) for s in sums]
  pairs = [(y, y) for y in range(m.held)] + [(y, y + 1) for y in range(m.held - 1)]
  products = jnp.concatenate([_dot(rows[a], rows[b], (1, 1), matrix.dtype) for a, b in pairs], 0)
  wide, n, wide_matrix = _upsampled(products, matrix), m.columns, matrix.astype(jnp.float32)
  own = {pair: jnp.sum(wide_matrix * wide[k * n:(k + 1) * n], axis=0, keepdims=True)
         for k, pair in enumerate(pairs)}
  return [sum(s * t * own[min(a, b), max(a, b)] for a, s in pair for b, t in pair)
          for pair in taps(m.factor, m.rows)]


def _logits(plan, rows, matrices, by_query):
  """x . n_j for each row x of by_query (each [K, C]) and each fine position j: [R, W] for each fine
  row of the windows; mean and 1/sqrt(variance + eps), [1, W] each; and for each map the rows that
  its positions are multiplied with, those of by_query and ones."""
  ones = jnp.ones((SUBLANES, plan.channels), jnp.float32)
  left = jnp.concatenate([x.astype(jnp.float32) for x in by_query] + [ones], axis=0)
  sums = jnp.sum(left[:-SUBLANES], axis=1, keepdims=True)                 # [R, 1]
  lhs = [left[:, m.start:m.start + m.channels].astype(plan.dtype) for m in plan.maps]
  products, squares = [0.0] * plan.window, [0.0] * plan.window
  for m, own, matrix, x in zip(plan.maps, rows, matrices, lhs):
    parts = [_dot(x, a, (1, 1), plan.dtype) for a in own]                 # [R + 8, columns]
    for y, (product, square) in enumerate(zip(_lifted(m, parts, matrix),
                                              _squares(m, own, matrix), strict=True)):
      products[y] += product
      squares[y] += square
  end = left.shape[0] - SUBLANES
  mean = [x[end:end + 1] * (1 / plan.channels) for x in products]
  r = [jax.lax.rsqrt(jnp.maximum(s * (1 / plan.channels) - m * m, 0.0) + plan.eps)
       for s, m in zip(squares, mean)]
  return [(x[:end] - m * sums) * s for x, m, s in zip(products, mean, r)], mean, r, lhs


def _softmax(plan, z):
  """Over the own window of each query: [K, W] for each fine row, 0 elsewhere."""
  shape = plan.queries, plan.columns
  first = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * plan.window
  column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  inside = (column >= first) & (column < first + plan.window)
  z = [jnp.where(inside, x, -jnp.inf) for x in z]
  most = jnp.max(functools.reduce(jnp.maximum, z), axis=1, keepdims=True)
  if plan.queries > plan.side:  # those that are padding have no window
    most = jnp.where(jnp.isfinite(most), most, 0.0)
  e = [jnp.exp(x - most) for x in z]
  total = jnp.sum(sum(e), axis=1, keepdims=True)
  if plan.queries > plan.side:
    total = jnp.where(total == 0, 1.0, total)
  return [x / total for x in e]


def _gathered(plan, weights, rows, matrices):
  """sum_j weight_j (a_j - mean_j): float32 [K, C] of weights [K, W] for each fine row.

  mean_j is linear, too: it is the mean of what is gathered, whatever the weights."""
  sums = []
  for m, own, matrix in zip(plan.maps, rows, matrices):
    sums.append(sum(_dot(w, a, (1, 0), plan.dtype)
                    for w, a in zip(_lowered(m, weights, matrix), own)))
  out = jnp.concatenate(sums, axis=1)
  return out - jnp.mean(out, axis=1, keepdims=True)


def _spread(plan, p, dz, z, dp, mean, r, q, g):
  """The gradient of a fine candidate is alpha q + beta g + gamma + delta a, of the query whose
  window it is in.  For each fine row: [alpha; beta; gamma] as rows of [2K + 8, W], beside the rows
  of `_logits`; and delta [1, W]."""
  q_sum, g_sum = (jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True) for x in (q, g))
  scale, found = 1 / plan.channels, []
  inside = lambda x: jnp.sum(x, axis=0, keepdims=True)
  first = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, plan.columns), 0) == 0
  for y in range(plan.window):
    delta = -r[y] * r[y] * scale * inside(p[y] * dp[y] + dz[y] * z[y])
    gamma = -r[y] * scale * inside(p[y] * g_sum + dz[y] * q_sum) - delta * mean[y]
    factors = [dz[y] * r[y], p[y] * r[y], jnp.where(first, gamma, 0.0)]
    found.append((jnp.concatenate(factors, axis=0), delta))
  return found


def _add_gradients(plan, part, spread, lhs, rows, matrices, found):
  """Adds the gradients of the maps to `found`: for each map, of each row that is seen."""
  for m, whole, own, matrix, x, sums in zip(part.maps, plan.maps, rows, matrices, lhs, found):
    direct = _lowered(m, [weights for weights, _ in spread], matrix)
    here = [_dot(w, x, (0, 0), plan.dtype) for w in direct]               # [columns, channels]
    for (a, b), scale in _scales(m, [delta for _, delta in spread], matrix).items():
      here[a] += _dot(scale, own[b], (1, 0), plan.dtype)
    beside = [jnp.zeros((n, m.channels), jnp.float32)
              for n in (m.left, whole.columns - m.left - m.columns)]
    for y, d in enumerate(here):
      sums[y] += jnp.concatenate([x for x in (beside[0], d, beside[1]) if len(x)], axis=0)


def _write_gradients(plan, j, found, d_refs, partial_refs):
  """Writes what is whole after row j of windows, and keeps what is not."""
  partial_refs = iter(partial_refs)
  for m, sums, d_ref in zip(plan.maps, found, d_refs):
    if m.coarse:
      _keep(plan, j, sums, d_ref, next(partial_refs))
    else:
      for y, d in enumerate(sums):
        d_ref[y] = d.astype(d_ref.dtype)


def _scales(m, deltas, matrix):
  """U^T diag(delta) U by pairs of rows of the map: [columns, columns] each."""
  if not m.coarse:
    n = m.columns
    diagonal = (jax.lax.broadcasted_iota(jnp.int32, (n, n), 0)
                == jax.lax.broadcasted_iota(jnp.int32, (n, n), 1))
    return {(y, y): jnp.where(diagonal, d, 0.0) for y, d in enumerate(deltas)}
  mixed = {}
  for delta, pair in zip(deltas, taps(m.factor, m.rows)):
    for a, s in pair:
      for b, t in pair:
        mixed[a, b] = mixed.get((a, b), 0.0) + s * t * delta
  wide = matrix.astype(jnp.float32)
  found = {(a, b): _dot(wide * d, matrix, (1, 1), matrix.dtype)
           for (a, b), d in mixed.items() if a <= b}
  return found | {(b, a): x for (a, b), x in found.items() if a < b}  # they are symmetric


def _keep(plan, j, found, d_ref, ref):
  """Adds the gradients of the rows that row j of windows sees to those of its neighbours.  ref: own
  rows of row j - 1 of windows, which lack this one's, and the first of row j."""
  above, *own, below = found
  rows = len(own)
  own[0] += jnp.where(j == 0, above, ref[rows])

  @pl.when(j > 0)
  def _():
    for y in range(rows):
      d_ref[y] = (ref[y] + above if y == rows - 1 else ref[y]).astype(d_ref.dtype)

  own[-1] += jnp.where(j == plan.side - 1, below, 0.0)
  for y, d in enumerate([*own, below]):
    ref[y] = d
