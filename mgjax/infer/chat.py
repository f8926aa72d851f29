"""The text side of the engine: history and pictures in, an answer out piece by piece."""
from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Generator, Iterator, Sequence

import jax
import jax.numpy as jnp

from mgjax.checkpoint import load_model, read_run
from mgjax.data.conversation import (
    GPT,
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
from mgjax.infer.engine import Engine, Prompt
from mgjax.infer.sampling import Sampling
from mgjax.sharding import make_mesh, mesh_context

_HALF = "\ufffd"  # what decoding makes of a character whose bytes are not all there


def end_ids(tokenizer: Tokenizer, template: Template,
            stop_ids: Sequence[int] = ()) -> tuple[int, ...]:
  """eos, the checkpoint's `stop_ids`, and the stop strings of the template that are one token each;
  others are found in the text (`TextStream`)."""
  ids = {tokenizer.eos_id, *stop_ids}
  for stop in template.stop:
    written = tokenizer.encode(stop, add_bos=False)
    if len(written) == 1:
      ids.add(written[0])
  return tuple(sorted(ids))


class TextStream:
  """Ids in, text out, as soon as no later id can change it.

  Held back are half characters, spaces at the end, and what may be the start of a stop string.  The
  text of a whole answer has no spaces around it.
  """

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
    self._tokenizer, self._stops = tokenizer, tuple(s for s in stops if s)
    self._ids: list[int] = []
    self._shown = 0  # characters given out
    self.text = ""   # everything so far, up to the first stop string
    self.stopped = False  # a stop string was met; further ids are ignored

  def feed(self, token: int) -> str:
    """The text that this id makes certain; often empty."""
    if self.stopped:
      return ""
    self._ids.append(token)
    # All ids every time: only the tokenizer knows how pieces join, and it is fast.
    self.text = self._tokenizer.decode(self._ids, skip_special=True).lstrip()
    if met := [at for stop in self._stops if (at := self.text.find(stop)) >= 0]:
      self.text, self.stopped = self.text[:min(met)].rstrip(), True
      return self._show(self.text)
    certain = self.text.rstrip(_HALF).rstrip()
    if self._tokenizer.takes_spaces_back:
      certain = certain[:max(certain.rfind(" "), self._shown)]
    held = max((_overlap(certain, stop) for stop in self._stops), default=0)
    return self._show(certain[:len(certain) - held].rstrip())

  def finish(self) -> str:
    """What was held back, once no more ids come."""
    self.text = self.text.rstrip(_HALF).rstrip()
    return self._show(self.text)

  def _show(self, text: str) -> str:
    new = text[self._shown:]
    self._shown = max(self._shown, len(text))
    return new


def _overlap(text: str, stop: str) -> int:
  """Length of the longest end of `text` that `stop` begins with."""
  return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])),
              0)


def finished_text(tokenizer: Tokenizer, template: Template, ids: Sequence[int],
                  ends: Sequence[int]) -> str:
  """The text of a whole answer, up to what ends it (`ends` from `end_ids`)."""
  stream = TextStream(tokenizer, template.stop)
  for token in ids:
    if token in ends or stream.stopped:
      break
    stream.feed(token)
  stream.finish()
  return stream.text


