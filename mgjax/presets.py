"""Every model by name, as rows of data (R1.11), and the tiny ones that tests and the demo use."""
from __future__ import annotations

import dataclasses
import difflib

from mgjax.config import ClipVitConfig, ConfigError, ConvNextConfig, DecoderConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class Preset:
  """A model, the templates of its two stages, and the recipe's numbers that depend on it (R4.3)."""

  model: ModelConfig
  template: str                    # stage 2 and chat
  align_template: str = "plain"    # stage 1
  max_length: int = 2048           # text + visual positions
  learning_rate: float = 2e-5      # stage 2
  projector_multiplier: float = 1.0  # stage 2: projector and mining, relative to the LLM


def _hd(preset: Preset) -> Preset:
  """The -HD variant: 672/1536, 2x2 tiles and the global view, 2880 visual tokens."""
  model = dataclasses.replace(preset.model, hr_size=1536, grid=2, global_view=True)
  return dataclasses.replace(preset, model=model, max_length=4096)


# The recipe trains with drop path in the frozen HR tower (R1.4); inference never applies it.
_HR = ConvNextConfig(drop_path=0.1)
_GEMMA_2B = Preset(
    ModelConfig(vision_hr=_HR, decoder=DecoderConfig(
        vocab_size=256000, width=2048, depth=18, heads=8, kv_heads=1, head_dim=256, mlp_width=16384,
        norm_eps=1e-6, activation="gelu", norm_offset=1.0, scale_inputs=True, tied_head=True)),
    "gemma", "gemma")
_VICUNA_7B = Preset(ModelConfig(vision_hr=_HR, decoder=DecoderConfig()), "vicuna_v1")
_VICUNA_13B = Preset(
    ModelConfig(vision_hr=_HR, decoder=DecoderConfig(width=5120, depth=40, heads=40, kv_heads=40,
                                                     mlp_width=13824)), "vicuna_v1")
_LLAMA3_8B = Preset(
    ModelConfig(vision_hr=_HR, decoder=DecoderConfig(vocab_size=128256, kv_heads=8,
                                                     mlp_width=14336, rope_theta=500000.0)),
    "llama_3", "llama_3")
_MIXTRAL_8X7B = Preset(
    ModelConfig(vision_hr=_HR, decoder=DecoderConfig(
        kv_heads=8, mlp_width=14336, rope_theta=1000000.0, experts=8, experts_per_token=2)),
    "mistral_instruct", learning_rate=1e-5, projector_multiplier=2.0)
_YI_34B = Preset(
    ModelConfig(vision_hr=_HR, decoder=DecoderConfig(vocab_size=64000, width=7168, depth=60,
                                                     heads=56, kv_heads=8, mlp_width=20480,
                                                     rope_theta=5000000.0)),
    "chatml_direct", learning_rate=1e-5, projector_multiplier=2.0)

# The proportions of the real model in miniature: a quarter of the side's tokens, 8x8 windows.
_TINY = ModelConfig(
    vision=ClipVitConfig(image_size=56, width=32, depth=3, heads=4, mlp_width=64),
    vision_hr=ConvNextConfig(depths=(1, 1, 2, 1), widths=(8, 16, 24, 32)),
    decoder=DecoderConfig(vocab_size=1024, width=64, depth=2, heads=4, kv_heads=2, head_dim=16,
                          mlp_width=128),
    hr_size=128)
_DEMO = ModelConfig(
    vision=ClipVitConfig(image_size=56, width=96, depth=4, heads=4, mlp_width=384),
    vision_hr=ConvNextConfig(depths=(2, 2, 2, 1), widths=(32, 64, 96, 128)),
    decoder=DecoderConfig(vocab_size=576, width=128, depth=3, heads=4, kv_heads=4, head_dim=32,
                          mlp_width=256),
    hr_size=128)
# The yardstick of design notes and benchmarks: 68.8 M parameters.
_MID = ModelConfig(
    vision=ClipVitConfig(width=384, depth=6, heads=6, mlp_width=1536),
    vision_hr=ConvNextConfig(depths=(2, 2, 6, 2), widths=(48, 96, 192, 384)),
    decoder=DecoderConfig(width=512, depth=6, heads=8, kv_heads=8, head_dim=64, mlp_width=1376),
    hr_size=768)

PRESETS: dict[str, Preset] = {
    "mgm-2b": _GEMMA_2B, "mgm-2b-hd": _hd(_GEMMA_2B),
    "mgm-7b": _VICUNA_7B, "mgm-7b-hd": _hd(_VICUNA_7B),
    "mgm-13b": _VICUNA_13B, "mgm-13b-hd": _hd(_VICUNA_13B),
    "mgm-8b": _LLAMA3_8B, "mgm-8b-hd": _hd(_LLAMA3_8B),
    "mgm-8x7b": _MIXTRAL_8X7B, "mgm-8x7b-hd": _hd(_MIXTRAL_8X7B),
    "mgm-34b": _YI_34B, "mgm-34b-hd": _hd(_YI_34B),
    "mid": Preset(_MID, "vicuna_v1"),
    "tiny": Preset(_TINY, "chatml_direct", max_length=128),
    "tiny-hd": Preset(dataclasses.replace(_TINY, hr_size=256, grid=2, global_view=True),
                      "chatml_direct", max_length=256),
    "demo": Preset(_DEMO, "chatml_direct", max_length=136),
}


# The baseline of the paper's ablation: the low-resolution tower alone, as many visual tokens.
PRESETS |= {f"{name}-lr": dataclasses.replace(p, model=dataclasses.replace(p.model, vision_hr=None))
            for name, p in PRESETS.items()}


def find(name: str) -> Preset:
  """The preset of that name.  Raises ConfigError naming the nearest and all the others."""
  if name in PRESETS:
    return PRESETS[name]
  near = difflib.get_close_matches(name, PRESETS, 1)
  hint = f"did you mean {near[0]!r}?  " if near else ""
  raise ConfigError(f"preset {name!r} does not exist; {hint}There are: {', '.join(PRESETS)}")
