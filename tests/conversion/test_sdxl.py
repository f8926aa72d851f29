"""diffusers SDXL -> mgjax -> diffusers, bit by bit; and what cannot be converted."""
import dataclasses
import json
import os
import shutil

import ml_dtypes  # noqa: F401  (names its types to numpy)
import numpy as np
import pytest
import sdxl_base
from folders import BF16, config_of, make_folder
from safetensors.numpy import load_file, save_file
from tiny_sdxl import write_folder, write_tokenizer

from conversion import check, from_hf, inspect, mapping, sdxl, to_hf
from conversion.sdxl import PARTS, VARIANTS, open_pipeline
from conversion.sdxl_config import read_configs, write_configs
from conversion.sdxl_mapping import sdxl_rows
from conversion.store import Reader, parameter_shapes
from conversion.tensors import Header
from mgjax.checkpoint import CheckpointError, load_model, read_run
from mgjax.diffusion.config import (
    ScheduleConfig,
    SdxlConfig,
    TextEncoderConfig,
    UNetConfig,
    VaeConfig,
)

TEXT = TextEncoderConfig(vocab_size=40, width=8, depth=3, heads=2, mlp_width=16, eos_id=39)
TINY = SdxlConfig(
    TEXT, dataclasses.replace(TEXT, width=12, activation="gelu", projection=6),
    UNetConfig(side=8, widths=(8, 16), resnets=1, depths=(0, 2), middle_depth=2, heads=(2, 4),
               context=20, pooled=6, number_width=4, groups=4),
    VaeConfig(widths=(8, 16), resnets=1, groups=4),
    ScheduleConfig("ddim", prediction="v_prediction", last_alpha_one=True), zero_negative=False)
NORM = "unet/conv_norm_out.weight"


def write_part(folder, part, tensors, *, variant="", shards=0):
  """Tensors of one part, of those by the table's names."""
  own = {n.removeprefix(f"{part}/"): t for n, t in tensors.items() if n.startswith(f"{part}/")}
  stem = PARTS[part][0]
  if not shards:
    save_file(own, folder / part / f"{stem}{variant}.safetensors")
    return
  names, weight_map = sorted(own), {}
  for i in range(shards):
    file = f"{stem}{variant}-{i + 1:05d}-of-{shards:05d}.safetensors"
    chosen = names[i::shards]
    save_file({n: own[n] for n in chosen}, folder / part / file)
    weight_map |= dict.fromkeys(chosen, file)
  (folder / part / f"{stem}.safetensors.index{variant}.json").write_text(
      json.dumps({"weight_map": weight_map}))


def make_sdxl(folder, *, dtype=np.float32, **kwargs):
  """A tiny random SDXL as diffusers lays it out; its tensors by the table's names."""
  shapes, rng = parameter_shapes(TINY), np.random.default_rng(0)
  tensors = {r.hf: rng.normal(size=r.form.there(shapes[r.path][len(r.at):])).astype(dtype)
             for r in sdxl_rows(TINY)}
  tensors["vae/quant_conv.bias"][:] = 0
  for path, values in write_configs(TINY).items():
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(json.dumps(values))
  for part in PARTS:
    write_part(folder, part, tensors, **kwargs)
  for name in ("tokenizer", "tokenizer_2"):
    write_tokenizer(folder / name, "!")
  return tensors


def convert(source, output, *args):
  return from_hf.main(["--sdxl", str(source), "--output", str(output), *args])


def export(source, output, *args):
  return to_hf.main(["--checkpoint", str(source), "--output", str(output), *args])


def same(checkpoint, reference):
  return check.main(["--checkpoint", str(checkpoint), "--reference", str(reference)]) == 0


def assert_same(folder, tensors, variants=VARIANTS):
  got = open_pipeline(folder, variants).tensors
  assert set(got.headers) == set(tensors)
  for name, want in tensors.items():
    have = got.read(name)
    assert (have.dtype, have.shape) == (want.dtype, want.shape), name
    assert have.tobytes() == want.tobytes(), name


def jsons(folder):
  """Text of every JSON file but indices of shards, by path."""
  return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*.json")
          if ".index." not in p.name}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  """A folder with a diffusers folder `hf` and `run`, which was made of it; and its tensors."""
  root = tmp_path_factory.mktemp("sdxl")
  tensors = make_sdxl(root / "hf", shards=2)
  text = root / "hf/text_encoder/config.json"  # the published one says this of float32 files
  text.write_text(json.dumps(json.loads(text.read_text()) | {"torch_dtype": "float16"}))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("conversion.store.CHUNK", 300)  # uneven pieces, as large arrays have
    assert convert(root / "hf", root / "run") == 0
  return root, tensors