class Chat:
  """A conversation with a model: pictures may join at any turn and stay.

  Args:
    engine: the model.
    tokenizer, template: those that it was trained with.
    aspect: how pictures are made square ('pad' or 'square'), as in training.
    sampling: how to generate; its `stop_ids` are filled in here.
    stop_ids: see `end_ids`.
    fit: whether an answer may be shorter than `max_new_tokens` where the conversation nears the
      engine's max_length, instead of being refused; `cut` then tells.
  """

  def __init__(self, engine: Engine, tokenizer: Tokenizer, template: Template, *,
               aspect: str, sampling: Sampling, stop_ids: Sequence[int] = (), fit: bool = False):
    self._engine, self._tokenizer, self._template = engine, tokenizer, template
    self._aspect, self._fit = aspect, fit
    self._sampling = dataclasses.replace(
        sampling, stop_ids=end_ids(tokenizer, template, stop_ids))
    self._control = control_tokens(template, tokenizer.special, tokenizer.eos)
    self._answering: Generator[str] | None = None
    self.clear()

  def clear(self) -> None:
    """Forgets the turns and the pictures."""
    self._stop_answering()
    self._turns: list[Turn] = []
    self._images: tuple[jax.Array, ...] = ()
    self._waiting: tuple[jax.Array, ...] = ()
    self.cut = False  # whether the last answer ended at its longest, not by itself

  @property
  def turns(self) -> tuple[Turn, ...]:
    """(role, text) of what was said, answers included."""
    return tuple(self._turns)

  def attach(self, path: str | pathlib.Path) -> None:
    """Adds the picture at `path` to the next question.  Raises ImageError, naming the file."""
    pixels = load_image(path, self._engine.config.hr_size, self._aspect)
    self._waiting += self._engine.encode_images(pixels[None])

  def drop(self) -> None:
    """Forgets the pictures that wait for the next question."""
    self._waiting = ()

  def _stop_answering(self) -> None:
    if self._answering is not None:  # the next answer writes into the same cache
      self._answering.close()
    self._answering = None

  def ask(self, question: str) -> Iterator[str]:
    """The answer in pieces, as they become certain; their sum is the answer.

    Closing the iterator, or the next question, stops the answer; what was said of it stays in the
    history.  Raises ValueError at the call, with nothing changed, if the question is empty, holds
    `<image>` or a control token, or does not fit into the length that the engine was made for.
    """
    self._stop_answering()
    question = question.strip()
    if not question:
      raise ValueError("the question is empty")
    if IMAGE_TAG in question:
      raise ValueError(f"the question holds {IMAGE_TAG}, which stands for a picture; leave it out "
                       "and attach the picture as a file")
    if found := [token for token in self._control if token in question]:
      raise ValueError(f"the question holds {found[0]}, which would end the turn; write it "
                       "otherwise")
    try:
      question.encode()
    except UnicodeEncodeError as error:
      raise ValueError(f"the question holds half a character ({error}); type it as UTF-8"
                       ) from error
    images = self._images + self._waiting
    turns = [*self._turns, (HUMAN, f"{IMAGE_TAG}\n" * len(self._waiting) + question)]
    encoded = encode_prompt(self._tokenizer, self._template, turns, len(images),
                            self._engine.config.visual_tokens)
    prompt, sampling = Prompt(encoded.tokens, encoded.visual_index, images), self._sampling
    if self._fit:
      longest = max(1, min(sampling.max_new_tokens, self._engine.room(prompt)))
      sampling = dataclasses.replace(sampling, max_new_tokens=longest)
    self._answering = self._answer(self._engine.generate(prompt, sampling), turns, images)
    return self._answering

  def _answer(self, ids: Generator[int], turns: list[Turn],
              images: tuple[jax.Array, ...]) -> Generator[str]:
    stream = TextStream(self._tokenizer, self._template.stop)
    before = self._turns, self._images, self._waiting
    self._images, self._waiting, self.cut = images, (), False
    # What the model said is text: a tag in it is no picture.
    said = lambda: stream.text.rstrip(_HALF).rstrip().replace(IMAGE_TAG, "")
    try:
      for token in ids:
        if token in self._sampling.stop_ids:
          break
        if piece := stream.feed(token):
          yield piece
        if stream.stopped:
          break
      else:
        self.cut = True
      if piece := stream.finish():
        yield piece
      self._turns = [*turns, (GPT, said())]
    except (GeneratorExit, KeyboardInterrupt):  # stopped on purpose
      self._turns = [*turns, (GPT, said())]
      raise
    except Exception:  # out of memory, say: as if it had not been asked
      self._turns, self._images, self._waiting = before
      raise
    finally:
      ids.close()


def load_chat(checkpoint: str | pathlib.Path, *, sampling: Sampling = Sampling(),
              template: Template | None = None, max_length: int | None = None,
              fit: bool = True) -> Chat:
  """A conversation with a trained model, on all devices.

      chat = load_chat("work_dirs/demo/stage2")
      chat.attach("photo.jpg")
      print("".join(chat.ask("what do the signs say?")))

  Args:
    checkpoint: folder of a run, or of one of its steps.
    template, max_length: as in training if None.
    sampling, fit: see `Chat`.

  Raises FileNotFoundError or CheckpointError, naming the folder.
  """
  checkpoint = pathlib.Path(checkpoint)
  if not checkpoint.exists():
    raise FileNotFoundError(f"{checkpoint}: no such folder; expected a run's --workdir")
  # One row at a time: as many devices as can share the heads share the layers.
  decoder = read_run(checkpoint)[1]["model"]["decoder"]
  ways = math.gcd(decoder["heads"], decoder["kv_heads"], jax.device_count())
  mesh = make_mesh({"tensor": ways, "fsdp": -1})
  with mesh_context(mesh):
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    loaded = load_model(checkpoint, mesh, dtype=dtype)
  tokenizer, vocabulary = load_tokenizer(loaded.tokenizer_dir), loaded.config.decoder.vocab_size
  if tokenizer.vocab_size > vocabulary:
    raise ValueError(f"{loaded.tokenizer_dir} has {tokenizer.vocab_size} entries, the model "
                     f"{vocabulary}; they belong to different models")
  engine = Engine(loaded.model, mesh=mesh, max_length=max_length or loaded.max_length)
  return Chat(engine, tokenizer,
              template or get_template(loaded.template), aspect=loaded.aspect, sampling=sampling,
              stop_ids=loaded.stop_ids, fit=fit)
