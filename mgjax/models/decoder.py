"""The language model: one decoder for the Llama, Gemma and Mistral families (R1.10)."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mgjax.config import DecoderConfig
from mgjax.models.attention import attention, rope, rope_frequencies
from mgjax.models.layers import Dense, RmsNorm, gelu, stack
from mgjax.models.lookup import lookup
from mgjax.models.moe import Experts
from mgjax.models.remat import remat
from mgjax.sharding import constrain, gathered

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class DecoderBlock(nnx.Module):
  """Pre-norm block: grouped-query attention with RoPE, then a gated MLP.

  What it names by `checkpoint_name` the policies of `remat` may keep.
  """

  def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
    self.config = config
    d, f = config.width, config.mlp_width
    q_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
    self.norm1 = RmsNorm(d, config.norm_eps, config.norm_offset)
    make = lambda i, o, axes: Dense(i, o, axes, bias=False, dtype=dtype, rngs=rngs)
    self.q = make(d, q_width, ("embed", "heads"))
    self.k = make(d, kv_width, ("embed", "heads"))
    self.v = make(d, kv_width, ("embed", "heads"))
    self.out = make(q_width, d, ("heads", "embed"))
    self.norm2 = RmsNorm(d, config.norm_eps, config.norm_offset)
    if config.experts:
      self.experts = Experts(config, ACTIVATIONS[config.activation], dtype=dtype, rngs=rngs)
    else:
      self.gate = make(d, f, ("embed", "mlp"))
      self.up = make(d, f, ("embed", "mlp"))
      self.down = make(f, d, ("mlp", "embed"))

  def qkv(self, x, positions):
    """x [B, L, D] -> q [B, L, H, h], k, v [B, L, K, h], rotated."""
    c = self.config
    b, l, _ = x.shape
    y = self.norm1(x)
    q = self.q(y).reshape(b, l, c.heads, c.head_dim)
    k = self.k(y).reshape(b, l, c.kv_heads, c.head_dim)
    v = self.v(y).reshape(b, l, c.kv_heads, c.head_dim)
    q, k, v = (constrain(a, "batch", "seq", "act_heads", None) for a in (q, k, v))
    frequencies = rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
    q, k = rope(q, positions, frequencies), rope(k, positions, frequencies)
    return checkpoint_name((q, k, v), "qkv")

  def finish(self, x, attended):
    """x [B, L, D], attended [B, L, H, h] -> [B, L, D]: output projection and MLP; and the scores of
    the router, if there are experts."""
    b, l, _ = x.shape
    x = constrain(x + self.out(attended.reshape(b, l, -1)), "batch", "seq", "act_embed")
    x = checkpoint_name(x, "residual")
    y, scores = self.mlp(self.norm2(x))
    return constrain(x + y, "batch", "seq", "act_embed"), scores

  def mlp(self, x):
    """[B, L, D] -> [B, L, D], and float32 [B, L, E] or None."""
    if self.config.experts:
      return self.experts(x)
    gate, up = checkpoint_name((self.gate(x), self.up(x)), "mlp")
    y = ACTIVATIONS[self.config.activation](gate) * up
    return self.down(constrain(y, "batch", "seq", "act_mlp")), None


class Decoder(nnx.Module):
  """Embeddings [B, L, D] -> final hidden states [B, L, D]; `logits` turns them into scores."""

  def __init__(self, config: DecoderConfig, *, remat_policy: str = "none",
               attention: str = "auto", dtype, rngs: nnx.Rngs):
    self.config, self.dtype = config, dtype
    self.remat_policy, self.attention = remat_policy, attention
    normal = nnx.initializers.normal(0.02)
    self.embedding = nnx.Param(
        normal(rngs(), (config.vocab_size, config.width)), out_sharding=("vocab", "embed"))
    self.blocks = stack(
        config.depth, lambda r: DecoderBlock(config, dtype=dtype, rngs=r), rngs)
    self.norm = RmsNorm(config.width, config.norm_eps, config.norm_offset)
    self.head = nnx.data(None if config.tied_head else Dense(
        config.width, config.vocab_size, ("embed", "vocab"), bias=False, dtype=dtype, rngs=rngs))

  @jax.named_scope("embedding")
  def embed(self, tokens: jax.Array) -> jax.Array:
    """int [B, L] -> [B, L, D] in the compute dtype."""
    x = lookup(self.embedding[...], tokens, self.dtype)
    return constrain(x, "batch", "seq", "act_embed")

  @jax.named_scope("logits")
  def logits(self, hidden: jax.Array) -> jax.Array:
    """[B, L, D] -> float32 [B, L, V]."""
    if self.head is None:
      scores = hidden @ gathered(self.embedding[...].astype(self.dtype), "vocab", "embed").T
    else:
      scores = self.head(hidden)
    return constrain(scores.astype(jnp.float32), "batch", "seq", "act_vocab")

  def head_weights(self) -> tuple[jax.Array, tuple[str, str]]:
    """The matrix behind `logits`, as it is stored, and the logical names of its dimensions."""
    if self.head is None:
      return self.embedding[...], ("vocab", "embed")
    return self.head.kernel[...], ("embed", "vocab")

  def enter(self, x: jax.Array) -> jax.Array:
    """Embeddings [B, L, D], of words or pictures, as the first block takes them."""
    if not self.config.scale_inputs:
      return x
    # In float32: in bfloat16 sqrt(D) itself would be rounded.
    return (x.astype(jnp.float32) * self.config.width**0.5).astype(x.dtype)

  @jax.named_scope("decoder")
  def __call__(self, x: jax.Array, positions: jax.Array,
               segment_ids: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Full pass over packed rows, for training and scoring.

    x [B, L, D]; positions int [B, L], restarting at each sample; segment_ids int [B, L], 0 for
    padding.  A sample attends to itself alone.  Returns [B, L, D], normed, and what the routers
    said, float32 [layers, B, L, E] (None without experts).
    """
    def body(x, block):
      x = checkpoint_name(x, "block_input")
      q, k, v = block.qkv(x, positions)
      return block.finish(x, attention(q, k, v, segment_ids, self.config.sliding_window,
                                       implementation=self.attention))

    x = constrain(self.enter(x), "batch", "seq", "act_embed")
    x, scores = jax.lax.scan(remat(self.remat_policy)(body), x, self.blocks)
    return self.norm(x), scores
