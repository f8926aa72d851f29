"""A checkpoint's answers to the questions of a LLaVA JSON file."""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from mgjax.checkpoint import load_model
from mgjax.data.conversation import HUMAN, drop_leading_reply, get_template
from mgjax.data.images import ImageError, load_image, resolve_image
from mgjax.data.samples import DataError, Problem, Sample, prepare_turns
from mgjax.data.tokenize import encode_prompt
from mgjax.data.tokenizer import load_tokenizer
from mgjax.infer.engine import Engine, Prompt
from mgjax.infer.sampling import Sampling
from mgjax.infer.text import end_ids, finished_text
from mgjax.sharding import mesh_context


def answer_first_questions(checkpoint: str | Path, samples: Sequence[Sample],
                           image_root: str | Path, mesh: Mesh, *, max_new_tokens: int = 32,
                           rows: int = 32, dtype="float32") -> list[str]:
  """What the model says to the first question of each sample, greedily.

  samples: records of `data.sources.load_samples`; only their first question is read.
  rows: questions answered at a time.
  Raises DataError naming the samples that cannot be asked, before any is.
  """
  with mesh_context(mesh):
    loaded = load_model(checkpoint, mesh, dtype=dtype)
  tokenizer, template = load_tokenizer(loaded.tokenizer_dir), get_template(loaded.template)
  engine = Engine(loaded.model, mesh=mesh, max_length=loaded.max_length, rows=rows)
  ends = end_ids(tokenizer, template, loaded.stop_ids)
  sampling = Sampling(max_new_tokens=max_new_tokens, stop_ids=ends)
  texts, files, problems = [], [], []
  for sample in samples:
    try:
      text = first_question(sample, tokenizer, template, loaded.config.visual_tokens)
      engine.check_length(len(text.tokens), sampling)
      texts.append(text)
      files.append([resolve_image(image_root, image) for image in sample.images])
    except (ValueError, ImageError) as error:
      problems.append(Problem("question", str(image_root), sample.index, sample.id, str(error)))
  if problems:
    raise DataError.of(problems, len(samples), "Repair or remove them.")
  answers = []
  for at in range(0, len(texts), rows):
    prompts = []
    for text, paths in zip(texts[at:at + rows], files[at:at + rows]):
      pixels = [load_image(path, loaded.config.hr_size, loaded.aspect) for path in paths]
      images = engine.encode_images(np.stack(pixels)) if pixels else ()
      prompts.append(Prompt(text.tokens, text.visual_index, images))
    answers += [finished_text(tokenizer, template, ids, ends)
                for ids in engine.generate_batch(prompts, sampling)]
  return answers


def first_question(sample: Sample, tokenizer, template, tokens_per_image: int):
  """The prompt that asks a sample's first question.  Raises ValueError if it has none."""
  turns = drop_leading_reply(sample.turns)[:1]
  if not turns or turns[0][0] != HUMAN:
    raise ValueError(f"no question of {HUMAN!r} in it")
  turns = prepare_turns(dataclasses.replace(sample, turns=tuple(turns)))
  return encode_prompt(tokenizer, template, turns, len(sample.images), tokens_per_image)
