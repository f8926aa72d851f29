"""TextVQA, POPE, GQA, ScienceQA and SEED-Bench against the official scorers' stored results."""
import json
import pathlib

import pytest
from official_files import LETTER, LLAVA, WORD, lay, lines

from mgjax.evaluate.benchmark import Answered, EvaluationError, Question
from mgjax.evaluate.benchmarks import BENCHMARKS, gqa, pope, scienceqa
from mgjax.evaluate.benchmarks.textvqa import bare_question
from mgjax.evaluate.evalai import normalise

OFFICIAL = pathlib.Path(__file__).parent / "official"


# Figure for figure as the official scorers (official_vqa.py has made the files)


@pytest.fixture(scope="module", params=["textvqa", "pope", "gqa", "scienceqa", "seed"])
def official(request, tmp_path_factory):
  """(name, what is stored, our answers, our score)"""
  stored = json.loads((OFFICIAL / f"{request.param}.json").read_text())
  folder = lay(tmp_path_factory.mktemp(request.param), stored["files"])
  questions = BENCHMARKS[request.param].read(folder)
  answered = [Answered(q, text) for q, text in zip(questions, stored["answers"], strict=True)]
  return request.param, stored, answered, BENCHMARKS[request.param].score(answered)


def test_marks(official):
  name, stored, answered, score = official
  assert len(answered) >= 200
  wrong = [(a.text, a.question.record, score.marks.get(a.question.key), mark)
           for a, mark in zip(answered, stored["marks"], strict=True)
           if score.marks.get(a.question.key) != mark]
  assert not wrong
  assert set(score.truths) == set(score.marks)


def test_totals(official):
  name, stored, answered, score = official
  totals = TOTALS[name](score)
  assert totals == stored["totals"]
  if name == "seed":  # the kinds in their order
    assert list(totals) == list(stored["totals"])


def textvqa_totals(score):
  return {"accuracy": score.headline["TextVQA"], "printed": f"{score.headline['TextVQA']:.2f}"}


def pope_totals(score):
  for column, row in (("POPE F1", "F1 score"), ("POPE accuracy", "Accuracy")):
    assert score.headline[column] == sum(c[row] for c in score.groups.values()) / 3
  return {name.removeprefix("POPE "): rows for name, rows in score.groups.items()}


def gqa_totals(score):
  overall = score.groups["GQA"]
  short = {long: short for short, long in gqa.SEMANTIC.items()}
  return {"accuracy": score.headline["GQA"], "binary": overall["Binary"], "open": overall["Open"],
          "distribution": overall["Distribution (lower is better)"],
          "accuracyPerStructuralType": score.groups["GQA, structural type"],
          "accuracyPerSemanticType": {short[k]: v for k, v in
                                      score.groups["GQA, semantic type"].items()},
          "accuracyPerSteps": score.groups["GQA, steps"],
          "accuracyPerLength": score.groups["GQA, words"]}


def scienceqa_totals(score):
  names = {"natural science": "natural", "social science": "social", "language science": "language",
           "text context": "has_text", "image context": "has_image", "no context": "no_context",
           "grades 1-6": "grade_1_6", "grades 7-12": "grade_7_12"}
  assert list(score.groups["ScienceQA"]) == list(names)
  classes = {f"acc_{names[k]}": f"{v:.2f}" for k, v in score.groups["ScienceQA"].items()}
  accuracy = score.headline["ScienceQA"]
  return {"accuracy": accuracy, "image": score.headline["ScienceQA image"],
          "classes": classes | dict.fromkeys(("acc_average", "acc_physics"), f"{accuracy:.2f}")}


def seed_totals(score):
  totals = {"Total": score.headline["SEED"], "image": score.headline["SEED image"],
            "video": score.headline["SEED video"]}
  return {k: f"{v:.2f}" for k, v in (score.groups["SEED"] | {
      f"{k} accuracy": v for k, v in totals.items()}).items()}


TOTALS = {"textvqa": textvqa_totals, "pope": pope_totals, "gqa": gqa_totals,
          "scienceqa": scienceqa_totals, "seed": seed_totals}


