"""What quantising costs a checkpoint: bytes of its weights, how far scores move, and perplexity on
a text, for the float model, int8 and int4 weights, and an int8 cache.

    python benchmarks/quantize.py work_dirs/stage2 --text book.txt
"""
import argparse
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mgjax.checkpoint import LoadedModel, load_model
from mgjax.data.tokenizer import load_tokenizer
from mgjax.infer.cache import empty_cache, extend, rounded_slots, with_unstacked_blocks
from mgjax.infer.quantize import load_quantized
from mgjax.models.mini_gemini import MiniGemini
from mgjax.sharding import make_mesh, mesh_context

BYTES = 50_000  # of the text


@dataclasses.dataclass(frozen=True)
class Variant:
  """Weights and cache of one measurement; None: as the model is."""

  name: str
  quantize: str | None = None
  cache_dtype: str | None = None


VARIANTS = (Variant("float"), Variant("int8", "int8"), Variant("int4", "int4"),
            Variant("int8 cache", None, "int8"), Variant("int8, int8 cache", "int8", "int8"))


def read_windows(loaded: LoadedModel, text: str, length: int) -> np.ndarray:
  """The text as ids [N, length]; what is left over is dropped."""
  ids = load_tokenizer(loaded.tokenizer_dir).encode(text)
  if len(ids) < length:
    raise SystemExit(f"the text has {len(ids)} tokens; --length asks for {length}")
  return np.asarray(ids[:len(ids) // length * length], np.int32).reshape(-1, length)


def scores_of(model: MiniGemini, cache_dtype):
  """A function: ids [1, L] -> float32 scores [L, V], read through a cache."""
  graphdef, params = nnx.split(with_unstacked_blocks(model.decoder))

  @jax.jit
  def scores(params, ids):
    decoder = nnx.merge(graphdef, params)
    cache = empty_cache(decoder.config, 1, rounded_slots(ids.shape[1]), cache_dtype)
    return decoder.logits(extend(decoder, decoder.embed(ids), jnp.zeros(1, int), cache)[0])[0]

  return lambda ids: scores(params, ids)


def weight_bytes(model: MiniGemini) -> int:
  """Bytes of the decoder, int4 as half a byte."""
  return sum(a.size * jax.dtypes.itemsize_bits(a.dtype) // 8
             for a in jax.tree.leaves(nnx.state(model.decoder)))


def surprise(scores: jax.Array, ids: np.ndarray) -> float:
  """Sum of the negative log-likelihoods of ids [L] after the first, by scores [L, V]."""
  chances = jax.nn.log_softmax(scores[:-1])
  return -float(jnp.sum(jnp.take_along_axis(chances, ids[1:, None], axis=-1)))


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("checkpoint", type=pathlib.Path)
  parser.add_argument("--text", type=pathlib.Path, required=True, metavar="FILE",
                      help=f"its first {BYTES // 1000} kB are read")
  parser.add_argument("--length", type=int, default=512, help="tokens that are read together")
  args = parser.parse_args()
  text = args.text.read_bytes()[:BYTES].decode(errors="ignore")
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  mesh = make_mesh(devices=jax.devices()[:1])
  first = None  # scores of the float model, on the host
  print(f"{'':18}{'decoder':>12}{'perplexity':>12}{'largest difference of a score':>32}")
  with mesh_context(mesh):
    for variant in VARIANTS:
      loaded = (load_quantized(args.checkpoint, mesh, dtype=dtype, name=variant.quantize)
                if variant.quantize else load_model(args.checkpoint, mesh, dtype=dtype))
      windows = read_windows(loaded, text, args.length)
      scores = scores_of(loaded.model, jnp.dtype(variant.cache_dtype or dtype))
      total, here = 0.0, None
      for n, ids in enumerate(windows):
        found = scores(ids[None])
        total += surprise(found, ids)
        if n == 0:  # one window is enough for the difference
          here = np.asarray(found)
      first = here if first is None else first
      perplexity = np.exp(total / (windows.size - len(windows)))
      size = f"{weight_bytes(loaded.model) / 1e6:.1f} MB"
      print(f"{variant.name:18}{size:>12}{perplexity:12.4f}"
            f"{np.abs(here - first).max():20.4f} of {np.abs(first).max():.2f}", flush=True)
      del loaded, scores


if __name__ == "__main__":
  main()
