"""A mixture of gated MLPs in place of one (Mixtral, R1.10)."""
from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mgjax.config import DecoderConfig
from mgjax.kernels.grouped import grouped_dot
from mgjax.models.layers import Dense
from mgjax.sharding import fitting_spec, spec

EVEN_SHARES = 2


class Experts(nnx.Module):
  """Each token goes to its k best experts; what these say is added up by their weights.

      p = softmax(W_r x);  y = sum over the k largest p_e of  p_e / (their sum) * expert_e(x)

  No expert is ever full: tokens are sorted by expert and multiplied group by group (`grouped_dot`),
  so that none is dropped and nothing is computed twice.  Over the mesh axis `expert` every device
  computes its own experts for the rows of all, and gets the sum of what all say of its rows.  There
  is room for EVEN_SHARES times the rows that are a device's own if all experts are chosen as often;
  what is more is computed in a second pass, left out where there is nothing more.
  """

  def __init__(self, config: DecoderConfig, activation: Callable, *, dtype, rngs: nnx.Rngs):
    self.config, self.activation, self.dtype = config, activation, dtype
    e, d, f = config.experts, config.width, config.mlp_width
    # The choice is made in float32: a rounded score would send a token elsewhere.
    self.router = Dense(d, e, ("embed", None), bias=False, dtype=jnp.float32, rngs=rngs)
    init = nnx.initializers.lecun_normal(batch_axis=0)
    make = lambda shape, axes: nnx.Param(init(rngs(), shape, jnp.float32), out_sharding=axes)
    self.gate = make((e, d, f), ("expert", "embed", "mlp"))
    self.up = make((e, d, f), ("expert", "embed", "mlp"))
    self.down = make((e, f, d), ("expert", "mlp", "embed"))

  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [B, L, D] -> [B, L, D], and the router's scores float32 [B, L, E]."""
    d, scores = x.shape[-1], self.router(x)
    weights, chosen = route(scores, self.config.experts_per_token)              # [B, L, k]

    kernels = [w[...].astype(self.dtype) for w in (self.gate, self.up, self.down)]
    axes = ("expert", "embed", "mlp"), ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
    stored = [fitting_spec(w.shape, *names) for w, names in zip(kernels, axes)]

    def whole(w, layout, names):  # but for its experts and its tensor part
      axis = names.index("embed")
      return jax.lax.all_gather(w, layout[axis], axis=axis, tiled=True) if layout[axis] else w

    def local(x, weights, chosen, *kernels):
      gate, up, down = map(whole, kernels, stored, axes)
      # The rows of all who share the experts come to each, rather than the experts to the rows.
      x, weights, chosen = (jax.lax.all_gather(a, "expert", tiled=True)
                            for a in (x, weights, chosen))
      own, k, ways = gate.shape[0], chosen.shape[-1], jax.lax.axis_size("expert")
      expert = chosen.reshape(-1) - jax.lax.axis_index("expert") * own          # [N*k]
      group = jnp.where((expert >= 0) & (expert < own), expert, own)            # others last
      order = jnp.argsort(group, stable=True)
      place = jnp.argsort(order).reshape(-1, k)                                 # [N, k]
      ends = jnp.cumsum(jnp.sum(group[:, None] == jnp.arange(own), axis=0, dtype=jnp.int32))
      tokens, share = x.reshape(-1, d), weights.reshape(-1).astype(x.dtype)

      def say(start, stop, kept=lambda both: checkpoint_name(both, "mlp")):
        """What the experts say in [start, stop) of the sorted rows, by token: [N, D]."""
        at = jnp.clip(ends, start, stop)
        counts = jnp.diff(at, prepend=start)
        live = (jnp.arange(start, stop) < at[-1])[:, None]
        pair = order[start:stop]
        rows = _spread(tokens, pair // k, live, place - start)                  # [R, D]
        dot = lambda a, w: grouped_dot(a, w, counts)
        both = kept((dot(rows, gate), dot(rows, up)))                           # [R, F]
        # Weighed here, and not what comes out, so that the backward pass needs no `down` again.
        y = self.activation(both[0]) * both[1] * share[pair][:, None]
        return _collect(dot(jnp.where(live, y, 0), down), pair // k, live, place - start)

      n = order.shape[0]
      first = min(n, -(-EVEN_SHARES * n // ways // 512) * 512)  # rows by which kernels count
      y = say(0, first)
      if first < n:
        rest = jax.checkpoint(lambda: say(first, n, kept=lambda both: both))
        y += jax.lax.cond(ends[-1] > first, rest, lambda: jnp.zeros_like(y))
      y = jax.lax.psum(y, "tensor").reshape(x.shape)
      return jax.lax.psum_scatter(y, "expert", tiled=True)

    batch = spec("batch", None, None)
    sharded = jax.shard_map(local, in_specs=(batch, batch, batch, *stored), out_specs=batch,
                            check_vma=False)
    return sharded(x, weights, chosen, *kernels), scores


# Rows of tokens [N, D] -> rows sorted by expert [R, D] and back, each the gradient of the other.
# Both read by index: a TPU adds rows into rows slowly.  token [R]: whose row it is; live [R, 1]:
# whether it is anyone's; place [N, k]: where the rows of a token are, outside of [0, R) if nowhere.


@jax.custom_vjp
def _spread(x, token, live, place):
  return jnp.where(live, x[token], 0)


@jax.custom_vjp
def _collect(rows, token, live, place):
  there = (place >= 0) & (place < jnp.sum(live))
  of = jnp.where(there[..., None], rows[jnp.where(there, place, 0)], 0)          # [N, k, D]
  return jnp.sum(of, axis=1)


_spread.defvjp(lambda x, *where: (_spread(x, *where), where),
               lambda where, g: (_collect(g, *where), None, None, None))
_collect.defvjp(lambda rows, *where: (_collect(rows, *where), where),
                lambda where, g: (_spread(g, *where), None, None, None))


def balance_loss(scores: jax.Array, real: jax.Array, k: int) -> jax.Array:
  """How unevenly tokens are spread over the experts (Switch Transformer, equation 4, k choices).

      E * sum_e  (share of the tokens that choose e) * (mean probability of e)

  scores float32 [layers, B, L, E], all layers counted together; real bool [B, L].  k when they are
  spread evenly; its gradient goes through the probabilities.
  """
  experts, probabilities = scores.shape[-1], jax.nn.softmax(scores, axis=-1)
  chosen = jnp.sum(jax.nn.one_hot(jax.lax.top_k(scores, k)[1], experts), axis=-2)  # [.., L, E]
  count = jnp.maximum(jnp.sum(real) * scores.shape[0], 1)
  mean = lambda x: jnp.sum(jnp.where(real[None, :, :, None], x, 0), axis=(0, 1, 2)) / count
  return experts * jnp.sum(mean(chosen) * mean(probabilities))


def route(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Scores float32 [..., E] -> weights float32 [..., k] that add up to 1, experts int [..., k]."""
  weights, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), k)
  return weights / jnp.sum(weights, axis=-1, keepdims=True), chosen
