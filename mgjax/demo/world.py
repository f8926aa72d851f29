"""What can be in a scene, what can be asked about it, and how a scene is written as text.

A scene is a photograph of `hr` x `hr` pixels under a `grid` x `grid` raster. Each cell of the
raster is the high-resolution window of one visual token, and holds at most one sign: a coloured
plate with one character. Nothing here touches pixels; see `render.py`.

Worked example, grid 4, a red 7 in cell 2 and a blue 3 in cell 5:

  as_words  -> "- - red7 - - blue3 - - - - - - - - - -"     one word for one visual token
  questions -> read_one "what does the red sign say?" "red 7",
               read_all "read the signs." "red7 blue3", ...

An answer about one sign names what it tells of before it tells it ("red 7"), as people's answers
do: a decoder this small learns to look up the word it has just said long before one it was asked
for.  A list has one word a sign, so that what follows a character is always its colour, and goes by
the order of the palette: which sign comes next is told by what stands in the scene, not by where.
"""

import dataclasses
import hashlib

import numpy as np

EMPTY = "-"  # the word of a cell without a sign
NOTHING = "nothing"  # the caption of a crop without a sign

# name: (plate RGB, ink RGB). Far apart, so that colour alone is easy at low resolution.
PALETTE = {
  "red": ((205, 28, 36), (250, 250, 250)),
  "blue": ((28, 66, 200), (250, 250, 250)),
  "green": ((16, 140, 56), (250, 250, 250)),
  "yellow": ((245, 205, 30), (15, 15, 15)),
  "white": ((245, 245, 240), (15, 15, 15)),
  "black": ((22, 22, 26), (250, 250, 250)),
}

PHRASES = {
  "read_one": (
    "what does the {colour} sign say?",
    "read the {colour} sign.",
    "what is written on the {colour} sign?",
  ),
  "read_all": ("read the signs.", "what do the signs say?", "read all signs in order."),
  "which_colour": ("which sign says {char}?", "what colour is the sign with {char}?"),
  "count": ("how many signs are there?", "count the signs."),
  "exists": ("is there a {colour} sign?", "can you see a {colour} sign?"),
  "where": ("where is the {colour} sign?", "is the {colour} sign at the top or at the bottom?"),
  "colours": ("what colours are the signs?", "name the colours of the signs."),
  "transcribe": ("write down every cell.",),  # the dense caption; for training alone
}
READING = ("read_one", "read_all", "which_colour")  # kinds that need the high-resolution view
CONTROL = ("count", "exists", "where", "colours")  # kinds that the low-resolution view can answer


@dataclasses.dataclass(frozen=True)
class World:
  """The parameters of the miniature world. `seed` decides everything random in it."""

  colours: tuple[str, ...] = tuple(PALETTE)
  characters: str = "0123456789"
  glyph: float = 14.0  # height of a character in high-resolution pixels
  noise: float = 6.0  # standard deviation of the sensor noise, of 255
  grid: int = 4
  hr: int = 128
  lr: int = 56
  max_signs: int = 4
  held_out: float = 0.12  # share of texts (what a scene's signs say together) not in training
  nearness: tuple[float, float] = (0.9, 1.35)  # of the signs of crops: 1 = as large as in scenes
  seed: int = 0

  def __post_init__(self):
    unknown = sorted(set(self.colours) - set(PALETTE))
    if unknown:
      raise ValueError(f"colours: {unknown} unknown; known are {sorted(PALETTE)}")
    for name in ("colours", "characters"):
      value = getattr(self, name)
      if len(value) < 2 or len(set(value)) != len(value):
        raise ValueError(f"{name}: {value!r}, expected at least two and none twice")
    # With one sign or one character, "which sign says 7?" would need no reading.
    if not 2 <= self.max_signs <= min(len(self.colours), self.grid**2):
      raise ValueError(
        f"max_signs: {self.max_signs}, expected 2..{min(len(self.colours), self.grid**2)}, since "
        "the signs of a scene differ in colour and cell; use fewer signs or more colours"
      )
    for name in ("hr", "lr"):
      if getattr(self, name) % self.grid:
        raise ValueError(f"{name}: {getattr(self, name)} is not a multiple of grid {self.grid}")
    if not 4 <= self.glyph <= 0.45 * self.cell:
      raise ValueError(
        f"glyph: {self.glyph}, expected 4..{0.45 * self.cell:g}, so that a plate fits in a cell of "
        f"{self.cell} pixels; change glyph, or hr / grid"
      )
    if not 0 <= self.noise <= 64:
      raise ValueError(f"noise: {self.noise}, expected 0..64 of 255")
    if not 0 <= self.held_out <= 0.3:
      raise ValueError(f"held_out: {self.held_out}, expected a share in 0..0.3")
    near, nearest = self.nearness
    if not 0.25 <= near <= nearest <= 2:
      raise ValueError(f"nearness: {self.nearness}, expected two rising numbers in 0.25..2")

  @property
  def cell(self) -> int:
    """Side of a cell in high-resolution pixels."""
    return self.hr // self.grid


