"""A checkpoint's answers to the questions of a LLaVA JSON file."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from mgjax.checkpoint import load_model
from mgjax.data.conversation import get_template
from mgjax.data.images import load_image, resolve_image
from mgjax.data.sources import Sample, prepare_turns
from mgjax.data.tokenize import encode_prompt
from mgjax.data.tokenizer import load_tokenizer
from mgjax.infer.chat import end_ids
from mgjax.infer.engine import Engine, Prompt
from mgjax.infer.sampling import Sampling
from mgjax.sharding import make_mesh, mesh_context


def answer_first_questions(checkpoint: str | Path, samples: list[Sample], image_root: str | Path, *,
                           max_new_tokens: int = 32, rows: int = 32, dtype="float32") -> list[str]:
  """What the model says to the first question of each sample, greedily.

  samples: records of `data.sources.load_samples`; only their first turn is read.
  rows: questions answered at a time.
  """
  mesh = make_mesh((1, 1, 1, 1), jax.devices()[:1])
  with mesh_context(mesh):
    loaded = load_model(checkpoint, mesh, dtype=dtype)
    tokenizer, template = load_tokenizer(loaded.tokenizer_dir), get_template(loaded.template)
    engine = Engine(loaded.model, mesh=mesh, max_length=loaded.max_length)
    sampling = Sampling(max_new_tokens=max_new_tokens, stop_ids=end_ids(tokenizer, template))
    answers = []
    for at in range(0, len(samples), rows):
      prompts = []
      for sample in samples[at:at + rows]:
        pixels = [load_image(resolve_image(image_root, image), loaded.config.hr_size, loaded.aspect)
                  for image in sample.images]
        first = prepare_turns(dataclasses.replace(sample, turns=sample.turns[:1]))
        text = encode_prompt(tokenizer, template, first, len(pixels), loaded.config.visual_tokens)
        images = engine.encode_images(np.stack(pixels)) if pixels else ()
        prompts.append(Prompt(text.tokens, text.visual_index, images))
      for ids in engine.generate_batch(prompts, sampling, rows):
        answers.append(tokenizer.decode(ids, skip_special=True).strip())
  return answers
