"""What the forward pass keeps for the backward pass; everything else is computed again."""
from __future__ import annotations

import dataclasses
import functools

import jax

from mgjax.config import ConfigError

# Policies of `jax.checkpoint_policies` that fit every part; "none" keeps every activation.
GENERAL = ("none", "nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable")

# For the decoder, by the names that its block gives to what it computes.  Bytes a token and layer
# in bfloat16 (D width, F mlp_width, H heads, K kv_heads, h head_dim), beside the block's input, 2D:
#   attention  what its kernel gives, so that it runs once              2Hh + 4H
#   qkv        queries, keys and values, rotated                        2(H + 2K)h
#   residual   the sum behind the attention                             2D
#   mlp        both halves of the MLP before they are multiplied        4F
SAVED = {
    "save_attention": ("attention",),
    "save_qkv_attention": ("qkv", "attention"),
    "save_mlp": ("attention", "residual", "mlp"),
    "save_products": ("qkv", "attention", "residual", "mlp"),  # no product is computed again
}
# The block's input too leaves the device, for the memory of its host.
OFFLOAD = "offload"
DECODER = (*GENERAL, *SAVED, OFFLOAD)


@dataclasses.dataclass(frozen=True)
class RematConfig:
  """A policy for each part.  One that is frozen, with nothing before it that trains, keeps nothing
  and computes nothing again, whatever stands here: no gradient passes through it."""

  decoder: str = "nothing_saveable"  # one of DECODER
  towers: str = "nothing_saveable"   # one of GENERAL
  mining: str = "nothing_saveable"   # one of GENERAL

  def __post_init__(self):
    for part, allowed in (("decoder", DECODER), ("towers", GENERAL), ("mining", GENERAL)):
      if (policy := getattr(self, part)) not in allowed:
        raise ConfigError(f"config.remat.{part} is {policy!r}; expected one of "
                          f"{', '.join(allowed)}")


KEEP_ALL = RematConfig("none", "none", "none")


def remat(policy: str, *, in_scan: bool = True):
  """Decorator that recomputes a function in the backward pass, but for what `policy` keeps.

  in_scan: the function is the body of a scan, where the barrier against common-subexpression
  elimination is not needed.
  """
  if policy == "none":
    return lambda f: f
  policies = jax.checkpoint_policies
  if policy in SAVED:
    chosen = policies.save_only_these_names(*SAVED[policy])
  elif policy == OFFLOAD:
    chosen = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["block_input"],
        offload_src="device", offload_dst="pinned_host")
  else:
    chosen = getattr(policies, policy)
  return functools.partial(jax.checkpoint, policy=chosen, prevent_cse=not in_scan)
