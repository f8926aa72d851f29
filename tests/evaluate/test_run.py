"""From official files to figures: answers, resuming, hosts, report, and what can be wrong."""
import html.parser
import json

import pytest
from serving import tiny_assistant

from mgjax.evaluate import report, run, wrong
from mgjax.evaluate.answers import answers
from mgjax.evaluate.benchmark import Answered, EvaluationError, Question, Score
from mgjax.evaluate.benchmarks import find
from mgjax.evaluate.published import COLUMNS, preset_of, published
from mgjax.presets import PRESETS


def files(folder):
  """What a run leaves, but for the parts, whose order may differ."""
  return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*"))
          if p.is_file() and "parts" not in p.parts}


def test_answers_equal_those_asked_alone(assistant, textvqa):
  questions = run.read_questions(find("textvqa"), textvqa.parent)
  stream = {q.key: text for q, text in answers(assistant, questions, max_new_tokens=30)}
  alone = tiny_assistant(rows=1)
  assert stream == {q.key: alone.chat(q.image, q.text, max_new_tokens=30).strip()
                    for q in questions}
  assert len(set(stream.values())) > 2


def test_questions_without_a_picture_and_too_long_ones(assistant):
  (_, text), = answers(assistant, [Question("t", "Hello")], max_new_tokens=5)
  assert text == assistant.chat(None, "Hello", max_new_tokens=5).strip()
  # An answer gets what room there is: 256 in all.
  words = "word " * 60
  (_, text), = answers(assistant, [Question("t", words)], max_new_tokens=250)
  assert text
  with pytest.raises(EvaluationError, match="question long: its 327 tokens leave no room"):
    list(answers(assistant, [Question("long", "word " * 100)], max_new_tokens=5))
  assert not assistant.engine.growing and not assistant.engine.waiting


def test_command_line(command, textvqa, tmp_path, capsys):
  assert command("--benchmark", "textvqa,textvqa-no-ocr", "--limit", "5") == 0
  out = capsys.readouterr().out
  assert "| TextVQA |" in out
  left = files(tmp_path / "out")
  assert set(left) == {"report.md", "report.json", *(
      f"{name}/{file}" for name in ("textvqa", "textvqa-no-ocr")
      for file in ("asked.json", "answers.jsonl", "score.json", "wrong.html"))}
  lines = [json.loads(line) for line in left["textvqa-no-ocr/answers.jsonl"].splitlines()]
  assert [line["question_id"] for line in lines] == ["p0", "p1", "p2", "p0", "p1"]
  assert lines[1]["prompt"] == ("What is word 1?\n"
                                "Answer the question using a single word or phrase.")
  assert "only the first 5 questions" in left["report.md"]


def test_interrupted_and_resumed(command, textvqa, tmp_path, monkeypatch, capsys):
  """The same files as in one go; no question is asked twice, nothing is asked a third time."""
  assert command("--benchmark", "textvqa") == 0
  whole = files(tmp_path / "out")
  (tmp_path / "out").rename(tmp_path / "whole")
  asked = []

  def interrupted(assistant, questions, **kwargs):
    for n, (question, text) in enumerate(answers(assistant, questions, **kwargs)):
      if n == 3 and not asked[3:]:
        raise KeyboardInterrupt
      asked.append(question.key)
      yield question, text
  monkeypatch.setattr(run, "answers", interrupted)
  assert command("--benchmark", "textvqa") == 130
  # As if the process had been killed while it wrote.
  with (tmp_path / "out/textvqa/parts/0/answers.jsonl").open("a") as file:
    file.write('{"key": "6", "te')
  for _ in range(2):
    assert command("--benchmark", "textvqa") == 0
    assert files(tmp_path / "out") == whole
  assert sorted(asked) == [str(n) for n in range(7)]


def test_hosts_share_the_questions(assistant, textvqa, tmp_path):
  """Any number of hosts, another on the way, gives one host's files."""
  benchmark = find("textvqa")
  questions = run.read_questions(benchmark, textvqa.parent)
  asked = run.Asked("c", run.digest(questions), {})
  where = lambda name: tmp_path / name / "textvqa"
  run.ask(benchmark, questions, where("one"), asked, lambda: assistant)
  run.ask(benchmark, questions, where("many"), asked, lambda: assistant, run.Host(1, 3))
  with pytest.raises(EvaluationError, match="5 of 7 questions have no answer, first 0"):
    run.collect(benchmark, questions, where("many"), "m", report=str)
  for n in (1, 0):
    run.ask(benchmark, questions, where("many"), asked, lambda: assistant, run.Host(n, 2))
  one, many = (run.collect(benchmark, questions, where(name), "m", report=str)
               for name in ("one", "many"))
  assert one == many and run.collect(benchmark, questions, where("many"), "m", None,
                                     run.Host(1, 2)) is None
  assert files(where("one")) == files(where("many"))


