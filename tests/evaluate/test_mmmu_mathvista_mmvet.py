"""MMMU, MathVista and MM-Vet against the official scorers' stored results, and their files."""
import hashlib
import json
import pathlib
import random
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from official_files import (
    MMVET,
    PROBLEMS,
    mathvista_files,
    mmmu_files,
    mmmu_row,
    mmvet_files,
    problem,
)

from mgjax.evaluate import files, run
from mgjax.evaluate.benchmark import Answered, EvaluationError, Question
from mgjax.evaluate.benchmarks import find, mathvista, mmmu, mmvet

OFFICIAL = pathlib.Path(__file__).parent / "official"


def stored(pairs):
  answered = [Answered(Question(key, "", None, record), text, verdict)
              for key, record, text, verdict, _ in pairs]
  return answered, {key: mark for key, *_, mark in pairs}


def official(name):
  return json.loads((OFFICIAL / f"{name}.json").read_text(encoding="utf-8"))


# MM-Vet


@pytest.fixture
def mmvet_folder(tmp_path):
  return mmvet_files(tmp_path)


def test_mmvet_scores_as_the_official_one():
  result = official("mmvet")
  answered, marks = stored(result["pairs"])
  assert len(answered) >= 200 and len(set(marks.values())) > 5
  score = find("mmvet").score(answered)
  assert score.marks == marks
  assert score.headline == {"MM-Vet": result["total"]}
  assert score.groups["capability"] == result["capability"]
  assert score.groups["capability integration"] == result["integration"]
  assert "have no mark that can be read" in score.notes[0]
  prompts = sorted({find("mmvet").judging.prompt(a, 0) for a in answered})
  assert hashlib.sha256("\0".join(prompts).encode()).hexdigest() == result["prompts"]


def test_mmvet_keeps_the_reply_that_the_official_one_keeps():
  """Of the replies in turn the first with a mark, of five; else 0."""
  result = official("mmvet")
  _, marks = stored(result["pairs"])
  judging = find("mmvet").judging
  failed = 0
  for key, replies in result["replies"].items():
    used = next((r for r in replies[:len(judging.temperature)] if judging.accepts(r)), "")
    assert (mmvet.correctness(used) or 0.0) == marks[key]
    failed += not used
  assert 0 < failed < len(result["replies"]) and judging.temperature == (0.0, 0.0, 0.5, 1.0, 1.5)


def test_mmvet_reads_asks_and_writes(mmvet_folder, tmp_path):
  bench = find("mmvet")
  questions = run.read_questions(bench, tmp_path)
  assert [(q.key, q.text) for q in questions] == [("v1_0", "What is x?"), ("v1_1", "Which one?")]
  assert questions[0].image == mmvet_folder / "images" / "v1_0.png"
  answered = [Answered(q, t, v) for q, t, v in zip(questions, ("-1", "left\none"), ("0.5", "1.0"),
                                                  strict=True)]
  asked = bench.judging.prompt(answered[0], 0)
  assert asked.startswith("Compare the ground truth and prediction from AI models")
  assert asked.endswith("their actual physical characteristics. | 1.0\n\n"
                        "What is x? | -1 <AND> -5 | -1 | ")
  assert bench.judging.prompt(answered[1], 3).endswith(
      "\nWhich one? | left <OR> first | left\none | \nPredict the correctness of the "
      "answer (digit): ")
  judging = bench.judging
  assert (judging.model, judging.max_tokens, judging.required) == ("gpt-4-0613", 3, True)
  answers, results = bench.write(answered, tmp_path, "mgm")
  assert json.loads(results.read_text()) == {"v1_0": "-1", "v1_1": "left\none"}
  assert json.loads(answers.read_text().splitlines()[0])["question_id"] == 0
  score = bench.score(answered)
  assert score.headline == {"MM-Vet": 75.0}
  assert score.groups == {"capability": {"rec": 100.0, "ocr": 50.0, "math": 50.0},
                          "capability integration": {"ocr_math": 50.0, "rec": 100.0}}
  assert score.notes == () and score.truths["v1_0"] == "-1<AND>-5"


@pytest.mark.parametrize("reply, mark", [
    ("1.0", 1.0), ("0", 0.0), ("0.25 |", 0.25), ("0.8\n", 0.8), ("1.1", None), ("-0.1", None),
    ("", None), ("Correct: 1", None), ("nan", None)])
def test_mmvet_replies(reply, mark):
  assert mmvet.correctness(reply) == mark


