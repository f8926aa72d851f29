"""The original's own outputs, stage by stage; and that the comparison can fail."""
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conversion.check import STAGES, check_case, main

CASES = ("llama", "llama3", "llama_hd", "llama_noaux", "llama_towers", "yi", "gemma", "gemma_tanh",
         "mistral", "mistral_swa", "mixtral")


def check(folder, stages):
  findings = list(check_case(folder, stages))
  assert [f for f in findings if not f.holds] == []
  return {f.stage for f in findings}


# One of a kind every time: what tells the others apart is in their tables, not in the code.
OFTEN = ("llama_noaux", "mixtral")


@pytest.mark.parametrize("case", [
    pytest.param(c, marks=[pytest.mark.slow] * (c not in OFTEN)) for c in CASES])
def test_golden_case(golden, case):
  stages = set(STAGES) - {"trajectory"}
  untold = {"llama_noaux": {"aux", "mined"}, "llama_hd": {"mined"}}
  assert check(golden / case, stages) == stages - untold.get(case, set())


@pytest.mark.parametrize("case", [
    pytest.param(c, marks=[pytest.mark.slow] * (c != "llama_noaux"))
    for c in CASES])
def test_training_runs(golden, case):
  assert check(golden / case, ["trajectory"]) == {"trajectory"}


def test_committed_case(committed_case, capsys):
  assert main(["--case", str(committed_case)]) == 0
  said = capsys.readouterr().out
  assert "DIFFERS" not in said and all(stage in said for stage in STAGES)


@pytest.mark.parametrize("tensor, stages", [
    ("model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight", {"tower"}),
    ("model.vision_tower_aux.vision_stages.2.blocks.0.gamma", {"aux"}),
    ("model.vlm_uni_val_projector.0.weight", {"mined"}),
    ("model.mm_projector.2.bias", {"visual tokens"}),
    ("model.layers.0.self_attn.o_proj.weight", {"logits", "loss"})])
def test_a_changed_weight_is_seen(committed_case, tmp_path, tensor, stages, capsys):
  folder = tmp_path / "case"
  shutil.copytree(committed_case, folder)
  tensors = load_file(folder / "model.safetensors")
  tensors[tensor] = tensors[tensor] * np.float32(1.01)
  save_file(tensors, folder / "model.safetensors")
  bad = {f.stage for f in check_case(folder, ["tower", "aux", "mined", "visual tokens", "logits",
                                              "loss"]) if not f.holds}
  assert stages <= bad
  assert ("tower" in bad) == (stages == {"tower"}) and ("aux" in bad) == (stages == {"aux"})


def test_wrong_expectations_fail(committed_case, tmp_path, capsys):
  folder = tmp_path / "case"
  shutil.copytree(committed_case, folder)
  facts = json.loads((folder / "golden.json").read_text())
  facts["generation"]["image_b1"]["tokens"][0][-1] += 1
  facts["trajectories"]["stage2_const"]["losses"][2] += 0.01
  (folder / "golden.json").write_text(json.dumps(facts))
  bad = [f for f in check_case(folder, ["trajectory", "generation"]) if not f.holds]
  assert [f.what for f in bad] == ["stage2_const: losses", "image_b1: 15 of 16 ids"]


def test_what_is_no_case_is_said(tmp_path, capsys):
  assert main(["--case", str(tmp_path)]) == 2
  assert "no config.json" in capsys.readouterr().err
