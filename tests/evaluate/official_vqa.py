"""Runs the official scorers of TextVQA, POPE, GQA, ScienceQA and SEED-Bench on made-up answers,
and stores what they say in official/*.json, to which test_vqa.py holds ours.

  python tests/evaluate/official_vqa.py --mgm MGM --scienceqa ScienceQA --gqa eval.py

MGM and ScienceQA are checkouts of dvlab-research/MGM and lupantech/ScienceQA.  eval.py is GQA's,
with the changes for test-dev that docs/Evaluation.md of LLaVA asks for (eval/gqa/eval_gqa.py of
BAAI-DCAI/Bunny is such a one).  The official scripts read the answer files that our `write` makes.
"""
import argparse
import contextlib
import io
import json
import os
import pathlib
import random
import re
import runpy
import sys
import tempfile
import types

from mgjax.evaluate.benchmark import Answered
from mgjax.evaluate.benchmarks import BENCHMARKS

NASTY = [
    "", "I'm sorry, I can't see that.", "not sure", "unanswerable", "Nothing", "cannot", "knot",
    "NO", "No", "no", "no.", "No, it isn't", "no,", "Yes", "yes.", "YES", "Yes. No.", "is it not?",
    "not", "No\nBecause", "yes\nno", "None", "a", "A", "a.", "A.", "A. ", "B. ", "B.\n", "(A)",
    "(B) two", "A, B", "AB", "E", "F", "b", "\uff21", "E. nothing", "The answer is B.",
    "The answer is B", "The answer is A. The answer is B.", "the answer is C.", "The answer is F.",
    "The answer is D\n", "So: The answer is C, of course", "option text", "1,000", "1000",
    "1,000.5", "1e3", "-3.50", "[1, 2, 3]", "the two, and none", "it's", "dont", "ow's'at", "Id've",
    "St. John's", "a-b", "a/b", "x" * 400, "a." * 40, "1.2.3.", "é", "東京 tower", "\u2019s",
    "tab\tand\nline", "ten?!", "....", " left", "left ", "Left.", "on the left"]


# What is asked and answered: (the benchmark's files, an answer for each question)


def textvqa(rng, n):
  said = ["coca-cola", "Nikon", "1,000", "two", "don't", "st. john's", "12:30", "$5.99", "café",
          "the end", "10", "yes", "no", "new york", "it's 3", "ten", "東京", "a.b.c", "samsung"]
  twist = [str, str.upper, str.title, lambda s: f"the {s}", lambda s: f"{s}.", lambda s: f" {s}",
           lambda s: s.replace(" ", "-"), lambda s: f"{s}, really", lambda s: s.replace("'", "")]
  asked, data, answers = [], [], []
  for i in range(n):
    image, question = f"im{i // 2:04x}", f"What is WRITTEN on sign {i}?"
    truths = rng.choices(said, k=rng.randint(1, 4))
    truths = [rng.choice(twist)(rng.choice(truths)) if rng.random() < 0.8 else rng.choice(NASTY)
              for _ in range(10)]
    tokens, end = "A, b", "Answer the question using a single word or phrase."
    text = rng.choice([f"{question}\nReference OCR token: {tokens}\n{end}"] * 3 + [
        f"Reference OCR token: {tokens}\n{question}\n{end}", f"{question}\n{end}",
        f"OCR tokens: {tokens}. Question: {question} Short answer:"])
    asked.append({"question_id": image, "image": f"{image}.jpg", "text": text,
                  "category": "default"})
    data.append({"image_id": image, "question": question.swapcase(), "answers": truths})
    answers.append(_pick(rng, rng.choice(truths), twist, said))
  return {"llava_textvqa_val_v051_ocr.jsonl": asked,
          "TextVQA_0.5.1_val.json": {"data": data}}, answers


def pope(rng, n):
  labels, asked, answers = {c: [] for c in ("adversarial", "popular", "random")}, [], []
  for i in range(n):
    category, label = rng.choice(list(labels)), rng.choice(["yes", "no"])
    image = f"COCO_{i // 6}.jpg"
    labels[category].append({"question_id": len(labels[category]), "image": image,
                             "text": "Is there a dog in the imange?", "label": label})
    asked.append({"question_id": 7 * i, "image": image, "category": category,
                  "text": "Is there a dog in the image?\nAnswer the question using a single word "
                          "or phrase."})
    twist = [str, str.title, lambda s: f"{s.title()}, there is", lambda s: f"{s}. Or not."]
    answers.append(_pick(rng, label, twist, 
                         ["no", "There is not one"] if label == "yes" else ["Yes", "yes, one"]))
  return {"llava_pope_test.jsonl": asked, **{f"coco/coco_pope_{c}.json": labels[c]
                                             for c in labels}}, answers