def test_both_ways(converted, tmp_path, capsys):
  root, tensors = converted
  assert export(root / "run", tmp_path / "back", "--shard-size", "20KB") == 0
  assert_same(tmp_path / "back", tensors)
  assert jsons(tmp_path / "back") == jsons(root / "hf")
  assert (tmp_path / "back/tokenizer_2/merges.txt").read_text().startswith("#version")
  assert len(list((tmp_path / "back/unet").iterdir())) > 4
  assert same(tmp_path / "back", root / "run") and same(root / "run", root / "hf")
  capsys.readouterr()
  assert inspect.main([str(root / "hf")]) == inspect.main([str(root / "run")]) == 0
  said = capsys.readouterr().out
  assert said.count("missing         none") == said.count("unknown         none") == 2
  assert "mgjax run of SDXL" in said and "diffusers SDXL" in said and "16 pixels" in said


def test_what_is_kept(converted):
  root, tensors = converted
  step, run = read_run(root / "run", "sdxl")
  assert run["kind"] == "sdxl" and run["model"] == json.loads(json.dumps(dataclasses.asdict(TINY)))
  read = Reader(step).read
  there = lambda name: tensors[f"unet/{name}.weight"]
  np.testing.assert_array_equal(read("unet/conv_in/kernel", ()),
                                there("conv_in").transpose(2, 3, 1, 0))
  block = "mid_block.attentions.0.transformer_blocks.1.attn2.to_k"
  np.testing.assert_array_equal(read("unet/mid/attentions/0/blocks/attn2/k/kernel", (1,)),
                                there(block).T)
  np.testing.assert_array_equal(read("unet/up/0/resnets/0/shortcut/kernel", ()),
                                there("up_blocks.0.resnets.0.conv_shortcut")[:, :, 0, 0].T)
  np.testing.assert_array_equal(
      read("text_encoder_2/last/q/bias", ()),
      tensors["text_encoder_2/text_model.encoder.layers.2.self_attn.q_proj.bias"])


def test_another_type(converted, tmp_path):
  root, tensors = converted
  assert export(root / "run", tmp_path / "narrow", "--dtype", "bfloat16") == 0
  assert_same(tmp_path / "narrow", {n: t.astype(BF16) for n, t in tensors.items()})
  assert [p.name for p in (tmp_path / "narrow/unet").iterdir() if p.suffix != ".json"] == [
      "diffusion_pytorch_model.safetensors"]
  before, after = jsons(root / "hf"), jsons(tmp_path / "narrow")
  assert {k for k in before if before[k] != after[k]} == {"text_encoder/config.json"}
  assert json.loads(after["text_encoder/config.json"])["torch_dtype"] == "bfloat16"


def test_a_run_that_never_was_diffusers(converted, tmp_path):
  root, tensors = converted
  shutil.copytree(root / "run", tmp_path / "run", ignore=shutil.ignore_patterns("origin"))
  assert export(tmp_path / "run", tmp_path / "made") == 0
  assert_same(tmp_path / "made", tensors)
  assert read_configs(tmp_path / "made") == TINY
  other = dataclasses.replace(TINY, vae=dataclasses.replace(TINY.vae, norm_eps=1e-3))
  with pytest.raises(ValueError, match="diffusers cannot be told of this model"):
    sdxl.export(dataclasses.replace(sdxl.open_run(tmp_path / "run"), model=other),
                tmp_path / "other")
  assert not (tmp_path / "other").exists()


