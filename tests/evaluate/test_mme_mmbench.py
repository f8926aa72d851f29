"""MME and MMBench against the official scorers' stored results, and their official files."""
import base64
import hashlib
import json
import pathlib

import openpyxl
import pytest
from official_files import ROWS, mmbench_files, mme_files

from mgjax.evaluate import run
from mgjax.evaluate.benchmark import Answered, EvaluationError, Question
from mgjax.evaluate.benchmarks import find, mmbench, mme

OFFICIAL = pathlib.Path(__file__).parent / "official"


def stored(pairs):
  answered = [Answered(Question(key, "", None, record), text, verdict)
              for key, record, text, verdict, _ in pairs]
  return answered, {key: mark for key, *_, mark in pairs}


def official(name):
  return json.loads((OFFICIAL / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def mme_folder(tmp_path):
  return mme_files(tmp_path)


def test_mme_scores_as_the_official_one():
  result = official("mme")
  answered, marks = stored(result["pairs"])
  assert len(answered) >= 200 and {0.0, 1.0} == set(marks.values())
  score = find("mme").score(answered)
  assert score.marks == marks
  assert list(score.headline.items()) == list(zip(("MME perception", "MME cognition"),
                                                  result["totals"], strict=True))
  assert {c: v for rows in score.groups.values() for c, v in rows.items()} == result["categories"]
  assert list(score.groups["MME perception"]) == list(mme.PERCEPTION)
  assert score.truths[answered[0].question.key] in ("Yes", "No")


def test_mme_reads_and_writes(mme_folder, tmp_path):
  questions = run.read_questions(find("mme"), mme_folder.parent)
  assert len(questions) == 4 * 14 and len({q.key for q in questions}) == 4 * 14
  q = next(q for q in questions if q.record["category"] == "artwork")
  assert q.text == "Is it red?\nAnswer the question using a single word or phrase."
  assert q.image == mme_folder / mme.RELEASE / "artwork" / "images" / "0001.png"
  assert (q.record["file"], q.record["truth"]) == ("0001.txt", "Yes")
  assert q.record["sentence"] == "Is it red?  Please answer yes or no."
  answered = [Answered(q, "Yes\tand\nno") for q in questions]
  paths = find("mme").write(answered, tmp_path, "some/mgm-2b")
  assert all(p.exists() for p in paths) and len(paths) == 15
  assert json.loads(paths[0].read_text().splitlines()[0]) == {
      "question_id": "existence/0001.png", "prompt": questions[0].text, "text": "Yes\tand\nno",
      "answer_id": json.loads(paths[0].read_text().splitlines()[0])["answer_id"],
      "model_id": "some/mgm-2b", "metadata": {}}
  assert (tmp_path / "eval_tool" / "answers" / "mgm-2b" / "OCR.txt").read_text() == (
      "0001.txt\tIs it red?  Please answer yes or no.\tYes\tYes and no\n"
      "0001.txt\tIs it OCR? Please answer yes or no.\tNo\tYes and no\n"
      "two.txt\tIs it red? Please answer yes or no.\tYes\tYes and no\n"
      "two.txt\tIs it OCR? Please answer yes or no.\tNo\tYes and no\n")
  # Half of the answers are right, no picture's both.
  assert find("mme").score(answered).headline == {"MME perception": 500.0, "MME cognition": 200.0}
  # A part of the questions (--limit) gives figures of what is there.
  assert find("mme").score(answered[:3]).headline["MME perception"] == pytest.approx(200 / 3)


@pytest.mark.parametrize("broken, message", [
    (lambda f: (f / mme.RELEASE / "count" / "0001.txt").unlink(),
     r"count/0001.txt: cannot be read"),
    (lambda f: (f / mme.RELEASE / "count" / "0001.txt").write_text("Is it?\tmaybe\n"),
     r"count/0001.txt: line 1 is no question and answer \('maybe', expected Yes or No\)"),
    (lambda f: (f / mme.RELEASE / "count" / "0001.txt").write_text("a\tNo\nno tab\n"),
     r"count/0001.txt: line 2 is no question"),
    (lambda f: (f / mme.RELEASE / "count" / "0001.txt").write_text("Another?\tNo\n"),
     r"2 questions of .*llava_mme.jsonl have no answer there, first count/0001.png: 'Is it red"),
    (lambda f: cut(f / mme.QUESTIONS, 1), r"1 questions of category existence, expected two"),
    (lambda f: cut(f / mme.QUESTIONS, 4), r"0 questions of category existence, expected two"),
    (lambda f: (f / mme.QUESTIONS).write_text(json.dumps(
        {"question_id": "art/1.jpg", "image": "x", "text": "y"})), r"art/1.jpg is of no category"),
])
def test_mme_files_that_are_wrong(mme_folder, broken, message):
  broken(mme_folder)
  with pytest.raises(EvaluationError, match=message):
    find("mme").read(mme_folder)


def cut(path, lines):
  keep = path.read_text().splitlines(keepends=True)[lines:]
  path.write_text("".join(keep if lines == 4 else keep[2:]))


@pytest.mark.parametrize("kind", ["circular", "first"])
def test_mmbench_scores_as_lmms_eval(kind):
  result = official("mmbench")[kind]
  answered, marks = stored(result["pairs"])
  prompts = [p for a in answered if (p := find("mmbench").judging.prompt(a, 0))]
  assert hashlib.sha256("\0".join(prompts).encode()).hexdigest() == result["prompts"]
  asked = len(prompts)
  assert asked == result["asked"] > 20
  for who, mine in (("judge", answered),
                    ("alone", [Answered(a.question, a.text) for a in answered])):
    theirs, score = result["totals"][who], find("mmbench").score(mine)
    assert score.headline == {"MMBench": theirs["overall"] * 100}
    for name in ("category", "l2-category"):
      assert score.groups[name] == pytest.approx({k: 100 * v for k, v in theirs[name].items()})
      assert list(score.groups[name]) == list(theirs[name])
    told = [n for n in score.notes if "no judge has read them" in n]
    assert (who == "judge") == (not told)
    if who == "judge":
      assert score.marks == marks
      assert score.groups["rows"]["accuracy"] == pytest.approx(
          100 * sum(marks.values()) / len(marks))
    else:
      assert told == [f"{asked} of {len(answered)} answers can be read by no rule, "
                      "and no judge has read them: they count as wrong"]


@pytest.mark.parametrize("text, letter", [
    ("A", "A"), ("B.", "B"), ("(C)", "C"), ("(D).", "D"), (":B", "B"), ("E.", "E"), ("E", "E"),
    ("A bird sits there", ""), ("It is A", "A"), ("A or B", ""), ("b", ""), ("**A**", ""),
    ("here it is A, B.", "B"), ("A bird sits (C)", "C"), ("A", "A"), ("It is A cat", "A"),
    ("the Catfish", "B"), ("CAT", ""), ("a dog, a catfish", ""),
    ("Failed to obtain answer via API B", ""), ("", "")])
def test_mmbench_rules(text, letter):
  assert mmbench.meant(text, {"A": "a cat", "B": "catfish", "C": "dog"}) == letter


def test_mmbench_draws_where_the_judge_cannot_be_read():
  """As lmms-eval, whose seed is 2680: the first letter is A, E or whatever, and stays it."""
  import random
  record = {"question_id": 1, "round_id": 0, "rounds": 1, "choices": {"A": "x", "B": "y"},
            "row": {"question": "q", "category": "c", "l2-category": None}}
  drawn = "ABCDE"[random.Random(2680).randint(0, 4)]
  for truth in "ABCDE":
    a = Answered(Question("1", "", None, record | {"truth": truth}), "hm", "no idea")
    assert find("mmbench").score([a]).headline["MMBench"] == 100.0 * (truth == drawn)
    assert find("mmbench").score([a]).marks == {"1": 0.0}  # of rows nothing is drawn


def test_mmbench_reads_and_writes(tmp_path):
  folder = mmbench_files(tmp_path, ROWS)
  questions = run.read_questions(find("mmbench"), tmp_path)
  assert [q.key for q in questions] == ["7", "9", "1000007", "2000007", "1000009"]
  assert questions[0].text == (
      "Look.\nTwice.\nWhat is it?\nA. cat\nB. dog\nC. Grüße\n"
      "Answer with the option's letter from the given choices directly.")
  assert questions[1].text == ('Say "hi"\nA. yes\nB. no\n'
                               "Answer with the option's letter from the given choices directly.")
  assert questions[0].image == b"picture 0"
  texts = ["B", "no", "dog", "\x07C", "=B"]
  answered = [Answered(q, t) for q, t in zip(questions, texts, strict=True)]
  answers, sheet = find("mmbench").write(answered, tmp_path, "mgm")
  lines = [json.loads(line) for line in answers.read_text().splitlines()]
  assert list(lines[0]) == ["question_id", "round_id", "prompt", "text", "options", "option_char",
                            "answer_id", "model_id", "metadata"]
  assert lines[0]["prompt"] == "Look.\nTwice.\nWhat is it?\nA. cat\nB. dog\nC. Grüße"
  assert (lines[0]["question_id"], lines[0]["round_id"]) == (7, 0)
  assert (lines[1]["options"], lines[1]["option_char"]) == (["yes", "no"], ["A", "B"])
  assert sheet.name == "mmbench_dev_20230712.xlsx"
  rows = [[c.value for c in row] for row in openpyxl.load_workbook(sheet).active.iter_rows()]
  assert rows[:3] == [
      ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"],
      [7, "What is it?", "cat", "dog", "Grüße", None, "B", "B", "dev"],
      [9, 'Say "hi"', "yes", "no", None, None, "no", "A", "dev"]]
  assert [row[6] for row in rows[1:]] == ["B", "no", "dog", "C", "=B"]
  score = find("mmbench").score(answered)
  # "no" is wrong, so is the question, though "=B" would have been asked about.
  assert score.marks == {"7": 1.0, "9": 0.0, "1000007": 1.0, "2000007": 0.0, "1000009": 0.0}
  assert score.headline == {"MMBench": 0.0} and score.truths["7"] == "B. dog"
  assert score.groups["category"] == {"animal": 0.0, "ocr": 0.0}
  right = [Answered(a.question, a.question.record["truth"]) for a in answered]
  assert find("mmbench").score(right).headline == {"MMBench": 100.0}
  assert find("mmbench").score(right).notes == ()
  some = [right[0], right[1], *right[2:4], answered[4]]
  assert find("mmbench").score(some).headline == {"MMBench": 50.0}
  assert folder.exists()


def test_mmbench_judge_prompt(tmp_path):
  mmbench_files(tmp_path, ROWS)
  q = find("mmbench").read(tmp_path / "mmbench")[0]
  judging = find("mmbench").judging
  assert judging.prompt(Answered(q, "B"), 0) == "" and judging.prompt(Answered(q, "Dog!"), 0) == ""
  asked = judging.prompt(Answered(q, "a puppy {}"), 0)
  assert asked.endswith("Example 3: \nQuestion: What is it??\nOptions: There are "
                        "several options: \n"
                        "A. cat\nB. dog\nC. Grüße\n\nAnswer: a puppy {}\nYour output: ")
  assert (judging.required, judging.max_tokens, judging.model) == (False, 256, "gpt-3.5-turbo-0613")
  assert find("mmbench").score([Answered(q, "a puppy", "B")]).marks == {"7": 1.0}


def test_mmbench_in_chinese(tmp_path):
  mmbench_files(tmp_path, ROWS, "mmbench_dev_cn_20231003")
  bench = find("mmbench-cn")
  questions = run.read_questions(bench, tmp_path)
  assert questions[1].text == 'Say "hi"\nA. yes\nB. no\n请直接回答选项字母。'
  answered = [Answered(q, q.record["truth"]) for q in questions]
  assert bench.score(answered).headline == {"MMBench-CN": 100.0}
  assert bench.write(answered, tmp_path, "m")[1].name == "mmbench_dev_cn_20231003.xlsx"


def test_mmbench_rotates_what_has_no_rotations(tmp_path):
  """As --all-rounds: each question in all its rotations, in the order of the rows."""
  mmbench_files(tmp_path, ROWS[:2])
  bench = find("mmbench")
  questions = run.read_questions(bench, tmp_path)
  assert [q.key for q in questions] == ["7", "7#1", "7#2", "9", "9#1"]
  assert questions[2].text.startswith("Look.\nTwice.\nWhat is it?\nA. Grüße\nB. cat\nC. dog\n")
  assert [q.record["truth"] for q in questions] == ["B", "A", "C", "A", "B"]
  answered = [Answered(q, q.record["truth"]) for q in questions]
  score = bench.score(answered)
  assert score.headline == {"MMBench": 100.0}
  assert score.notes == ("the file has no rotations: each row was asked in all of them",)
  assert bench.score([Answered(q, "B") for q in questions]).headline == {"MMBench": 0.0}
  answers, sheet = bench.write(answered, tmp_path, "m")
  lines = [json.loads(line) for line in answers.read_text().splitlines()]
  assert [(n["question_id"], n["round_id"], n["option_char"]) for n in lines[:3]] == [
      (7, 0, ["A", "B", "C"]), (7, 1, ["B", "C", "A"]), (7, 2, ["C", "A", "B"])]
  assert openpyxl.load_workbook(sheet).active.max_row == 3


def test_mmbench_truth_that_is_no_option(tmp_path):
  """As of an option that reads "None": no answer is right then, not even one without a letter."""
  mmbench_files(tmp_path, [ROWS[1] | {"answer": "C"}])
  questions = find("mmbench").read(tmp_path / "mmbench")
  assert [q.record["truth"] for q in questions] == ["C", ""]
  assert set(find("mmbench").score([Answered(q, "hm") for q in questions]).marks.values()) == {0.0}


def test_mmbench_rotations_without_their_question_do_not_count(tmp_path):
  mmbench_files(tmp_path, [ROWS[1], *ROWS[2:]])
  answered = [Answered(q, q.record["truth"] if q.key.endswith("9") else "E")
              for q in find("mmbench").read(tmp_path / "mmbench")]
  assert find("mmbench").score(answered).headline == {"MMBench": 100.0}


def test_mmbench_part_of_the_file(tmp_path):
  mmbench_files(tmp_path, ROWS)
  answered = [Answered(q, q.record["truth"])
              for q in run.read_questions(find("mmbench"), tmp_path, limit=2)]
  assert find("mmbench").score(answered).notes == (
      "no question was asked in its rotations: the figure is not the circular one",)


@pytest.mark.parametrize("change, message", [
    (lambda rows: [{k: v for k, v in r.items() if k != "answer"} for r in rows],
     "no column answer; .* is it the test split"),
    (lambda rows: [r | {"index": "x"} for r in rows], "row 1 cannot be read"),
    (lambda rows: [rows[0], rows[1] | {"answer": "NA"}], "row 2 cannot be read .no answer"),
    (lambda rows: [rows[0], rows[0]], "2 rows, expected several, each with an index of its own"),
    (lambda rows: [r | {"image": "123"} for r in rows], "the picture of row 7 is no base64"),
])
def test_mmbench_files_that_are_wrong(tmp_path, change, message):
  folder = mmbench_files(tmp_path, change(ROWS))
  with pytest.raises(EvaluationError, match=message):
    find("mmbench").read(folder)


def test_mmbench_rows_that_are_too_long_or_no_text(tmp_path):
  folder = mmbench_files(tmp_path, ROWS)
  path = folder / "mmbench_dev_20230712.tsv"
  path.write_text(path.read_text() + "1\t" * 20)
  with pytest.raises(EvaluationError, match="row 6 cannot be read .21 cells, expected 14"):
    find("mmbench").read(folder)
  path.write_bytes(b"\xff\xfe\x00")
  with pytest.raises(EvaluationError, match="cannot be read"):
    find("mmbench").read(folder)


def test_mmbench_long_pictures(tmp_path):
  """Longer than the csv module's own limit."""
  picture = base64.b64encode(bytes(400_000)).decode()
  folder = mmbench_files(tmp_path, [r | {"image": picture} for r in ROWS])
  assert len(find("mmbench").read(folder)[0].image) == 400_000


def test_mmbench_missing_as_pandas_has_it():
  parsers = pytest.importorskip("pandas._libs.parsers")
  assert mmbench.MISSING == parsers.STR_NA_VALUES
