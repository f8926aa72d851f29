import functools
import hashlib
import json
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from mgjax.data.images import (
    MAX_PIXELS,
    PAD_COLOUR,
    ImageError,
    check_header,
    check_pixels,
    load_image,
    resolve_image,
    square_pixels,
)

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
HR_SIZE = {"small": 128, "small_hd": 256, "small_grid_noglobal": 256, "real": 768, "real_hd": 1536}


def digest(pixels):
  """SHA-256 of the float32 tensor that the original makes of these pixels."""
  tensor = ((pixels * (1 / 255)).astype(np.float32) - MEAN) / STD
  return hashlib.sha256(np.ascontiguousarray(tensor.transpose(2, 0, 1)).tobytes()).hexdigest()


def load_case(path, case):
  aspect, setting = case.split("/")
  return load_image(path, HR_SIZE[setting], "pad" if aspect == "pad" else "square")


def test_committed_pictures(cases):
  for name, expected in json.loads((cases / "images.json").read_text()).items():
    for case, sha in expected.items():
      assert digest(load_case(cases / f"{name}.png", case)) == sha, (name, case)


def test_golden_pictures(golden):
  safetensors = pytest.importorskip("safetensors.numpy")
  folder = golden / "preprocess"
  tensors = safetensors.load_file(folder / "tensors.safetensors")
  items = json.loads((folder / "preprocess.json").read_text())["items"]
  compared = 0
  for name, item in items.items():
    if name.startswith("example_"):  # the pictures themselves are not ours to keep
      continue
    for case, expected in item["cases"].items():
      pixels = load_case(folder / item["file"], case)
      assert digest(pixels) == expected["image_aux"]["sha256_f32le"], (name, case)
      stored = tensors.get(f"{name}/{case}/image_aux_pixels")
      if stored is not None:
        if stored.shape != pixels.shape:
          stored = stored.transpose(1, 2, 0)
        np.testing.assert_array_equal(stored, pixels)
        compared += 1
  assert compared >= 20


@pytest.mark.parametrize("width, height", [(61, 40), (40, 61), (33, 33), (1, 5), (7, 1), (64, 50)])
def test_padding_between_the_passes_changes_nothing(width, height):
  rng = np.random.default_rng(width)
  image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
  side = max(width, height)
  canvas = Image.new("RGB", (side, side), PAD_COLOUR)
  canvas.paste(image, ((side - width) // 2, (side - height) // 2))
  expected = np.asarray(canvas.resize((64, 64), Image.Resampling.BICUBIC))
  np.testing.assert_array_equal(square_pixels(image, 64, "pad"), expected)


def test_tall_pictures_are_padded_in_strips(monkeypatch):
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 20, 3), np.uint8))
  whole = square_pixels(image, 32, "pad")
  monkeypatch.setattr("mgjax.data.images.MAX_PIXELS", 16 * 90 * 7)
  np.testing.assert_array_equal(square_pixels(image, 32, "pad"), whole)


def test_odd_modes_become_rgb(tmp_path):
  grey = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
  grey.save(tmp_path / "16bit.png")
  rgb = Image.new("RGB", (30, 20), (10, 200, 30))
  rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
  rgb.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (30, 20))])
  palette = rgb.convert("P")
  palette.save(tmp_path / "palette.png", transparency=0)
  exif = Image.Exif()
  exif[0x0112] = 6
  rgb.save(tmp_path / "turned.jpg", exif=exif)
  Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
  Image.new("RGB", (1, 4000)).save(tmp_path / "thin.png")
  for file in tmp_path.iterdir():
    assert load_image(file, 24, "pad").shape == (24, 24, 3)
  turned = load_image(tmp_path / "turned.jpg", 24, "pad")
  assert tuple(turned[0, 12]) == PAD_COLOUR  # bars above and below: not turned


def broken(folder, name):
  path = folder / name
  if name == "empty.jpg":
    path.touch()
  elif name == "text.jpg":
    path.write_text("not found")
  elif name == "cut.jpg":
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-900])
  elif name == "cut.png":
    Image.new("RGB", (64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:60])
  return path


