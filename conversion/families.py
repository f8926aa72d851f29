"""The kinds of language model that the original was built on, as data (R1.10, R2.6, R3.4)."""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from conversion.tensors import ConversionError
from mgjax.config import DecoderConfig

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
  """A kind of language model: its names, and what config.json leaves unsaid.

  kind: as in the class names LlamaForCausalLM, MGMLlamaForCausalLM.
  template: of chats, where the tokenizer does not tell more (see `guess_template`).
  fixed: fields of DecoderConfig that no field of config.json says.
  defaults: fields of config.json that its class does not always write.
  activation: which of `ACTIVATIONS` a config.json means.
  """

  kind: str
  template: str
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  activation: Callable[[Json], str] = lambda config: config.get("hidden_act", "silu")

  @property
  def plain(self) -> str:
    """model_type of the language model alone."""
    return self.kind.lower()

  @property
  def model_type(self) -> str:
    """model_type of the original with this language model."""
    return "mgm" if self.kind == "Llama" else f"mgm_{self.plain}"

  @property
  def model_types(self) -> tuple[str, ...]:
    """Every model_type that means this family; the first releases said mini_gemini (R2.6)."""
    return self.plain, self.model_type, self.model_type.replace("mgm", "mini_gemini")


def _gemma_activation(config: Json) -> str:
  """transformers before 4.39 used `hidden_act`; later `hidden_activation`, or tanh without it."""
  version = tuple(int(n) for n in re.findall(r"\d+", str(config.get("transformers_version")))[:2])
  if version < (4, 39) if version else "hidden_activation" not in config:
    return config.get("hidden_act") or "gelu"
  return config.get("hidden_activation") or "gelu_pytorch_tanh"


FAMILIES = (
    Family("Llama", "vicuna_v1"),
    Family("Gemma", "gemma", dict(norm_offset=1.0, scale_inputs=True),
           dict(tie_word_embeddings=True, head_dim=256), _gemma_activation),
    Family("Mistral", "mistral_instruct", {}, dict(sliding_window=4096, num_key_value_heads=8)),
    Family("Mixtral", "mistral_instruct", {},
           dict(num_local_experts=8, num_experts_per_tok=2, rope_theta=1e6,
                num_key_value_heads=8)),
)


def family_of(config: Json, where: str) -> Family:
  """The family that `model_type` names.  Raises ConversionError."""
  name = config.get("model_type")
  for family in FAMILIES:
    if name in family.model_types:
      return family
  known = ", ".join(t for f in FAMILIES for t in f.model_types)
  raise ConversionError(f"{where}: model_type is {name!r}; expected one of {known}")


def family_of_decoder(decoder: DecoderConfig) -> Family:
  """The family whose model a decoder is, for one that never had a config.json."""
  kind = ("Mixtral" if decoder.experts else "Gemma" if decoder.norm_offset else
          "Mistral" if decoder.sliding_window else "Llama")
  return next(f for f in FAMILIES if f.kind == kind)


# What tells the template of a Llama: a token of its tokenizer, or else the size of its vocabulary.
_TOLD_BY = (("<|eot_id|>", 128256, "llama_3"), ("<|im_end|>", 64000, "chatml_direct"))


def guess_template(family: Family, vocab_size: int, has_token: Callable[[str], bool] | None) -> str:
  """The conversation template of a release, which no config.json says.

  has_token: whether its tokenizer has a token; None where there is no tokenizer.
  """
  if family.kind == "Llama":
    for token, size, template in _TOLD_BY:
      if has_token(token) if has_token else vocab_size == size:
        return template
  return family.template
