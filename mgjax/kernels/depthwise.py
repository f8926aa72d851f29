"""Depthwise 7x7 convolution, alone or with the LayerNorm behind it, on a TPU's vector unit.

XLA's form takes four to five times what the arithmetic needs (benchmarks/depthwise.py --tpu).
Here a block of rows of an image is laid out in the memory of the core as float32, channels on the
lanes and columns on the sublanes, with its halo and zeros around.  A load may begin at any sublane,
so a shift in either direction costs nothing; 49 multiplications and additions of registers are
left.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

TAPS, REACH = 7, 3            # of the kernel, along a side; beyond its middle
LANES, SUBLANES = 128, 8      # of a register
HALO = 4                      # rows above and below that are read: a divisor of every block
LEFT = 8                      # columns before the first one, so that it is aligned
ROWS = 8                      # of a tile, whose sums are in registers, or twice as many
MEMORY, SPARE = 40 << 20, 8 << 20  # bytes of the core's that a block may take; for registers


def fits(shape: tuple[int, ...], dtype) -> bool:
  """Whether the kernels can take one device's map [N, H, W, C] of this dtype."""
  return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32) and _block_rows(_padded(shape), dtype) > 0


def _tile_rows(rows: int) -> int:
  return 2 * ROWS if rows % (2 * ROWS) == 0 else ROWS