def test_answer_files(official, tmp_path):
  name, stored, answered, score = official
  first, *more = BENCHMARKS[name].write(answered, tmp_path, "mgm-2b")
  lines = [json.loads(line) for line in first.read_text().splitlines()]
  assert first.name == "answers.jsonl" and len({line["answer_id"] for line in lines}) == len(lines)
  for line, a in zip(lines, answered, strict=True):
    shown = "<image>\n" if name == "scienceqa" and a.question.image else ""
    assert line == {"question_id": a.question.record["question_id"], "text": a.text,
                    "prompt": shown + a.question.text, "answer_id": line["answer_id"],
                    "model_id": "mgm-2b", "metadata": {}}
    assert len(line["answer_id"]) == 22
  if name == "gqa":
    assert more[0].name == "testdev_balanced_predictions.json"
    assert json.loads(more[0].read_text())[0] == {
        "questionId": lines[0]["question_id"], "prediction": lines[0]["text"].rstrip(".").lower()}
  if name == "seed":  # in the order of SEED-Bench.json, and of a repeated id the last answer
    last = {str(line["question_id"]): line["text"] for line in lines}
    known = json.loads(stored["files"]["SEED-Bench.json"])["questions"]
    assert [json.loads(line) for line in more[0].read_text().splitlines()] == [
        {"question_id": q["question_id"], "prediction": last[q["question_id"]]} for q in known]
    assert len(set(last)) == len(known) - 1


@pytest.mark.parametrize("said, expected", [
    ("It's 3.", "it 's 3"), ("1,000 dollars", "1000 dollars"), ("St. John's", "st john 's"),
    ("the two cats, a dog", "2 cats dog"), ("can't", "can't"), ("A-B", "b"), ("yes!", "yes"),
    ("None, an egg", "0 egg"), ("b." * 34, "b" * 32 + "b.b.")])
def test_normalise(said, expected):
  assert normalise(said) == expected


# What is asked, from small files in the official form


def read(name, folder, files=None):
  return BENCHMARKS[name].read(lay(folder, files or LLAVA[name.split("-")[0]]()))


@pytest.mark.parametrize("name, expected", [
    ("textvqa", [(f"What is it?\nReference OCR token: STOP, 4{WORD}", "train_images/ab.jpg"),
                 (f"Reference OCR token: STOP, 4\nWhich sign?{WORD}", "train_images/ab.jpg"),
                 (f"What is it?{WORD}", "train_images/cd.jpg")]),
    ("textvqa-no-ocr", [(f"What is it?{WORD}", "train_images/ab.jpg"),
                        (f"Which sign?{WORD}", "train_images/ab.jpg"),
                        (f"What is it?{WORD}", "train_images/cd.jpg")]),
    ("pope", [(f"Is there a dog in the image?{WORD}", f"val2014/{image}.jpg") for image in "abca"]),
    ("gqa", [(f"Is it red?{WORD}", "data/images/n7.jpg")]),
    ("scienceqa", [(f"Which?\nA. a cat\nB. a cow{LETTER}", None),
                   (f"Context: Look.\nWhich?\nA. a cat\nB. a cow{LETTER}",
                    "images/test/5/image.png")]),
    ("seed", [(f"What?\nA. x\nB. y\nC. z\nD. w{LETTER}", "SEED-Bench-image/1_2"),
              (f"What?\nA. x\nB. y\nC. z\nD. w{LETTER}", "SEED-Bench-video-image/10_v5.png")]),
    ("seed-image", [(f"What?\nA. x\nB. y\nC. z\nD. w{LETTER}", "SEED-Bench-image/1_2")])])
def test_questions(tmp_path, name, expected):
  questions = read(name, tmp_path)
  assert [(q.text, q.image and str(q.image.relative_to(tmp_path))) for q in questions] == expected
  assert len({q.key for q in questions}) == len(questions)
  assert BENCHMARKS[name].max_new_tokens == (1024 if name == "scienceqa" else 128)
  given = [*LLAVA[name.split("-")[0]](), *{f"{path}".rsplit("/", 2 if "test/" in path else 1)[0]
                                           for _, path in expected if path}]
  assert set(BENCHMARKS[name].files) == set(given)  # all that is opened


def test_the_right_answers_are_right(tmp_path):
  right = {"textvqa": ["Stop."] * 3, "pope": ["Yes", "yes", "no", "yes"], "gqa": ["Yes."],
           "scienceqa": ["B", "B. a cow"], "seed": ["A", "B"], "seed-image": ["A"]}
  for name, texts in right.items():
    questions = read(name, tmp_path / name)
    score = BENCHMARKS[name].score([Answered(*pair) for pair in zip(questions, texts, strict=True)])
    assert set(score.headline.values()) == {100.0}, name
    assert list(score.marks.values()) == [1.0] * len(texts)
  assert list(score.headline) == ["SEED image"] and score.groups == {"SEED": {"Scene": 100.0}}


