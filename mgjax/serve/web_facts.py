"""What the page says about the model, and the examples that it offers."""
from __future__ import annotations

import collections
import html
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx
from PIL import Image, ImageDraw, ImageFont

from mgjax.infer.assistant import Assistant
from mgjax.infer.engine import Engine
from mgjax.infer.studio import Studio
from mgjax.models.mini_gemini import MiniGemini
from mgjax.sharding import mesh_context

DRAWING_EXAMPLE = "A lighthouse in a storm, painted in oil"
TEXT_EXAMPLES = ("Write a haiku about the sea.",
                 "Explain in three sentences why the sky is blue.")


def facts(assistant: Assistant, studio: Studio | None = None) -> str:
  """The model, and what paints for it, in figures: a table in Markdown."""
  engine, config = assistant.engine, assistant.engine.config
  formats = _formats(engine.programs.model)
  devices = collections.Counter(d.device_kind for d in engine.mesh.devices.flat)
  decoder = config.decoder
  names = ", ".join(name for name, _ in formats.most_common())
  rows = [("Parameters", _rounded(_parameters(engine))),
          ("Weights", f"{names}; {_rounded(formats.total())}B"),
          ("Language model", f"{decoder.depth} layers, width {decoder.width}, vocabulary "
                             f"{decoder.vocab_size:,}"),
          ("Context", f"{engine.max_length:,} tokens")]
  for side in engine.picture_sides if config.vision else ():
    rows.append((f"Pictures at {side} × {side}", f"{config.at(side).visual_tokens:,} tokens each"))
  if config.vision:
    rows.append(("Patch info mining", "yes" if config.vision_hr else "no: one vision tower"))
  else:
    rows.append(("Pictures", "none: a language model alone"))
  if studio:
    side = studio.painter.side
    rows.append(("Draws with", f"{studio.name}, {side} × {side}"))
  rows += [("Devices", ", ".join(f"{n} × {kind}" for kind, n in devices.items())),
           ("Answers at once", str(engine.rows))]
  lines = [f"| {name} | {html.escape(value)} |" for name, value in rows]
  return "\n".join(["| | |", "|---|---|", *lines])


def _parameters(engine: Engine) -> int:
  """How many numbers the model has, in whatever format they lie on the devices."""
  with mesh_context(engine.mesh):
    model = nnx.eval_shape(lambda: MiniGemini(engine.config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))


def _formats(model: nnx.Module) -> collections.Counter[str]:
  """Bytes of the arrays of each format."""
  sizes = collections.Counter()
  for array in jax.tree.leaves(nnx.state(model)):
    sizes[str(array.dtype)] += array.size * jax.dtypes.itemsize_bits(array.dtype) // 8
  return sizes


def _rounded(number: int) -> str:
  """In three digits.

  >>> _rounded(950), _rounded(7_063_427_072)
  ('950 ', '7.06 G')
  """
  value, unit = float(number), 0
  while value >= 999.5:
    value, unit = value / 1000, unit + 1
  return f"{value:.3g} {('', 'k', 'M', 'G', 'T')[unit]}"


def examples(folder: pathlib.Path, pictures: bool,
             draws: bool = False) -> list[tuple[str, tuple[str, ...]]]:
  """Questions, each with the files of its pictures, which are drawn into the folder."""
  last = (DRAWING_EXAMPLE if draws else TEXT_EXAMPLES[0], ())
  if not pictures:
    return [last, (TEXT_EXAMPLES[1], ())]
  sign, shapes = str(folder / "sign.png"), str(folder / "shapes.png")
  _sign().save(sign)
  _shapes().save(shapes)
  return [("What does the sign say?", (sign,)),
          ("How many shapes are there, and which colours have they?", (shapes,)),
          ("What is the difference between these pictures?", (sign, shapes)),
          last]


def _sign() -> Image.Image:
  image = Image.new("RGB", (480, 360), "#a9c8dd")
  draw = ImageDraw.Draw(image)
  draw.rectangle((0, 290, 480, 360), fill="#6f8f5a")
  draw.rectangle((228, 200, 252, 330), fill="#6b5a48")
  draw.rounded_rectangle((70, 60, 410, 220), 16, fill="#1d5c3a", outline="white", width=6)
  for text, y, size in (("HARBOUR", 112, 58), ("2 km", 176, 44)):
    draw.text((240, y), text, "white", ImageFont.load_default(size), anchor="mm")
  return image


def _shapes() -> Image.Image:
  image = Image.new("RGB", (480, 360), "#f4efe6")
  draw = ImageDraw.Draw(image)
  draw.ellipse((50, 100, 190, 240), fill="#c8372d")
  draw.rectangle((220, 60, 330, 170), fill="#2b63b8")
  draw.polygon(((300, 310), (380, 190), (450, 310)), fill="#e0a92b")
  return image