@pytest.mark.parametrize("name, reason", [
    ("empty.jpg", "file is empty"), ("text.jpg", "not a picture"), ("cut.jpg", "truncated"),
    ("cut.png", "cannot be decoded")])
def test_broken_files_are_named(tmp_path, name, reason):
  for look in (lambda p: load_image(p, 32, "pad"), check_pixels):
    with pytest.raises(ImageError, match=reason) as caught:
      look(broken(tmp_path, name))
    assert caught.value.kind == "broken_image" and name in str(caught.value)


def bomb(path, side):
  """A valid PNG of side x side white pixels, far below a megabyte."""
  def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
  rows = zlib.compressobj(9)
  data = b"".join(rows.compress(bytes(side // 8 + 1)) for _ in range(side)) + rows.flush()
  path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", side, side, 1, 0, 0,
                                                                     0, 0))
                   + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def test_bombs_are_refused_from_the_header(tmp_path):
  bomb(tmp_path / "bomb.png", 30_000)
  assert os.path.getsize(tmp_path / "bomb.png") < 2**20
  tracemalloc.start()
  for look in (check_header, lambda p: load_image(p, 32, "pad")):
    with pytest.raises(ImageError, match="bomb.png") as caught:
      look(tmp_path / "bomb.png")
    assert caught.value.kind == "oversized_image"
  assert tracemalloc.get_traced_memory()[1] < 50e6
  tracemalloc.stop()


@pytest.mark.filterwarnings("ignore:Image size")
def test_sizes_that_explode_when_resized(tmp_path):
  Image.new("L", (1, 20_000)).save(tmp_path / "thin.png")
  assert check_header(tmp_path / "thin.png", "pad", 768) == (1, 20_000)
  with pytest.raises(ImageError, match=f"at most {MAX_PIXELS:,} pixels") as caught:
    check_header(tmp_path / "thin.png", "square", 768)
  assert caught.value.kind == "oversized_image"
  bomb(tmp_path / "large.png", 9_500)  # Pillow alone would only warn
  with pytest.raises(ImageError, match="9500 x 9500 pixels"):
    check_header(tmp_path / "large.png")
  Image.new("1", (40_000, 1)).save(tmp_path / "long.png")
  with pytest.raises(ImageError, match="32,768 a side"):
    check_header(tmp_path / "long.png")


def test_paths_stay_below_the_root(tmp_path):
  root = tmp_path / "images"
  (root / "sub").mkdir(parents=True)
  (root / "sub/a.png").touch()
  (tmp_path / "secret.png").touch()
  (tmp_path / "images2").mkdir()
  (tmp_path / "images2/b.png").touch()
  (root / "link.png").symlink_to(tmp_path / "secret.png")
  (root / "sibling.png").symlink_to(tmp_path / "images2/b.png")
  (root / "inside.png").symlink_to(root / "sub/a.png")
  (root / "out").symlink_to(tmp_path)
  remembering = functools.lru_cache(os.path.realpath)
  for real in (os.path.realpath, remembering, remembering):
    refuse_what_is_outside(root, real)


def refuse_what_is_outside(root, real):
  tmp_path = root.parent
  assert resolve_image(root, "sub/a.png", real) == (root / "sub/a.png").resolve()
  assert resolve_image(root, "inside.png", real).name == "a.png"
  for path in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "sibling.png",
               "sub/../../secret.png", "sub/../sub/a.png", "../images2/b.png", "",
               "out/secret.png", "out/images2/b.png"):
    with pytest.raises(ImageError) as caught:
      resolve_image(root, path, real)
    assert caught.value.kind == "path_escape", path
  with pytest.raises(ImageError) as caught:
    resolve_image(root, "sub/none.png", real)
  assert caught.value.kind == "missing_image" and "none.png" in str(caught.value)


def test_paths_of_the_released_data(tmp_path):
  for file in ("ocr_vqa/1.png", "ocr_vqa/2.jpg", "vg/images/3.jpg"):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
  for given, found in [("ocr_vqa/1.jpg", "1.png"), ("ocr_vqa/2.jpg", "2.jpg"),
                       ("vg/VG_100K/3.jpg", "3.jpg"), ("vg/VG_100K_2/3.jpg", "3.jpg")]:
    assert resolve_image(tmp_path, given).name == found