def test_a_repeated_id_of_seed_has_the_last_answer(tmp_path):
  files = LLAVA["seed"]()
  files["llava-seed-bench.jsonl"] += files["llava-seed-bench.jsonl"].splitlines()[0] + "\n"
  files["SEED-Bench.json"]["questions"].append(
      files["SEED-Bench.json"]["questions"][1] | {"answer": "C"})
  questions = read("seed", tmp_path, files)
  score = BENCHMARKS["seed"].score([Answered(q, text) for q, text in zip(questions, "ABC")])
  assert score.marks == {"1": 1.0, "2": 0.5} and score.headline["SEED image"] == 50.0
  assert score.truths["2"] == "A | C"


def test_pope_where_a_figure_is_not_defined(tmp_path):
  questions = read("pope", tmp_path)
  score = BENCHMARKS["pope"].score([Answered(q, "no") for q in questions[:3]])
  assert score.headline == {"POPE F1": 0.0, "POPE accuracy": 25.0}
  assert score.groups["POPE random"]["Precision"] == 0.0 == score.groups["POPE popular"]["Recall"]
  assert score.notes == (
      "random: precision is not defined, 0 stands for it",
      "random: F1 score is not defined, 0 stands for it",
      "popular: precision is not defined, 0 stands for it",
      "popular: F1 score is not defined, 0 stands for it",
      "adversarial: no question was asked, the means are over the others")
  assert pope.figures([("yes", "no"), ("no", "no")]) == (
      {"Accuracy": 50.0, "Precision": 0.0, "Recall": 0.0, "F1 score": 0.0, "Yes ratio": 50.0},
      [f"{name} is not defined, 0 stands for it" for name in ("recall", "F1 score")])


def test_gqa_classes(tmp_path):
  question, = read("gqa", tmp_path)
  score = BENCHMARKS["gqa"].score([Answered(question, "No")])
  assert score.groups == {"GQA": {"Binary": 0.0}, "GQA, structural type": {"verify": 0.0},
                          "GQA, semantic type": {"attribute": 0.0}, "GQA, steps": {"1": 0.0},
                          "GQA, words": {"3": 0.0}}
  longer = Question("2", "", None, question.record | {"words": 12})
  score = BENCHMARKS["gqa"].score([Answered(longer, "yes"), Answered(question, "no")])
  assert list(score.groups["GQA, words"].items()) == [("3", 0.0), ("12", 100.0)]


# Files that cannot be used


def _edit(name, file, change):
  def files():
    made = LLAVA[name]()
    made[file] = change(made[file])
    return made
  return name, files


