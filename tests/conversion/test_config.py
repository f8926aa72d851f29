"""config.json of every kind of release, and of base models, to and from the model's shapes."""
import dataclasses

import numpy as np
import pytest
from folders import config_of, model_of

from conversion.config import read_decoder, read_model, write_config
from conversion.families import family_of, guess_template
from conversion.mapping import all_rows
from conversion.tensors import Header
from mgjax.config import DecoderConfig, RopeScaling
from mgjax.models.attention import rope_frequencies
from mgjax.presets import PRESETS

# Public numbers of the base models, as their config.json writes them (R1.11).
BASE = {
    "mgm-2b": dict(model_type="gemma", hidden_size=2048, num_hidden_layers=18, head_dim=256,
                   num_attention_heads=8, num_key_value_heads=1, intermediate_size=16384,
                   vocab_size=256000, rms_norm_eps=1e-6, hidden_act="gelu",
                   transformers_version="4.38.0"),
    "mgm-7b": dict(model_type="llama", hidden_size=4096, num_hidden_layers=32,
                   num_attention_heads=32, num_key_value_heads=32, intermediate_size=11008,
                   vocab_size=32000, rms_norm_eps=1e-5, tie_word_embeddings=False),
    "mgm-13b": dict(model_type="llama", hidden_size=5120, num_hidden_layers=40,
                    num_attention_heads=40, num_key_value_heads=40, intermediate_size=13824,
                    vocab_size=32000, rms_norm_eps=1e-5, tie_word_embeddings=False),
    "mgm-8b": dict(model_type="llama", hidden_size=4096, num_hidden_layers=32,
                   num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
                   vocab_size=128256, rms_norm_eps=1e-5, rope_theta=500000.0),
    "mgm-8x7b": dict(model_type="mixtral", hidden_size=4096, num_hidden_layers=32,
                     num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
                     vocab_size=32000, rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8,
                     num_experts_per_tok=2, sliding_window=None),
    "mgm-34b": dict(model_type="llama", hidden_size=7168, num_hidden_layers=60,
                    num_attention_heads=56, num_key_value_heads=8, intermediate_size=20480,
                    vocab_size=64000, rms_norm_eps=1e-5, rope_theta=5000000.0)}


@pytest.mark.parametrize("preset", BASE)
def test_presets_are_the_base_models(preset):
  decoder = read_decoder(BASE[preset], "config.json")
  assert decoder == PRESETS[preset].model.decoder == PRESETS[preset + "-hd"].model.decoder


@pytest.mark.parametrize("preset", [p + hd for p in BASE for hd in ("", "-hd")])
def test_presets_to_config_and_back(preset):
  model = PRESETS[preset].model
  base = BASE[preset.removesuffix("-hd")]
  written = write_config(model, base, aspect="pad", max_length=PRESETS[preset].max_length,
                         dtype="bfloat16")
  assert written["model_type"].startswith("mgm") and written["image_aspect_ratio"] == "pad"
  assert (written["image_size_aux"], written["image_grid"], written["image_global"]) == (
      (1536, 2, True) if preset.endswith("-hd") else (768, 1, False))
  assert written["tokenizer_model_max_length"] == (4096 if preset.endswith("-hd") else 2048)
  hr = dataclasses.replace(model.vision_hr, drop_path=0.0)  # no config.json knows of it
  assert read_model(written, headers(model), "x") == dataclasses.replace(model, vision_hr=hr)


def headers(model):
  """As much of the towers' tensors as tells their shapes."""
  v, prefix = model.vision, "model.vision_tower.vision_tower.vision_model."
  shapes = {"embeddings.patch_embedding.weight": (v.width, 3, v.patch_size, v.patch_size),
            "embeddings.position_embedding.weight": (v.side**2 + 1, v.width)}
  shapes |= {f"encoder.layers.{i}.mlp.fc1.weight": (v.mlp_width, v.width) for i in range(v.depth)}
  out = {prefix + n: s for n, s in shapes.items()}
  for s, (depth, width) in enumerate(zip(model.vision_hr.depths, model.vision_hr.widths)):
    for b in range(depth):
      out[f"model.vision_tower_aux.vision_stages.{s}.blocks.{b}.gamma"] = (width,)
  return {n: Header(s, np.dtype(np.float32), None) for n, s in out.items()}


def test_tower_sizes_of_the_release():
  rows = {r.hf.split(".")[1] for r in all_rows(PRESETS["mgm-7b"].model)}
  assert {"vision_tower", "vision_tower_aux", "mm_projector"} <= rows
  counts = {p: sum(r.hf.startswith(f"model.{p}.") for r in all_rows(PRESETS["mgm-7b"].model))
            for p in ("vision_tower", "vision_tower_aux")}
  assert counts == {"vision_tower": 391, "vision_tower_aux": 340}  # R2.2


