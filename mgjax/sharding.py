"""Where arrays live: one mesh, one table from logical axis names to mesh axes, for weights and
activations alike."""
from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mgjax.config import ConfigError, DecoderConfig

AXES = ("data", "fsdp", "tensor", "expert")

# Logical name -> mesh axes.  Weights shard their model axis over fsdp, activations their batch.
RULES = {
    # weights
    "embed": "fsdp", "mlp": "tensor", "heads": "tensor", "vocab": "tensor", "layers": None,
    "expert": "expert",
    "channels": "fsdp", "taps": None, "norm": None,
    "rank": "fsdp",  # of an adapter's matrix that has no `embed` side
    # activations
    "batch": ("data", "fsdp", "expert"), "seq": None, "act_embed": None, "act_mlp": "tensor",
    "act_heads": "tensor", "act_vocab": "tensor", "space": None, "strips": "tensor",
}


def make_mesh(shape: dict[str, int] | tuple[int, ...] = (1, 1, 1, 1), devices=None) -> Mesh:
  """Mesh with axes AXES.  One entry may be -1: it takes what the other axes leave.

  Raises ConfigError if the axes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  if isinstance(shape, dict) and (unknown := sorted(set(shape) - set(AXES))):
    raise ConfigError(f"mesh: no axis {unknown[0]!r}; there are {', '.join(AXES)}")
  sizes = tuple(shape.get(a, 1) for a in AXES) if isinstance(shape, dict) else tuple(shape)
  known = math.prod(s for s in sizes if s != -1)
  if sizes.count(-1) == 1 and known and len(devices) % known == 0:
    sizes = tuple(len(devices) // known if s == -1 else s for s in sizes)
  if math.prod(sizes) != len(devices) or min(sizes) < 1:
    asked = ", ".join(f"{a}={s}" for a, s in zip(AXES, sizes))
    raise ConfigError(
        f"mesh: {asked} does not cover the {len(devices)} devices present; the sizes must multiply "
        f"to {len(devices)} (one of them may be -1, e.g. --config.mesh.fsdp=-1)")
  slices = len({getattr(d, "slice_index", 0) or 0 for d in devices})
  if sizes[0] % slices:
    raise ConfigError(f"mesh: data={sizes[0]} over {slices} TPU slices; data must be a multiple of "
                      f"{slices}, so that only gradients leave a slice")
  lay = functools.partial(mesh_utils.create_device_mesh, devices=devices)
  if slices > 1:
    lay = functools.partial(mesh_utils.create_hybrid_device_mesh,
                            dcn_mesh_shape=(slices, 1, 1, 1), devices=devices)
    sizes = (sizes[0] // slices, *sizes[1:])
  # Auto has to be asked for: under the default (Explicit) FSDP weights collide with FSDP batches.
  return Mesh(lay(sizes, allow_split_physical_axes=True), AXES,
              axis_types=(AxisType.Auto,) * len(AXES))


def fit_mesh(sizes: Sequence[int], devices: int, rows: Sequence[int]) -> tuple[int, ...]:
  """Sizes of AXES with fsdp and tensor worked out where both are -1: fsdp takes as many devices as
  can share each of these numbers of rows evenly, tensor the rest.  Others come back as they are.

  >>> fit_mesh((1, -1, -1, 1), 64, [32]), fit_mesh((2, -1, -1, 1), 64, [64])
  ((1, 32, 2, 1), (2, 32, 1, 1))
  """
  data, fsdp, tensor, expert = sizes
  if (fsdp, tensor) != (-1, -1) or data < 1 or expert < 1 or devices % (data * expert):
    return tuple(1 if s == -1 and i == AXES.index("tensor") and fsdp == -1 else s
                 for i, s in enumerate(sizes))
  left, most = devices // (data * expert), math.gcd(*rows)
  fsdp = max(f for f in range(1, left + 1)
             if left % f == 0 and most % (data * f * expert) == 0 or f == 1)
  return data, fsdp, left // fsdp, expert


@contextlib.contextmanager
def mesh_context(mesh: Mesh):
  """The one place that enters a mesh; modules are built and steps are traced inside it."""
  with jax.set_mesh(mesh), nnx.logical_axis_rules(tuple(RULES.items())):
    yield mesh


def on_this_host(f, *args):
  """f(*args) outside the mesh: what runs at once cannot run on devices that are only described."""
  with jax.set_mesh(make_mesh(devices=jax.local_devices()[:1])):
    return f(*args)


def spec(*names: str | None) -> P:
  """PartitionSpec of an array whose dimensions carry these logical names."""
  return P(*(RULES[n] if n else None for n in names))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """`x` laid out by its logical dimension names, those whole that the mesh does not divide."""
  return jax.lax.with_sharding_constraint(x, fitting_spec(x.shape, *names))


def fitting_spec(shape: tuple[int, ...], *names: str | None) -> P:
  """`spec`, with the dimensions whole that the mesh does not divide."""
  mesh = jax.sharding.get_abstract_mesh()
  return P(*(axes if _divides(mesh, axes, size) else None
             for axes, size in zip(spec(*names), shape)))


def gathered(w: jax.Array, *names: str | None) -> jax.Array:
  """A weight as a product wants it: brought together over fsdp, its tensor parts where they are.

  names: the logical names of its dimensions.  Its gradient is laid out as the weight is.  Without
  this the partitioner may cut the activations like the weight instead, which moves far more.
  """
  stored = fitting_spec(w.shape, *names)
  used = tuple(None if axes == "fsdp" else axes for axes in stored)
  return _relaid(w, stored, P(*used)) if stored != P(*used) else w


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _relaid(w, stored, used):
  return jax.lax.with_sharding_constraint(w, used)


def _scattered(stored, used, _, g):
  # TPUs scatter a sum along the outermost dimension; along others they sum all of it everywhere.
  axis = [a is b for a, b in zip(stored, used)].index(False)
  spec = P(stored[axis], *stored[:axis], *stored[axis + 1:])
  return (jnp.moveaxis(jax.lax.with_sharding_constraint(jnp.moveaxis(g, axis, 0), spec), 0, axis),)


_relaid.defvjp(lambda w, stored, used: (_relaid(w, stored, used), None), _scattered)


def check_heads(config: DecoderConfig, mesh: Mesh) -> None:
  """Raises ConfigError if the tensor axis would cut an attention head."""
  ways = mesh.shape["tensor"]
  if max(config.experts, 1) % mesh.shape["expert"]:
    raise ConfigError(f"mesh: expert={mesh.shape['expert']} does not divide the {config.experts} "
                      "experts of the decoder")
  for name in ("heads", "kv_heads"):
    if (count := getattr(config, name)) % ways:
      raise ConfigError(f"mesh: tensor={ways} does not divide the {count} {name} of the decoder; "
                        f"use a divisor of {math.gcd(config.heads, config.kv_heads)}")


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over the axes that carry the batch; other dimensions whole."""
  return NamedSharding(mesh, spec("batch"))


