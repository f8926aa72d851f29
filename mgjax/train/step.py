"""One update, as a pure function of state and batch."""
from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mgjax import trees
from mgjax.models.lora import set_dropout
from mgjax.models.moe import balance_loss
from mgjax.models.tagger import Tagger
from mgjax.train.config import RunConfig
from mgjax.train.loss import next_token_loss, tag_loss
from mgjax.train.optimizer import make_schedule, mask_layers
from mgjax.train.state import TrainState

DROPOUT = 0x10A  # folded into a step's key for the adapters: drop path has the key itself


def batch_loss(model: nnx.Module, batch: dict, rng: jax.Array | None, router_loss: float = 0.0):
  """Summed loss and number of its terms, by what the model is.

  router_loss: weight of the experts' balance, added to the mean over terms.
  """
  targets = batch["targets"], batch["loss_mask"]
  if isinstance(model, Tagger):
    return tag_loss(model(batch, rng), *targets)
  hidden, router = model.hidden(batch, rng)
  total, terms = next_token_loss(hidden, *model.decoder.head_weights(), *targets)
  if router_loss:
    k = model.config.decoder.experts_per_token
    total += router_loss * terms * balance_loss(router, batch["segment_ids"] > 0, k)
  return total, terms


def make_train_step(config: RunConfig, graphdef: nnx.GraphDef, tx: optax.GradientTransformation,
                    steps: int) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
  """(state, batch) -> (state, metrics), to be jitted with the state donated.

  The batch [accumulate*B, ...] is cut into micro-batches; their gradients of the *summed* loss
  are added and divided by the total number of terms last, so the result is the exact mean however
  the batch is cut.  If loss or gradients are not finite, the state comes back unchanged.
  """
  schedule = make_schedule(config.optimizer, steps)

  def micro_batches(x):  # row r goes to micro-batch r mod A, so that every device keeps its rows
    return jnp.moveaxis(x.reshape(-1, config.accumulate, *x.shape[1:]), 1, 0)

  def gradients(params, frozen, batch, rng):
    def loss_fn(params):
      model = nnx.merge(graphdef, trees.merge(params, frozen))
      set_dropout(model, jax.random.fold_in(rng, DROPOUT))
      loss, terms = batch_loss(model, batch, rng, config.router_loss)
      return loss, terms
    (loss, terms), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return loss, terms, grads

  def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
    rng = jax.random.fold_in(jax.random.key(config.seed), state.step)  # for dropping
    if config.accumulate == 1:
      loss, terms, grads = gradients(state.params, state.frozen, batch, rng)
    else:
      def body(total, scanned):
        i, micro = scanned
        new = gradients(state.params, state.frozen, micro, jax.random.fold_in(rng, i))
        return jax.tree.map(jnp.add, total, new), None
      zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
      scanned = jnp.arange(config.accumulate), jax.tree.map(micro_batches, batch)
      (loss, terms, grads), _ = jax.lax.scan(body, zero, scanned)
    terms = jnp.maximum(terms, 1)
    loss = loss / terms
    grads = mask_layers(jax.tree.map(lambda g: g / terms, grads), config.optimizer.table)
    norm = optax.tree.norm(grads)

    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    with jax.named_scope("optimizer"):
      updates, opt_state = tx.update(grads, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
      new = TrainState(state.step + 1, params, state.frozen, opt_state)
      new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    metrics = {"loss": loss, "grad_norm": norm, "learning_rate": schedule(state.step),
               "terms": terms, "finite": finite}
    return new, metrics

  return step
