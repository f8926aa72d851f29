"""How lmms-eval reads a record of `mgjax_signs.yaml`."""
import pathlib

from PIL import Image

FOLDER = pathlib.Path(__file__).resolve().parent


def visual(doc):
  return [Image.open(FOLDER / doc["picture"]).convert("RGB")]


def text(doc):
  return doc["question"]