def test_mixed_types_buffers_and_old_names(tmp_path):
  """What diffusers wrote before 0.18, transformers before 4.31, and transformers 5."""
  tensors = make_sdxl(tmp_path / "hf", dtype=BF16)
  for part in PARTS:
    for file in (tmp_path / "hf" / part).glob("*.safetensors"):
      file.unlink()
  block = "unet/mid_block.attentions.0.transformer_blocks.0."
  tensors = {n: t.astype(np.float16 if n.startswith(block) else t.dtype)
             for n, t in tensors.items()}
  tensors["text_encoder_2/text_model.embeddings.position_ids"] = np.arange(77)[None]
  names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
  old = {}
  for name, value in tensors.items():
    if name.startswith("vae/") and ".attentions." in name:
      for new, before in names.items():
        name = name.replace(f".{new}.", f".{before}.")
    old[name.replace("text_encoder/text_model.", "text_encoder/")] = value
  assert len(set(old) - set(tensors)) > 16
  for part in PARTS:
    write_part(tmp_path / "hf", part, old, variant=".fp16", shards=3 * (part == "unet"))
  assert convert(tmp_path / "hf", tmp_path / "run") == 0
  assert export(tmp_path / "run", tmp_path / "back") == 0
  assert_same(tmp_path / "back", tensors)
  assert "encoder.mid_block.attentions.0.to_q.weight" in load_file(
      tmp_path / "back/vae/diffusion_pytorch_model.safetensors")
  assert same(tmp_path / "run", tmp_path / "hf") and same(tmp_path / "back", tmp_path / "hf")
  index = tmp_path / "hf/unet/diffusion_pytorch_model.safetensors.index.fp16.json"
  index.write_text(index.read_text().replace("conv_norm_out.bias", "conv_norm_out.bios"))
  with pytest.raises(ValueError, match="conv_norm_out.bios is not in it"):
    open_pipeline(tmp_path / "hf")
  old["text_encoder/text_model.final_layer_norm.bias"] = np.ones(8, np.float32)
  write_part(tmp_path / "hf", "text_encoder", old)
  with pytest.raises(ValueError, match="there twice"):
    open_pipeline(tmp_path / "hf")


def test_which_files(tmp_path, capsys):
  tensors = make_sdxl(tmp_path / "hf")
  half = {n: t.astype(np.float16) for n, t in tensors.items()}
  for part in PARTS:
    write_part(tmp_path / "hf", part, half, variant=".fp16")
  assert_same(tmp_path / "hf", tensors)
  assert_same(tmp_path / "hf", half, ["fp16"])
  (tmp_path / "hf/vae/diffusion_pytorch_model.fp16.safetensors").unlink()
  assert convert(tmp_path / "hf", tmp_path / "out", "--variant", "fp16") == 2
  assert "expected diffusion_pytorch_model.safetensors.index.fp16.json" in capsys.readouterr().err
  with pytest.raises(ValueError, match="no weights found"):
    open_pipeline(tmp_path / "hf", ["bf16"])


def test_a_difference_is_found(converted, tmp_path, capsys):
  root, tensors = converted
  shutil.copytree(root / "hf", tmp_path / "hf")
  changed = tensors[NORM].copy()
  changed[3] = np.nextafter(changed[3], np.float32(9))
  write_part(tmp_path / "hf", "unet", tensors | {NORM: changed}, shards=2)
  assert not same(root / "run", tmp_path / "hf")
  said = capsys.readouterr().out
  assert f"DIFFERS  {NORM}" in said and "1 differ" in said


# Against the published model's settings, and diffusers itself.


def write_published(folder):
  for path, text in sdxl_base.FILES.items():
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(text)


def test_the_published_settings_are_the_defaults(tmp_path):
  write_published(tmp_path)
  assert read_configs(tmp_path) == SdxlConfig()
  for path, values in write_configs(SdxlConfig()).items():
    said = json.loads(sdxl_base.FILES[path])
    assert {k: v for k, v in values.items() if k in said} == {
        k: v for k, v in said.items() if k in values}, path


def test_names_and_shapes_of_the_published_model(tmp_path):
  """On torch's meta device: diffusers' own classes at full size, without memory for them."""
  diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
  import transformers
  from transformers import CLIPTextConfig
  load = lambda part: json.loads(sdxl_base.FILES[f"{part}/config.json"])
  with torch.device("meta"):
    models = {
        "text_encoder": transformers.CLIPTextModel(CLIPTextConfig(**load("text_encoder"))),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(
            CLIPTextConfig(**load("text_encoder_2"))),
        "unet": diffusers.UNet2DConditionModel.from_config(load("unet")),
        "vae": diffusers.AutoencoderKL.from_config(load("vae"))}
  headers = {}
  for part, model in models.items():
    for name, value in model.state_dict().items():
      if part == "text_encoder":
        name = f"text_model.{name.removeprefix('text_model.')}"  # as published
      headers[f"{part}/{name}"] = Header(tuple(value.shape), np.dtype(np.float32), tmp_path)
  assert len(headers) == 1680 + 248 + 196 + 517
  mapping.check_fit(headers, sdxl_rows(SdxlConfig()), parameter_shapes(SdxlConfig()), "published")


