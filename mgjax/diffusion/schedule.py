"""The sampler: which noise levels are visited, and what a step does.

A step of Euler's method and one of DDIM without noise of its own (eta 0) are both linear in the
latents and the prediction, with factors that depend on the step alone.  So a sampler is a table.

Sources: Karras et al., "Elucidating the design space" (2022), algorithm 1 without churn (Euler);
Song et al., DDIM (2020), equation 12; Lin et al. (2023), table 2 (spacings).
"""
from __future__ import annotations

import dataclasses

import jax
import numpy as np

from mgjax.diffusion.config import ScheduleConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
  """Float32 factors of every step, [steps]:

      prediction = unet(scale * latents, time)
      latents    = keep * latents + add * prediction

  from latents = start * noise on.
  """

  time: np.ndarray
  scale: np.ndarray
  keep: np.ndarray
  add: np.ndarray
  start: np.ndarray  # one number


def make_schedule(config: ScheduleConfig, steps: int) -> Schedule:
  """The table for so many steps, from 1 to the training's.  Raises ValueError for others."""
  if not 1 <= steps <= config.train_steps:
    raise ValueError(f"{steps} steps; expected 1 to {config.train_steps}")
  signal = signal_kept(config)
  time = time_steps(config, steps)
  return (_ddim if config.sampler == "ddim" else _euler)(config, signal, time)


def signal_kept(config: ScheduleConfig) -> np.ndarray:
  """How much of a picture's variance is left at each step of the training, [train_steps]."""
  if config.beta_schedule == "linear":
    betas = np.linspace(config.beta_start, config.beta_end, config.train_steps)
  else:
    betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.train_steps) ** 2
  return np.cumprod(1 - betas)


def time_steps(config: ScheduleConfig, steps: int) -> np.ndarray:
  """The steps of the training's schedule that are visited, falling: float64 [steps]."""
  train = config.train_steps
  if config.spacing == "linspace":
    time = np.linspace(0, train - 1, steps)[::-1]
    return time.round() if config.sampler == "ddim" else time
  if config.spacing == "trailing":
    return np.arange(train, 0, -train / steps).round()[:steps] - 1
  return np.arange(steps)[::-1] * (train // steps) + float(config.offset)


def _euler(config, signal, time):
  noise = ((1 - signal) / signal) ** 0.5  # standard deviation, next to a picture of full strength
  sigma = np.interp(time, np.arange(len(noise)), noise)
  step = np.append(sigma[1:], 0) - sigma
  start = sigma.max() if config.spacing != "leading" else (sigma.max() ** 2 + 1) ** 0.5
  scale = (sigma**2 + 1) ** -0.5
  if config.prediction == "epsilon":
    return _table(time, scale, np.ones_like(sigma), step, start)
  # The picture is latents * scale^2 - prediction * sigma * scale.
  return _table(time, scale, 1 + step * sigma * scale**2, step * scale, start)


def _ddim(config, signal, time):
  now = signal[np.minimum(time.astype(int), config.train_steps - 1)]
  # The next step is a whole stride on, wherever the spacing put this one.
  before = time.astype(int) - config.train_steps // len(time)
  last = 1.0 if config.last_alpha_one else signal[0]
  then = np.where(before >= 0, signal[np.maximum(before, 0)], last)
  root = lambda x: x**0.5
  ones = np.ones_like(now)
  if config.prediction == "epsilon":
    keep = root(then / now)
    return _table(time, ones, keep, root(1 - then) - keep * root(1 - now), 1.0)
  keep = root(then * now) + root((1 - then) * (1 - now))
  return _table(time, ones, keep, root((1 - then) * now) - root(then * (1 - now)), 1.0)


def _table(*columns):
  return Schedule(*(np.asarray(c, np.float32) for c in columns))
