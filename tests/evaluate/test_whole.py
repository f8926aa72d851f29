"""Every benchmark from the command line, on small official files: stopped, resumed, scored."""
import json
import shutil

import pytest
from official_files import (
    LLAVA,
    ROWS,
    lay,
    mathvista_files,
    mmbench_files,
    mme_files,
    mmmu_files,
    mmvet_files,
)
from PIL import Image
from stub_endpoint import KEY, Stub, completion

from mgjax.evaluate import run
from mgjax.evaluate.answers import answers
from mgjax.evaluate.benchmarks import BENCHMARKS


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """data/ with every benchmark, each question with a picture that can be decoded."""
  root = tmp_path_factory.mktemp("data")
  picture = root / "picture.png"
  Image.new("RGB", (30, 20), (200, 40, 90)).save(picture)
  for name, files in LLAVA.items():
    lay(root / BENCHMARKS[name].folder, files())
  for make in (mme_files, mmvet_files, mathvista_files):
    make(root)
  mmmu_files(root, picture.read_bytes())
  for file in ("mmbench_dev_20230712", "mmbench_dev_cn_20231003"):
    mmbench_files(root, ROWS, file, picture.read_bytes())
  for benchmark in BENCHMARKS.values():
    for question in benchmark.read(root / benchmark.folder):
      if not isinstance(question.image, bytes | None):
        question.image.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, question.image)
  return root


def left(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
          if p.is_file() and p.suffix != ".xlsx"
          and not {"parts", "judged.jsonl"}.intersection(p.parts)}


@pytest.fixture
def judge(monkeypatch):
  stub = Stub()
  stub.answer = lambda call: (200, completion("0.5"), {})
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  yield stub
  stub.close()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_one_benchmark(name, whole, command, judge, tmp_path, monkeypatch, capsys):
  judging = ("--judge", "m", "--judge-url", judge.url) if BENCHMARKS[name].judging else ()
  flags = ("--data", str(whole), "--benchmark", name, "--limit", "9", *judging)
  # Short answers are as good for this; a few, so that it can stop on the way.
  short = lambda *args, max_new_tokens, **more: answers(*args, max_new_tokens=4, **more)

  def stopped(*args, **more):
    yield next(short(*args, **more))
    raise KeyboardInterrupt
  monkeypatch.setattr(run, "answers", stopped)
  assert command(*flags) == 130
  monkeypatch.setattr(run, "answers", short)
  assert command(*flags) == 0
  assert not judging or judge.calls or name.startswith("mathvista")
  resumed = left(tmp_path / "out")
  shutil.rmtree(tmp_path / "out")
  assert command(*flags) == 0
  assert left(tmp_path / "out") == resumed
  out = capsys.readouterr()
  if BENCHMARKS[name].score is None:
    assert "not scored here: its answers are not published" in out.err.replace(";", ":")
    return
  report = json.loads(resumed["report.json"])
  figures = report["benchmarks"][name]["headline"]
  assert figures and all(0 <= v <= 2000 for v in figures.values())
  assert all(f"| {column} |" in out.out or f" {column} " in out.out for column in figures)
  assert resumed[f"{name}/wrong.html"].count(b"<img ") > 0 or not judging


def test_without_a_judge(whole, command, capsys):
  """MM-Vet has no score then, MathVista and MMBench one that says what it lacks."""
  assert command("--data", str(whole), "--benchmark", "mmvet,mathvista,mmbench") == 0
  err = capsys.readouterr().err
  assert "MM-Vet: not scored here; --judge MODEL does it (officially gpt-4-0613)" in err
