"""Tokens a second beside HuggingFace transformers (torch): one language model, the same weights and
dtype; and what a picture and a second turn cost.

    pip install -e '.[parity]'
    python benchmarks/engine.py work_dirs/demo/stage2
    python benchmarks/engine.py checkpoints/smollm2     # gets the towers of "mid", random

The two take turns, so that what else the machine does hits both.
"""
import argparse
import contextlib
import dataclasses
import io
import json
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from conversion import to_hf
from mgjax.checkpoint import load_model
from mgjax.infer.engine import Engine, Prompt
from mgjax.infer.sampling import Sampling
from mgjax.models.mini_gemini import MiniGemini
from mgjax.presets import find
from mgjax.sharding import make_mesh, mesh_context


def of_transformers(checkpoint: pathlib.Path):
  """The language model of a checkpoint as transformers builds it, from what `conversion` writes."""
  import torch
  from transformers import AutoConfig, AutoModelForCausalLM, logging
  logging.set_verbosity_error()
  logging.disable_progress_bar()
  torch.set_num_threads(2)
  with tempfile.TemporaryDirectory() as folder:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
      assert to_hf.main(["--checkpoint", str(checkpoint), "--output", f"{folder}/hf"]) == 0
    values = json.loads(pathlib.Path(folder, "hf", "config.json").read_text())
    family = values.pop("model_type").removeprefix("mgm_")
    config = AutoConfig.for_model({"mgm": "llama"}.get(family, family), **values)
    return AutoModelForCausalLM.from_pretrained(f"{folder}/hf", config=config,
                                                dtype=torch.float32).eval()


def their_answers(model, prompts: np.ndarray, new: int) -> list[list[int]]:
  """Greedy: ids [B, L] -> B lists of `new` ids."""
  import torch
  with torch.inference_mode():
    ids = torch.tensor(prompts, dtype=torch.long)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=new, eos_token_id=None, pad_token_id=0)
  return out[:, prompts.shape[1]:].tolist()


def our_answers(engine: Engine, prompts: np.ndarray, new: int) -> list[list[int]]:
  """The same of the engine, with prompts that it has not seen."""
  asked = [Prompt(p, np.full(len(p), -1)) for p in prompts]
  return engine.generate_batch(asked, Sampling(max_new_tokens=new))


def timed(f, *args):
  begun = time.perf_counter()
  return f(*args), time.perf_counter() - begun


def compare(model: MiniGemini, theirs, mesh, args, batch: int) -> None:
  """Prints a line: tokens/s of both, and how many of the first tokens are the same."""
  rng = np.random.default_rng(batch)
  engine = Engine(model, mesh=mesh, max_length=args.prompt + args.new + 1, rows=batch)
  fresh = lambda: rng.integers(3, model.config.decoder.vocab_size, (batch, args.prompt))
  our_answers(engine, fresh(), 3)
  their_answers(theirs, fresh(), 3)
  ours, others = [], []  # (seconds to the first tokens, of the whole)
  for _ in range(args.repeats):
    one, many = fresh(), fresh()
    ours.append((timed(our_answers, engine, one, 1)[1], 0))
    others.append((timed(their_answers, theirs, one, 1)[1], 0))
    a, seconds = timed(our_answers, engine, many, args.new)
    ours[-1] = ours[-1][0], seconds
    b, seconds = timed(their_answers, theirs, many, args.new)
    others[-1] = others[-1][0], seconds
  middle = lambda rows, f: statistics.median(f(*row) for row in rows)
  decode = lambda first, whole: batch * (args.new - 1) / (whole - first)
  total = lambda first, whole: batch * args.new / whole
  cells = [f"{middle(ours, f):9.1f} {middle(others, f):9.1f} "
           f"{middle(ours, f) / middle(others, f):6.2f}x" for f in (decode, total)]
  cells += [f"{middle(ours, lambda first, _: first):7.3f} "
            f"{middle(others, lambda first, _: first):7.3f}"]
  same = np.mean([x == y for one, two in zip(a, b) for x, y in zip(one, two)])
  print(f"{batch:5} |{cells[0]} |{cells[1]} |{cells[2]} |{same:8.1%}", flush=True)


def with_towers(model: MiniGemini) -> MiniGemini:
  """A language model with the towers of "mid" at random in front."""
  config = dataclasses.replace(find("mid").model, decoder=model.config.decoder)
  seeing = MiniGemini(config, dtype=model.dtype, rngs=nnx.Rngs(0))
  seeing.decoder = model.decoder
  return seeing


def turns(model: MiniGemini, mesh, new: int) -> None:
  """Prints the time to the first token with a picture, and of a second turn behind it."""
  rng, t = np.random.default_rng(0), model.config.visual_tokens
  ids = lambda n: rng.integers(3, model.config.decoder.vocab_size, n)
  engine = Engine(model, mesh=mesh, max_length=t + 256, rows=1)
  pixels = lambda: rng.integers(0, 256, (1, model.config.hr_size, model.config.hr_size, 3),
                                dtype=np.uint8)
  first, encode, second, whole = [], [], [], []
  for _ in range(4):
    picture = pixels()
    begun = time.perf_counter()
    image = jax.block_until_ready(engine.encode_images(picture))
    encode.append(time.perf_counter() - begun)
    tokens = np.concatenate([ids(10), np.zeros(t, int), ids(30)])
    index = np.concatenate([np.full(10, -1), np.arange(t), np.full(30, -1)])
    stream = engine.generate(Prompt(tokens, index, image), Sampling(max_new_tokens=new))
    said = [next(stream)]
    first.append(time.perf_counter() - begun)
    said += stream
    more = np.concatenate([tokens, said, ids(30)])
    longer = np.concatenate([index, np.full(new + 30, -1)])
    for asked, times in ((engine, second), (None, whole)):
      if asked is None:  # as if nothing were kept
        asked = Engine(model, mesh=mesh, max_length=t + 256, rows=1)
        list(asked.generate(Prompt(ids(len(more)), longer, image), Sampling(max_new_tokens=1)))
      begun = time.perf_counter()
      list(asked.generate(Prompt(more, longer, image), Sampling(max_new_tokens=1)))
      times.append(time.perf_counter() - begun)
  best = lambda times: statistics.median(times[1:])  # the first compiles
  print(f"first token with a new picture ({t} visual tokens): {best(first):.3f} s, of which "
        f"{best(encode):.3f} s see it\nfirst token of a second turn: {best(second):.3f} s "
        f"({best(second) / best(first):.1%}); were the first turn read again: {best(whole):.3f} s")


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("checkpoint", type=pathlib.Path)
  parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
  parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
  parser.add_argument("--batches", type=int, nargs="+", default=(1, 8, 32))
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()
  mesh = make_mesh(devices=jax.devices()[:1])
  with mesh_context(mesh):
    model = load_model(args.checkpoint, mesh, dtype=jnp.float32).model
    theirs = of_transformers(args.checkpoint)
    size = sum(p.numel() for p in theirs.parameters()) / 1e6
    print(f"{size:.1f} M parameters, float32, {jax.default_backend()}, prompts of {args.prompt} "
          f"tokens, {args.new} new ones\n"
          "      |   decode, tokens/s        |  in all, tokens/s         |first token, s  |  same\n"
          "batch |   mgjax     torch  ratio  |   mgjax     torch  ratio  |  mgjax   torch |  ids")
    for batch in args.batches:
      compare(model, theirs, mesh, args, batch)
    turns(model if model.config.vision else with_towers(model), mesh, args.new)


if __name__ == "__main__":
  main()
