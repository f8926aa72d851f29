"""A trained model with all that belongs to it: pictures and text in, text out."""
from __future__ import annotations

import collections
import hashlib
import math
import os
import pathlib
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mgjax.checkpoint import STEPS, load_model, read_run
from mgjax.data.conversation import (
    HUMAN,
    IMAGE_TAG,
    Template,
    Turn,
    control_tokens,
    get_template,
)
from mgjax.data.images import load_image
from mgjax.data.tokenize import encode_prompt
from mgjax.data.tokenizer import Tokenizer, load_tokenizer
from mgjax.infer.cache import check_cache_dtype
from mgjax.infer.chat import Chat
from mgjax.infer.engine import Engine, Prompt
from mgjax.infer.quantize import check_format, load_quantized
from mgjax.infer.sampling import Sampling
from mgjax.infer.text import end_ids, finished_text
from mgjax.sharding import make_mesh, mesh_context

KEPT_PICTURES = 64  # whose visual tokens stay: 64 HD pictures of a 7B take 1.5 GB in bfloat16


class Assistant:
  """Asks a model, one question or many.

  Args:
    engine: the model.
    tokenizer, template: those that it was trained with.
    aspect: how pictures are made square ('pad' or 'square'), as in training.
    stop_ids: more ids that end an answer; see `text.end_ids`.
    name: what the model is called.
  """

  def __init__(self, engine: Engine, tokenizer: Tokenizer, template: Template, *, aspect: str,
               stop_ids: Sequence[int] = (), name: str = "mgjax"):
    self.engine, self.tokenizer, self.template, self.name = engine, tokenizer, template, name
    self.ends = end_ids(tokenizer, template, stop_ids)
    self._aspect = aspect
    self._control = control_tokens(template, tokenizer.special, tokenizer.eos)
    self._seen: collections.OrderedDict[tuple, jax.Array] = collections.OrderedDict()

  @property
  def sees(self) -> bool:
    """Whether the model takes pictures; else it is a language model alone."""
    return self.engine.config.vision is not None

  def pixels(self, picture, hd: bool = True) -> np.ndarray:
    """A picture (a path, `data.images.Picture` or of Pillow's) as the model takes it, uint8
    [H, H, 3].

    hd: as fine as the model can see; else at its standard size.  Raises ImageError.
    """
    if isinstance(picture, Image.Image):
      picture = np.asarray(picture.convert("RGB"))
    return load_image(picture, self.engine.picture_sides[-1 if hd else 0], self._aspect)

  def see(self, pixels: np.ndarray) -> jax.Array:
    """uint8 [H, H, 3] -> visual tokens [T, D]: the same array for the same picture, while kept."""
    return self.see_all([pixels])[0]

  def see_all(self, pictures: Sequence[np.ndarray]) -> list[jax.Array]:
    """As `see` for each, those that are new encoded together."""
    keys = [(p.shape, hashlib.sha256(np.ascontiguousarray(p)).digest()) for p in pictures]
    new = {key: p for key, p in zip(keys, pictures) if key not in self._seen}
    for shape in dict.fromkeys(p.shape for p in new.values()):
      alike = {key: p for key, p in new.items() if p.shape == shape}
      # Kept only once it is there: what fails on the device must not stay.
      tokens = jax.block_until_ready(self.engine.encode_images(np.stack(list(alike.values()))))
      self._seen.update(zip(alike, tokens))
    seen = [self._seen[key] for key in keys]
    for key in keys:
      self._seen.move_to_end(key)
    while len(self._seen) > KEPT_PICTURES:
      self._seen.popitem(last=False)
    return seen

  def check_text(self, text: str, what: str = "question") -> None:
    """ValueError if a text would be read as something else than text."""
    if IMAGE_TAG in text:
      raise ValueError(f"the {what} holds {IMAGE_TAG}, which stands for a picture; leave it out "
                       "and attach the picture as a file")
    if found := [token for token in self._control if token in text]:
      raise ValueError(f"the {what} holds {found[0]}, which would end the turn; write it "
                       "otherwise")
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise ValueError(f"the {what} holds half a character ({error}); type it as UTF-8"
                       ) from error

  def is_text(self, text: str) -> bool:
    """Whether `check_text` lets it pass."""
    try:
      self.check_text(text)
    except ValueError:
      return False
    return True

  def prompt(self, turns: Sequence[Turn], images: Sequence[jax.Array], begun: str = "") -> Prompt:
    """The prompt that asks for the next answer; `images` from `see`, a tag in `turns` for each, or
    none at all.  begun: what the answer begins with; the model goes on from there.
    ValueError as in `data.tokenize.encode_prompt`."""
    encoded = encode_prompt(self.tokenizer, self.template, turns, len(images),
                            [len(image) for image in images], begun)
    return Prompt(encoded.tokens, encoded.visual_index, tuple(images))

  def conversation(self, sampling: Sampling = Sampling(), *, fit: bool = True) -> Chat:
    """A conversation of several turns; see `Chat`."""
    return Chat(self, sampling, fit=fit)

  def chat(self, image, text: str, **sampling) -> str:
    """The answer to one question.

        mgjax.load("work_dirs/stage2").chat("photo.jpg", "what do the signs say?")

    image: a path, a list of them, or None; sampling: fields of `Sampling`.
    Raises ImageError and ValueError, naming what is wrong.
    """
    return self.chat_batch([(image, text)], **sampling)[0]

  def chat_batch(self, questions: Iterable[tuple], **sampling) -> list[str]:
    """The answers to (image, text) pairs as in `chat`, many at a time; errors name the pair."""
    settings = Sampling(**{"stop_ids": self.ends} | sampling)
    prompts = []
    for i, (image, text) in enumerate(questions):
      files = [] if image is None else image if isinstance(image, list | tuple) else [image]
      try:
        self.check_text(text)
        images = [self.see(self.pixels(file)) for file in files]
        prompts.append(self.prompt([(HUMAN, text)], images))
      except ValueError as error:
        raise ValueError(f"question {i}: {error}") from error
    return [finished_text(self.tokenizer, self.template, ids, self.ends)
            for ids in self.engine.generate_batch(prompts, settings)]


