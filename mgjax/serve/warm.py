"""Compiles before the first request what requests will need."""
from __future__ import annotations

import numpy as np

from mgjax.diffusion.painter import Painting
from mgjax.infer.assistant import Assistant
from mgjax.infer.engine import Prompt
from mgjax.infer.sampling import Sampling
from mgjax.infer.studio import Studio


def warm_up(assistant: Assistant) -> None:
  """Reads a prompt of every length of window, without a picture and with one of every size, and
  copies a row: no request needs another program.
  """
  engine, two = assistant.engine, Sampling(max_new_tokens=2)
  for side in (None, *(engine.picture_sides if engine.config.vision else ())):
    for bucket in engine.buckets:
      length = min(bucket, engine.max_length - 2)
      # Tokens and pictures of its own for each: what is known already would not be read.
      text, index = np.full(length, bucket % assistant.tokenizer.vocab_size), np.full(length, -1)
      images = engine.encode_images(np.zeros((1, side, side, 3), np.uint8)) if side else ()
      if images:
        shown = min(length - 1, len(images[0]))
        index[:shown] = np.arange(shown)
      engine.generate_batch([Prompt(text, index, images)], two)
  if engine.rows > 1:  # a second answer to one prompt copies what the first has read
    text = np.full(min(engine.buckets[0], engine.max_length - 2), 1)
    engine.generate_batch([Prompt(text, np.full(len(text), -1))] * 2, two)


def warm_up_painter(studio: Studio) -> None:
  """Paints one picture of the model's own size.  Other sizes and numbers of pictures are compiled
  when they are first asked for.  Raises PaintError where there is too little memory."""
  studio.open()
  studio.paint([""], Painting(steps=1))