def _padded(shape):
  n, h, w, c = shape
  return n, -(-h // ROWS) * ROWS, -(-w // SUBLANES) * SUBLANES, c


def _block_rows(shape, dtype) -> int:
  """Rows of a block: as many as there is memory for, so that the halo is little; or 0."""
  _, h, w, c = shape
  tiles, item = -(-c // LANES), jnp.dtype(dtype).itemsize
  pixel = tiles * LANES
  for rows in (32, 16, 24, 8):  # tiles of 16 rows are faster than of 8
    laid_out = (rows + 2 * REACH) * (w + 2 * LEFT) * pixel * 4 + rows * w * pixel * 4
    moved = 2 * (2 * rows + 2 * HALO) * w * pixel * item  # the next block's are on the way
    if h % rows == 0 and laid_out + moved <= MEMORY:
      return rows
  return 0


def depthwise(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, interpret: bool) -> jax.Array:
  """Same-size depthwise 7x7 convolution and a bias, added up in float32.

  x [N, H, W, C], kernel [7, 7, C], bias [C] -> [N, H, W, C] in the dtype of x.  interpret: run the
  kernel's steps as ordinary operations, on any platform.
  """
  return _convolve(x, kernel, (bias,), None, interpret)


def depthwise_norm(x: jax.Array, kernel: jax.Array, bias: jax.Array, scale: jax.Array,
                   shift: jax.Array, eps: float, *, interpret: bool) -> jax.Array:
  """`depthwise` and LayerNorm over the channels with scale and shift [C]; what is between the two
  stays in float32 and in the core."""
  return _convolve(x, kernel, (bias, scale, shift), eps, interpret)


def depthwise_gradient(x: jax.Array, g: jax.Array, *,
                       interpret: bool) -> tuple[jax.Array, jax.Array]:
  """Gradients of kernel and bias of `depthwise`: x, g [N, H, W, C] -> float32 [7, 7, C], [C]."""
  shape, c = _padded(x.shape), x.shape[-1]
  rows, tiles = _block_rows(shape, x.dtype), -(-c // LANES)
  x, g = (_pad(a, shape) for a in (x, g))
  sums = pl.pallas_call(
      functools.partial(_gradient_kernel, rows=rows, unroll=not interpret),
      grid=(shape[0], shape[1] // rows),
      in_specs=[*_blocks(shape, rows), _block(shape, rows)],
      out_specs=pl.BlockSpec((tiles, TAPS**2 + 1, LANES), lambda n, b: (0, 0, 0)),
      out_shape=jax.ShapeDtypeStruct((tiles, TAPS**2 + 1, LANES), jnp.float32),
      scratch_shapes=[*_scratch(shape, rows),
                      pltpu.VMEM((tiles, TAPS**2 + 1, SUBLANES, LANES), jnp.float32)],
      compiler_params=_compiler_params("arbitrary"),
      name="depthwise_gradient", interpret=interpret)(x, x, x, g)
  sums = sums.transpose(1, 0, 2).reshape(TAPS**2 + 1, tiles * LANES)[:, :c]
  return sums[:-1].reshape(TAPS, TAPS, c), sums[-1]


def _convolve(x, kernel, vectors, eps, interpret):
  shape, c = _padded(x.shape), x.shape[-1]
  rows, tiles = _block_rows(shape, x.dtype), -(-c // LANES)
  by_tile = lambda w: jnp.pad(w.astype(jnp.float32), ((0, 0), (0, tiles * LANES - c))).reshape(
      -1, tiles, LANES).transpose(1, 0, 2)  # [n, C] -> [tiles, n, 128]
  padded = _pad(x, shape)
  y = pl.pallas_call(
      functools.partial(_convolution_kernel, rows=rows, eps=eps, unroll=not interpret),
      grid=(shape[0], shape[1] // rows),
      in_specs=[*_blocks(shape, rows),
                pl.BlockSpec((tiles, TAPS**2, LANES), lambda n, b: (0, 0, 0)),
                pl.BlockSpec((len(vectors), c), lambda n, b: (0, 0))],
      out_specs=_block(shape, rows), out_shape=jax.ShapeDtypeStruct(shape, x.dtype),
      scratch_shapes=_scratch(shape, rows),
      compiler_params=_compiler_params("parallel"),
      name="depthwise" if eps is None else "depthwise_norm", interpret=interpret)(
          padded, padded, padded, by_tile(kernel.reshape(TAPS**2, c)),
          jnp.stack(vectors).astype(jnp.float32))
  return y[:, :x.shape[1], :x.shape[2]]


def _pad(x, shape):
  return jnp.pad(x, [(0, b - a) for a, b in zip(x.shape, shape)]) if x.shape != shape else x


def _block(shape, rows):
  return pl.BlockSpec((1, rows, *shape[2:]), lambda n, b: (n, b, 0, 0))


def _blocks(shape, rows):
  """A block of rows, and those above and below (of an image's first and last block, whatever)."""
  step, last = rows // HALO, shape[1] // HALO - 1
  halo = lambda index: pl.BlockSpec((1, HALO, *shape[2:]), lambda n, b: (n, index(b), 0, 0))
  return (_block(shape, rows), halo(lambda b: jnp.maximum(b * step - 1, 0)),
          halo(lambda b: jnp.minimum((b + 1) * step, last)))


def _scratch(shape, rows):
  """Of the block: input laid out with its surroundings, and output (or what comes back for it)."""
  tiles, w = -(-shape[3] // LANES), shape[2]
  return [pltpu.VMEM((tiles, rows + 2 * REACH, w + 2 * LEFT, LANES), jnp.float32),
          pltpu.VMEM((tiles, rows, w, LANES), jnp.float32)]


def _compiler_params(order):
  return pltpu.CompilerParams(dimension_semantics=(order, order), vmem_limit_bytes=MEMORY + SPARE)


def _lanes(tile, c):
  return min(LANES, c - tile * LANES)


def _lay_out(x_ref, above_ref, below_ref, laid):
  """Writes a block and its surroundings, zeros beyond the picture, as float32."""
  (_, rows, w, c), block, blocks = x_ref.shape, pl.program_id(1), pl.num_programs(1)

  def write(tile, to, row, inside=None):
    lanes = _lanes(tile, c)
    row = row.astype(jnp.float32)
    row = row if inside is None else jnp.where(inside, row, 0)
    laid[tile, to, LEFT:LEFT + w, :lanes] = row

  for tile in range(laid.shape[0]):
    at = pl.ds(tile * LANES, _lanes(tile, c))

    @pl.loop(0, rows + 2 * REACH)
    def _(r, tile=tile):
      border = jnp.zeros((LEFT, LANES), jnp.float32)
      laid[tile, r, :LEFT] = border
      laid[tile, r, LEFT + w:] = border

    for r in range(REACH):
      write(tile, r, above_ref[0, HALO - REACH + r, :, at], block > 0)
      write(tile, rows + REACH + r, below_ref[0, r, :, at], block < blocks - 1)

    @pl.loop(0, rows)
    def _(r, tile=tile, at=at):
      write(tile, r + REACH, x_ref[0, r, :, at])


def _over_tiles(laid, out, body):
  """body(tile of channels, first row, first column) for all that a block has."""
  tiles, rows, w, _ = out.shape
  many = _tile_rows(rows)

  @pl.loop(0, tiles)
  def _(tile):
    @pl.loop(0, rows // many)
    def _(down):
      @pl.loop(0, w // SUBLANES)
      def _(right):
        body(tile, down * many, right * SUBLANES)


def _over_taps(body, laid, tile, row, column, down, carry, unroll):
  """carry = body(dx, rows, carry) for each column dx of taps, with the rows [8, 128] of the input
  that a tile of `down` rows sees through it.  unroll: as interpreted it would compile for long."""
  def step(dx, carry):
    columns = pl.ds(column + LEFT - REACH + dx, SUBLANES)
    return body(dx, [laid[tile, row + r, columns] for r in range(down + 2 * REACH)], carry)
  return jax.lax.fori_loop(0, TAPS, step, carry, unroll=unroll)


def _meeting(down):
  """Which rows of what comes in and goes out a tile has, and the row of taps in which they meet.  A
  row that comes in meets all that it is part of at once, so that registers suffice."""
  return [(r, y, r - y) for r in range(down + 2 * REACH)
          for y in range(max(0, r - TAPS + 1), min(down, r + 1))]


def _convolution_kernel(x_ref, above_ref, below_ref, taps_ref, vectors_ref, y_ref, laid, out, *,
                        rows, eps, unroll):
  _lay_out(x_ref, above_ref, below_ref, laid)

  down = _tile_rows(rows)

  def body(tile, row, column):
    def add(dx, values, sums):
      taps = [taps_ref[tile, pl.ds(dy * TAPS + dx, 1)] for dy in range(TAPS)]
      sums = list(sums)
      for r, y, dy in _meeting(down):
        sums[y] += values[r] * taps[dy]
      return tuple(sums)
    zero = (jnp.zeros((SUBLANES, LANES), jnp.float32),) * down
    sums = _over_taps(add, laid, tile, row, column, down, zero, unroll)
    for y, total in enumerate(sums):
      out[tile, row + y, pl.ds(column, SUBLANES)] = total

  _over_tiles(laid, out, body)
  _, _, w, c = x_ref.shape
  tiles = range(out.shape[0])
  vector = lambda n, tile: vectors_ref[pl.ds(n, 1), pl.ds(tile * LANES, _lanes(tile, c))]
  # Of one row, columns at a time: enough for their sums to hide one another's latency, few enough
  # to stay in registers.
  size = next((s for s in (96, 64, 48, 32, 16) if w % s == 0 and s * len(tiles) <= 288), SUBLANES)

  @pl.loop(0, rows)
  def _(row):
    @pl.loop(0, w // size)
    def _(part):
      columns = pl.ds(part * size, size)
      parts = [out[t, row, columns, :_lanes(t, c)] + vector(0, t) for t in tiles]
      if eps is not None:
        mean = lambda parts: sum(jnp.sum(p, axis=-1, keepdims=True) for p in parts) / c
        middle = mean(parts)
        parts = [p - middle for p in parts]
        spread = jax.lax.rsqrt(mean([jnp.square(p) for p in parts]) + eps)
        parts = [p * spread * vector(1, t) + vector(2, t) for t, p in zip(tiles, parts)]
      for t, p in zip(tiles, parts):
        y_ref[0, row, columns, pl.ds(t * LANES, _lanes(t, c))] = p.astype(y_ref.dtype)


def _gradient_kernel(x_ref, above_ref, below_ref, g_ref, sums_ref, laid, g, sums, *, rows,
                     unroll):
  first = (pl.program_id(0) == 0) & (pl.program_id(1) == 0)
  last = ((pl.program_id(0) == pl.num_programs(0) - 1)
          & (pl.program_id(1) == pl.num_programs(1) - 1))

  @pl.when(first)
  def _():
    sums[...] = jnp.zeros_like(sums)

  _lay_out(x_ref, above_ref, below_ref, laid)
  c = x_ref.shape[-1]
  for tile in range(g.shape[0]):
    @pl.loop(0, rows)
    def _(r, tile=tile):
      lanes = _lanes(tile, c)
      g[tile, r, :, :lanes] = g_ref[0, r, :, pl.ds(tile * LANES, lanes)].astype(jnp.float32)

  down = _tile_rows(rows)

  def body(tile, row, column):
    own = [g[tile, row + y, pl.ds(column, SUBLANES)] for y in range(down)]

    def add(dx, values, none):
      found = [0.0] * TAPS
      for r, y, dy in _meeting(down):
        found[dy] += values[r] * own[y]
      for dy, product in enumerate(found):
        sums[tile, dy * TAPS + dx] += product
      return none
    _over_taps(add, laid, tile, row, column, down, 0, unroll)
    sums[tile, TAPS**2] += sum(own)

  _over_tiles(laid, g, body)

  @pl.when(last)
  def _():
    sums_ref[...] = jnp.sum(sums[...], axis=2)