def load(checkpoint: str | os.PathLike, *, template: str | None = None,
         max_length: int | None = None, rows: int = 1, step: int | None = None,
         quantize: str | None = None, cache_dtype: str | None = None,
         devices: Sequence[jax.Device] | None = None) -> Assistant:
  """A trained model.

  Args:
    checkpoint: folder of a run, or of one of its steps.
    template, max_length: as in training if None.
    rows: answers that grow at once.
    step: which saved step of the run; the newest if None.
    quantize: "int8" or "int4" for weights in fewer bytes, see `infer.quantize`.
    cache_dtype: "int8" for keys and values in fewer bytes; else that of the model, if None.
    devices: where it lies; all there are if None.

  Raises FileNotFoundError, CheckpointError or ValueError, naming the folder.
  """
  checkpoint, named = pathlib.Path(checkpoint), template and get_template(template)
  check_format(quantize)
  if cache_dtype is not None:
    check_cache_dtype(cache_dtype)
  if not checkpoint.exists():
    raise FileNotFoundError(f"{checkpoint}: no such folder; expected a run's --workdir")
  if step is not None:
    checkpoint = checkpoint / STEPS / str(step)
  # A row lies on as many devices as can share the heads; only what is left shares the rows.
  decoder = read_run(checkpoint)[1]["model"]["decoder"]
  devices = jax.devices() if devices is None else devices
  ways = math.gcd(decoder["heads"], decoder["kv_heads"], len(devices))
  mesh = make_mesh({"tensor": ways, "fsdp": -1}, devices)
  with mesh_context(mesh):
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    loaded = (load_quantized(checkpoint, mesh, dtype=dtype, name=quantize) if quantize else
              load_model(checkpoint, mesh, dtype=dtype))
  tokenizer, vocabulary = load_tokenizer(loaded.tokenizer_dir), loaded.config.decoder.vocab_size
  if tokenizer.vocab_size > vocabulary:
    raise ValueError(f"{loaded.tokenizer_dir} has {tokenizer.vocab_size} entries, the model "
                     f"{vocabulary}; they belong to different models")
  engine = Engine(loaded.model, mesh=mesh, max_length=max_length or loaded.max_length, rows=rows,
                  cache_dtype=cache_dtype)
  return Assistant(engine, tokenizer, named or get_template(loaded.template),
                   aspect=loaded.aspect, stop_ids=loaded.stop_ids,
                   name=pathlib.Path(os.path.abspath(checkpoint)).name)
