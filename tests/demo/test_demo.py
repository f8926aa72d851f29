import dataclasses
import json
import os

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from mgjax.demo import report
from mgjax.demo.make import Sizes, corpus, make
from mgjax.demo.render import (
  HELD_OUT_PHOTOS,
  TRAIN_PHOTOS,
  low_resolution,
  photo,
  render_crop,
  render_scene,
)
from mgjax.demo.tokenizer import build
from mgjax.demo.world import (
  CONTROL,
  READING,
  Sign,
  World,
  all_pairs,
  as_words,
  ask,
  ask_several,
  is_held_out,
  sample_scene,
)

SIZES = Sizes(crops=12, text=20, scenes=10, held_out=36)
FILES = ("crops", "text", "captions", "instruct", "heldout")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = str(tmp_path_factory.mktemp("demo"))
  assert make(World(), path, SIZES)
  return path


def load(folder, name):
  with open(os.path.join(folder, f"{name}.json")) as f:
    return json.load(f)


def contents(folder):
  found = {}
  for base, _, names in os.walk(folder):
    for name in names:
      path = os.path.join(base, name)
      with open(path, "rb") as f:
        found[os.path.relpath(path, folder)] = f.read()
  return found


def test_records_are_llava_json(folder):
  for name in FILES:
    records = load(folder, name)
    assert len({r["id"] for r in records}) == len(records)
    for r in records:
      turns = r["conversations"]
      assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
      assert all(t["value"] for t in turns[1::2])
      assert "<image>" not in "".join(t["value"] for t in turns[1:])
      if "image" in r:
        assert turns[0]["value"].startswith("<image>")
        side = 32 if name == "crops" else 128
        with Image.open(os.path.join(folder, r["image"])) as image:
          assert image.size == (side, side) and image.mode == "RGB"
      else:
        assert "<image>" not in turns[0]["value"]
  assert {r["kind"] for r in load(folder, "heldout")} == set(READING + CONTROL)


def test_make_is_idempotent_and_follows_its_parameters(folder, tmp_path):
  assert make(World(), folder, SIZES) == {}
  again = str(tmp_path)
  make(World(), again, SIZES)
  assert contents(again) == contents(folder)
  other = World(seed=1)
  assert make(other, again, SIZES)
  assert load(again, "text") != load(folder, "text")
  os.remove(os.path.join(again, "done.json"))
  assert make(other, again, SIZES)


def test_a_record_does_not_depend_on_how_many_there_are(folder, tmp_path):
  make(World(), str(tmp_path), Sizes(crops=3, text=3, scenes=3, held_out=3))
  for name in FILES:
    assert load(tmp_path, name) == load(folder, name)[:3]


def signs_in(text):
  """The signs of a caption: their colours and characters, in order."""
  return tuple(Sign(i, word[:-1], word[-1]) for i, word in enumerate(text.split()) if word != "-")


def test_held_out_texts_are_in_no_training_image(folder):
  world, rng = World(), np.random.default_rng(0)
  assert not set(HELD_OUT_PHOTOS) & set(TRAIN_PHOTOS)
  scenes = [sample_scene(world, rng, held_out=None) for _ in range(3000)]
  share = np.mean([is_held_out(world, signs) for signs in scenes])
  assert abs(share - world.held_out) < 0.03
  # Where they stand is no part of the text.
  moved = [tuple(dataclasses.replace(s, cell=i) for i, s in enumerate(signs)) for signs in scenes]
  assert [is_held_out(world, s) for s in moved] == [is_held_out(world, s) for s in scenes]
  for r in load(folder, "captions"):
    assert not is_held_out(world, signs_in(r["conversations"][1]["value"]))
  alone = [sign for signs in scenes if not is_held_out(world, signs) for sign in signs]
  assert {(s.colour, s.char) for s in alone} == set(all_pairs(world))  # every sign is learnt


def test_questions_have_the_answers_of_the_scene():
  world, rng = World(), np.random.default_rng(0)
  signs = (Sign(2, "red", "7"), Sign(5, "blue", "3"), Sign(15, "green", "7"))
  assert as_words(world, signs) == "- - red7 - - blue3 - - - - - - - - - green7"
  answers = {k: ask(world, rng, signs, k, signs[1]).answer for k in READING + CONTROL[:1]}
  assert answers == {"read_one": "blue 3", "read_all": "red7 blue3 green7",
                     "which_colour": "3 blue", "count": "3"}
  assert ask(world, rng, signs, "which_colour", signs[0]) is None
  assert ask(world, rng, signs, "where", signs[2]).answer == "green bottom"
  assert ask(world, rng, signs, "colours").answer == "red blue green"
  for _ in range(20):
    q = ask(world, rng, signs, "exists")
    colour, verdict = q.answer.split()
    assert colour in q.text.split()
    assert verdict == ("yes" if colour in {s.colour for s in signs} else "no")
  asked = ask_several(world, rng, signs, 3)
  assert len({(q.kind, q.about) for q in asked}) == 3


def test_scenes_are_valid():
  world = World()
  for i in range(200):
    rng = np.random.default_rng(i)
    signs = sample_scene(world, rng, held_out=i % 2 == 0)
    assert 1 <= len(signs) <= 4 and is_held_out(world, signs) == (i % 2 == 0)
    assert len({s.colour for s in signs}) == len({s.cell for s in signs}) == len(signs)
    assert [s.cell for s in signs] == sorted(s.cell for s in signs)