def state_of(pipeline):
  return {f"{part}/{name}": value for part in PARTS
          for name, value in getattr(pipeline, part).state_dict().items()}


def test_diffusers_loads_what_comes_back(tmp_path):
  diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
  load = diffusers.StableDiffusionXLPipeline.from_pretrained
  pipeline = load(write_folder(tmp_path / "written"))
  pipeline.save_pretrained(tmp_path / "hf")  # with the names of today's versions
  assert same(tmp_path / "hf", tmp_path / "written")
  assert convert(tmp_path / "hf", tmp_path / "run") == 0
  assert export(tmp_path / "run", tmp_path / "back") == 0
  shutil.rmtree(tmp_path / "run/origin")
  assert export(tmp_path / "run", tmp_path / "made", "--shard-size", "100KB") == 0
  want = state_of(pipeline)
  for folder in (tmp_path / "back", tmp_path / "made"):
    got = state_of(load(folder))
    assert set(got) == set(want) and all(torch.equal(got[n], want[n]) for n in want)
    assert same(folder, tmp_path / "hf")
  before, after = jsons(tmp_path / "hf"), jsons(tmp_path / "back")
  assert {k: v for k, v in before.items() if "tokenizer" not in k} == {
      k: v for k, v in after.items() if "tokenizer" not in k}
  # Another scheduler, shards of half the width, and pickles.
  pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
  half = pipeline.to(torch.float16)
  half.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="200KB")
  assert len(list((tmp_path / "half/unet").iterdir())) > 5
  for part, stems in PARTS.items():
    shutil.copytree(tmp_path / "half" / part, tmp_path / "bin" / part,
                    ignore=shutil.ignore_patterns("*.safetensors", "*.index.*"))
    torch.save(getattr(half, part).state_dict(), tmp_path / "bin" / part / f"{stems[1]}.bin")
  shutil.copytree(tmp_path / "half", tmp_path / "bin", dirs_exist_ok=True,
                  ignore=shutil.ignore_patterns(*PARTS))
  assert same(tmp_path / "bin", tmp_path / "half")
  assert read_configs(tmp_path / "half").schedule.sampler == "ddim"


# What is refused.