def test_answers_of_another_model_do_not_mix(command, textvqa, tmp_path, capsys):
  assert command("--benchmark", "textvqa") == 0
  assert command("--benchmark", "textvqa", "--limit", "3") == 2
  assert "holds answers of other questions; give another --output" in capsys.readouterr().err
  assert command("--benchmark", "textvqa", "--quantize", "int8") == 2
  assert "'quantize': None" in (err := capsys.readouterr().err) and "'quantize': 'int8'" in err


def test_what_is_missing_is_listed(command, textvqa, capsys):
  (textvqa / "train_images" / "p1.jpg").unlink()
  assert command("--benchmark", "textvqa") == 2
  err = capsys.readouterr().err
  assert "1 of 3 pictures are missing" in err and str(textvqa / "train_images" / "p1.jpg") in err
  (textvqa / "TextVQA_0.5.1_val.json").unlink()
  assert command("--benchmark", "textvqa") == 2
  err = capsys.readouterr().err
  assert "1 of 3 files are missing" in err and "https://dl.fbaipublicfiles.com/textvqa/" in err
  assert command("--benchmark", "texvqa") == 2
  assert "did you mean 'textvqa'" in capsys.readouterr().err


def test_a_broken_picture_loses_nothing(command, textvqa, tmp_path, capsys):
  (textvqa / "train_images" / "p2.jpg").write_bytes(b"\xff\xd8 nothing")
  assert command("--benchmark", "textvqa") == 2
  assert "question 2: " in (err := capsys.readouterr().err) and "p2.jpg" in err
  from PIL import Image
  Image.new("RGB", (8, 8)).save(textvqa / "train_images" / "p2.jpg")
  assert command("--benchmark", "textvqa") == 0


class Page(html.parser.HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.tags, self.text = [], ""
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_data(self, data):
    self.text += data


def test_page_of_wrong_answers(textvqa):
  evil = "<script>alert(1)</script>\u202e"
  asked = [Answered(Question(str(n), f"Q{n}", textvqa / "train_images" / "p1.jpg"), evil, "0.4")
           for n in range(9)]
  marks = {str(n): 1.0 if n == 4 else 0.5 for n in range(8)}  # 8 could not be marked
  score = Score({"TextVQA": 52.5}, {"kind": {"a|b": 1234.0}}, marks, {"0": "truth"}, ("a note",))
  page = Page(wrong.page(find("textvqa"), asked, score, "m", {"step": 3}, most=4))
  assert not [t for t, _ in page.tags if t in ("script", "link", "iframe")]
  assert "7 of 8 answers are not, or not wholly, right; 4 of them" in page.text
  assert len([t for t, _ in page.tags if t == "img"]) == 4 and "Q4" not in page.text
  assert evil[:-1] in page.text and "\\u202e" in page.text and "truth" in page.text
  assert all(a["src"].startswith("data:image/jpeg;base64,") for t, a in page.tags if t == "img")


def test_report_beside_the_published_row():
  entry = report.Entry("textvqa", "TextVQA", 5000, Score(
      {"TextVQA": 66.25}, {"kind": {"a|b": 1.0}}, notes=("n",)), {"decoding": "greedy"})
  mme = report.Entry("mme", "MME", 2374, Score({"MME perception": 1500.04, "MME cognition": 320.0}),
                     {})
  text = report.report([entry, mme], "mine", "mgm-7b")
  assert ("| mine | 66.25 | 1500.0 | 320.00 |\n| mgm-7b, published | 65.20 | 1523.0 | 316.00 |\n"
          "| difference | +1.05 | -22.96 | +4.00 |\n") in text
  assert "a\\|b" in text and "\n* n\n" in text
  assert "published" not in report.table(entry.score.headline, "mine", "")


def test_published_rows_belong_to_presets():
  named = [name for name in PRESETS if published(name)]
  assert len(named) == 11 and all(preset_of(PRESETS[name].model) == name for name in named)
  assert preset_of(PRESETS["mgm-7b-lr"].model) == "" == preset_of(PRESETS["demo"].model)
  assert published("mgm-8b-hd") == {"TextVQA": 71.6, "MME perception": 1532, "MME cognition": 357,
                                    "MMMU val": 37.0}
  assert set(published("mgm-34b")) == set(COLUMNS)
