"""What the official scorers say to made-up answers: writes tests/evaluate/official/{mme,...}.json.

  python tests/evaluate/official_reasoning.py --mgm MGM --mmvet MM-Vet --lmms lmms_eval's-parent \
      --mme FOLDER --site FOLDER [--pairs 240] [--seed 0] [--check]

--mme holds MME's calculation*.py and LLaVA's convert_answer_to_mme.py; --site packages that the
official code needs and this project does not (scikit-learn, loguru, Levenshtein, pandas<3), put
before the others for the scripts that run in a process of their own.  With --check nothing is
written: ours and theirs are compared only, for a larger --pairs.

Where the official code is a script that reads files, it reads those that our `write` made, and what
it says is compared with our figures here and stored for the tests.
"""
import argparse
import ast
import base64
import collections
import contextlib
import csv
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import types

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from mgjax.evaluate.benchmark import Answered, Question  # noqa: E402
from mgjax.evaluate.benchmarks import BENCHMARKS, mathvista, mmbench, mme, mmmu, mmvet  # noqa: E402

WORDS = ("red green blue cat dog river 东京 café no yes not Norway eyes nose knot half quarter "
         "left right triangle circle 3/4 12 1,234 0.5 -7 1e3 2.50 answer option A B none").split()
NASTY = ("", " ", "I'm sorry, but I cannot answer that.", "A", "A.", "(A)", "A)", ":B", "B:",
         "(C).",
         "The answer is B.", "The answer is (D)", "Answer: C", "a cat", "A cat is on the left side",
         "A or B", "(A) or (B)", "A, B and C", "b", "E", "E.", "none of these", "Yes", "yes.", "No",
         "no,", " yes it is", "Y", "n", "Not at all", "knot", "eyes", "Oh no", "yesterday", "是的",
         "日本 (B)", "“A”", "A\nB", "The answer is\nC", "so the result is 1,234.5", "1e3", "1.5E-2",
         "-7", "= 12", "x = 3.14159", "the answer is: .", "could be 5 or 6", "nan", "inf", "1_000",
         "[1, 2]", "[1.0, 2.5]", "(a) (b)", "0.50", "12.0", "two", "  12  ", "100%", "$1,234",
         "A" * 1500, "so " * 600 + "7", "Failed to obtain answer via API", "A.B",
         "final answer 3/4.",
         "It is A. So it is B.\nTherefore C", "thus\nis \nresult ", "İstanbul is the answer İ",
         "=SUM(A1)",
         "tab\there", "naïve", "\u2028yes", "<b>A</b>", '"quoted"', "C D", "D.", "(D",
         "A.,", ",.A", "'C'")


def phrase(rng, most=6):
  return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


def answer_for(rng, good, bad=()):
  """Right about as often as wrong, in many coats."""
  if rng.random() < 0.2:
    return rng.choice(NASTY)
  if rng.random() < 0.1:
    return phrase(rng, 12)
  text = str(rng.choice(good if rng.random() < 0.65 or not bad else bad))
  return rng.choice(("{}", "{}", "{}.", "({})", "The answer is {}.", "The answer is ({}).",
                     "Answer: {}", "{} is what I can see in the picture, I think", "{}\n", "  {}",
                     "So it could be {}", "It is {}.\nTherefore, the final answer is {}", "**{}**",
                     "After thinking it over for long, = {}", "{}, because of {}")
                    ).replace("{}", text)


def run(script, *arguments, cwd=None, site=(), env=None):
  """What a script prints."""
  path = os.pathsep.join(str(s) for s in site)
  done = subprocess.run([sys.executable, str(script), *map(str, arguments)], cwd=cwd, text=True,
                        capture_output=True, env={**os.environ, "PYTHONPATH": path, **(env or {})})
  assert done.returncode == 0, f"{script}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
  return done.stdout


def functions(path, *names, space=None):
  """Functions of a module, without what it imports."""
  space = {} if space is None else space
  tree = ast.parse(pathlib.Path(path).read_text())
  for node in tree.body:
    if isinstance(node, ast.FunctionDef) and node.name in names:
      exec(compile(ast.Module([node], []), str(path), "exec"), space)
  return [space[n] for n in names]


def module(path, name):
  spec = importlib.util.spec_from_file_location(name, path)
  made = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(made)
  return made


def same(ours, theirs, what):
  assert ours == theirs, f"{what}:\n ours   {ours!r:.600}\n theirs {theirs!r:.600}"


def digest(texts):
  return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def shares(marks, what):
  right = sum(m == 1 for m in marks) / len(marks)
  print(f"  {what}: {len(marks)} pairs, {right:.0%} right")
  assert 0.15 < right < 0.8, f"{what}: {right}"


def packed(answered, marks, keep, **more):
  """What a test needs to score again."""
  return {"pairs": [[a.question.key, keep(a.question.record), a.text, a.verdict, m]
                    for a, m in zip(answered, marks, strict=True)], **more}


