"""Small files in the benchmarks' official form, and where they lie in the folder of all."""
import base64
import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq

from mgjax.evaluate.benchmarks import mathvista, mme, mmmu, mmvet

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source",
           "l2-category", "comment", "split"]


def lay(folder, files):
  for name, value in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
  return folder


def lines(*records):
  return "".join(json.dumps(record) + "\n" for record in records)


def textvqa_files():
  hint = "Reference OCR token: STOP, 4"
  asked = [("ab", f"What is it?\n{hint}{WORD}"), ("ab", f"{hint}\nWhich sign?{WORD}"),
           ("cd", f"What is it?{WORD}")]
  return {"llava_textvqa_val_v051_ocr.jsonl": lines(*(
      {"question_id": i, "image": f"{i}.jpg", "text": t, "category": "default"} for i, t in asked)),
          "TextVQA_0.5.1_val.json": {"data": [
              {"image_id": i, "question": q, "answers": ["stop"] * 10} for i, q in (
                  ("ab", "What is IT?"), ("ab", "which sign?"), ("cd", "What is it?"))]}}


def pope_files():
  asked = [(1, "a.jpg", "popular"), (2, "b.jpg", "random"), (3, "c.jpg", "popular"),
           (4, "a.jpg", "adversarial")]
  label = lambda image, label: {"question_id": 9, "image": image, "text": "?", "label": label}
  return {"llava_pope_test.jsonl": lines(*(
      {"question_id": n, "image": image, "text": f"Is there a dog in the image?{WORD}",
       "category": category} for n, image, category in asked)),
          "coco/coco_pope_popular.json": lines(label("a.jpg", "yes"), label("c.jpg", "no")),
          "coco/coco_pope_random.json": lines(label("b.jpg", "yes")),
          "coco/coco_pope_adversarial.json": lines(label("a.jpg", "yes"))}


def gqa_files():
  known = lambda balanced: {
      "question": "Is it  red?", "answer": "yes", "isBalanced": balanced,
      "semantic": [{"operation": "select", "argument": "car (1)"},
                   {"operation": "choose name", "argument": "x"},
                   {"operation": "exist", "argument": "?"}],
      "groups": {"global": None}, "types": {"structural": "verify", "semantic": "attr"}}
  return {"llava_gqa_testdev_balanced.jsonl": lines({
      "question_id": "2011", "image": "n7.jpg", "text": f"Is it red?{WORD}",
      "category": "default"}),
          "data/testdev_balanced_questions.json": {"2011": known(True), "2012": known(False)}}


def scienceqa_files():
  problem = {"choices": ["a cat", "a cow"], "answer": 1, "subject": "natural science", "hint": "",
             "grade": "grade7", "image": None}
  turns = lambda text: [{"from": "human", "value": text}, {"from": "gpt", "value": "B"}]
  return {"llava_test_CQM-A.json": [
      {"id": "4", "conversations": turns("Which?\nA. a cat\nB. a cow")},
      {"id": "5", "image": "5/image.png",
       "conversations": turns("<image>\nContext: Look.\nWhich?\nA. a cat\nB. a cow")}],
          "pid_splits.json": {"test": ["4", "5"], "val": ["6"]},
          "problems.json": {"4": problem, "6": problem,
                            "5": problem | {"hint": "Look.", "image": "image.png"}}}


def seed_files():
  text = f"What?\nA. x\nB. y\nC. z\nD. w{LETTER}"
  return {"llava-seed-bench.jsonl": lines(
      {"image": "SEED-Bench-image/1_2", "text": text, "category": "Scene", "question_id": 101},
      {"image": "SEED-Bench-video-image/10_v5.png", "text": text, "category": "Action",
       "question_id": "v5"}),
          "SEED-Bench.json": {"question_type": {"Scene": 1, "Action": 10}, "questions": [
              {"answer": "B", "data_type": "video", "question_id": "v5", "question_type_id": 10},
              {"answer": "A", "data_type": "image", "question_id": "101", "question_type_id": 1}]}}


LLAVA = {"textvqa": textvqa_files, "pope": pope_files, "gqa": gqa_files,
         "scienceqa": scienceqa_files, "seed": seed_files}


def mme_files(root):
  """Two pictures in each category, in both of the release's layouts."""
  folder = root / "MME"
  lines = []
  for category in mme.PERCEPTION + mme.COGNITION:
    split = category in ("artwork", "posters")
    texts = folder / mme.RELEASE / category / ("questions_answers_YN" if split else "")
    images = folder / mme.RELEASE / category / ("images" if split else "")
    texts.mkdir(parents=True)
    images.mkdir(exist_ok=True)
    for name in ("0001.png", "two.b.jpg"):
      (images / name).write_bytes(b"")
      gap = "  " if name == "0001.png" else " "
      (texts / f"{name.split('.')[0]}.txt").write_text(
          f"Is it red?{gap}Please answer yes or no.\tYes\nIs it {category}?"
          " Please answer yes or no."
          "\tNo\n")
      lines += [{"question_id": f"{category}/{name}", "category": category, "text":
                 f"{question}\nAnswer the question using a single word or phrase.",
                 "image": f"{category}/{'images/' if split else ''}{name}"}
                for question in ("Is it red?", f"Is it {category}?")]
  (folder / mme.QUESTIONS).write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


