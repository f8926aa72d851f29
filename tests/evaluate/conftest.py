"""A tiny random model that answers, and the command line in this process."""
import importlib.util
import json
import pathlib

import pytest
from PIL import Image

REPO = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def assistant():
  from serving import tiny_assistant
  return tiny_assistant(rows=3)


@pytest.fixture(scope="session")
def launch():
  spec = importlib.util.spec_from_file_location("launch_evaluate", REPO / "launch" / "evaluate.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def command(launch, assistant, monkeypatch, tmp_path):
  """Runs launch/evaluate.py on the tiny model; returns its exit code."""
  import mgjax
  import mgjax.checkpoint
  step = tmp_path / "tiny" / "checkpoints" / "1"
  step.mkdir(parents=True)
  monkeypatch.setattr(mgjax, "load", lambda *args, **kwargs: assistant)
  monkeypatch.setattr(mgjax.checkpoint, "read_run", lambda path: (step, {"model": {}}))

  def run(*flags):
    return launch.main(["--checkpoint", str(tmp_path / "tiny"), "--data", str(tmp_path / "data"),
                        "--output", str(tmp_path / "out"), *flags])
  return run


@pytest.fixture
def textvqa(tmp_path):
  """Seven questions about three pictures, in the official files."""
  folder = tmp_path / "data" / "textvqa"
  (folder / "train_images").mkdir(parents=True)
  asked, truths = [], []
  for n in range(7):
    picture, question = f"p{n % 3}", f"What is word {n}?"
    Image.new("RGB", (40 + n, 30), (30 * n, 99, 7)).save(folder / "train_images" / f"{picture}.jpg")
    asked.append({"question_id": picture, "image": f"{picture}.jpg", "text":
                  f"{question}\nReference OCR token: stop, {n}\n"
                  "Answer the question using a single word or phrase."})
    truths.append({"image_id": picture, "question": question, "answers": [f"word {n}"] * 10})
  (folder / "llava_textvqa_val_v051_ocr.jsonl").write_text(
      "".join(json.dumps(a) + "\n" for a in asked))
  (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": truths}))
  return folder