STUB = '''
import json, os, types
_replies = json.load(open(os.environ["STUB_REPLIES"]))
api_key = api_base = None
_log = open(os.environ["STUB_REPLIES"] + ".log", "w")
def _create(model, messages, temperature, max_tokens, **_):
  prompt = messages[0]["content"]
  _log.write(json.dumps([model, prompt, temperature, max_tokens]) + "\\n"); _log.flush()
  text = _replies[prompt].pop(0) if len(_replies[prompt]) > 1 else _replies[prompt][0]
  message = type("M", (dict,), {"content": text})(content=text)
  choice = type("C", (dict,), {"message": message})(message=message)
  return type("R", (dict,), {"choices": [choice], "model": model})(choices=[choice])
class ChatCompletion:
  create = staticmethod(_create)
class OpenAI:
  def __init__(self, api_key=None):
    self.chat = types.SimpleNamespace(completions=types.SimpleNamespace(create=_create))
'''


def stubs(folder, replies):
  """A folder with an `openai` that says what it is told, and empty stand-ins for what is unused."""
  folder.mkdir(exist_ok=True)
  (folder / "openai").mkdir(exist_ok=True)
  (folder / "openai" / "__init__.py").write_text(STUB)
  (folder / "openai" / "_exceptions.py").write_text("class RateLimitError(Exception): pass\n")
  (folder / "cv2.py").write_text("")
  (folder / "word2number").mkdir(exist_ok=True)
  (folder / "word2number" / "__init__.py").write_text("")
  (folder / "word2number" / "w2n.py").write_text("")
  path = folder / "replies.json"
  path.write_text(json.dumps(replies))
  return {"STUB_REPLIES": str(path)}


def asked_of(env):
  return [json.loads(line) for line in open(env["STUB_REPLIES"] + ".log")]


def judge(judging, answered, reply):
  """As mgjax.evaluate.judge: the first reply that is accepted, or the last."""
  log, out = [], []
  for a in answered:
    verdict = ""
    if judging.prompt(a, 0):
      for attempt, temperature in enumerate(judging.temperature):
        log.append([judging.model, judging.prompt(a, attempt), temperature, judging.max_tokens])
        verdict = reply(a, attempt)
        if judging.accepts(verdict):
          break
    out.append(Answered(a.question, a.text, verdict))
  return out, log


# MME


def do_mme(args, rng, work):
  data, out = work / "MME", work / "out"
  release = data / mme.RELEASE
  lines = []
  per = max(2, args.pairs // 28)
  for category in mme.PERCEPTION + mme.COGNITION:
    split = category in ("artwork", "celebrity", "landmark", "posters", "scene")
    (release / category / ("questions_answers_YN" if split else ".")).mkdir(parents=True)
    (release / category / ("images" if split else ".")).mkdir(exist_ok=True)
    for i in range(per):
      name = f"{i:04}.{rng.choice(('jpg', 'png'))}"
      asked = [f"Is {phrase(rng)} in picture {i}?", f"Is {phrase(rng)} not there, {i}?"]
      gap = [rng.choice((" ", " ", "  ")) for _ in asked]
      text = "\n".join(f"{q}{g}Please answer yes or no.\t{t}"
                       for q, g, t in zip(asked, gap, ("Yes", "No")))
      (release / category / ("questions_answers_YN" if split else ".") / name).with_suffix(
          ".txt").write_text(text + rng.choice(("", "\n")))
      for q in asked:
        lines.append({"question_id": f"{category}/{name}",
                      "image": f"{category}/{'images/' if split else ''}{name}",
                      "text": f"{q}\n{mme.LLAVA_SUFFIX}", "category": category})
  (data / mme.QUESTIONS).write_text("".join(json.dumps(line) + "\n" for line in lines))
  answered = []
  for q in mme.read(data):
    truth = q.record["truth"]
    answered.append(Answered(q, answer_for(rng, (truth, truth.lower(), f"{truth}, it is"),
                                           ("Yes", "No", "no", "yes"))))
  out.mkdir()
  mme.write(answered, out, "some/mgm")
  score = mme.score(answered)
  # The official converter makes the same files of our answers, line breaks in answers apart.
  there = work / "convert"
  (there / "answers").mkdir(parents=True)
  (there / mme.RELEASE).symlink_to(release)
  told = [json.loads(line) for line in (out / "answers.jsonl").open()]
  (there / "answers" / "mgm.jsonl").write_text("".join(
      json.dumps(t | {"text": mme.one_line(t["text"])}) + "\n" for t in told))
  run(next(args.mme.glob("convert*.py")), "--experiment", "mgm", cwd=there)
  for path in (there / "answers_upload" / "mgm").glob("*.txt"):
    same((out / "eval_tool" / "answers" / "mgm" / path.name).read_text(), path.read_text(), path)
  # The official scorer reads ours.
  script = next(args.mme.glob("calculation*.py"))
  printed = run(script, "--results_dir", out / "eval_tool" / "answers" / "mgm", site=[args.site])
  totals = [float(t) for t in re.findall(r"total score: (\S+)", printed)]
  same(list(score.headline.values()), totals, "MME totals")
  parts = {k: float(v) for k, v in re.findall(r"\t (\S+)  score: (\S+)", printed)}
  same({k: v for rows in score.groups.values() for k, v in rows.items()}, parts, "MME categories")
  sys.path.append(str(args.site))
  official = module(script, "calculation").calculate_metrics()
  marks = []
  for a in answered:
    line = (mme.one_line(a.text) + "\n").lower()
    label = official.parse_pred_ans(line)
    same(mme.said(a.text), label, a.text)
    marks.append(float(label == a.question.record["truth"].lower()))
  same(list(score.marks.values()), marks, "MME marks")
  shares(marks, "MME")
  return {"mme": packed(answered, marks, lambda r: {k: r[k] for k in ("category", "truth")},
                        totals=totals, categories=parts)}


# MMBench


COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source",
           "l2-category", "comment", "split")


