"""Makes the demo's files: photographs with signs, and LLaVA JSON about them.

`make(World(), folder)` writes into `folder`, which is also the image folder of every JSON:

  tokenizer/       tokenizer.json, tokenizer_config.json
  crops.json       one cell, one sign; pre-trains the high-resolution tower     (template plain)
  text.json        scenes as words, with questions; pre-trains the decoder      (chatml_direct)
  captions.json    crowded scenes, each cell put into a word; stage 1           (chatml_direct)
  instruct.json    scenes with several questions; stage 2                            (chatml_direct)
  heldout.json     other photographs, texts that no training image shows, a question each, `kind`
  done.json        the parameters; written last
"""

import dataclasses
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from . import tokenizer as tokenizer_lib
from .render import HELD_OUT_PHOTOS, TRAIN_PHOTOS, render_crop, render_scene
from .world import (
  CONTROL,
  NOTHING,
  PHRASES,
  READING,
  World,
  all_pairs,
  as_words,
  ask,
  ask_several,
  sample_crowd,
  sample_scene,
)

VERSION = 5  # raise when the same parameters would give other files
IMAGE = "<image>"
QUESTIONS = 5  # of one scene; an answer is little to learn from


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How many records of each kind to make."""

  crops: int = 12_000
  text: int = 30_000
  scenes: int = 12_000
  held_out: int = 480

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if value < 1:
        raise ValueError(f"{name}: {value}, expected at least 1 record")


def make(world: World, folder: str, sizes: Sizes = Sizes()) -> dict[str, float]:
  """Makes everything in `folder`, unless the same is there already.

  Returns the seconds that each file took; empty when nothing had to be done.
  """
  wanted = {
    "version": VERSION,
    "world": dataclasses.asdict(world) | {"colours": list(world.colours)},
    "sizes": dataclasses.asdict(sizes),
  }
  wanted["hash"] = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
  done = os.path.join(folder, "done.json")
  if os.path.exists(done):
    with open(done) as f:
      if f.read() == json.dumps(wanted, indent=2):
        return {}
    os.remove(done)  # from here on the folder is unfinished
  os.makedirs(folder, exist_ok=True)
  steps = {
    "tokenizer": lambda: tokenizer_lib.save(
      tokenizer_lib.build(corpus(world)), os.path.join(folder, "tokenizer")
    ),
    "crops.json": lambda: write(folder, "crops.json", crops(world, folder, sizes.crops)),
    "text.json": lambda: write(folder, "text.json", text_chats(world, sizes.text)),
    "captions.json": lambda: write(folder, "captions.json",
                                   scenes(world, folder, "crowds", sizes.scenes)),
    "instruct.json": lambda: write(folder, "instruct.json",
                                   scenes(world, folder, "scenes", sizes.scenes)),
    "heldout.json": lambda: write(folder, "heldout.json", held_out(world, folder, sizes.held_out)),
  }
  seconds = {}
  for name, step in steps.items():
    start = time.perf_counter()
    step()
    seconds[name] = time.perf_counter() - start
  with open(done, "w") as f:
    f.write(json.dumps(wanted, indent=2))
  return seconds


def write(folder: str, name: str, records) -> None:
  """One LLaVA JSON."""
  with open(os.path.join(folder, name), "w") as f:
    json.dump(records, f)


def save_image(folder: str, name: str, pixels: np.ndarray) -> None:
  """A JPEG with full colour resolution: subsampled chroma would smear a glyph into its plate."""
  Image.fromarray(pixels).save(os.path.join(folder, name), quality=92, subsampling=0)


def turns(*texts: str) -> list[dict]:
  """Alternating human and gpt turns."""
  return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def chat(head: str, questions) -> list[dict]:
  """Turns for some questions; `head` (an image, or its words) opens the first."""
  texts = [text for q in questions for text in (q.text, q.answer)]
  return turns(f"{head}\n{texts[0]}", *texts[1:])


def each(one, n: int) -> list:
  """[one(0), ..., one(n - 1)] by a few threads: creating files waits more than it computes."""
  with ThreadPoolExecutor(4) as pool:
    return list(pool.map(one, range(n)))


def stream(world: World, name: str, index: int):
  """The random generator of one record: no record depends on how many others there are."""
  names = ("crops", "text", "crowds", "scenes", "heldout")
  return np.random.default_rng([world.seed, 2 + names.index(name), index])


def crops(world: World, folder: str, n: int) -> list[dict]:
  """Single cells, one in ten without a sign; signs are about as large as in the scenes, or larger
  (`World.nearness`)."""
  os.makedirs(os.path.join(folder, "crops"), exist_ok=True)
  pairs = all_pairs(world)

  def one(i):
    rng = stream(world, "crops", i)
    pair = None if rng.random() < 0.1 else pairs[rng.integers(len(pairs))]
    name = f"crops/{i:06d}.jpg"
    # Seen from nearer, too: large characters are learnt at once, and lead on to the small ones.
    nearness = rng.uniform(*world.nearness)
    save_image(folder, name, render_crop(world, pair, TRAIN_PHOTOS, rng, nearness))
    text = " ".join(pair) if pair else NOTHING
    return {"id": f"crop-{i:06d}", "image": name, "conversations": turns(IMAGE, text)}

  return each(one, n)


def text_chats(world: World, n: int) -> list[dict]:
  """Scenes as words, with questions; a language model has read everything."""
  records = []
  for i in range(n):
    rng = stream(world, "text", i)
    if rng.random() < 0.1:
      signs = sample_crowd(world, rng)
      questions = [ask(world, rng, signs, "transcribe")]
    else:
      signs = sample_scene(world, rng, held_out=None)
      questions = ask_several(world, rng, signs, QUESTIONS)
    talk = chat(as_words(world, signs), questions)
    records.append({"id": f"text-{i:06d}", "conversations": talk})
  return records


def scenes(world: World, folder: str, name: str, n: int) -> list[dict]:
  """Training pictures with what is said of them: "crowds" with dense captions, or "scenes" with
  conversations."""
  os.makedirs(os.path.join(folder, name), exist_ok=True)

  def one(i):
    rng = stream(world, name, i)
    if name == "crowds":
      signs = sample_crowd(world, rng)
      questions = [ask(world, rng, signs, "transcribe")]
    else:
      signs = sample_scene(world, rng)
      questions = ask_several(world, rng, signs, QUESTIONS)
    image = f"{name}/{i:06d}.jpg"
    save_image(folder, image, render_scene(world, signs, TRAIN_PHOTOS, rng))
    return {"id": f"{name}-{i:06d}", "image": image, "conversations": chat(IMAGE, questions)}

  return each(one, n)


def held_out(world: World, folder: str, n: int) -> list[dict]:
  """One question an image, on photographs and with texts that training has not shown."""
  # Two thirds reading, one third controls, as in training; mixed, so that any first few show all.
  triples = [(READING[2 * i % 3], READING[(2 * i + 1) % 3], CONTROL[i % 4]) for i in range(12)]
  kinds = [kind for three in triples for kind in three]
  os.makedirs(os.path.join(folder, "heldout"), exist_ok=True)

  def one(i):
    rng = stream(world, "heldout", i)
    kind = kinds[i % len(kinds)]
    question = None
    while question is None:
      signs = sample_scene(world, rng, held_out=world.held_out > 0)
      question = ask(world, rng, signs, kind)
    name = f"heldout/{i:06d}.jpg"
    save_image(folder, name, render_scene(world, signs, HELD_OUT_PHOTOS, rng))
    return {
      "id": f"heldout-{i:06d}",
      "image": name,
      "kind": kind,
      "conversations": chat(IMAGE, [question]),
    }

  return each(one, n)


def corpus(world: World) -> list[str]:
  """Every text of the world, for the tokenizer: each word that any record can contain."""
  words = [as_words(world, ()), NOTHING]
  words += [f"{colour}{char} {colour} {char}" for colour, char in all_pairs(world)]
  words += [str(n) for n in range(1, world.max_signs + 1)]
  words += ["yes no top bottom", "system user assistant Answer the questions."]
  for phrases in PHRASES.values():
    words += [p.format(colour=world.colours[0], char=world.characters[0]) for p in phrases]
  return words
