"""Adapters of a run as a folder of peft and back, and merged into a HuggingFace folder."""
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import BF16, config_of, make_folder, write_tensors
from safetensors.numpy import load_file, save_file

from conversion import from_hf, lora, to_hf
from conversion.tensors import open_tensors
from mgjax.adapter_base import read_base
from mgjax.checkpoint import load_model, read_run
from mgjax.sharding import make_mesh, mesh_context

MODULES = {"self_attn.q_proj": (16, 16), "self_attn.v_proj": (16, 8), "mlp.down_proj": (24, 16)}
RANK, ALPHA = 3, 12


def convert(*args):
  return from_hf.main([str(a) for a in args])


def export(*args):
  return to_hf.main([str(a) for a in args])


def write_peft(folder, more=None):
  """A folder as peft writes it, for two layers; returns its tensors."""
  rng, tensors = np.random.default_rng(3), {}
  for i in range(2):
    for name, (d_in, d_out) in MODULES.items():
      key = f"base_model.model.model.layers.{i}.{name}"
      tensors[f"{key}.lora_A.weight"] = rng.normal(size=(RANK, d_in)).astype(np.float32)
      tensors[f"{key}.lora_B.weight"] = rng.normal(size=(d_out, RANK)).astype(np.float32)
  folder.mkdir()
  save_file(tensors, folder / "adapter_model.safetensors")
  (folder / "adapter_config.json").write_text(json.dumps({
      "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA,
      "lora_dropout": 0.1, "bias": "none", "use_dora": False, "rank_pattern": {},
      "target_modules": ["q_proj", "v_proj", "down_proj"]} | (more or {})))
  return tensors


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
  """A folder with hf (a Llama, bfloat16), its checkpoint base, peft, and run, of both."""
  root = tmp_path_factory.mktemp("adapted")
  make_folder(root / "hf", config_of("llama", text=True, torch_dtype="bfloat16"), BF16)
  write_peft(root / "peft")
  assert convert("--checkpoint", root / "hf", "--output", root / "base") == 0
  assert convert("--peft", root / "peft", "--base", root / "base", "--output", root / "run") == 0
  return root


def test_there_and_back(adapted, tmp_path):
  assert export("--checkpoint", adapted / "run", "--output", tmp_path / "peft", "--peft") == 0
  want, got = (load_file(f / "adapter_model.safetensors") for f in (adapted / "peft",
                                                                    tmp_path / "peft"))
  assert got.keys() == want.keys()
  for key in want:
    np.testing.assert_array_equal(got[key], want[key], err_msg=key)
  told = json.loads((tmp_path / "peft/adapter_config.json").read_text())
  assert (told["r"], told["lora_alpha"], told["peft_type"]) == (RANK, ALPHA, "LORA")
  assert told["target_modules"] == (
      r"model\.layers\.\d+\.mlp\.down_proj|model\.layers\.\d+\.self_attn\.q_proj|"
      r"model\.layers\.\d+\.self_attn\.v_proj")
  assert set(read_base(adapted / "run").parameters) >= {"decoder/embedding",
                                                        "decoder/blocks/q/kernel"}
  assert read_run(adapted / "run")[1]["lora"] == {
      "pattern": "^(decoder/blocks/down|decoder/blocks/q|decoder/blocks/v)$", "rank": RANK,
      "alpha": ALPHA, "dropout": 0.1, "base": ""}


def test_merged(adapted, tmp_path):
  assert export("--checkpoint", adapted / "run", "--output", tmp_path / "merged") == 0
  before, after = open_tensors(adapted / "hf"), open_tensors(tmp_path / "merged")
  adapters = load_file(adapted / "peft/adapter_model.safetensors")
  assert after.headers.keys() == before.headers.keys()
  changed = 0
  for name in before.headers:
    want = before.read(name)
    layer = f"base_model.model.{name.removesuffix('.weight')}"
    if f"{layer}.lora_A.weight" in adapters:
      pair = (adapters[f"{layer}.lora_{x}.weight"] for x in "BA")
      want, changed = want.astype(np.float32) + ALPHA / RANK * np.matmul(*pair), changed + 1
    np.testing.assert_allclose(after.read(name).astype(np.float32), want.astype(np.float32),
                               atol=1e-5, err_msg=name)
    assert after.headers[name].dtype == want.dtype
  assert changed == 6
  assert export("--checkpoint", adapted / "run", "--output", tmp_path / "narrow",
                "--dtype", "bfloat16") == 0
  assert {h.dtype for h in open_tensors(tmp_path / "narrow").headers.values()} == {BF16}
  # The folder converted again is the run as it is loaded.
  assert convert("--checkpoint", tmp_path / "merged", "--output", tmp_path / "again") == 0
  one, other = (logits_of(tmp_path / "again"), logits_of(adapted / "run"))
  np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)
  assert np.abs(one - logits_of(adapted / "base")).max() > 0.1