def test_a_sign_stays_inside_its_cell():
  world = World(noise=0)
  photos = ("gravel",)
  signs = (Sign(5, "red", "8"),)
  for seed in range(20):
    # The background is drawn first, so that the same seed gives the same one without the sign.
    with_sign, without = (
      render_scene(world, s, photos, np.random.default_rng(seed)).astype(int) for s in (signs, ())
    )
    changed = np.abs(with_sign - without).max(-1) > 8
    inside = changed[32:64, 32:64].sum()
    assert inside > 50 and changed.sum() - inside == 0


def test_low_resolution_is_bilinear_without_antialiasing():
  jax = pytest.importorskip("jax")
  world = World()
  pixels = render_crop(World(hr=128), ("red", "7"), TRAIN_PHOTOS, np.random.default_rng(0))
  assert pixels.shape == (32, 32, 3)
  scene = render_scene(world, (), TRAIN_PHOTOS, np.random.default_rng(0)).astype(np.float32)
  wanted = jax.image.resize(scene, (56, 56, 3), "linear", antialias=False)
  np.testing.assert_allclose(low_resolution(world, scene), wanted, atol=1e-3)


def test_photographs_need_no_network(monkeypatch):
  import socket

  def refuse(*_, **__):
    raise AssertionError("network used")

  monkeypatch.setattr(socket, "create_connection", refuse)
  monkeypatch.setattr(socket.socket, "connect", refuse)
  photo.cache_clear()
  for name in TRAIN_PHOTOS + HELD_OUT_PHOTOS:
    assert min(photo(name).size) >= World().hr


class TestTokenizer:
  tokenizer = build(corpus(World()))

  def ids(self, text):
    return self.tokenizer.encode(text, add_special_tokens=False).ids

  def test_layout(self):
    names = ("<unk>", "<s>", "<pad>", "<|im_start|>", "<|im_end|>", "\n")
    assert [self.tokenizer.token_to_id(t) for t in names] == list(range(6))
    assert self.tokenizer.get_vocab_size() <= 600
    assert self.ids("7")[0] == self.ids("3 7")[1] != 1  # no BOS, one id for a word anywhere

  def test_every_word_of_the_corpus_is_one_token(self):
    for text in corpus(World()):
      for word in text.replace("?", " ").replace(".", " ").split():
        assert len(self.ids(word)) == 1, word

  @pytest.mark.parametrize(
    "text",
    [
      "7 3 9",
      "red7 - -",
      "what does the red sign say?",
      "Zebra, é ☃ x²",
      "two  spaces",
      "line\nnext line\n\nlast\n",
      "ends with a space ",
    ],
  )
  def test_decoding_gives_the_text_back(self, text):
    assert self.tokenizer.decode(self.ids(text)) == text

  def test_the_words_of_a_scene_take_the_place_of_its_visual_tokens(self):
    world = World()
    words = as_words(world, (Sign(0, "red", "7"), Sign(15, "blue", "3")))
    chat = (
      "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nread the "
      "signs.<|im_end|><|im_start|>assistant\n7 3<|im_end|>"
    )
    before, after = (self.ids(part) for part in chat.split("<image>"))
    cells = self.ids(words)
    assert len(cells) == 16
    assert self.ids(chat.replace("<image>", words)) == before + cells + after

  def test_transformers_loads_it(self, folder):
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(os.path.join(folder, "tokenizer"))
    text = "<|im_start|>user\n- red7\nread the signs.<|im_end|>"
    assert loaded(text)["input_ids"] == self.ids(text)
    assert (loaded.pad_token_id, loaded.eos_token_id) == (2, 4)
    assert loaded.decode(self.ids("7 3") + [4], skip_special_tokens=True) == "7 3"


@pytest.mark.parametrize(
  "bad, message",
  [
    ({"colours": ("red", "mauve")}, "mauve.*known are"),
    ({"characters": "00"}, "none twice"),
    ({"max_signs": 7}, "max_signs: 7"),
    ({"max_signs": 1}, "max_signs: 1, expected 2..6"),
    ({"hr": 130}, "hr: 130 is not a multiple"),
    ({"glyph": 20}, "glyph: 20"),
    ({"noise": -1}, "noise: -1"),
    ({"held_out": 0.9}, "held_out: 0.9"),
    ({"nearness": (1, 0.5)}, "nearness: .*two rising numbers"),
  ],
)
def test_a_world_that_cannot_be_is_refused(bad, message):
  with pytest.raises(ValueError, match=message):
    World(**bad)


def test_sizes_are_positive():
  with pytest.raises(ValueError, match="crops: 0"):
    Sizes(crops=0)


def test_report(folder, tmp_path):
  records = load(folder, "heldout")
  good = [report.truth(r) for r in records]
  bad = ["8"] * len(records)
  table = report.score_table(records, {"mining": good, "twin": bad})
  assert "| **reading** | 24 | **100.0 %** |" in table and table.count("\n") == 12
  with pytest.raises(ValueError, match="twin.*35 answers, expected 36"):
    report.score_table(records, {"twin": bad[:-1]})

  sheet = str(tmp_path / "sheet.png")
  report.contact_sheet(records, {"mining": good, "twin": bad}, folder, sheet, limit=5)
  metrics = tmp_path / "metrics.jsonl"
  metrics.write_text('{"note": 1}\n' + "".join(f'{{"step": {i}, "loss": 2}}\n' for i in range(9)))
  curves = str(tmp_path / "curves.png")
  report.loss_curves({"stage 1": str(metrics), "stage 2": str(metrics)}, curves)
  for path in (sheet, curves):
    with Image.open(path) as image:
      assert image.format == "PNG" and image.width > 500
  metrics.write_text("{}\n")
  with pytest.raises(ValueError, match="no line with step and loss"):
    report.loss_curves({"x": str(metrics)}, curves)
