"""A painter without a network, and a language model that says what it is told to."""
import hashlib
import io
import threading

import numpy as np
from PIL import Image

from mgjax.diffusion.config import SdxlConfig, UNetConfig
from mgjax.diffusion.painter import Painter
from mgjax.infer.engine import Engine

ANSWER = "Sure. <h>a red cat</h>"
LONG = "a very long prompt of nine words it is"  # the painter reads six


class StubPainter(Painter):
  """Checks as SDXL does, reads six words, and paints one colour that prompt and seed give.

  `orders` has what it painted; `go`, once cleared, holds it up; `fail` is raised instead.
  """

  def __init__(self):
    self.config = SdxlConfig(unet=UNetConfig(side=8))
    self.side, self.orders, self.fail = self.config.side, [], None
    self.go, self.weights, self.while_painting = threading.Event(), False, lambda: None
    self.go.set()

  @property
  def loaded(self):
    return self.weights

  def load(self):
    self.weights = True

  def free(self):
    self.weights = False

  def cut(self, prompt):
    return " ".join(prompt.split()[6:])

  def paint(self, prompts, painting):
    self.check(painting, len(prompts))
    self.load()
    self.orders.append((list(prompts), painting))
    self.while_painting()
    assert self.go.wait(20)
    if self.fail:
      raise self.fail
    size = painting.height or self.side, painting.width or self.side
    return np.stack([np.full((*size, 3), colour(prompt, painting.seed, i), np.uint8)
                     for i, prompt in enumerate(prompts)])


def colour(prompt, seed, i=0):
  return list(hashlib.sha256(f"{prompt} {seed} {i}".encode()).digest()[:3])


def opened(file):
  """The format of a picture's file, and its pixels."""
  image = Image.open(io.BytesIO(file))
  return image.format, np.asarray(image.convert("RGB"))


def says(monkeypatch, assistant, *texts):
  """Has the model answer with these texts, one after another, whatever it is asked."""
  scripts = [assistant.tokenizer.encode(text, add_bos=False) + [assistant.tokenizer.eos_id]
             for text in texts]
  told, give = {}, Engine._give

  def given(self, answer, token):
    script = told.setdefault(id(answer), (answer, scripts[min(len(told), len(scripts) - 1)]))[1]
    give(self, answer, script[len(answer.tokens)])
  monkeypatch.setattr(Engine, "_give", given)