def batch_shards(mesh: Mesh) -> int:
  """How many ways the rows of a batch are split."""
  return math.prod(mesh.shape[a] for a in RULES["batch"])


def shardings_of(tree, mesh: Mesh):
  """NamedShardings of an abstract tree made by `nnx.eval_shape` inside the mesh.

  A dimension that its mesh axes do not divide stays whole (a bias of 7 on 2 devices).
  Raises ConfigError if more than 2 % of the bytes that the mesh could shard stay unsharded.
  """
  def leaf(s):
    parts = tuple(s.sharding.spec) if s.sharding is not None else ()
    parts += (None,) * (len(s.shape) - len(parts))
    kept = tuple(p if _divides(mesh, p, n) else None for p, n in zip(parts, s.shape))
    return NamedSharding(mesh, P(*kept))

  shardings = jax.tree.map(leaf, tree)
  _refuse_unsharded(tree, shardings, mesh)
  return shardings


def _ways(mesh, axes) -> int:
  axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
  return math.prod(mesh.shape[a] for a in axes)


def _divides(mesh, axes, size) -> bool:
  return size % _ways(mesh, axes) == 0


def _refuse_unsharded(tree, shardings, mesh):
  if math.prod(mesh.shape[a] for a in AXES if a != "data") == 1:
    return
  total = whole = 0
  worst = (0, "")
  for (path, s), sharding in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(shardings)):
    size = math.prod(s.shape) * s.dtype.itemsize
    total += size
    if all(_ways(mesh, p) == 1 for p in sharding.spec):
      whole += size
      worst = max(worst, (size, jax.tree_util.keystr(path, simple=True, separator="/")))
  # Small models are mostly norms and biases; below 64 MiB nobody pays for a copy on every device.
  if whole > 0.02 * total and whole > 64 * 2**20:
    raise ConfigError(
        f"mesh {dict(mesh.shape)} leaves {whole / total:.0%} of the parameter bytes whole on every "
        f"device (largest: {worst[1]}, {worst[0] / 2**20:.0f} MiB); choose fsdp and tensor sizes "
        "that divide the model's width, heads and vocabulary")