@pytest.mark.parametrize("file, change, needles", [
    ("model_index", {"_class_name": "StableDiffusionPipeline"}, ["'StableDiffusionXLPipeline'"]),
    ("model_index", {"scheduler": ["diffusers", "LCMScheduler"]}, ["LCM", "DDIMScheduler"]),
    ("model_index", {"text_encoder": [None, None]}, ["text_encoder is [None, None]"]),
    ("model_index", {"vae": None}, ["vae is None", "AutoencoderKL"]),
    ("model_index", {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]},
     ["image_encoder"]),
    ("model_index", {"force_zeros_for_empty_prompt": "no"}, ["'no'", "true or false"]),
    ("unet", {"_class_name": "UNet3DConditionModel"}, ["'UNet3DConditionModel'"]),
    ("unet", {"act_fn": "gelu"}, ["act_fn is 'gelu'; only 'silu'"]),
    ("unet", {"use_linear_projection": None}, ["use_linear_projection is None; only True"]),
    ("unet", {"addition_embed_type": "text"}, ["addition_embed_type is 'text'"]),
    ("unet", {"flip_sin_to_cos": False}, ["flip_sin_to_cos"]),
    ("unet", {"freq_shift": 1}, ["freq_shift is 1; only 0"]),
    ("unet", {"only_cross_attention": [False, True]}, ["only_cross_attention"]),
    ("unet", {"dual_cross_attention": True}, ["dual_cross_attention"]),
    ("unet", {"class_embed_type": "timestep"}, ["class_embed_type"]),
    ("unet", {"resnet_time_scale_shift": "scale_shift"}, ["resnet_time_scale_shift"]),
    ("unet", {"mid_block_type": "UNetMidBlock2D"}, ["mid_block_type"]),
    ("unet", {"time_cond_proj_dim": 256}, ["time_cond_proj_dim is 256"]),
    ("unet", {"num_attention_heads": 8}, ["num_attention_heads is 8"]),
    ("unet", {"in_channels": 9}, ["out_channels is 4", "9"]),
    ("unet", {"invented_gate": True}, ["invented_gate is True", "not known"]),
    ("unet", {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, ["'AttnDownBlock2D'"]),
    ("unet", {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}, ["up_block_types", "mirror"]),
    ("unet", {"transformer_layers_per_block": [1, 2, 3]}, ["transformer_layers_per_block", "or 2"]),
    ("unet", {"layers_per_block": [1, 2]}, ["layers_per_block", "the same for all"]),
    ("unet", {"attention_head_dim": [2, 3]}, ["3 heads"]),
    ("unet", {"block_out_channels": "8,16"}, ["block_out_channels is '8,16'; expected whole"]),
    ("unet", {"sample_size": [8, 8]}, ["sample_size is [8, 8]; expected a whole number"]),
    ("unet", {"norm_eps": True}, ["norm_eps is True; expected a number"]),
    ("unet", {"cross_attention_dim": 16}, ["unet.context is 16", "20"]),
    ("unet", {"projection_class_embeddings_input_dim": 24}, ["24"]),
    ("unet", {"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ("vae", {"latents_mean": [0.1] * 4}, ["latents_mean"]),
    ("vae", {"shift_factor": 0.1}, ["shift_factor is 0.1"]),
    ("vae", {"mid_block_add_attention": False}, ["mid_block_add_attention is False; only True"]),
    ("vae", {"use_quant_conv": False}, ["use_quant_conv"]),
    ("vae", {"latent_channels": 16}, ["vae.channels is 16"]),
    ("vae", {"down_block_types": ["DownEncoderBlock2D"]}, ["down_block_types", "expected 2"]),
    ("text_encoder", {"model_type": "t5"}, ["model_type is 't5'"]),
    ("text_encoder", {"hidden_act": "relu"}, ["hidden_act is 'relu'", "quick_gelu"]),
    ("text_encoder", {"num_attention_heads": 3}, ["3 heads"]),
    ("text_encoder_2", {"projection_dim": None}, ["projection_dim is None"]),
    ("text_encoder_2", {"eos_token_id": [1, 2]}, ["eos_token_id is [1, 2]"]),
    ("scheduler", {"clip_sample": None, "prediction_type": "sample"}, ["'sample'"]),
    ("scheduler", {"clip_sample": True}, ["clip_sample is True"]),
    ("scheduler", {"thresholding": True}, ["thresholding"]),
    ("scheduler", {"rescale_betas_zero_snr": True}, ["rescale_betas_zero_snr"]),
    ("scheduler", {"trained_betas": [0.1]}, ["trained_betas"]),
    ("scheduler", {"beta_schedule": "squaredcos_cap_v2"}, ["squaredcos_cap_v2"]),
    ("scheduler", {"beta_start": "0.1"}, ["beta_start is '0.1'; expected a number"])])
def test_refused_settings(tmp_path, file, change, needles):
  paths = {"model_index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
  refuse_settings(tmp_path, paths.get(file, f"{file}/config.json"), change, needles)


@pytest.mark.parametrize("change, needles", [
    ({"use_karras_sigmas": True}, ["use_karras_sigmas is True; only False"]),
    ({"use_beta_sigmas": True}, ["use_beta_sigmas"]),
    ({"interpolation_type": "log_linear"}, ["'log_linear'"]),
    ({"final_sigmas_type": "sigma_min"}, ["'sigma_min'"]),
    ({"timestep_type": "continuous"}, ["'continuous'"]),
    ({"timestep_spacing": "karras"}, ["'karras'"])])
def test_refused_settings_of_euler(tmp_path, change, needles):
  refuse_settings(tmp_path, "scheduler/scheduler_config.json", change, needles, sampler="euler")


def refuse_settings(folder, path, change, needles, sampler="ddim"):
  schedule = dataclasses.replace(TINY.schedule, sampler=sampler, last_alpha_one=sampler == "ddim")
  files = write_configs(dataclasses.replace(TINY, schedule=schedule))
  for name, values in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values))
  assert read_configs(folder).schedule == schedule
  (folder / path).write_text(json.dumps(files[path] | change))
  with pytest.raises(ValueError) as caught:
    read_configs(folder)
  for needle in (str(folder), *needles):
    assert needle in str(caught.value)
  # All but what is wrong between two files names the file.
  assert path in str(caught.value) or "different models" in str(caught.value)


def test_what_missing_fields_mean(tmp_path):
  write_published(tmp_path)
  for path in ("scheduler/scheduler_config.json", "text_encoder/config.json"):
    (tmp_path / path).write_text("{}")
  index = json.loads((tmp_path / "model_index.json").read_text())
  index.pop("force_zeros_for_empty_prompt")
  (tmp_path / "model_index.json").write_text(json.dumps(index))
  unet = json.loads((tmp_path / "unet/config.json").read_text()) | {
      "cross_attention_dim": 512 + 1280, "attention_head_dim": 5}
  (tmp_path / "unet/config.json").write_text(json.dumps(unet))
  got = read_configs(tmp_path)
  assert got.zero_negative and got.unet.heads == (5, 5, 5)
  assert got.schedule == ScheduleConfig("euler", 1000, 0.0001, 0.02, "linear", "epsilon",
                                        "linspace", 0)
  assert got.text_encoder == TextEncoderConfig(width=512, heads=8, mlp_width=2048, eos_id=49407)
  index["scheduler"] = ["diffusers", "DDIMScheduler"]
  (tmp_path / "model_index.json").write_text(json.dumps(index))
  with pytest.raises(ValueError, match="clip_sample is True; only False"):  # as DDIM means it
    read_configs(tmp_path)


def refuse(capsys, folder, *needles):
  """The conversion fails with one line that holds all needles, and leaves nothing."""
  assert convert(folder, folder.parent / "out") == 2
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
  assert len(lines) == 1
  for needle in needles:
    assert needle in lines[0], (needle, lines[0])
  assert not list(folder.parent.glob("out*"))


def test_bad_folders(tmp_path, capsys):
  folder = tmp_path / "hf"
  refuse(capsys, folder, "no such folder")
  tensors = make_sdxl(folder)
  weights = folder / "unet/diffusion_pytorch_model.safetensors"
  for change, needles in (
      (lambda t: t.pop(NORM), [f"missing: {NORM}"]),
      (lambda t: t.update({"unet/lora.weight": np.ones(3)}),
       ["unknown: unet/lora.weight", str(weights)]),
      (lambda t: t.update({NORM: np.ones(9, np.float32)}),
       [str(weights), NORM, "(9,)", "expected (8,)"]),
      (lambda t: t.update({NORM: np.ones(8, np.int8)}), [NORM, "int8", "expected float32"])):
    changed = dict(tensors)
    change(changed)
    write_part(folder, "unet", changed)
    refuse(capsys, folder, *needles)
  write_part(folder, "unet", tensors)
  os.truncate(weights, weights.stat().st_size - 5)
  refuse(capsys, folder, str(weights), "cut off", "download it again")
  weights.unlink()
  refuse(capsys, folder, str(folder / "unet"), "no weights found",
         "diffusion_pytorch_model.safetensors")
  write_part(folder, "unet", tensors)
  (folder / "tokenizer_2/merges.txt").unlink()
  refuse(capsys, folder, str(folder / "tokenizer_2"), "expected vocab.json and merges.txt")
  shutil.rmtree(folder / "vae")
  refuse(capsys, folder, str(folder / "vae"), "no such folder")
  (folder / "scheduler/scheduler_config.json").write_text("{")
  (folder / "vae").mkdir()
  refuse(capsys, folder, "scheduler_config.json: cannot be read")


def test_the_wrong_kind(converted, tmp_path, capsys):
  root, _ = converted
  with pytest.raises(CheckpointError, match="it holds SDXL, which draws pictures; expected a Mini"):
    load_model(root / "run", None)
  assert to_hf.main(["--checkpoint", str(root / "run"), "--output", str(tmp_path / "a"),
                     "--adapter-only"]) == 2
  assert "it holds SDXL" in capsys.readouterr().err
  assert from_hf.main(["--checkpoint", str(root / "hf"), "--output", str(tmp_path / "b")]) == 2
  assert "diffusers pipeline; convert it with --sdxl" in capsys.readouterr().err
  make_folder(tmp_path / "llm", config_of("llama", text=True))
  refuse(capsys, tmp_path / "llm", "no model_index.json")
  (tmp_path / "text/checkpoints/0/state").mkdir(parents=True)
  (tmp_path / "text/config.json").write_text('{"objective": "language"}')
  with pytest.raises(CheckpointError, match="it holds a Mini-Gemini.*expected SDXL"):
    read_run(tmp_path / "text", "sdxl")
  for args in (["--sdxl", "x", "--llm", "y"], ["--sdxl", "x", "--template", "gemma"],
               ["--llm", "x", "--variant", "fp16"]):
    with pytest.raises(SystemExit):
      from_hf.main([*args, "--output", "z"])