@pytest.mark.parametrize("broken, told", [
    (_edit("textvqa", "TextVQA_0.5.1_val.json", lambda d: {"data": d["data"][:1]}),
     "TextVQA_0.5.1_val.json: 2 questions of .*first ab: 'Which sign\\?'; both must be of the val"),
    (_edit("textvqa", "TextVQA_0.5.1_val.json", lambda d: {"data": [
        {k: v for k, v in d["data"][0].items() if k != "answers"}]}),
     "expected 'answers' among them; is it another split"),
    (_edit("textvqa", "TextVQA_0.5.1_val.json", lambda d: {"data": [
        a | {"answers": ["stop"]} for a in d["data"]]}), "1 answers to 'What is it.', exp"),
    (_edit("textvqa", "TextVQA_0.5.1_val.json", lambda d: d["data"]),
     "TextVQA_0.5.1_val.json: it holds a list, expected a dict"),
    (_edit("textvqa", "llava_textvqa_val_v051_ocr.jsonl", lambda s: s.replace(r"\n", " ")),
     "no question is found in 'What is it\\? Ref"),
    (_edit("pope", "coco/coco_pope_popular.json", lambda s: s * 2),
     "coco_pope_popular.json: it has 4 labels, and .*llava_pope_test.jsonl 2 questions .*e3e39262"),
    (_edit("pope", "coco/coco_pope_popular.json", lambda s: s.replace("c.jpg", "x.jpg")),
     "popular.json: label 2 is for x.jpg, and question 2 .* shows c.jpg; fetch it from https"),
    (_edit("pope", "coco/coco_pope_random.json", lambda s: s.replace("label", "truth")),
     "random.json: a record has question_id, image, text, truth, expected 'label'"),
    (_edit("pope", "llava_pope_test.jsonl", lambda s: s + lines(
        {"question_id": 5, "image": "a", "text": "?", "category": "rare"})),
     "llava_pope_test.jsonl: category 'rare'; expected random, popular, adversarial"),
    (_edit("pope", "llava_pope_test.jsonl", lambda s: s + s.splitlines()[0]),
     "llava_pope_test.jsonl: question 1 is there twice"),
    (_edit("gqa", "data/testdev_balanced_questions.json", lambda d: {"2013": d["2011"]}),
     "testdev_balanced_questions.json: 1 of 1 questions of .*first '2011'; both must be of"),
    (_edit("gqa", "data/testdev_balanced_questions.json", lambda d: d | {"2013": d["2011"]}),
     "llava_gqa_testdev_balanced.jsonl: 1 of 2 questions of .*first '2013'"),
    (_edit("gqa", "data/testdev_balanced_questions.json", lambda d: {
        "2011": {"question": "?", "imageId": "n7", "isBalanced": True}}),
     "a record has question, imageId, isBalanced, expected 'types' among them"),
    (_edit("gqa", "data/testdev_balanced_questions.json", lambda d: "{"), "not JSON"),
    (_edit("gqa", "data/testdev_balanced_questions.json", lambda d: [d]), "a list, expected a d"),
    (_edit("gqa", "llava_gqa_testdev_balanced.jsonl", lambda s: s + "{"), "line 2 is no record"),
    (_edit("scienceqa", "llava_test_CQM-A.json", lambda d: d[:1]),
     "llava_test_CQM-A.json: 1 of 2 questions of .*pid_splits.json are not there, first '5'; both"),
    (_edit("scienceqa", "llava_test_CQM-A.json", lambda d: {"a": d}), "holds a dict, expect"),
    (_edit("scienceqa", "llava_test_CQM-A.json", lambda d: [3]), "a record has 3, expected 'conv"),
    (_edit("scienceqa", "llava_test_CQM-A.json", lambda d: [{"id": "4", "conversations": []}]),
     "expected 'value' among them"),
    (_edit("scienceqa", "pid_splits.json", lambda d: {"val": d["val"]}),
     "pid_splits.json: a record has val, expected 'test' among them"),
    (_edit("scienceqa", "problems.json", lambda d: {"4": d["4"]}),
     "problems.json: a record has 4, expected '5' among them"),
    (_edit("seed", "SEED-Bench.json", lambda d: d | {"questions": d["questions"][1:]}),
     "SEED-Bench.json: 1 of 2 questions of .*first 'v5'; both must be of the first SEED-Bench"),
    (_edit("seed", "llava-seed-bench.jsonl", lambda s: s.splitlines()[0]),
     "llava-seed-bench.jsonl: 1 of 2 questions of .*SEED-Bench.json are not there, first 'v5'"),
    (_edit("seed", "SEED-Bench.json", lambda d: d | {"question_type": {"Scene": 1}}),
     "SEED-Bench.json: a record has 1, expected 10 among them"),
])
def test_broken_files(tmp_path, broken, told):
  name, files = broken
  with pytest.raises(EvaluationError, match=told):
    read(name, tmp_path, files())


def test_seed_image_needs_no_videos(tmp_path):
  _, files = _edit("seed", "SEED-Bench.json", lambda d: d | {"questions": d["questions"][1:]})
  assert len(read("seed-image", tmp_path, files())) == 1


def test_pope_says():
  said = {"No": "no", "no, it is": "no", "It is not.": "no", "Yes. No": "yes", "NO": "yes",
          "No\nway": "yes", "nothing": "yes", "": "yes", "no.": "no", "a, no": "no"}
  assert {text: pope.says(text) for text in said} == said


def test_gqa_prediction():
  assert gqa.prediction(".A.b..") == ".a.b" and gqa.prediction("No. ") == "no. "


def test_scienceqa_choice():
  said = {"B": 1, "C": -1, "B. ": 1, "B.": -1, "B. it": 1, "(B)": -1, "The answer is B.": 1,
          "The answer is B": -1, "The answer is B\n": -1, "The answer is A. The answer is B.": -1,
          "F": -1, "": -1, "The answer is Z!": -1, "AB": -1, "b": -1, "Z. x The answer is A.": 0}
  assert {text: scienceqa.choice(text, 2) for text in said} == said


def test_textvqa_older_prompt(tmp_path):
  prompt = "OCR tokens: a, b. Question: What\nis it? Short answer:"
  assert bare_question(prompt) == "What\nis it?"
  _, files = _edit("textvqa", "llava_textvqa_val_v051_ocr.jsonl", lambda s: lines(
      {"question_id": "cd", "image": "cd.jpg", "text": prompt.replace("\n", " ")}))
  assert len(read("textvqa", tmp_path, files())) == 1
  with pytest.raises(EvaluationError, match="the OCR tokens of 'OCR tokens: a.*not on a line"):
    read("textvqa-no-ocr", tmp_path, files())