def mmbench_rows(rng, count, circular):
  """Questions with two to four options, their rotations as rows of their own."""
  rows, later = [], []
  for index in rng.sample(range(3 * count), count):
    options = rng.sample([phrase(rng, 3) + f" {i}" for i in range(9)]
                         + list("xyz") + ["cat", "catfish"],
                         rng.randint(2, 4))
    if rng.random() < 0.03:
      options[-1] = "None"  # pandas reads it as missing
    hint = rng.choice(("", "", "nan", f"{phrase(rng)}\nsecond line",
                       'a "quoted"\thint', "NA", "None"))
    row = {"index": index, "question": f"What is {phrase(rng)}?", "hint": hint,
           "answer": rng.randrange(len(options)), "options": options,
           "category": rng.choice(("ocr", "action_recognition", "physical_relation")),
           "image": base64.b64encode(rng.randbytes(9)).decode(), "source": "here",
           "l2-category": rng.choice(("coarse", "fine", "logic")), "comment": "", "split": "dev"}
    rows.append(row)
    for turn in range(1, len(options) if circular else 1):
      later.append({**row, "index": index + turn * mmbench.ROTATION,
                    "options": options[turn:] + options[:turn],
                    "answer": (row["answer"] - turn) % len(options)})
  for row in (*rows, *later):
    options = row.pop("options")
    row |= {c: options[i] if i < len(options) else "" for i, c in enumerate("ABCD")}
    row["answer"] = "ABCD"[row["answer"]]
  return [*rows, *later]