def gqa(rng, n):
  said = ["yes", "no", "left", "right", "red", "1000", "trash can", "café"]
  steps = [("select", "scene"), ("exist", "?"), ("query", "name"), ("choose name", "cat|dog"),
           ("verify color", "red"), ("relate", "cat,on,s (4)"), ("query", "color"), ("filter", "x")]
  asked, known, answers = [], {}, []
  for i in range(n):
    name, truth = str(20_000_000 + 37 * i), rng.choice(said)
    question = " ".join(["Is"] + ["it"] * rng.randint(1, 8)) + "?"
    known[name] = {
        "semantic": [{"operation": o, "argument": a}
                     for o, a in rng.choices(steps, k=rng.randint(1, 4))],
        "question": question, "answer": truth, "isBalanced": True,
        "groups": {"global": rng.choice([None, "color", "animal", "room"])},
        "types": {"semantic": rng.choice(["attr", "cat", "global", "obj", "rel"]),
                  "structural": rng.choice(["query", "query", "verify", "logical", "choose",
                                            "compare"])}}
    asked.append({"question_id": name, "image": f"n{i}.jpg",
                  "text": f"{question}\nAnswer the question using a single word or phrase."})
    twist = [str, str.title, lambda s: f"{s.upper()}.", lambda s: f"{s}...", lambda s: f"the {s}"]
    answers.append(_pick(rng, truth, twist, said))
  return {"llava_gqa_testdev_balanced.jsonl": asked,
          "data/testdev_balanced_questions.json": known}, answers


