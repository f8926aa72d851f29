"""HuggingFace -> mgjax -> HuggingFace -> mgjax, bit by bit."""
import json

import jax
import ml_dtypes  # noqa: F401  (names its types to numpy)
import numpy as np
import pytest
from folders import BF16, config_of, make_folder, make_towers, write_tensors
from safetensors.numpy import load_file

from conversion import check, from_hf, inspect, to_hf
from conversion.case import spread
from conversion.sources import adapter_tensors
from conversion.tensors import open_tensors
from mgjax.checkpoint import load_model, read_run
from mgjax.sharding import make_mesh, mesh_context


def convert(*args) -> int:
  return from_hf.main([str(a) for a in args])


def export(*args) -> int:
  return to_hf.main([str(a) for a in args])


def assert_same(folder, tensors):
  got = open_tensors(folder)
  assert set(got.headers) == set(tensors)
  for name, want in tensors.items():
    have = got.read(name)
    assert (have.dtype, have.shape) == (want.dtype, want.shape), name
    assert have.tobytes() == want.tobytes(), name


FOLDERS = {
    "llama": (config_of("llama"), np.float32, 3),
    "old_names": (config_of("old"), BF16, 2),
    "gemma": (config_of("gemma", torch_dtype="bfloat16"), BF16, 0),
    "mistral": (config_of("mistral", torch_dtype="float16"), np.float16, 2),
    "mixtral": (config_of("mixtral", torch_dtype="bfloat16"), BF16, 3),
    "hd": (config_of("llama", image_size_aux=128, image_grid=2, image_global=True,
                     image_aspect_ratio=None), np.float16, 0),
    "single_tower": (config_of("llama", mm_vision_tower_aux=None, mm_projector_type="linear"),
                     np.float32, 2),
    "text": (config_of("llama", text=True, tie_word_embeddings=True), BF16, 2),
    "text_gemma": (config_of("gemma", text=True), np.float32, 0),
    "text_mixtral": (config_of("mixtral", text=True), np.float16, 0),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_both_ways(tmp_path, name, capsys, monkeypatch):
  monkeypatch.setattr("conversion.store.CHUNK", 300)  # uneven pieces, as large arrays have
  config, dtype, shards = FOLDERS[name]
  tensors = make_folder(tmp_path / "hf", config, dtype, shards)
  assert convert("--checkpoint", tmp_path / "hf", "--output", tmp_path / "run") == 0
  assert export("--checkpoint", tmp_path / "run", "--output", tmp_path / "back",
                "--shard-size", "5KB") == 0
  assert_same(tmp_path / "back", tensors)
  assert json.loads((tmp_path / "back/config.json").read_text()) == config
  assert json.loads((tmp_path / "back/generation_config.json").read_text()) == {
      "eos_token_id": [2, 5]}
  assert convert("--checkpoint", tmp_path / "back", "--output", tmp_path / "again") == 0
  pair = ["--checkpoint", str(tmp_path / "again"), "--reference"]
  assert check.main([*pair, str(tmp_path / "run")]) == 0
  assert check.main([*pair, str(tmp_path / "hf")]) == 0
  assert inspect.main([str(tmp_path / "hf")]) == inspect.main([str(tmp_path / "run")]) == 0
  said = capsys.readouterr().out
  assert "missing         none" in said and "unknown         none" in said
  # The original's loader wants all of CLIP in the files that hold mining and ConvNeXt.
  index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())["weight_map"]
  assert len({f for n, f in index.items() if "vlm_uni" in n or "vision_tower" in n}) <= 1
  assert len(set(index.values())) >= 2