@pytest.mark.parametrize("name", ["llama", "old", "gemma", "mistral", "mixtral"])
@pytest.mark.parametrize("text", [False, True])
def test_families_and_models_without_a_config(name, text):
  config = config_of(name, text=text)
  model = model_of(config)
  assert read_decoder(config, "x") == model.decoder
  written = write_config(model, None, aspect="pad", max_length=128, dtype="float32")
  assert read_decoder(written, "x") == model.decoder
  assert family_of(written, "x") == family_of(config, "x")
  assert write_config(model, config, aspect="pad", max_length=128, dtype="float32") == config


@pytest.mark.parametrize("fields, activation", [
    (dict(hidden_act="gelu", transformers_version="4.38.2"), "gelu"),
    (dict(hidden_act="gelu", hidden_activation=None, transformers_version="4.38.2"), "gelu"),
    (dict(hidden_act="gelu", hidden_activation=None, transformers_version="4.40.2"), "gelu_tanh"),
    (dict(hidden_act="gelu", transformers_version="4.40.2"), "gelu_tanh"),
    (dict(hidden_act="gelu", hidden_activation="gelu", transformers_version="4.41.0"), "gelu"),
    (dict(hidden_act="gelu"), "gelu"), (dict(hidden_act="gelu", hidden_activation=None),
                                        "gelu_tanh")])
def test_gemmas_activation(fields, activation):
  config = {k: v for k, v in config_of("gemma").items() if k not in (
      "hidden_act", "transformers_version")} | fields
  assert read_decoder(config, "x").activation == activation


def test_newer_names():
  config = config_of("llama", text=True)
  config.pop("rope_theta")
  config["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0,
                               "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                               "original_max_position_embeddings": 8192}
  decoder = read_decoder(config, "x")
  assert decoder.rope_theta == 500000.0
  assert decoder.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192.0)
  written = write_config(
      dataclasses.replace(model_of(config_of("llama", text=True)), decoder=dataclasses.replace(
          decoder, rope_theta=1e6)), config, aspect="pad", max_length=128, dtype="float32")
  assert written["rope_parameters"] == config["rope_parameters"] | {"rope_theta": 1e6}


@pytest.mark.parametrize("scaling", [
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192}, {"rope_type": "linear", "factor": 4.0}, None])
def test_rotary_frequencies_are_those_of_transformers(scaling):
  """Its formulas need torch; these are written out again from the papers' numbers."""
  h, theta = 128, 500000.0
  plain = theta ** (-np.arange(0, h, 2) / h)
  ours = RopeScaling(8.0, 1.0, 4.0, 8192.0) if scaling and scaling["factor"] == 8 else (
      RopeScaling(4.0) if scaling else None)
  want = plain.copy()
  if ours and ours.original_length:
    wavelength = 2 * np.pi / plain
    for i, length in enumerate(wavelength):
      if length > 8192 / 1.0:
        want[i] = plain[i] / 8
      elif length >= 8192 / 4.0:
        smooth = (8192 / length - 1.0) / 3.0
        want[i] = (1 - smooth) * plain[i] / 8 + smooth * plain[i]
  elif ours:
    want = plain / 4
  np.testing.assert_allclose(rope_frequencies(h, theta, ours), want, rtol=1e-5)
  if scaling is None:
    return
  pytest.importorskip("torch")
  from transformers import LlamaConfig
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
  config = LlamaConfig(hidden_size=h, num_attention_heads=1, max_position_embeddings=16384,
                       rope_parameters=scaling | {"rope_theta": theta})
  theirs, _ = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, device="cpu")
  np.testing.assert_allclose(rope_frequencies(h, theta, ours), theirs.numpy(), rtol=1e-5)


def test_templates_are_told_by_the_tokenizer():
  llama = family_of({"model_type": "mgm"}, "x")
  assert guess_template(llama, 32000, lambda t: False) == "vicuna_v1"
  assert guess_template(llama, 32000, lambda t: t == "<|eot_id|>") == "llama_3"
  assert guess_template(llama, 32000, lambda t: t == "<|im_end|>") == "chatml_direct"
  assert guess_template(llama, 128256, None) == "llama_3"
  assert guess_template(llama, 64000, None) == "chatml_direct"
  mixtral, gemma = ({"model_type": t} for t in ("mixtral", "mini_gemini_gemma"))
  assert guess_template(family_of(mixtral, "x"), 32000, bool) == "mistral_instruct"
  assert guess_template(family_of(gemma, "x"), 256000, bool) == "gemma"


def test_decoder_defaults_are_vicuna_7b():
  assert read_decoder(BASE["mgm-7b"], "x") == DecoderConfig()
