"""SDXL on the devices: prompts in, pictures out."""
from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mgjax import trees
from mgjax.checkpoint import CONFIG, SDXL, TOKENIZER, TOKENIZER_2, NoKeys, load_params, read_run
from mgjax.config import build
from mgjax.diffusion.config import SdxlConfig
from mgjax.diffusion.prompt import PromptTokenizer
from mgjax.diffusion.schedule import Schedule, make_schedule
from mgjax.diffusion.sdxl import Sdxl
from mgjax.sharding import constrain, make_mesh, mesh_context
from mgjax.xla import options_of, sampling_options

LARGEST = 4    # times the model's own side; past that nothing sensible comes
# What a picture should not be (R App. C).
NEGATIVE = (
    "out of frame, lowres, text, error, cropped, worst quality, low quality, jpeg artifacts, ugly, "
    "duplicate, morbid, mutilated, out of frame, extra fingers, mutated hands, poorly drawn hands, "
    "poorly drawn face, mutation, deformed, blurry, dehydrated, bad anatomy, bad proportions, "
    "extra limbs, cloned face, disfigured, gross proportions, malformed limbs, missing arms, "
    "missing legs, extra arms, extra legs, fused fingers, too many fingers, long neck, username, "
    "watermark, signature")


class PaintError(ValueError):
  """A picture that cannot be painted; the message says why, and what can."""


@dataclasses.dataclass(frozen=True)
class Painting:
  """How to paint.

  Args:
    width, height: pixels; None: those that the model was trained on.
    steps: of the sampler.
    guidance: how much the prompt counts; 1 and less: as it is, without a negative prompt.
    negative: what the picture should not be; None: nothing is said.
    seed: of the noise.
    original: (height, width) of the picture that it may seem to be cut from; None: its own.
    crop: (top, left) of that cut.
    target: (height, width) that it should be composed for; None: its own.
  """

  width: int | None = None
  height: int | None = None
  steps: int = 50
  guidance: float = 5.0
  negative: str | None = NEGATIVE
  seed: int = 0
  original: tuple[int, int] | None = None
  crop: tuple[int, int] = (0, 0)
  target: tuple[int, int] | None = None