@dataclasses.dataclass(frozen=True)
class Sign:
  """One sign: its cell in row-major order, plate colour and character."""

  cell: int
  colour: str
  char: str


@dataclasses.dataclass(frozen=True)
class Question:
  """One question with its answer. `about` is the sign asked about, if it is one."""

  kind: str
  text: str
  answer: str
  about: Sign | None = None


def all_pairs(world: World) -> list[tuple[str, str]]:
  """Every (colour, character)."""
  return [(colour, char) for colour in world.colours for char in world.characters]


def listed(world: World, signs) -> list[str]:
  """The signs as a list reads them, one word each, in the order of the palette."""
  ordered = sorted(signs, key=lambda s: (world.colours.index(s.colour), s.char))
  return [s.colour + s.char for s in ordered]


def is_held_out(world: World, signs) -> bool:
  """Whether no training image may show these signs together, wherever they stand."""
  text = " ".join(listed(world, signs))
  digest = hashlib.sha256(f"{world.seed} {text}".encode()).digest()
  return int.from_bytes(digest[:4]) < world.held_out * 2**32


def sample_scene(world: World, rng, held_out: bool | None = False) -> tuple[Sign, ...]:
  """1..max_signs signs in reading order, colours and cells distinct.

  held_out: whether their text is one of those that training does not show; None: either.
  """
  while True:
    n = int(rng.integers(1, world.max_signs + 1))
    cells = np.sort(rng.permutation(world.grid**2)[:n])
    colours = rng.permutation(world.colours)[:n]
    signs = tuple(Sign(int(cell), str(colour), str(rng.choice(list(world.characters))))
                  for cell, colour in zip(cells, colours))
    if held_out is None or is_held_out(world, signs) == held_out:
      return signs


def sample_crowd(world: World, rng) -> tuple[Sign, ...]:
  """Signs in about half of the cells, colours repeating: a picture with much to say about it."""
  count, pairs = world.grid**2, all_pairs(world)
  while True:
    cells = np.sort(rng.permutation(count)[:rng.integers(1, count)])
    signs = tuple(Sign(int(cell), *pairs[rng.integers(len(pairs))]) for cell in cells)
    if not is_held_out(world, signs):
      return signs


def as_words(world: World, signs) -> str:
  """The scene as grid*grid words, one for each visual token, in its order."""
  words = [EMPTY] * world.grid**2
  for s in signs:
    words[s.cell] = s.colour + s.char
  return " ".join(words)


def half(world: World, cell: int) -> str:
  """The half of the scene in which a cell lies: "top" or "bottom"."""
  return "top" if cell // world.grid < world.grid / 2 else "bottom"


def ask(world: World, rng, signs, kind: str, about: Sign | None = None) -> Question | None:
  """One question of `kind`, or None where it has no unique answer. `about`: the sign, else any."""
  sign = about or signs[rng.integers(len(signs))]
  phrase = PHRASES[kind][rng.integers(len(PHRASES[kind]))]
  if kind == "read_one":
    return Question(kind, phrase.format(colour=sign.colour), f"{sign.colour} {sign.char}", sign)
  if kind == "read_all":
    return Question(kind, phrase, " ".join(listed(world, signs)))
  if kind == "which_colour":
    # Of a single sign, the colour could be told without reading.
    if len(signs) == 1 or sum(s.char == sign.char for s in signs) > 1:
      return None
    return Question(kind, phrase.format(char=sign.char), f"{sign.char} {sign.colour}", sign)
  if kind == "count":
    return Question(kind, phrase, str(len(signs)))
  if kind == "exists":
    present = {s.colour for s in signs}
    absent = [c for c in world.colours if c not in present]
    if absent and rng.random() < 0.5:  # so that yes and no are equally frequent
      colour = absent[rng.integers(len(absent))]
      return Question(kind, phrase.format(colour=colour), f"{colour} no")
    return Question(kind, phrase.format(colour=sign.colour), f"{sign.colour} yes", sign)
  if kind == "where":
    answer = f"{sign.colour} {half(world, sign.cell)}"
    return Question(kind, phrase.format(colour=sign.colour), answer, sign)
  if kind == "colours":
    return Question(kind, phrase, " ".join(c for c in world.colours if c in {
      s.colour for s in signs}))
  if kind == "transcribe":
    return Question(kind, phrase, as_words(world, signs))
  raise ValueError(f"kind: {kind!r} unknown; known are {sorted(PHRASES)}")


def ask_several(world: World, rng, signs, n: int) -> list[Question]:
  """`n` different questions in random order, two thirds of them about reading."""
  questions, seen = [], set()
  while len(questions) < n:
    kinds = READING if rng.random() < 2 / 3 else CONTROL
    question = ask(world, rng, signs, kinds[rng.integers(len(kinds))])
    # A question may not return in other words either: its answer would stand in the context.
    key = question and (question.kind, question.about)
    if question and key not in seen:
      seen.add(key)
      questions.append(question)
  return questions
