"""Nested dictionaries of arrays, and the same by path: "decoder/blocks/q/kernel"."""
from __future__ import annotations

from typing import Any

import jax
from flax import nnx


def pure(state: nnx.State) -> dict:
  """nnx state -> nested dict whose keys are strings (list positions too), as checkpoints want."""
  return _string_keys(nnx.to_pure_dict(state))


def _string_keys(tree):
  if not isinstance(tree, dict):
    return tree
  return {str(k): _string_keys(v) for k, v in tree.items()}


def flatten(tree: Any) -> dict[str, Any]:
  """{"a": {"b": x}} -> {"a/b": x}"""
  leaves = jax.tree.leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any]) -> dict:
  """{"a/b": x} -> {"a": {"b": x}}"""
  tree: dict = {}
  for path, leaf in flat.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def merge(*trees: dict) -> dict:
  """Nested dicts with disjoint leaves as one."""
  return unflatten({k: v for tree in trees for k, v in flatten(tree).items()})