class Painter:
  """Paints with one model, on `devices` (None: all); see `open_painter`.

  Weights are whole on every device.  Pictures and their negative halves are spread over the
  devices; where these are more, each picture is cut into strips (see `diffusion.layers`).
  """

  def __init__(self, folder: Path, config: SdxlConfig, tokenizers: Sequence[PromptTokenizer], *,
               dtype, vae_dtype, devices: Sequence | None = None):
    self.config, self.side, self.folder = config, config.side, folder
    self.tokenizers, self._dtype, self._vae_dtype = tokenizers, dtype, vae_dtype
    self._devices = jax.devices() if devices is None else devices
    self.params: dict | None = None  # on the devices, or None
    self._graphdef, self._shapes = abstract_sdxl(config, dtype, vae_dtype)
    platform = self._devices[0].platform
    self._encode = jax.jit(self._encode_program, compiler_options=options_of(platform))
    self._sample = jax.jit(self._sample_program, compiler_options=sampling_options(platform))
    self._decode = jax.jit(self._decode_program, compiler_options=options_of(platform))

  # Pure functions, traced once for each size, number of pictures, and guidance or not.

  def _model(self, params) -> Sdxl:
    return nnx.merge(self._graphdef, params)

  def _encode_program(self, params, ids, ids_2):
    encoded = self._model(params).encode_prompts(ids, ids_2)
    return tuple(jax.lax.with_sharding_constraint(x, P()) for x in encoded)

  def _sample_program(self, params, noise, context, pooled, sizes, schedule, steps, guidance):
    return spread(self._model(params).sample(
        spread(noise), spread(context), spread(pooled), sizes, schedule, steps, guidance))

  def _decode_program(self, params, latents):
    """-> uint8 [N, H, W, 3], and whether each latent and each picture is finite, bool [2, N]."""
    pictures = self._model(params).vae.decode(latents)
    finite = jnp.stack([jnp.isfinite(x).all((1, 2, 3)) for x in (latents, pictures)])
    pixels = jnp.round(jnp.clip(pictures * 0.5 + 0.5, 0, 1) * 255).astype(jnp.uint8)
    return spread(pixels), jax.lax.with_sharding_constraint(finite, P())

  @property
  def loaded(self) -> bool:
    """Whether the weights are on the devices."""
    return self.params is not None

  def load(self) -> None:
    """Brings the weights to the devices.  Raises CheckpointError."""
    if self.loaded:
      return
    wanted = self.weights(mesh_for(1, self._devices))
    self.params = trees.unflatten(load_params(self.folder, wanted))

  def weights(self, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """All weights by path, whole on every device of the mesh."""
    whole = NamedSharding(mesh, P())
    return {path: jax.ShapeDtypeStruct(s.shape, self._stored_dtype(path), sharding=whole)
            for path, s in self._shapes.items()}

  @property
  def model(self) -> Sdxl:
    """The model around the weights that are loaded.  Call it inside a mesh."""
    return self._model(self.params)

  def _stored_dtype(self, path: str):
    return self._vae_dtype if path.startswith("vae/") else self._dtype

  def free(self) -> None:
    """Takes the weights off the devices; `paint` reads them again."""
    self.params = None

  def check(self, painting: Painting, count: int = 1) -> None:
    """PaintError if `painting` is out of what the model can do."""
    shrink, most = self.config.vae.shrink, LARGEST * self.side
    least = shrink * 2 ** (len(self.config.unet.widths) - 1)
    for name in ("width", "height"):
      pixels = getattr(painting, name)
      if pixels is not None and (pixels % shrink or not least <= pixels <= most):
        near = min(max(round(pixels / shrink) * shrink, least), most)
        raise PaintError(f"{name} {pixels}: expected a multiple of {shrink} from {least} to "
                         f"{most}; {near} is the nearest (the model was trained at {self.side})")
    if not 1 <= painting.steps <= self.config.schedule.train_steps:
      raise PaintError(f"steps {painting.steps}: expected 1 to "
                       f"{self.config.schedule.train_steps}; 30 to 50 are usual")
    if not 0 <= painting.guidance <= 100:  # nan is neither
      raise PaintError(f"guidance {painting.guidance}: expected 0 to 100; 5 to 8 are usual")
    if not 0 <= painting.seed < 2**32:
      raise PaintError(f"seed {painting.seed}: expected 0 to {2**32 - 1}")
    if count < 1:
      raise PaintError(f"{count} pictures: expected at least one prompt")

  def cut(self, prompt: str) -> str:
    """The end of a prompt that the model does not read, as it has no room; "" if it reads all."""
    return min((t.cut(prompt) for t in self.tokenizers), key=len, default="")

  def paint(self, prompts: Sequence[str], painting: Painting = Painting()) -> np.ndarray:
    """A picture for each prompt: uint8 [N, H, W, 3].

    The noise of the i-th picture follows from `painting.seed` and i alone.
    Raises PaintError, or CheckpointError if the weights cannot be read.
    """
    latents = self.latents(prompts, painting)
    together = self.decoded_at_once(len(prompts))
    out = []
    for i in range(0, len(prompts), together):
      with mesh_context(self.mesh("decode", painting, together)):
        pictures, finite = self._decode(*place((self.params, latents[i:i + together])))
      refuse_unfinite(np.asarray(finite), self._dtype, self._vae_dtype)
      out.append(np.asarray(pictures))
    return np.concatenate(out)

  def decoded_at_once(self, count: int) -> int:
    """How many of so many pictures leave the autoencoder together."""
    return math.gcd(count, len(self._devices))

  def latents(self, prompts: Sequence[str], painting: Painting) -> jax.Array:
    """What `paint` decodes, float32 [N, H/8, W/8, 4]; as `paint` otherwise."""
    self.check(painting, len(prompts))
    self.load()
    n, guided = len(prompts), painting.guidance > 1
    shape, settings = self._settings(painting, n)
    with mesh_context(self.mesh("sample", painting, n)):
      context, pooled = self._read(prompts, painting.negative if guided else None, guided)
      arrays = place((self.params, make_noise(painting.seed, n, shape), context, pooled))
      return self._sample(*arrays, *settings)

  def mesh(self, program: str, painting: Painting, n: int) -> Mesh:
    """Where a program of `paint`, "encode", "sample" or "decode", works on n pictures at once."""
    asked = 2 if program != "decode" and painting.guidance > 1 else 1
    return mesh_for(asked * n, self._devices)

  def _settings(self, painting: Painting, n: int):
    """Shape of a picture's latents, and what `_sample` gets behind the arrays."""
    config, guided = self.config, painting.guidance > 1
    height, width = painting.height or self.side, painting.width or self.side
    own = (height, width)
    sizes = [*(painting.original or own), *painting.crop, *(painting.target or own)]
    schedule = padded(make_schedule(config.schedule, painting.steps), config.schedule.train_steps)
    guidance = np.float32(painting.guidance) if guided else None
    shape = (height // config.vae.shrink, width // config.vae.shrink, config.vae.channels)
    return shape, (np.tile(np.array(sizes, np.float32), (n, 1)), schedule,
                   np.int32(painting.steps), guidance)

  def lower(self, program: str, painting: Painting, n: int) -> jax.stages.Lowered:
    """A program of `paint` (see `mesh`) as the compiler gets it; no weights need be loaded."""
    config, mesh = self.config, self.mesh(program, painting, n)
    shape, settings = self._settings(painting, n)
    rows, whole = 2 * n if painting.guidance > 1 else n, NamedSharding(mesh, P())
    array = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype, sharding=whole)
    params, latents = trees.unflatten(self.weights(mesh)), array(np.float32, n, *shape)
    length, unet = config.text_encoder.length, config.unet
    with mesh_context(mesh):
      if program == "encode":
        return self._encode.lower(params, *[array(np.int32, rows, length)] * 2)
      if program == "decode":
        return self._decode.lower(params, latents)
      return self._sample.lower(params, latents, array(self._dtype, rows, length, unet.context),
                                array(self._dtype, rows, unet.pooled), *settings)

  def _read(self, prompts, negative, guided):
    """Prompts as the UNet wants them; where guided, behind as many negative ones."""
    zeros = guided and negative is None and self.config.zero_negative
    before = [negative or ""] * (len(prompts) if guided and not zeros else 0)
    texts = [*before, *prompts]
    encoded = self._encode(place(self.params), *(tokenize(texts) for tokenize in self.tokenizers))
    if not zeros:
      return encoded
    return tuple(jnp.concatenate([jnp.zeros_like(x), x]) for x in encoded)


def open_painter(folder: str | os.PathLike, *, sampler: str | None = None, dtype=None,
                 vae_dtype=jnp.float32) -> Painter:
  """A converted SDXL (`python -m conversion.from_hf --sdxl ...`), its weights not read yet.

  Args:
    sampler: "euler" or "ddim"; None: as the model was published.
    dtype: of the computation; None: bfloat16, on a CPU float32.
    vae_dtype: of the autoencoder's.

  Raises FileNotFoundError, CheckpointError or ValueError, naming the folder.
  """
  folder = Path(folder)
  if not folder.exists():
    raise FileNotFoundError(f"{folder}: no such folder; expected a converted SDXL")
  step_dir, saved = read_run(folder, SDXL)
  root = step_dir.parent.parent
  config = build(SdxlConfig, saved["model"], f"{root / CONFIG}: model")
  if sampler is not None:
    config = dataclasses.replace(config, schedule=dataclasses.replace(
        config.schedule, sampler=sampler))
  if dtype is None:
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  length = config.text_encoder.length
  tokenizers = [PromptTokenizer(root / name, length) for name in (TOKENIZER, TOKENIZER_2)]
  return Painter(folder, config, tokenizers, dtype=dtype, vae_dtype=vae_dtype)


def abstract_sdxl(config: SdxlConfig, dtype, vae_dtype):
  """Graph of the model, and its parameters by path as ShapeDtypeStructs."""
  with mesh_context(make_mesh(devices=jax.devices()[:1])):
    graphdef, state = nnx.split(nnx.eval_shape(
        lambda: Sdxl(config, dtype=dtype, vae_dtype=vae_dtype, rngs=NoKeys(0))))
  return graphdef, trees.flatten(trees.pure(state))


def mesh_for(rows: int, devices) -> Mesh:
  """A mesh that shares so many rows evenly, and cuts maps into strips on what is left of it."""
  data = math.gcd(rows, len(devices))
  return make_mesh({"data": data, "tensor": len(devices) // data}, devices)


def place(tree):
  """Arrays whole on every device of the mesh at hand; those that are so on another mesh of the same
  devices are not moved."""
  return jax.device_put(tree, NamedSharding(jax.sharding.get_mesh(), P()))


def spread(x: jax.Array) -> jax.Array:
  """An array [N, ...] with its pictures over the devices."""
  return constrain(x, "batch", *(None,) * (x.ndim - 1))


def padded(schedule: Schedule, length: int) -> Schedule:
  """With rows of zeros up to `length`, so that every number of steps has the same shapes."""
  pad = lambda x: np.pad(x, (0, length - len(x))) if x.ndim else x
  return jax.tree.map(pad, schedule)


def make_noise(seed: int, n: int, shape: tuple[int, int, int]) -> np.ndarray:
  """Normal noise [n, *shape]; the i-th follows from seed and i, on whatever devices."""
  with jax.set_mesh(make_mesh(devices=jax.local_devices()[:1])):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(n))
    return np.asarray(jax.vmap(lambda key: jax.random.normal(key, shape))(keys))


def refuse_unfinite(finite: np.ndarray, dtype, vae_dtype) -> None:
  """PaintError unless latents and pictures, bool [2, N], are all finite."""
  name = lambda d: jnp.dtype(d).name
  if not finite[0].all():
    raise PaintError(f"the UNet's latents are not finite in {name(dtype)}; the weights are "
                     "damaged, or need bfloat16 or float32")
  if not finite[1].all():
    raise PaintError(f"the autoencoder's picture is not finite in {name(vae_dtype)}; decode in "
                     "float32, which is the default: its published weights overflow in float16")
