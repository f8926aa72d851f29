import sys

import pytest
from PIL import Image, ImageDraw, ImageFont

from mgjax.config import ConfigError
from mgjax.data.images import ImageError
from mgjax.infer import ocr


@pytest.fixture
def sign(tmp_path):
  """Two printed lines."""
  image = Image.new("RGB", (640, 240), "white")
  draw = ImageDraw.Draw(image)
  draw.text((40, 30), "EXIT 42", font=ImageFont.load_default(60), fill=(200, 0, 0))
  draw.text((40, 140), "Open daily", font=ImageFont.load_default(48), fill="black")
  image.save(tmp_path / "sign.png")
  return tmp_path / "sign.png"


def test_printed_lines_are_read(sign, tmp_path):
  pytest.importorskip("rapidocr_onnxruntime")
  assert ocr.read_text(sign) == ["EXIT 42", "Open daily"]
  with Image.open(sign) as image:
    exif = image.getexif()
    exif[0x0112] = 6  # a camera held upright
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif)
  assert ocr.read_text(tmp_path / "turned.jpg") == ["EXIT 42", "Open daily"]


def test_nothing_to_read(tmp_path):
  pytest.importorskip("rapidocr_onnxruntime")
  Image.new("L", (1, 1)).save(tmp_path / "dot.png")
  assert ocr.read_text(tmp_path / "dot.png") == []
  with pytest.raises(ImageError, match="none.png: no such file"):
    ocr.read_text(tmp_path / "none.png")


def test_what_is_hardly_legible_is_left_out(sign, monkeypatch):
  lines = [[[], "sure", 0.9], [[], "at the edge", 0.1], [[], "hardly", "0.11"]]
  monkeypatch.setattr(ocr, "reader", lambda: lambda pixels: (lines, []))
  assert ocr.read_text(sign) == ["sure", "hardly"]


def test_the_hint_is_the_originals():
  assert ocr.hint(["EXIT 42", "Open daily"]) == "\nReference OCR Token: EXIT 42, Open daily\n"
  assert ocr.hint([]) == ""


def test_a_missing_package_is_named(sign, monkeypatch):
  monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
  ocr.reader.cache_clear()
  with pytest.raises(ConfigError, match=r"pip install -e '.\[ocr\]'$"):
    ocr.read_text(sign)