def test_mmvet_files_that_are_wrong(mmvet_folder):
  path = mmvet_folder / mmvet.TRUTHS
  path.write_text(json.dumps({k: MMVET[k] for k in ("v1_0",)}))
  with pytest.raises(EvaluationError, match="mm-vet.json: 1 of 2 questions of .* first 'v1_1'"):
    find("mmvet").read(mmvet_folder)
  path.write_text(json.dumps(MMVET | {"v1_2": MMVET["v1_0"]}))
  with pytest.raises(EvaluationError, match="llava-mm-vet.jsonl: 1 of 3 .* both must be of MM-Vet"):
    find("mmvet").read(mmvet_folder)
  path.write_text("[]")
  with pytest.raises(EvaluationError, match="expected an object of truths"):
    find("mmvet").read(mmvet_folder)
  path.write_text(json.dumps(MMVET | {"v1_1": {"question": "?"}}))
  with pytest.raises(EvaluationError, match="expected 'answer' among them"):
    find("mmvet").read(mmvet_folder)


# MMMU


@pytest.fixture(scope="module")
def whole_mmmu(tmp_path_factory):
  return mmmu_files(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def mmmu_folder(whole_mmmu, tmp_path):
  return pathlib.Path(shutil.copytree(whole_mmmu, tmp_path / "MMMU"))


def test_mmmu_scores_as_the_official_one():
  result = official("mmmu")
  answered, marks = stored(result["pairs"])
  assert len(answered) >= 200 and {0.0, 1.0} == set(marks.values())
  parsed = [m if isinstance(m, str) else sorted(map(repr, m)) for m in mmmu.parsed(answered)]
  assert parsed == result["parsed"]
  score = find("mmmu").score(answered)
  assert score.marks == marks
  assert score.headline == {"MMMU val": result["metric"]["acc"] * 100}
  assert score.groups["subject"] == {s: v * 100 for s, v in result["subjects"].items()}
  assert {d: round(v / 100, 3) for d, v in score.groups["domain"].items()} == result["domains"]
  # A letter is drawn anew each time, from the same seed.
  assert result["drawn"] > 5 and mmmu.parsed(answered) == mmmu.parsed(answered)


def test_mmmu_published_answers_are_on_record():
  """official_reasoning.py has compared them: two models' 900 answers each."""
  published = official("mmmu")["published"]
  for model, overall in (("llava1.5_13b", 0.367), ("qwen_vl", 0.361)):
    assert published[model]["answers"] == 900 and published[model]["bundled"] == overall
    rows = published[model]["subjects"]
    assert list(rows) == list(mmmu.SUBJECTS)
    assert round(sum(rows.values()) / 30, 3) == overall


@pytest.mark.parametrize("text, letter", [
    ("(B) or (A)", "A"), ("B, so not A at all", "A"), ("It is A.,", "A"), ("It is A,.", ""),
    ("'C'", "C"), ("I think that this one is It's here", "B"), ("it's", ""),
    ("a b c d e it's", "B"),
    ("(A) or (B), no, (A)", "A"), ("here it's, or very long, but no, it's", "B"),
    ("a very long answer without any", "A"), ("", "")])
def test_mmmu_choices(text, letter):
  class Draw:
    def choice(self, _):
      return ""
  assert mmmu.chosen(text, {"A": "very long", "B": "it's", "C": "dog"}, Draw()) == letter


@pytest.mark.parametrize("text, meant", [
    ("", [""]), ("Thus it is 1,234.567.", [1234.57, 1234.0, 234.57]),
    ("x = 5", [5.0]), ("x = 5\ny", ["x = 5\ny", 5.0]), ("The answer is C", [" c", "c "]),
    ("so :\nso .\nso a", [" a", "a "]),
    ("THUS Five", ["five"]), ("could be 3e2 or .5", ["3e2 or .5", 300.0, 2.0, 0.5])])
def test_mmmu_phrases(text, meant):
  assert mmmu.phrases(text) == meant


@pytest.mark.parametrize("truth, text, is_right", [
    ("24/7", "It is 24/7", True), ("1,234", "the result is 1234.0", True), ("C", "C", True),
    ("C", "cat", False), (["$MgS$", "MgS"], "so MgS", True), ("['$MgS$', 'MgS']", "so MgS", False)])
def test_mmmu_open_answers(truth, text, is_right):
  assert mmmu.right("open", truth, mmmu.phrases(text)) == is_right


def test_mmmu_reads_and_writes(mmmu_folder, tmp_path):
  bench = find("mmmu")
  questions = run.read_questions(bench, tmp_path)
  assert len(questions) == 60 and questions[6].key == "validation_Art_1"
  assert questions[0].text == (
      "<image 1> What?\n(A) a\n(B) it's\n(C) <image 2>\n\n"
      "Answer with the option's letter from the given choices directly.")
  assert questions[1].text == ("How much {}?\nAnswer the question using a single word or phrase.")
  assert questions[0].image == b"validation_Accounting_1"
  answered = [Answered(q, "B\n" if q.record["options"] else "is 24/7") for q in questions]
  answered[0] = Answered(questions[0], "?")
  answers, val = bench.write(answered, tmp_path, "mgm")
  lines = [json.loads(line) for line in answers.read_text().splitlines()]
  assert lines[2] == {"id": "validation_Agriculture_1", "question_type": "multiple-choice",
                      "answer": "B", "response": "B", "parsed_pred": "B",
                      "index2ans": {"A": "a", "B": "it's", "C": "<image 2>"}}
  assert lines[3] == {"id": "validation_Agriculture_2", "question_type": "open", "answer": "24/7",
                      "response": "is 24/7", "parsed_pred": ["24/7", 24.0, 7.0]}
  drawn = random.Random(42).choice("ABC")
  assert lines[0]["parsed_pred"] == drawn
  right = 59 + (drawn == "B")
  judged = json.loads(val.read_text())
  assert judged.pop("metric_dict") == {"acc": right / 60, "num_example": 60}
  assert sum(v == "Correct" for v in judged.values()) == right and set(judged) == {
      q.key for q in questions}
  score = bench.score(answered)
  assert score.groups["domain"]["Science"] == 100.0 and len(score.groups["subject"]) == 30
  assert score.notes == () and score.truths["validation_Art_2"] == "24/7"


def test_mmmu_lists_of_answers_are_told():
  record = {"subject": "Math", "question_type": "open", "answer": "['24/7', '3.429']",
            "options": {}}
  score = find("mmmu").score([Answered(Question("q", "", None, record), "24/7")])
  assert score.headline == {"MMMU val": 0.0} and "1 open questions have a list" in score.notes[0]


def test_mmmu_test_split(mmmu_folder, tmp_path):
  bench = find("mmmu-test")
  questions = run.read_questions(bench, tmp_path)
  assert questions[0].key == "test_Accounting_1" and bench.score is None
  answered = [Answered(q, "A" if q.record["options"] else "is 24/7") for q in questions]
  _, upload = bench.write(answered, tmp_path, "mgm")
  texts = json.loads(upload.read_text())
  assert (texts["test_Art_1"], texts["test_Art_2"], len(texts)) == ("A", "24/7", 60)
  numbers = [Answered(q, "5" if not q.record["options"] else "A") for q in questions]
  assert json.loads(bench.write(numbers, tmp_path, "m")[1].read_text())["test_Art_2"] == "5.0"


@pytest.mark.parametrize("row, message", [
    (mmmu_row("test_Art_1", "[]", "x", "open"), "question test_Art_1, expected validation_Art_..."),
    (mmmu_row("validation_Art_1", "['a'", "A"), r"has the options .*\['a'"),
    (mmmu_row("validation_Art_1", "[]", "A"), "expected a list of options"),
    (mmmu_row("validation_Art_1", "os.abort()", "A"), "has the options 'os.abort"),
    (mmmu_row("validation_Art_1", "['a']", "A", image_1=None), "no picture in column image_1"),
    ({"id": "validation_Art_1"}, "no column question, options"),
])
def test_mmmu_files_that_are_wrong(mmmu_folder, row, message):
  path = mmmu_folder / "Art" / "validation-00000-of-00002.parquet"
  schema = None
  if row.get("image_1", 1) is None:
    schema = pa.Table.from_pylist([mmmu_row("a", "[]", "A")]).schema
  pq.write_table(pa.Table.from_pylist([row], schema=schema), path)
  with pytest.raises(EvaluationError, match=message):
    find("mmmu").read(mmmu_folder)


def test_mmmu_files_that_are_missing_or_broken(mmmu_folder, monkeypatch):
  path = mmmu_folder / "Art" / "validation-00000-of-00002.parquet"
  path.write_bytes(b"version https://git-lfs")
  with pytest.raises(EvaluationError, match="not a parquet file that can be read"):
    find("mmmu").read(mmmu_folder)
  for file in (mmmu_folder / "Art").glob("validation*"):
    file.unlink()
  with pytest.raises(EvaluationError, match="no validation-.*.parquet, there is test-00000"):
    find("mmmu").read(mmmu_folder)
  with pytest.raises(EvaluationError, match=r"package no_such is needed.*pip install -e '.\[eval"):
    files.extra("no_such.part")


# MathVista


@pytest.mark.parametrize("who", ["judge", "alone"])
def test_mathvista_scores_as_the_official_one(who):
  result = official("mathvista")
  answered, _ = stored(result["pairs"])
  assert len(answered) >= 200
  if who == "alone":
    answered = [Answered(a.question, a.text) for a in answered]
  assert hashlib.sha256(mathvista.DEMO.encode()).hexdigest() == result["demo"]
  theirs, score = result[who]["scores"], find("mathvista").score(answered)
  assert "".join(str(int(m)) for m in score.marks.values()) == result[who]["marks"]
  average = theirs.pop("average")
  assert score.headline == {"MathVista": float(average["accuracy"])}
  assert average["correct"] == sum(score.marks.values()) and average["total"] == len(answered)
  assert score.groups == {name: {row: float(f["accuracy"]) for row, f in rows.items()}
                          for name, rows in theirs.items()}
  assert (who == "alone") == any("no judge has read them" in n for n in score.notes)


def test_mathvista_reads_asks_and_writes(tmp_path):
  folder = mathvista_files(tmp_path, PROBLEMS)
  bench = find("mathvista")
  questions = run.read_questions(bench, tmp_path)
  assert [q.text for q in questions] == [
      "Hint: Please answer the question requiring a floating-point number with one decimal "
      "place and provide the final value, e.g., 1.2, 1.3, 1.4, at the end.\n"
      "Question: How many? (Unit: $)",
      "Hint: Please answer the question requiring a floating-point number with two decimal "
      "places and provide the final value, e.g., 1.23, 1.34, 1.45, at the end.\n"
      "Question: How many?",
      "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, "
      "D, at the end.\nQuestion: How many?\nChoices:\n(A) 145°\n(B) 15\n(C) No",
      "Hint: Please answer the question requiring a Python list as an answer and provide the final "
      "list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.\nQuestion: How many?",
      "Hint: Please answer the question requiring an integer answer and provide the final "
      "value, e.g., 1, 2, 3, at the end.\nQuestion: How many?"]
  assert questions[2].image == folder / "images" / "3.jpg" and questions[2].key == "3"
  texts = ("1.23", "about 1.25", "(a) it is", "[2, 3]", " 3")
  answered = [Answered(q, t) for q, t in zip(questions, texts, strict=True)]
  prompts = [bench.judging.prompt(a, 0) for a in answered]
  assert [bool(p) for p in prompts] == [False, True, True, True, False]
  assert prompts[1].startswith("Please read the following example. Then extract the answer")
  assert prompts[1].endswith(f"Extracted answer: B\n\n{questions[1].text}\n\nabout 1.25\n\n"
                             "Extracted answer: ")
  judging = bench.judging
  assert (judging.model, judging.max_tokens, judging.required) == ("gpt-4-0613", 256, False)
  alone = bench.score(answered)
  # Nothing was found in the third: the shortest choice, which is "15".
  assert alone.marks == {"1": 1.0, "2": 0.0, "3": 0.0, "4": 0.0, "5": 1.0}
  assert alone.notes[0].startswith("3 of 5 answers are not a bare number or choice, and no judge")
  judged = [Answered(a.question, a.text, v) for a, v in zip(
      answered, ("", "1.254", "(a)", "[2, 3]", ""), strict=True)]
  score = bench.score(judged)
  assert score.headline == {"MathVista": 100.0} and score.notes == ()
  assert score.groups["skills"] == {"arithmetic reasoning": 100.0, "logical reasoning": 100.0}
  answers, extracted, scores = bench.write(judged, tmp_path, "mgm")
  lines = [json.loads(line) for line in answers.read_text().splitlines()]
  assert lines[0] == PROBLEMS["1"] | {"query": questions[0].text, "response": "1.23"}
  assert {k: v["extraction"] for k, v in json.loads(extracted.read_text()).items()} == {
      "1": "1.23", "2": "1.254", "3": "(a)", "4": "[2, 3]", "5": "3"}
  assert json.loads(scores.read_text())["average"] == {
      "accuracy": "100.0", "correct": 5, "total": 5}


@pytest.mark.parametrize("change, message", [
    ({"answer_type": "float", "precision": 3},
     r"problem 1 wants an answer of the kind \('float', 3\)"),
    ({"answer_type": "picture"}, "expected one of"),
    ({"metadata": {"split": "test"}}, "is of the split 'test', expected 'testmini'"),
])
def test_mathvista_files_that_are_wrong(tmp_path, change, message):
  folder = mathvista_files(tmp_path, {"1": problem("1", **change)})
  with pytest.raises(EvaluationError, match=message):
    find("mathvista").read(folder)


def test_mathvista_files_of_another_kind(tmp_path):
  without = {k: v for k, v in problem("1").items() if k != "answer"}
  folder = mathvista_files(tmp_path, {"1": without})
  with pytest.raises(EvaluationError, match="expected 'answer' among them"):
    find("mathvista").read(folder)
  (folder / mathvista.PROBLEMS).write_text('[{"pid": "1"}]')
  with pytest.raises(EvaluationError, match="expected an object of problems by number"):
    find("mathvista").read(folder)
