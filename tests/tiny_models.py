"""Models of random weights, the same each time."""
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mgjax.models.mini_gemini import MiniGemini
from mgjax.sharding import mesh_context


def random_model(config, mesh) -> MiniGemini:
  """In float32; norms around 1."""
  with mesh_context(mesh):
    graphdef, state = nnx.split(nnx.eval_shape(
        lambda: MiniGemini(config, dtype=jnp.float32, rngs=nnx.Rngs(0))))
  rng = np.random.RandomState(0)
  fill = lambda x: jnp.asarray(rng.randn(*x.shape) * x.shape[-1]**-0.5 + (len(x.shape) == 1))
  return nnx.merge(graphdef, jax.tree.map(lambda x: fill(x).astype(x.dtype), state))