def scienceqa(rng, n):
  asked, problems, answers = [], {}, []
  for i in range(n + n // 10):
    name, choices, test = str(3 * i), rng.randint(2, 5), i % 11 > 0
    shown, hint = rng.random() < 0.5, rng.choice(["", "Look."])
    problems[name] = {
        "question": "Which?", "choices": [f"it {k}" for k in range(choices)], "hint": hint,
        "answer": rng.randrange(choices), "image": "image.png" if shown else None,
        "grade": f"grade{rng.randint(1, 12)}", "topic": "physics",
        "split": "test" if test else "val",
        "subject": rng.choice(["natural science", "social science", "language science"])}
    if not test:
      continue
    options = "\n".join(f"{letter}. it {k}" for k, letter in zip(range(choices), "ABCDE"))
    asked.append({"id": name, "conversations": [
        {"from": "human", "value": f"{'<image>' if shown else ''}\nWhich?\n{options}"},
        {"from": "gpt", "value": "A"}]} | ({"image": f"{name}/image.png"} if shown else {}))
    twist = [str, lambda s: f"{s}. it", lambda s: f"The answer is {s}.", lambda s: f"{s}.",
             lambda s: f"({s})", lambda s: f"Well. The answer is {s}!", lambda s: f"{s}.  it"]
    answers.append(_pick(rng, "ABCDE"[problems[name]["answer"]], twist, list("ABCDE")))
  splits = {"test": [r["id"] for r in asked],
            "val": [name for name, p in problems.items() if p["split"] == "val"]}
  return {"llava_test_CQM-A.json": asked, "pid_splits.json": splits,
          "problems.json": problems}, answers


def seed(rng, n):
  kinds = ["Scene Understanding", "Instance Identity", "Instance Attributes", "Instance Location",
           "Instances Counting", "Spatial Relation", "Instance Interaction", "Visual Reasoning",
           "Text Understanding", "Action Recognition", "Action Prediction",
           "Procedure Understanding"]
  asked, questions, answers = [], [], []
  for i in range(n):
    kind = rng.randint(1, 12)
    video = kind > 9
    name = f"v{i}" if video else str(100_000 + i)
    if i == n // 2:  # an id that two questions have, as SEED-Bench's 49914
      name, video = next(q["question_id"] for q in questions if q["data_type"] == "image"), False
      kind = 1
    truth = rng.choice("ABCD")
    questions.append({"answer": truth, "choice_a": "x", "data_id": str(i), "question": "What?",
                      "data_type": "video" if video else "image", "question_id": name,
                      "question_type_id": kind})
    folder = "SEED-Bench-video-image" if video else "SEED-Bench-image"
    asked.append({"image": f"{folder}/{i}{'.png' if video else ''}", "category": kinds[kind - 1],
                  "text": f"What {i}?\nA. x\nB. y\nC. z\nD. w\nAnswer with the option's letter "
                          "from the given choices directly.",
                  "question_id": name if video else int(name)})
    answers.append(_pick(rng, truth, [str, str, lambda s: f"{s}.", lambda s: f"({s})", str.lower],
                         list("ABCD")))
  order = list(range(n))
  rng.shuffle(order)
  return {"llava-seed-bench.jsonl": [asked[i] for i in order],
          "SEED-Bench.json": {"question_type": {k: i for i, k in enumerate(kinds, 1)},
                              "questions": questions}}, [answers[i] for i in order]


def _pick(rng, truth, twists, others):
  """Right, right in another form, another truth or something nasty."""
  kind = rng.choices(["right", "twisted", "other", "nasty"], [30, 30, 15, 25])[0]
  return (truth if kind == "right" else rng.choice(twists)(truth) if kind == "twisted"
          else rng.choice(others) if kind == "other" else rng.choice(NASTY))


# What the official scorers say: (a mark for each answer, totals)


def textvqa_official(args, folder, written, questions, answered):
  scores, said = run(args.mgm / "mgm/eval/eval_textvqa.py", "--annotation-file",
                     folder / "TextVQA_0.5.1_val.json", "--result-file", written["answers.jsonl"])
  evaluator = scores["TextVQAAccuracyEvaluator"]()
  pairs = [{"pred_answer": a.text, "gt_answers": a.question.record["answers"]} for a in answered]
  with contextlib.redirect_stderr(io.StringIO()):
    marks = [evaluator.eval_pred_list([pair]) for pair in pairs]
    accuracy = 100. * evaluator.eval_pred_list(pairs)
  return marks, {"accuracy": accuracy, "printed": re.search(r"Accuracy: (\S+)%", said)[1]}


def pope_official(args, folder, written, questions, answered):
  script = args.mgm / "mgm/eval/eval_pope.py"
  scores, said = run(script, "--annotation-dir", folder / "coco", "--question-file",
                     folder / "llava_pope_test.jsonl", "--result-file", written["answers.jsonl"])
  totals = {}
  for part in said.split("Category: ")[1:]:
    totals[part.split(",")[0]] = {k: 100 * float(v) for k, v in re.findall(
        r"^(Accuracy|Precision|Recall|F1 score|Yes ratio): (\S+)$", part, re.M)}
  # `answers` is what the script has read: each text is now the answer that it found.
  found = {line["question_id"]: line["text"] for line in scores["answers"]}
  return [float(found[q.record["question_id"]] == q.record["label"]) for q in questions], totals


def gqa_official(args, folder, written, questions, answered):
  predictions = written["testdev_balanced_predictions.json"]
  ours = predictions.read_text()
  run(args.mgm / "scripts/convert_gqa_for_eval.py", "--src", written["answers.jsonl"], "--dst",
      predictions)
  assert predictions.read_text() == ours  # our file is theirs, byte for byte
  (folder / "data/testdev_balanced_predictions.json").write_text(ours)
  with contextlib.chdir(folder / "data"):
    scores, said = run(args.gqa, "--tier", "testdev_balanced")
  known, predicted, scores = scores["questions"], scores["predictions"], scores["scores"]
  marks = [float(predicted[name] == known[name]["answer"])
           for name in (q.record["question_id"] for q in questions)]
  assert sum(marks) / len(marks) * 100 == scores["accuracy"]
  detailed = {k: {str(t): v[0] for t, v in scores[k].items()} for k in (
      "accuracyPerStructuralType", "accuracyPerSemanticType", "accuracyPerSteps",
      "accuracyPerLength")}
  return marks, {k: scores[k] for k in ("accuracy", "binary", "open", "distribution")} | detailed


def scienceqa_official(args, folder, written, questions, answered):
  output, result = folder / "output.json", folder / "result.json"
  scores, said = run(args.mgm / "mgm/eval/eval_science_qa.py", "--base-dir", folder,
                     "--result-file", written["answers.jsonl"], "--output-file", output,
                     "--output-result", result)
  right = {x["question_id"] for x in json.loads(output.read_text())["correct"]}
  # Its number of questions is asserted to be the real one.
  path, scope = args.scienceqa / "tools/evaluate_acc.py", {"__name__": "evaluate_acc"}
  exec(compile(path.read_text(), path, "exec", optimize=1), scope)  # noqa: S102
  classes = scope["get_scores"](result, folder / "problems.json")
  return [float(q.record["question_id"] in right) for q in questions], {
      "accuracy": scores["sqa_results"]["acc"],
      "image": scores["multimodal_correct"] / scores["multimodal_total"] * 100,
      "classes": {k: v for k, v in classes.items() if v != -1}}


def seed_official(args, folder, written, questions, answered):
  upload = folder / "upload.jsonl"
  scores, said = run(args.mgm / "scripts/convert_seed_for_submission.py", "--annotation-file",
                     folder / "SEED-Bench.json", "--result-file", written["answers.jsonl"],
                     "--result-upload-file", upload)
  assert upload.read_text() == written["upload.jsonl"].read_text()  # byte for byte
  marks = {}
  for known in scores["data"]["questions"]:
    name = known["question_id"]
    row = scores["results"][name if name.startswith("v") else int(name)]
    marks.setdefault(row["answer_id"], []).append(row["text"] == known["answer"])
  total = re.search(r"Total accuracy: (\S+)%", said)[1]
  assert f"{100 * sum(map(sum, marks.values())) / sum(map(len, marks.values())):.2f}" == total
  lines = written["answers.jsonl"].read_text().splitlines()
  ids = [json.loads(line)["answer_id"] for line in lines]
  return [sum(marks[i]) / len(marks[i]) if i in marks else None for i in ids], dict(
      re.findall(r"^(.*): (\S+)%$", said, re.M))


def text(file, value):
  """What is in a file; those of one record a line, POPE's labels among them, are lists."""
  if file.endswith(".jsonl") or "coco_pope" in file:
    return "".join(json.dumps(v) + "\n" for v in value)
  return json.dumps(value)


def run(script, *arguments):
  """A script's globals, and what it prints."""
  mgm = types.ModuleType("mgm")  # the real one loads the model
  mgm.__path__ = [str(script.parents[1])]
  said, before = io.StringIO(), sys.argv
  sys.argv, sys.modules["mgm"] = [str(script), *map(str, arguments)], mgm
  try:
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
      scope = runpy.run_path(str(script), run_name="__main__")
  finally:
    sys.argv = before
    for name in [name for name in sys.modules if name.split(".")[0] == "mgm"]:
      del sys.modules[name]
  return scope, said.getvalue()


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  for name in ("mgm", "scienceqa", "gqa"):
    parser.add_argument(f"--{name}", type=lambda p: pathlib.Path(p).resolve(), required=True)
  parser.add_argument("--pairs", type=int, default=230)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--output", type=pathlib.Path,
                      default=pathlib.Path(__file__).parent / "official")
  args = parser.parse_args()
  args.output.mkdir(parents=True, exist_ok=True)
  for make, official in ((textvqa, textvqa_official), (pope, pope_official), (gqa, gqa_official),
                         (scienceqa, scienceqa_official), (seed, seed_official)):
    name = make.__name__
    files, answers = make(random.Random(f"{name} {args.seed}"), args.pairs)
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder)
      texts = {file: text(file, value) for file, value in files.items()}
      for file, written in texts.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(written)
      questions = BENCHMARKS[name].read(folder)
      answered = [Answered(q, said) for q, said in zip(questions, answers, strict=True)]
      (folder / "out").mkdir()
      written = {p.name: p for p in BENCHMARKS[name].write(answered, folder / "out", "mgm-2b")}
      marks, totals = official(args, folder, written, questions, answered)
    given = [m for m in marks if m is not None]
    right, wrong = given.count(1.0) / len(given), given.count(0.0) / len(given)
    assert right > 0.2 and wrong > 0.2, (name, right, wrong)
    assert name != "textvqa" or 1 - right - wrong > 0.1, (right, wrong)
    path = args.output / f"{name}.json"
    path.write_text(json.dumps({"files": texts, "answers": answers, "marks": marks,
                                "totals": totals}, separators=(",", ":")) + "\n")
    print(f"{path}: {len(answers)} answers, {right:.0%} right, {wrong:.0%} wrong, "
          f"{os.path.getsize(path) / 1000:.0f} kB")


if __name__ == "__main__":
  main()