def rows_of(*rows):
  return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


PICTURES = [base64.b64encode(b"picture %d" % n).decode() for n in range(2)]
ROWS = rows_of(
    [7, "What is it?", "Look.\nTwice.", "cat", "dog", "Grüße", "", "B", "animal",
     PICTURES[0], "web",
     "fine", "", "dev"],
    [9, 'Say "hi"', "NONE", "yes", "no", "None", "N/A", "A", "ocr", PICTURES[1], "web", "coarse",
     "", "dev"],
    [1000007, "What is it?", "Look.\nTwice.", "dog", "Grüße", "cat", "", "A", "animal", PICTURES[0],
     "web", "fine", "", "dev"],
    [2000007, "What is it?", "Look.\nTwice.", "Grüße", "cat", "dog", "", "C", "animal", PICTURES[0],
     "web", "fine", "", "dev"],
    [1000009, 'Say "hi"', "nan", "no", "yes", "", "", "B", "ocr", PICTURES[1], "web", "coarse", "",
     "dev"])


def mmbench_files(root, rows=ROWS, file="mmbench_dev_20230712", picture=None):
  folder = root / "mmbench"
  if picture:
    rows = [row | {"image": base64.b64encode(picture).decode()} for row in rows]
  folder.mkdir(exist_ok=True)
  with (folder / f"{file}.tsv").open("w", newline="", encoding="utf-8") as tsv:
    writer = csv.DictWriter(tsv, rows[0], delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
  return folder


MMVET = {"v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5",
                  "capability": ["ocr", "math"]},
         "v1_1": {"imagename": "v1_1.jpg", "question": "Which one?", "answer": "left<OR>first",
                  "capability": ["rec"]}}


def mmvet_files(root):
  folder = root / "mm-vet"
  (folder / "images").mkdir(parents=True)
  (folder / mmvet.TRUTHS).write_text(json.dumps(MMVET))
  lines = []
  for name, truth in reversed(MMVET.items()):
    (folder / "images" / truth["imagename"]).write_bytes(b"")
    lines.append({"question_id": int(name[3:]), "image": truth["imagename"],
                  "text": truth["question"], "category": "default"})
  (folder / mmvet.QUESTIONS).write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


def mmmu_row(name, options, answer, kind="multiple-choice", question="<image 1> What?", **more):
  return {"id": name, "question": question, "options": options, "explanation": "?",
          "answer": answer,
          "image_1": {"bytes": name.encode(), "path": None}, "question_type": kind} | more


def mmmu_files(root, picture=None):
  """Two questions a subject; one subject in two files."""
  shown = {"image_1": {"bytes": picture, "path": None}} if picture else {}
  folder = root / "MMMU"
  for split in ("validation", "test"):
    for subject in mmmu.SUBJECTS:
      rows = [mmmu_row(f"{split}_{subject}_1", "['a', \"it's\", '<image 2>']", "B", **shown),
              mmmu_row(f"{split}_{subject}_2", "[]", "24/7", "open", "How much {}?", **shown)]
      (folder / subject).mkdir(parents=True, exist_ok=True)
      shards = [rows[:1], rows[1:]] if subject == "Art" else [rows]
      for n, shard in enumerate(shards):
        pq.write_table(pa.Table.from_pylist(shard), folder / subject /
                       f"{split}-{n:05}-of-{len(shards):05}.parquet")
  return folder


def problem(pid, **more):
  return {"question": "How many?", "image": f"images/{pid}.jpg", "choices": None, "unit": None,
          "precision": None, "answer": "3", "question_type": "free_form", "answer_type": "integer",
          "pid": pid, "metadata": {
              "split": "testmini", "language": "english", "source": "TQA",
              "category": "general-vqa",
              "task": "vqa", "context": "table", "grade": "college",
              "skills": ["arithmetic reasoning", "logical reasoning"]}} | more


PROBLEMS = {
    "1": problem("1", precision=1, answer="1.2", answer_type="float", unit="$"),
    "2": problem("2", precision=2, answer="1.25", answer_type="float"),
    "3": problem("3", choices=["145°", "15", "No"], answer="145°", answer_type="text",
                 question_type="multi_choice"),
    "4": problem("4", answer="[2, 3]", answer_type="list"),
    "5": problem("5")}


def mathvista_files(root, problems=PROBLEMS):
  folder = root / "MathVista"
  (folder / "images").mkdir(parents=True, exist_ok=True)
  for pid in problems:
    (folder / "images" / f"{pid}.jpg").write_bytes(b"")
  (folder / mathvista.PROBLEMS).write_text(json.dumps(problems))
  return folder
