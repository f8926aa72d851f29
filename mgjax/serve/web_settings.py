"""What the page lets its user choose; see `web_talk.Settings`."""
from __future__ import annotations

import gradio as gr

from mgjax.diffusion.painter import PaintError, Painting
from mgjax.infer.assistant import Assistant
from mgjax.infer.studio import Studio
from mgjax.serve.limits import Limits
from mgjax.serve.web_talk import HAS_OCR

SHAPES = ((1, 1), (19 / 16, 13 / 16), (13 / 16, 19 / 16))  # of SDXL's side, as it was trained


def settings_of_answers(assistant: Assistant, limits: Limits) -> list[gr.components.Component]:
  """What `Settings` begins with, in its order."""
  longest = min(assistant.engine.max_length, limits.new_tokens or assistant.engine.max_length)
  config = assistant.engine.config
  return [
      gr.Slider(0, 2, 0, step=0.05, label="Temperature",
                info="0 takes the likeliest word, each time the same; more is freer"),
      gr.Slider(0.05, 1, 1, step=0.05, label="Top-p",
                info="Draws from the likeliest words that reach this probability"),
      gr.Number(0, precision=0, label="Top-k",
                info="Draws from this many words; 0: from all"),
      gr.Slider(1, longest, min(512, longest), step=1, label="Longest answer, in tokens"),
      gr.Number(-1, precision=0, label="Seed", info="-1: another answer each time"),
      gr.Checkbox(True, label="Pictures in high resolution (HD)", container=False,
                  visible=config.vision is not None and len(assistant.engine.picture_sides) > 1),
      gr.Checkbox(False, label="Read words in pictures for the model (OCR)", container=False,
                  visible=config.vision is not None and HAS_OCR)]


def drawing_settings(studio: Studio, limits: Limits) -> list[gr.components.Component]:
  """The rest of `Settings`, in its order."""
  steps = min(Painting.steps, limits.draw_steps)
  return [
      gr.Dropdown(sizes(studio), label="Size"),
      gr.Slider(1, limits.draw_steps, steps, step=1, label="Steps",
                info="More take longer; 30 to 50 are usual"),
      gr.Slider(1, 15, Painting.guidance, step=0.5, label="Guidance",
                info="How much the prompt counts")]


def sizes(studio: Studio) -> list[str]:
  """Square, wide and high, as far as the painter can."""
  found = []
  for shape in SHAPES:
    width, height = (round(studio.painter.side * part / 8) * 8 for part in shape)
    try:
      studio.painter.check(Painting(width=width, height=height))
      found.append(f"{width}x{height}")
    except PaintError:
      pass
  return found
