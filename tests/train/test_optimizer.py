"""The optimizer's table: what it covers, and what it leaves as it is."""
import jax
import jax.numpy as jnp
import optax
import pytest

from mgjax.config import ConfigError
from mgjax.train.optimizer import OptimizerConfig, Row, check_table, make_optimizer


def test_layers_left_out_do_not_move():
  tree = {"a": {"kernel": jnp.ones((4, 2, 3))}, "b": {"kernel": jnp.ones((2, 2))}}
  config = OptimizerConfig(1.0, (Row("^a/", layers=(2, None)), Row("")), "constant",
                           weight_decay=0.1)
  tx = make_optimizer(config, 5)
  updates, _ = tx.update(tree, tx.init(tree), tree)
  moved = optax.apply_updates(tree, updates)["a"]["kernel"]
  assert (moved[:2] == 1).all() and (moved[2:] < 1).all()


def test_table_errors():
  shapes = lambda *paths: {path: jax.ShapeDtypeStruct((3, 2), jnp.float32) for path in paths}
  with pytest.raises(ConfigError, match="no row of the table covers 'b/x'"):
    check_table(shapes("a/x", "b/x"), (Row("^a/"),))
  with pytest.raises(ConfigError, match=r"\['\^c/'\] cover no parameter"):
    check_table(shapes("a/x"), (Row("^a/"), Row("^c/")))
  with pytest.raises(ConfigError, match="a/patch_embed/kernel is no stack of layers"):
    check_table(shapes("a/patch_embed/kernel"), (Row("^a/", 1.0, (1, None)),))
  with pytest.raises(ConfigError, match="has 3 layers"):
    check_table(shapes("a/blocks/q/kernel"), (Row("^a/", 1.0, (3, None)),))
  check_table(shapes("a/blocks/q/kernel"), (Row("^a/", 1.0, (-1, None)),))