def do_mmbench(args, rng, work):
  result = {}
  for name, circular in (("circular", True), ("first", False)):
    folder = work / name
    folder.mkdir()
    tsv = folder / "mmbench_dev_20230712.tsv"
    with tsv.open("w", newline="", encoding="utf-8") as file:
      writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
      writer.writeheader()
      writer.writerows(mmbench_rows(rng, args.pairs // (3 if circular else 6), circular))
    result[name] = one_mmbench(args, rng, folder, tsv, circular)
  return {"mmbench": result}


def one_mmbench(args, rng, folder, tsv, circular):
  import pandas as pd
  bench = BENCHMARKS["mmbench"]
  frame = pd.read_table(tsv)
  space = {"math": __import__("math")}
  _, get_options = functions(args.mgm / "mgm/eval/model_vqa_mmbench.py", "is_none", "get_options",
                             space=space)
  questions = bench.read(folder)
  by_index = {row["index"]: row for _, row in frame.iterrows()}
  for q in questions:
    if not q.record["round_id"]:
      same(q.record["options"], get_options(by_index[q.record["question_id"]], "ABCD"), q.key)
  answered = []
  luck = {}
  for q in questions:  # some questions are answered well in all rotations, or there were no hits
    r = q.record
    base = r["question_id"] % mmbench.ROTATION
    knows = luck.setdefault(base, rng.random() < 0.4)
    good = (r["truth"], r["truth"], r["choices"].get(r["truth"], "?"))
    if knows and rng.random() < 0.9:
      text = rng.choice(("{}", "{}.", "({})", "{}) it is", "It is what you see: {}.")).format(
          rng.choice(good))
    else:
      text = answer_for(rng, good, tuple("ABCDE"))
    answered.append(Answered(q, text))
  evaluator = load_mmbench(args)
  reply = {}

  def say(a, attempt):
    r = a.question.record
    return reply.setdefault((a.question.key, attempt), rng.choice(
        (r["truth"] or "E", r["truth"] or "E",
        f"{r['choices'].get(r['truth'], '?')}", "E", "hm", "A B")))
  answered, asked = judge(bench.judging, answered, say)
  rows = []
  for a in answered:  # what lmms-eval has of a row
    r = a.question.record
    row = dict(by_index[r["question_id"]]) | {"prediction": a.text, "answer": r["truth"]}
    if r["round_id"]:
      row |= {"index": r["question_id"] + mmbench.ROTATION * r["round_id"]} | {
          c: r["options"][i] if i < len(r["options"]) else float("nan")
          for i, c in enumerate("ABCD")}
    rows.append(row)
    found = evaluator.prefetch_answer(dict(row)) or ""
    same(mmbench.meant(a.text, r["choices"]), found, (a.text, r["choices"]))
    prompt = bench.judging.prompt(a, 0)
    if not found:
      same(prompt, evaluator.build_prompt(row["question"], evaluator.build_option_str(
          evaluator.extract_options(row)), a.text), "the judge's prompt")
    same(bool(prompt), not found, a.text)
  verdicts = {bench.judging.prompt(a, 0): a.verdict for a in answered if a.verdict}
  totals = {}
  for who, chat in (("judge", lambda p: verdicts[p]), ("alone", lambda p: "E")):
    evaluator.get_chat_response = chat
    with contextlib.redirect_stdout(io.StringIO()):
      overall, category, l2 = evaluator.eval_result([dict(row) for row in rows], "openai")
    mine = answered if who == "judge" else [Answered(a.question, a.text) for a in answered]
    score = bench.score(mine)
    same(score.headline["MMBench"], overall * 100, who)
    for kind, theirs in (("category", category), ("l2-category", l2)):
      same(list(score.groups[kind]), list(theirs), kind)
      assert all(abs(score.groups[kind][k] - 100 * v) < 1e-11 for k, v in theirs.items()), kind
    totals[who] = {"overall": overall, "category": category, "l2-category": l2}
  if circular:
    assert 0.1 < totals["judge"]["overall"] < 0.8 and totals["judge"] != totals["alone"], totals
  # The sheet, cell for cell; of rotated questions the server knows the first round only.
  out = folder / "out"
  out.mkdir()
  bench.write(answered, out, "some/mgm")
  (folder / "result").mkdir()
  told = [json.loads(line) for line in (out / "answers.jsonl").open()]
  illegal = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")
  (folder / "result" / "mgm.jsonl").write_text("".join(
      json.dumps(t | {"text": illegal.sub("", t["text"])}) + "\n" for t in told
      if not t["round_id"]))
  run(args.mgm / "scripts/convert_mmbench_for_submission.py", "--annotation-file", tsv,
      "--result-dir", folder / "result", "--upload-dir", folder, "--experiment", "mgm")
  sheets = [cells(path) for path in (out / "mmbench_dev_20230712.xlsx", folder / "mgm.xlsx")]
  same(*sheets, "sheet")
  marks = []
  for a, row in zip(answered, rows, strict=True):
    letter = evaluator.prefetch_answer(dict(row)) or evaluator.can_infer(
        a.verdict, evaluator.build_choices(row))
    marks.append(float(bool(letter) and letter == row["answer"]))
  same(list(bench.score(answered).marks.values()), marks, "MMBench's marks")
  shares(marks, f"MMBench {'circular' if circular else 'first rounds'}")
  return packed(answered, marks, lambda r: {
      "question_id": r["question_id"], "round_id": r["round_id"], "rounds": r["rounds"],
      "truth": r["truth"], "choices": r["choices"],
      "row": {k: r["row"][k] for k in ("question", "category", "l2-category")}},
      totals=totals, asked=len(asked), prompts=digest(
          evaluator.build_prompt(row["question"], evaluator.build_option_str(
              evaluator.extract_options(row)), a.text)
          for a, row in zip(answered, rows, strict=True)
          if not evaluator.prefetch_answer(dict(row))))


def cells(path):
  import openpyxl
  sheet = openpyxl.load_workbook(path).active
  return [sheet.title, [[(c.value, c.data_type) for c in row] for row in sheet.iter_rows()]]


def load_mmbench(args):
  sys.path.append(str(args.site))
  official = module(args.lmms / "lmms_eval/tasks/mmbench/mmbench_evals.py", "mmbench_evals")
  official.eval_logger = types.SimpleNamespace(info=lambda *_: None)
  return official.MMBench_Evaluator()


# MM-Vet


def do_mmvet(args, rng, work):
  import pandas as pd
  data, out = work / "mm-vet", work / "out"
  (data / "images").mkdir(parents=True)
  out.mkdir()
  bench = BENCHMARKS["mmvet"]
  mixes = [rng.sample(mmvet.CAPABILITIES, rng.randint(1, 4)) for _ in range(14)]
  truths = {f"v1_{i}": {"imagename": f"v1_{i}.png", "question": f"What is {phrase(rng)}, {i}?",
                        "answer": rng.choice((f"{phrase(rng)}<AND>{phrase(rng)}", phrase(rng),
                                              f"{phrase(rng)}<OR>{phrase(rng)}")),
                        "imagesource": "here", "capability": rng.choice(mixes)}
            for i in range(args.pairs)}
  (data / mmvet.TRUTHS).write_text(json.dumps(truths))
  (data / mmvet.QUESTIONS).write_text("".join(json.dumps(
      {"question_id": int(k[3:]), "image": t["imagename"], "text": t["question"]}) + "\n"
      for k, t in truths.items()))
  marks = ["0.0", "0.1", "0.3", "0.5", "0.7", "0.9", "1.0", "1.0", "1", "0", "0.8\n", "0.25 |"]
  wrong = ["", "It is", "1.5", "-0.1", "|", "Correctness: 1.0", " 0.5", "½", "one"]
  said = {}

  def reply(a, attempt):
    return said.setdefault((a.question.key, attempt), rng.choice(
        marks if rng.random() < (0.85 if not attempt else 0.4) else wrong))
  plain = [Answered(q, answer_for(rng, (truths[q.key]["answer"],), (phrase(rng),)))
           for q in mmvet.read(data)]
  answered, log = judge(bench.judging, plain, reply)
  bench.write(answered, out, "some/mgm")
  replies = {}
  for a in plain:
    first, again = bench.judging.prompt(a, 0), bench.judging.prompt(a, 1)
    replies[first] = [reply(a, 0)]
    replies[again] = [reply(a, i) for i in range(1, 5)] + ["1.0"]  # the last is never looked at
  env = stubs(work / "stub", replies)
  (work / "graded").mkdir()
  run(args.mmvet / "mm-vet_evaluator.py", "--mmvet_path", data, "--result_file",
      out / "results.json",
      "--result_path", work / "graded", "--openai_api_key", "none", env=env,
      site=[work / "stub", args.site])
  asked = asked_of(env)
  unlooked = [i for i, line in enumerate(asked) if line[2] == 2.0]  # the sixth
  same(log, [line for i, line in enumerate(asked) if i not in unlooked], "MM-Vet's prompts")
  assert unlooked, "no answer failed five times"
  grades = {k: v["score"][0] for k, v in
            json.loads(next((work / "graded").glob("*grade*.json")).read_text()).items()}
  score = bench.score(answered)
  same(dict(score.marks), grades, "MM-Vet's marks")
  single = pd.read_csv(next((work / "graded").glob("*cap-score*.csv")),
                       index_col=0).iloc[0].to_dict()
  joint = pd.read_csv(next((work / "graded").glob("*cap-int-score*.csv")), index_col=0
                      ).iloc[0].to_dict()
  same(score.headline["MM-Vet"], single["total"], "MM-Vet")
  rows = {k: v for k, v in single.items() if k in mmvet.CAPABILITIES}
  same(dict(score.groups["capability"]), {k: rows[k] for k in score.groups["capability"]}, "caps")
  same(len(rows), len(score.groups["capability"]), "caps")
  mixed = {"_".join(sorted(k.split("_"), key=mmvet.CAPABILITIES.index)): v for k, v in joint.items()
           if k not in ("total", "std", "runs")}
  same(dict(score.groups["capability integration"]), mixed, "combinations")
  shares(list(grades.values()), "MM-Vet")
  return {"mmvet": packed(answered, list(grades.values()), lambda r: {
      k: r[k] for k in ("question", "answer", "capability")}, total=single["total"],
      capability=rows, integration=mixed, prompts=digest(sorted(
          {line[1] for line in asked if not line[1].endswith(mmvet.AGAIN)})), replies={
          a.question.key: [said[a.question.key, i] for i in range(5)] for a in plain
          if not bench.judging.accepts(reply(a, 0))})}


# MMMU


def do_mmmu(args, rng, work):
  import pyarrow as pa
  import pyarrow.parquet as pq
  there = args.mgm / "mgm/eval/MMMU/eval"
  sys.path.insert(0, str(there))
  data_utils, eval_utils = (importlib.import_module(f"utils.{n}")
                            for n in ("data_utils", "eval_utils"))
  same(list(mmmu.SUBJECTS), list(data_utils.CAT_SHORT2LONG.values()), "subjects")
  same({k: list(v) for k, v in mmmu.DOMAINS.items()}, data_utils.DOMAIN_CAT2SUB_CAT, "domains")
  config = {k: v[0] if isinstance(v, list) and len(v) == 1 else v
            for k, v in data_utils.load_yaml(there / "configs/llava1.5.yaml").items()}
  data, out = work / "MMMU", work / "out"
  out.mkdir()
  rows_of = {}
  for split in ("validation", "test"):
    for subject in mmmu.SUBJECTS:
      rows = rows_of[split, subject] = [mmmu_row(rng, split, subject, i + 1)
                                        for i in range(max(1, args.pairs // 30))]
      (data / subject).mkdir(parents=True, exist_ok=True)
      pq.write_table(pa.Table.from_pylist(rows), data / subject / f"{split}-00000-of-00001.parquet")
  bench = BENCHMARKS["mmmu"]
  questions = bench.read(data)
  flat = [r for subject in mmmu.SUBJECTS for r in rows_of["validation", subject]]
  same([q.key for q in questions], [r["id"] for r in flat], "order")
  samples = [data_utils.construct_prompt(data_utils.process_single_sample(r), config) for r in flat]
  for q, sample in zip(questions, samples, strict=True):
    same(q.text, sample["final_input_prompt"], q.key)
    same(q.image, sample["image"]["bytes"], q.key)
  answered = []
  for q in questions:
    r = q.record
    if r["options"]:
      good = (r["answer"], r["answer"], r["options"][r["answer"]])
      answered.append(Answered(q, answer_for(rng, good, tuple(r["options"]))))
    else:
      answered.append(Answered(q, answer_for(rng, (r["answer"],),
                                             (phrase(rng), rng.randint(0, 99)))))
  score = bench.score(answered)
  random.seed(42)  # as the original does
  theirs, drawn = [], 0
  for a, sample in zip(answered, samples, strict=True):
    before, response = random.getstate(), a.text.strip("\n")
    theirs.append(eval_utils.parse_multi_choice_response(
        response, sample["all_choices"], sample["index2ans"])
                  if sample["question_type"] == mmmu.CHOICE
                  else eval_utils.parse_open_response(response))
    drawn += random.getstate() != before
  ours = mmmu.parsed(answered)
  for a, x, y in zip(answered, ours, theirs, strict=True):
    same(unordered(x), unordered(y), (a.text, a.question.record))
  assert drawn > 5, drawn
  bench.write(answered, out, "mgm")
  for line, a, sample in zip((out / "answers.jsonl").open(), answered, samples, strict=True):
    line = json.loads(line)
    same(list(line), ["id", "question_type", "answer", "response", "parsed_pred", *(
        ["index2ans"] if a.question.record["options"] else [])], "fields")
    same(line.get("index2ans"), sample.get("index2ans"), "index2ans")
  printed = run(there / "eval.py", "--result_file", out / "answers.jsonl", "--output_path",
                work / "val.json", cwd=there, site=[args.site])
  same((out / "val.json").read_text(), (work / "val.json").read_text(), "val.json")
  metric = ast.literal_eval(printed.strip().splitlines()[-1])
  same(score.headline["MMMU val"], metric["acc"] * 100, "MMMU")
  judged = json.loads((work / "val.json").read_text())
  marks = [float(judged[a.question.key] == "Correct") for a in answered]
  same(list(score.marks.values()), marks, "MMMU marks")
  subjects, domains = mmmu_tables(data_utils, eval_utils, answered, ours)
  compare_mmmu(score, subjects, domains)
  # The test split: uploads equal where the order of a set does not matter.
  test = BENCHMARKS["mmmu-test"]
  tested = [Answered(q, rng.choice(answered).text) for q in test.read(data)]
  test.write(tested, out, "mgm")
  run(there / "convert_to_test.py", "--result_file", out / "answers.jsonl", "--output_path",
      work / "test.json", cwd=there, site=[args.site])
  same((out / "test.json").read_text(), (work / "test.json").read_text(), "test.json")
  shares(marks, "MMMU")
  published = mmmu_published(args, work, data_utils, eval_utils)
  return {"mmmu": packed(answered, marks, lambda r: dict(r), parsed=[
      x if isinstance(x, str) else sorted(map(repr, x)) for x in ours], metric=metric, drawn=drawn,
      subjects=subjects, domains=domains, published=published)}


def unordered(parsed):
  return parsed if isinstance(parsed, str) else sorted(map(repr, parsed))


def mmmu_row(rng, split, subject, number):
  choice = rng.random() < 0.75
  options = rng.sample([
      *(phrase(rng, 4) for _ in range(3)), "$x^2$", "<image 2>", "cat", "a cat", "I", "it's", '"q"',
      "{}", "100°C"], rng.choice((2, 3, 4, 4, 4, 5))) if choice else []
  answer = chr(ord("A") + rng.randrange(len(options))) if choice else rng.choice(
      ("12", "1,234", "0.50", "24/7", "Tampa", "C", "-7", "1e3", "['24/7', '3.429']",
      "café", "3.14159"))
  return {"id": f"{split}_{subject}_{number}", "question": f"<image 1> What is {phrase(rng)} {{}}?",
          "options": str(options), "explanation": "",
          "answer": "?" if split == "test" and choice else answer,
          "image_1": {"bytes": rng.randbytes(8), "path": None},
          "question_type": mmmu.CHOICE if choice else "open", "subfield": "x"}


def mmmu_tables(data_utils, eval_utils, answered, parsed):
  """Accuracy by subject and domain as the official print_results has them."""
  by = collections.defaultdict(list)
  for a, meant in zip(answered, parsed, strict=True):
    r = a.question.record
    by[r["subject"]].append({"id": a.question.key, "question_type": r["question_type"],
                             "answer": r["answer"], "parsed_pred": meant})
  subjects = {}
  for subject in data_utils.CAT_SHORT2LONG.values():
    subjects[subject] = eval_utils.evaluate(by[subject])[1] | {"num_example": len(by[subject])}
  domains = {d: round(eval_utils.calculate_ins_level_acc({s: subjects[s] for s in names}), 3)
             for d, names in data_utils.DOMAIN_CAT2SUB_CAT.items()}
  return {s: m["acc"] for s, m in subjects.items()}, domains


def compare_mmmu(score, subjects, domains):
  same(dict(score.groups["subject"]), {s: acc * 100 for s, acc in subjects.items()}, "subjects")
  same({d: round(v / 100, 3) for d, v in score.groups["domain"].items()}, domains, "domains")


def mmmu_published(args, work, data_utils, eval_utils):
  """The answers of two models that are bundled with the original: parsed and scored as there."""
  there = args.mgm / "mgm/eval/MMMU/eval"
  found = {}
  for model in ("llava1.5_13b", "qwen_vl"):
    folder = work / model
    shutil.copytree(there / "example_outputs" / model, folder)
    run(there / "main_parse_and_eval.py", "--path", folder, "--subject", "ALL", cwd=there,
        site=[args.site])
    answered, theirs, results = [], [], {}
    for subject in mmmu.SUBJECTS:
      for sample in json.loads((folder / subject / "output.json").read_text()):
        answered.append(Answered(Question(sample["id"], "", None, {
            "subject": subject, "question_type": sample["question_type"],
            "answer": sample["answer"],
            "options": sample.get("index2ans", {})}), sample["response"]))
      for sample in json.loads((folder / subject / "parsed_output.json").read_text()):
        theirs.append((sample["id"], unordered(sample["parsed_pred"]), sample["judge"]))
      results[subject] = json.loads((folder / subject / "result.json").read_text())["acc"]
    draw = random.Random(mmmu.SEED)  # the responses as they are: the script strips no line breaks
    ours = [mmmu.chosen(a.text, a.question.record["options"], draw)
            if a.question.record["question_type"] == mmmu.CHOICE else mmmu.phrases(a.text)
            for a in answered]
    for a, meant, (name, parsed, verdict) in zip(answered, ours, theirs, strict=True):
      r = a.question.record
      same((a.question.key, unordered(meant)), (name, parsed), a.text)
      same(mmmu.right(r["question_type"], r["answer"], meant), verdict == "Correct", name)
    score = mmmu.score(answered)
    _, domains = mmmu_tables(data_utils, eval_utils, answered, ours)
    compare_mmmu(score, results, domains)
    # Against the parsed answers that are bundled: only drawn ones may differ, for the seed does.
    bundled = json.loads((there / "example_outputs" / model / "total_val_output.json").read_text())
    differ = [a.question.key for a, meant in zip(answered, ours, strict=True)
              if isinstance(meant, str) and bundled[a.question.key] != meant]
    undrawn = [a for a in answered if a.question.key in differ
               and "!" not in mmmu.chosen(a.text, a.question.record["options"], Never())]
    same(undrawn, [], f"{model}: bundled letters")
    # `main_eval_only.py` on the bundled letters.
    printed = run(there / "main_eval_only.py", "--output_path", there / "example_outputs" / model /
                  "total_val_output.json", "--answer_path", there / "answer_dict_val.json",
                  cwd=there,
                  site=[args.site])
    table = ast.literal_eval(printed.strip().splitlines()[-1])
    truths = json.loads((there / "answer_dict_val.json").read_text())
    marks = collections.defaultdict(list)
    for key, said in bundled.items():
      kind = truths[key]["question_type"]
      marks["_".join(key.split("_")[1:-1])].append(mmmu.right(
          kind, truths[key]["ground_truth"], said if kind == mmmu.CHOICE else mmmu.phrases(said)))
    for subject in mmmu.SUBJECTS:
      same(round(sum(marks[subject]) / len(marks[subject]), 3), table[subject]["acc"], subject)
    everything = [m for rows in marks.values() for m in rows]
    same(round(sum(everything) / len(everything), 3), table["Overall"]["acc"], model)
    print(f"  MMMU, {model}: {len(answered)} published answers parse and "
          "score as the official ones; "
          f"{score.headline['MMMU val']:.2f}; {len(differ)} drawn letters differ from the bundled")
    found[model] = {"answers": len(answered), "subjects": results,
                     "bundled": table["Overall"]["acc"],
                     "parsed": hashlib.sha256(
                         json.dumps([t[1] for t in theirs]).encode()).hexdigest()}
  return found


class Never:
  """Draws a letter that is none."""

  def choice(self, _):
    return "!"


# MathVista


def do_mathvista(args, rng, work):
  there = args.mgm / "mgm/eval/MathVista"
  data, out = work / "MathVista", work / "out"
  (data / "images").mkdir(parents=True)
  out.mkdir()
  bench = BENCHMARKS["mathvista"]
  problems = {str(i): mathvista_problem(rng, str(i)) for i in range(1, args.pairs + 1)}
  (data / mathvista.PROBLEMS).write_text(json.dumps(problems))
  questions = bench.read(data)
  [create] = functions(args.mgm / "mgm/eval/model_math_vista.py", "create_one_query")
  for q in questions:
    same(q.text, create(q.record, 0, "solution", False), q.key)
  plain = []
  for q in questions:
    p = q.record
    good = [p["answer"], p["answer"]]
    if p["choices"]:
      good += ["ABCDEFGH"[p["choices"].index(p["answer"])]] * 2
    plain.append(Answered(q, answer_for(rng, good, (p["choices"] or []) + ["7", "1.25", "A", "B"])))

  said = {}

  def reply(a, attempt):
    p = a.question.record
    good = [p["answer"], f"{p['answer']} ", "7", "1.25", "", "unknown", a.text[:80], "(B)", "12 cm"]
    if p["choices"]:
      letter = "ABCDEFGH"[p["choices"].index(p["answer"])]
      good += [letter, f"({letter})", f"({letter.lower()}) it is", p["answer"][:-1]]
    return said.setdefault(bench.judging.prompt(a, 0), rng.choice(good))  # two may ask the same
  result = {}
  for who in ("judge", "alone"):
    folder = work / who
    folder.mkdir()
    answered, log = judge(bench.judging, plain, reply) if who == "judge" else (plain, [])
    bench.write(answered, folder, "mgm")
    if who == "judge":  # the official extraction, of our answers
      replies = {bench.judging.prompt(a, 0): [reply(a, 0)] for a in plain
                  if bench.judging.prompt(a, 0)}
      # It asks for ever for a reply that is not empty; here it gets none, and then gives up.
      env = stubs(work / "stub", {k: v if v[0].strip() else [" ", " ", "?"]
                                  for k, v in replies.items()})
      answered = [Answered(a.question, a.text, a.verdict if a.verdict.strip() or not
                           bench.judging.prompt(a, 0) else "?") for a in answered]
      shutil.copy(folder / "answers.jsonl", folder / "merge.jsonl")
      run(there / "extract_answer.py", "--output_file", folder / "merge.jsonl", "--api_key", "none",
          cwd=there, site=[work / "stub", args.site], env=env)
      seen = asked_of(env)
      same({line[1] for line in seen}, {line[1] for line in log}, "the judge's prompts")
      same({(m, t, n) for m, _, t, n in seen}, {(m, t, n) for m, _, t, n in log}, "its settings")
      theirs = json.loads((folder / "merge.jsonl").read_text())
      bench.write(answered, folder, "mgm")
      same(json.loads((folder / "extracted.json").read_text()), theirs, "extraction")
    shutil.copy(folder / "extracted.json", folder / "scored.json")
    stubs(work / "stub", {})
    run(there / "calculate_score.py", "--output_file", folder / "scored.json", "--score_file",
        folder / "theirs.json", "--gt_file", data / mathvista.PROBLEMS, cwd=there,
        site=[work / "stub", args.site], env={"STUB_REPLIES": str(work / "stub" / "replies.json")})
    theirs = json.loads((folder / "theirs.json").read_text())
    same(json.loads((folder / "scores.json").read_text()), theirs, "MathVista's score file")
    score = bench.score(answered)
    scored = json.loads((folder / "scored.json").read_text())
    marks = [float(scored[a.question.key]["true_false"]) for a in answered]
    same(list(score.marks.values()), marks, "MathVista's marks")
    for a in answered:
      same(mathvista.prediction(mathvista.extraction(a), a.question.record),
           scored[a.question.key]["prediction"], a.text)
    shares(marks, f"MathVista, {who}")
    result[who] = {"scores": theirs, "marks": "".join(str(int(m)) for m in marks)}
    if who == "judge":
      demo = {}
      exec((there / "prompts" / "ext_ans.py").read_text(), demo)
      result["demo"] = digest([demo["demo_prompt"].strip()])
      result |= packed(answered, marks, lambda r: {
          k: r[k] for k in ("choices", "precision", "answer", "question_type", "answer_type",
                            "metadata")})
  return {"mathvista": result}


def mathvista_problem(rng, pid):
  kind = rng.choice(("text", "text", "integer", "integer", "float1", "float2", "list"))
  choices, precision = None, None
  if kind == "text":
    choices = list(dict.fromkeys(
        rng.choice((phrase(rng, 2), str(rng.randint(0, 99)), f"{rng.randint(1, 9)}cm", "Yes", "No",
                    "145°")) for _ in range(rng.randint(2, 6))))
    answer = rng.choice(choices)
  elif kind == "integer":
    answer = str(rng.randint(-5, 2000))
  elif kind == "list":
    answer = str([rng.randint(0, 9), rng.randint(0, 9)])
  else:
    precision = int(kind[-1])
    kind, answer = "float", str(round(rng.uniform(0, 20), precision))
  return {"question": f"What is {phrase(rng)}?", "image": f"images/{pid}.jpg", "choices": choices,
          "unit": rng.choice((None, None, "$", "g")), "precision": precision, "answer": answer,
          "question_type": "multi_choice" if choices else "free_form", "answer_type": kind,
          "pid": pid,
          "metadata": {"split": "testmini", "language": rng.choice(("english", "chinese")),
                       "source": rng.choice(("TQA", "DVQA")), "category": rng.choice(("m", "g")),
                       "task": rng.choice(("fqa", "gps")),
                       "context": rng.choice(("bar chart", "table")),
                       "grade": rng.choice(("college", "high school")),
                       "skills": rng.sample(("arithmetic reasoning", "logical reasoning",
                                             "algebra"),
                                            rng.randint(1, 3))}}


def main():
  parser = argparse.ArgumentParser()
  for name in ("mgm", "mmvet", "lmms", "mme", "site"):
    parser.add_argument(f"--{name}", type=lambda p: pathlib.Path(p).resolve(), required=True)
  parser.add_argument("--pairs", type=int, default=240)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--check", action="store_true")
  parser.add_argument("--only", default="mme,mmbench,mmvet,mmmu,mathvista")
  args = parser.parse_args()
  out = pathlib.Path(__file__).parent / "official"
  out.mkdir(exist_ok=True)
  for name in args.only.split(","):
    rng = random.Random(f"{name} {args.seed}")
    with tempfile.TemporaryDirectory() as work:
      for stem, stored in globals()[f"do_{name}"](args, rng, pathlib.Path(work)).items():
        if not args.check:
          text = json.dumps(stored, ensure_ascii=False, separators=(",", ":"))
          (out / f"{stem}.json").write_text(text + "\n", encoding="utf-8")
          print(f"{stem}.json: {len(text.encode()):,} bytes")


if __name__ == "__main__":
  main()
