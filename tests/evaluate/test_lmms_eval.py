"""lmms-eval, a program of others, on what launch/serve.py serves.  docs/evaluation.md says how.

It has a Python of its own, for it needs another world of packages:

  MGJAX_LMMS_EVAL=lmms/bin/python pytest -m slow tests/evaluate/test_lmms_eval.py
"""
import json
import os
import pathlib
import re
import shutil
import subprocess

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

PYTHON = os.environ.get("MGJAX_LMMS_EVAL") and os.path.abspath(os.environ["MGJAX_LMMS_EVAL"])
TASK = pathlib.Path(__file__).resolve().parent / "lmms_task"
QUESTIONS = ("What does the sign say?", "Which colour is it?\nAnswer in one word.",
             " How many are there? ")
NEW_TOKENS = 16  # as in mgjax_signs.yaml, and in lmms-eval's own mme.yaml
MME_ENDS = "\nAnswer the question using a single word or phrase."  # what mme.yaml adds

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not PYTHON, reason="no lmms-eval here; MGJAX_LMMS_EVAL names a python that has it, see "
    "docs/evaluation.md")]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pictures")
  files = [folder / f"{n}.png" for n in range(4)]
  for n, file in enumerate(files):
    Image.linear_gradient("L").resize((40 + 9 * n, 30)).convert("RGB").rotate(90 * n).save(file)
  return files


def lmms_eval(served, folder, model, *flags):
  """Its results, and a task's records by its name; run in `folder`."""
  arguments = f"model_version=tiny,base_url={served.url}/v1,api_key=none,max_retries=1"
  offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "TQDM_DISABLE": "1"}
  done = subprocess.run(
      [PYTHON, "-m", "lmms_eval", "--model", model, "--model_args", arguments, "--log_samples",
       "--output_path", "out", *flags], cwd=folder, env=os.environ | offline, timeout=540,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  assert done.returncode == 0, done.stdout[-4000:]
  results = list(folder.glob("out/*/*_results.json"))
  assert len(results) == 1, done.stdout[-4000:]
  samples = {file.stem.partition("_samples_")[2]: [json.loads(line) for line in file.open()]
             for file in folder.glob("out/*/*_samples_*.jsonl")}
  for records in samples.values():
    records.sort(key=lambda record: record["doc_id"])
  return json.loads(results[0].read_text())["results"], samples


def answers(records):
  """What the model answered, by lmms-eval's account."""
  found = [record["filtered_resps"] for record in records]
  return [answer if isinstance(answer, str) else answer[0] for answer in found]


@pytest.mark.parametrize("model", ["openai", "async_openai"])
def test_it_scores_a_task_of_ones_own_as_the_answers_are(assistant, pictures, tmp_path, model):
  from serving import serving
  asked = [(picture, question) for picture in pictures for question in QUESTIONS]
  own = [assistant.chat(picture, question.strip(), max_new_tokens=NEW_TOKENS)
         for picture, question in asked]
  assert len(set(own)) > 1 and all(own)
  truths = [answer if n % 3 else f"not {answer}" for n, answer in enumerate(own)]
  folder = shutil.copytree(TASK, tmp_path / "task")
  for picture in pictures:
    shutil.copy(picture, folder)
  (folder / "test.jsonl").write_text("".join(
      json.dumps({"picture": picture.name, "question": question, "answer": truth}) + "\n"
      for (picture, question), truth in zip(asked, truths)))
  with serving(assistant) as served:
    results, samples = lmms_eval(served, tmp_path, model, "--include_path", str(folder),
                                 "--tasks", "mgjax_signs")
    assert statuses(served) == {"200": len(asked)}
  assert answers(samples["mgjax_signs"]) == own
  assert results["mgjax_signs"]["exact_match,none"] == pytest.approx(8 / 12)


def test_its_own_tasks_run_on_a_folder_of_their_data(assistant, pictures, tmp_path):
  """mme, pope_adv and realworldqa as shipped; their data sets lie in the current folder."""
  from serving import serving
  said = lambda picture, question, tokens=NEW_TOKENS: assistant.chat(
      picture, question, max_new_tokens=tokens)
  data = tmp_path / "lmms-lab-encoder"
  mme = [(category, picture, question)
         for category, picture in zip(("existence", "OCR", "code_reasoning"), pictures)
         for question in ("Is there a sign?", "Is it red?")]
  parquet(data / "MME/data/test-00000-of-00001.parquet", [
      {"question_id": f"{category}/{picture.name}", "image": file(picture), "question":
       f"{question} Please answer yes or no.", "answer": answer, "category": category}
      for (category, picture, question), answer in zip(mme, ["Yes", "No"] * 3)])
  pope = [(picture, f"Is there a {thing} in the image?")
          for picture, thing in zip(pictures, ("sign", "horse", "board", "car"))]
  parquet(data / "POPE/Full/adversarial-00000-of-00001.parquet", [
      {"id": str(n), "question_id": str(n), "question": question, "answer": answer,
       "image_source": picture.stem, "image": file(picture), "category": "adversarial"}
      for n, ((picture, question), answer) in enumerate(zip(pope, ["yes", "no"] * 2))])
  (data / "POPE/README.md").write_text(
      "---\nconfigs:\n- config_name: Full\n  data_files:\n  - split: adversarial\n"
      "    path: Full/adversarial-*\n---\n")
  world = [said(picture, QUESTIONS[0]) for picture in pictures]
  parquet(data / "RealWorldQA/data/test-00000-of-00001.parquet", [
      {"image": file(picture), "question": QUESTIONS[0],
       "answer": answer.rstrip(".") if n else "not that"}
      for n, (picture, answer) in enumerate(zip(pictures, world))])
  with serving(assistant) as served:
    results, samples = lmms_eval(served, tmp_path, "openai", "--tasks", "mme,pope_adv,realworldqa")
    assert statuses(served) == {"200": len(mme) + len(pope) + len(world)}
  assert answers(samples["mme"]) == [said(p, q + MME_ENDS) for _, p, q in mme]
  assert answers(samples["pope_adv"]) == [said(p, q + MME_ENDS, 128) for p, q in pope]
  assert answers(samples["realworldqa"]) == world
  assert results["realworldqa"]["exact_match,none"] == 3 / 4
  assert results["pope_adv"]["pope_yes_ratio,none"] == 1 / 2
  assert {"mme_perception_score,none", "mme_cognition_score,none"} <= results["mme"].keys()


def statuses(served):
  """How many requests for a completion ended with which status."""
  return {status: int(float(count)) for status, count in re.findall(
      r'^mgjax_requests_total{status="(\d+)"} (\S+)$', served.http.get("/metrics").text, re.M)}


def file(picture):
  return {"bytes": picture.read_bytes(), "path": picture.name}


def parquet(path, records):
  """As Hugging Face writes it: the schema says which column holds pictures."""
  path.parent.mkdir(parents=True)
  kinds = {name: {"_type": "Image"} if name == "image" else {"dtype": "string", "_type": "Value"}
           for name in records[0]}
  table = pyarrow.Table.from_pylist(records)
  pyarrow.parquet.write_table(table.replace_schema_metadata(
      {"huggingface": json.dumps({"info": {"features": kinds}})}), path)