def test_mixed_dtypes_buffers_and_a_copied_head(tmp_path):
  config = config_of("llama", tie_word_embeddings=True)
  tensors = make_folder(tmp_path / "first", config)
  for name in tensors:
    if "layers.0." in name:
      tensors[name] = tensors[name].astype(BF16)
    if "layers.1." in name:
      tensors[name] = tensors[name].astype(np.float16)
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
  write_tensors(tmp_path / "hf", tensors)
  (tmp_path / "hf/config.json").write_text(json.dumps(config))
  assert convert("--checkpoint", tmp_path / "hf", "--output", tmp_path / "run") == 0
  assert export("--checkpoint", tmp_path / "run", "--output", tmp_path / "back") == 0
  assert_same(tmp_path / "back", tensors)
  assert export("--checkpoint", tmp_path / "run", "--output", tmp_path / "narrow",
                "--dtype", "bfloat16") == 0
  assert_same(tmp_path / "narrow", {n: t.astype(BF16) for n, t in tensors.items()
                                    if "inv_freq" not in n} | {
      n: t for n, t in tensors.items() if "inv_freq" in n})
  assert json.loads((tmp_path / "narrow/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_towers_from_folders(tmp_path):
  config = config_of("llama")
  tensors = make_folder(tmp_path / "whole", config)
  make_folder(tmp_path / "bare", config, drop="model.vision_tower")
  make_towers(tmp_path / "zoo", config, tensors)
  assert convert("--checkpoint", tmp_path / "bare", "--towers", tmp_path / "zoo",
                 "--output", tmp_path / "run") == 0
  assert convert("--checkpoint", tmp_path / "whole", "--output", tmp_path / "same") == 0
  assert check.main(["--checkpoint", str(tmp_path / "run"), "--reference",
                     str(tmp_path / "same")]) == 0


def test_start_of_stage_1_and_what_stage_1_leaves(tmp_path, capsys):
  pytest.importorskip("torch")
  config = config_of("llama")
  tensors = make_folder(tmp_path / "whole", config)
  clip, openclip = make_towers(tmp_path / "zoo", config, tensors)
  text = {n: t for n, t in tensors.items()
          if not n.startswith(("model.vision", "model.vlm_uni", "model.mm_projector"))}
  write_tensors(tmp_path / "llm", text)
  (tmp_path / "llm/config.json").write_text(json.dumps(config_of("llama", text=True)))
  start = ["--llm", tmp_path / "llm", "--clip", clip, "--openclip", openclip]
  assert convert(*start, "--output", tmp_path / "start") == 0
  assert "train stage 1" in capsys.readouterr().out
  assert export("--checkpoint", tmp_path / "start", "--output", tmp_path / "no") == 2
  assert "no projector yet" in capsys.readouterr().err and not (tmp_path / "no").exists()

  assert convert("--checkpoint", tmp_path / "whole", "--output", tmp_path / "run") == 0
  assert export("--checkpoint", tmp_path / "run", "--output", tmp_path / "adapter",
                "--adapter-only") == 0
  import torch
  held = torch.load(tmp_path / "adapter/mm_projector.bin", weights_only=True)
  assert set(held) == set(tensors) - set(text)
  assert all((held[n].numpy() == tensors[n]).all() for n in held)
  for towers in (["--clip", clip, "--openclip", openclip], []):  # the adapter brings its own
    output = tmp_path / f"stage2-{len(towers)}"
    assert convert("--llm", tmp_path / "llm", *towers, "--adapter", tmp_path / "adapter",
                   "--output", output) == 0
    assert check.main(["--checkpoint", str(output), "--reference", str(tmp_path / "run")]) == 0
  assert read_run(tmp_path / "stage2-0")[1]["model"]["hr_size"] == 64


def test_bin_shards(tmp_path):
  torch = pytest.importorskip("torch")
  config = config_of("gemma", torch_dtype="bfloat16")
  tensors = make_folder(tmp_path / "whole", config, BF16)
  folder, names = tmp_path / "hf", sorted(tensors)
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(config))
  as_torch = lambda t: torch.from_numpy(t.view(np.int16)).view(torch.bfloat16)
  files = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin":
           names[1::2]}
  for file, own in files.items():
    torch.save({n: as_torch(tensors[n]) for n in own}, folder / file)
  (folder / "pytorch_model.bin.index.json").write_text(json.dumps(
      {"weight_map": {n: f for f, own in files.items() for n in own}}))
  assert convert("--checkpoint", folder, "--output", tmp_path / "run") == 0
  assert export("--checkpoint", tmp_path / "run", "--output", tmp_path / "back") == 0
  assert_same(tmp_path / "back", tensors)


def test_the_originals_own_folders(golden, tmp_path):
  source = golden / "checkpoints/llama_sharded"
  assert convert("--checkpoint", source, "--output", tmp_path / "run") == 0
  assert export("--checkpoint", tmp_path / "run", "--output", tmp_path / "back") == 0
  assert check.main(["--checkpoint", str(tmp_path / "back"), "--reference", str(source)]) == 0
  for name in ("config.json", "generation_config.json"):
    assert json.loads((tmp_path / "back" / name).read_text()) == json.loads(
        (source / name).read_text())
  given = load_file(source / "expected.safetensors")
  mesh = make_mesh(devices=jax.devices()[:1])
  with mesh_context(mesh), jax.default_matmul_precision("highest"):
    model = load_model(tmp_path / "run", mesh, dtype=np.float32).model
    lr, hr = (np.moveaxis(given[k].astype(np.float32), 1, -1) for k in ("images", "images_aux"))
    tokens, index, _ = spread(given["input_ids"][0], model.config.visual_tokens)

    @jax.jit
    def logits(model, tiles, hr):
      x = model.place(tokens[None], index[None], model.encode_views(tiles, hr))
      x, _ = model.decoder(x, np.arange(len(tokens))[None], np.ones((1, len(tokens)), int))
      return model.decoder.logits(x)

    np.testing.assert_allclose(logits(model, lr[:, None], hr), given["logits"], rtol=0, atol=1e-4)


def test_the_originals_adapter(golden, tmp_path):
  pytest.importorskip("torch")
  folder = golden / "checkpoints/stage1_adapter"
  held, _ = adapter_tensors(folder)
  want = load_file(folder / "mm_projector.contents.safetensors")
  assert set(held.headers) == set(want)
  assert all((held.read(n) == want[n]).all() for n in want)


def test_differences_are_found(tmp_path, capsys):
  config = config_of("llama")
  tensors = make_folder(tmp_path / "a", config)
  tensors["model.norm.weight"] = tensors["model.norm.weight"] + np.float32(1e-6)
  write_tensors(tmp_path / "b", tensors | {"model.extra": np.ones(1, np.float32)})
  assert check.main(["--checkpoint", str(tmp_path / "a"), "--reference", str(tmp_path / "b")]) == 1
  said = capsys.readouterr().out
  assert "model.norm.weight" in said and "model.extra: only in" in said and "2 differ" in said
