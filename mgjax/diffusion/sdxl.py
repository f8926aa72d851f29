"""SDXL with all its parts, and the programs that draw with it."""
from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mgjax.diffusion.config import SdxlConfig
from mgjax.diffusion.schedule import Schedule
from mgjax.diffusion.text_encoder import TextEncoder
from mgjax.diffusion.unet import UNet
from mgjax.diffusion.vae import Vae


class Sdxl(nnx.Module):
  """Two readers of the prompt, the UNet and the autoencoder (Podell et al., SDXL, 2023).

  vae_dtype: of the autoencoder's computation; the published one overflows in float16, and bfloat16
  shows in flat areas.
  """

  def __init__(self, config: SdxlConfig, *, dtype=jnp.float32, vae_dtype=jnp.float32,
               rngs: nnx.Rngs):
    self.config = config
    self.text_encoder = TextEncoder(config.text_encoder, dtype=dtype, rngs=rngs)
    self.text_encoder_2 = TextEncoder(config.text_encoder_2, dtype=dtype, rngs=rngs)
    self.unet = UNet(config.unet, dtype=dtype, rngs=rngs)
    self.vae = Vae(config.vae, dtype=vae_dtype, rngs=rngs)

  def encode_prompts(self, ids: jax.Array, ids_2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ids of each encoder's tokenizer, [N, L] -> (context [N, L, E], pooled [N, P])."""
    first, _ = self.text_encoder(ids)
    second, pooled = self.text_encoder_2(ids_2)
    return jnp.concatenate([first, second], -1), pooled

  def sample(self, noise: jax.Array, context: jax.Array, pooled: jax.Array, sizes: jax.Array,
             schedule: Schedule, steps: jax.Array, guidance: jax.Array | None) -> jax.Array:
    """Noise -> latents, both float32 [N, H, W, 4].

    Args:
      context, pooled: of `encode_prompts`; with guidance [2N, ...], the negative prompts first.
      sizes: [N, 6], as in `UNet`.
      schedule: its rows from `steps` on are not used, so that one program serves any number.
      guidance: how far to go from the negative prompt's prediction, past the prompt's (classifier-
        free guidance; Ho and Salimans, 2022); None: the prompt's prediction as it is.
    """
    guided = guidance is not None
    double = lambda x: jnp.concatenate([x, x]) if guided else x
    sizes = double(sizes)

    def step(i, latents):
      x = double(schedule.scale[i] * latents)
      time = jnp.broadcast_to(schedule.time[i], len(x))
      predicted = self.unet(x, time, context, pooled, sizes)
      if guided:
        without, towards = jnp.split(predicted, 2)
        predicted = without + guidance * (towards - without)
      return schedule.keep[i] * latents + schedule.add[i] * predicted

    return jax.lax.fori_loop(0, steps, step, schedule.start * noise)