def logits_of(run, ids=range(3, 15)):
  mesh = make_mesh(devices=jax.devices()[:1])
  with mesh_context(mesh), jax.default_matmul_precision("highest"):
    model, ids = load_model(run, mesh, dtype=jnp.float32).model, np.array([ids])
    return np.asarray(jax.jit(lambda m, ids: m.decoder.logits(m.decoder(
        m.decoder.embed(ids), jnp.arange(ids.shape[1])[None], jnp.ones_like(ids))[0]))(
            model, ids))[0]


def test_what_else_was_trained_goes_along(tmp_path):
  config = config_of("llama")
  tensors = make_folder(tmp_path / "hf", config)
  write_peft(tmp_path / "peft")
  whole = {f"base_model.model.{n}": t + 1 for n, t in tensors.items()
           if "mm_projector" in n or "vlm_uni" in n}
  save_file(whole, tmp_path / "peft/non_lora_trainables.safetensors")
  assert convert("--checkpoint", tmp_path / "hf", "--output", tmp_path / "base") == 0
  assert convert("--peft", tmp_path / "peft", "--base", tmp_path / "base",
                 "--output", tmp_path / "run") == 0
  assert export("--checkpoint", tmp_path / "run", "--output", tmp_path / "back", "--peft") == 0
  for file in ("adapter_model.safetensors", "non_lora_trainables.safetensors"):
    a, b = (load_file(tmp_path / f / file) for f in ("peft", "back"))
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
  assert export("--checkpoint", tmp_path / "run", "--output", tmp_path / "mgm") == 0
  after = open_tensors(tmp_path / "mgm")
  for name, value in whole.items():
    np.testing.assert_array_equal(after.read(name.removeprefix("base_model.model.")), value)


@pytest.mark.parametrize("change, message", [
    ({"use_dora": True}, "'use_dora': True} is not supported"),
    ({"bias": "all"}, "'bias': 'all'} is not supported"),
    ({"r": "many"}, "r and lora_alpha cannot be read"),
    ({"r": RANK + 1}, r"has shape \(3, 24\), .* needs \(4, 24\)"),
])
def test_a_folder_that_does_not_fit(adapted, tmp_path, change, message, capsys):
  write_peft(tmp_path / "peft", change)
  assert convert("--peft", tmp_path / "peft", "--base", adapted / "base",
                 "--output", tmp_path / "run") == 2
  said = capsys.readouterr().err
  assert re.search(message, said), said
  assert not (tmp_path / "run").exists()


def test_each_folder_is_opened_once(adapted, monkeypatch):
  opened, reader = [], lora.Reader
  monkeypatch.setattr(lora, "Reader", lambda folder: opened.append(folder) or reader(folder))
  lora.open_reader(adapted / "run/checkpoints/0")
  assert sorted(f.parent.parent.name for f in opened) == ["base", "run"]


def test_adapters_are_exported_without_their_base(adapted, tmp_path):
  shutil.copytree(adapted / "run", tmp_path / "run")
  told = (tmp_path / "run/base.json").read_text().replace(str(adapted), "/nowhere")
  (tmp_path / "run/base.json").write_text(told)
  assert export("--checkpoint", tmp_path / "run", "--output", tmp_path / "peft", "--peft") == 0


def test_what_cannot_be_exported(adapted, tmp_path, capsys):
  assert export("--checkpoint", adapted / "base", "--output", tmp_path / "no", "--peft") == 2
  assert "has no adapters" in capsys.readouterr().err
  assert convert("--peft", adapted / "peft", "--base", adapted / "run",
                 "--output", tmp_path / "no") == 2
  assert "has adapters itself" in capsys.readouterr().err


def test_another_base_is_refused(adapted, tmp_path, capsys):
  tensors = {n: t + (t.ndim == 1) for n, t in
             load_file(adapted / "hf/model.safetensors").items()}
  write_tensors(tmp_path / "hf", {n: t.astype(BF16) for n, t in tensors.items()})
  (tmp_path / "hf/config.json").write_bytes((adapted / "hf/config.json").read_bytes())
  assert convert("--checkpoint", tmp_path / "hf", "--output", tmp_path / "base") == 0
  shutil.copytree(adapted / "run", tmp_path / "run")
  assert export("--checkpoint", tmp_path / "run", "--output", tmp_path / "merged") == 2
  assert "they belong to another base model" in capsys.readouterr().err


def test_peft_says_the_same(adapted, tmp_path):
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  assert export("--checkpoint", adapted / "run", "--output", tmp_path / "peft", "--peft") == 0
  base = transformers.AutoModelForCausalLM.from_pretrained(adapted / "hf", dtype=torch.float32)
  model = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
  with torch.no_grad():
    want = model(torch.arange(3, 15)[None]).logits[0].numpy()
  np.testing.assert_allclose(logits_of(adapted / "run"), want, atol=1e-4, rtol=0)
