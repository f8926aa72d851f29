"""Trajectories of the samplers, against diffusers' schedulers."""
import dataclasses

import numpy as np
import pytest
from tiny_sdxl import SCHEDULER

from mgjax.config import ConfigError
from mgjax.diffusion.config import ScheduleConfig
from mgjax.diffusion.schedule import make_schedule

CASES = [(sampler, prediction, spacing, steps)
         for sampler in ("euler", "ddim") for prediction in ("epsilon", "v_prediction")
         for spacing in ("leading", "trailing", "linspace") for steps in (1, 4, 30)]


def theirs(sampler, **settings):
  """diffusers' scheduler."""
  diffusers = pytest.importorskip("diffusers")
  kind = {"euler": diffusers.EulerDiscreteScheduler, "ddim": diffusers.DDIMScheduler}[sampler]
  return kind.from_config(SCHEDULER | settings)


@pytest.mark.parametrize("sampler,prediction,spacing,steps", CASES)
def test_trajectory(sampler, prediction, spacing, steps):
  import torch
  scheduler = theirs(sampler, prediction_type=prediction, timestep_spacing=spacing)
  scheduler.set_timesteps(steps)
  rng = np.random.default_rng(0)
  noise = rng.normal(size=(2, 5)).astype(np.float32)
  network = lambda x, t: np.sin(3 * x) + t / 1000  # any function of what the UNet is given

  want = torch.tensor(noise) * scheduler.init_noise_sigma
  table = make_schedule(ScheduleConfig(sampler=sampler, prediction=prediction, spacing=spacing),
                        steps)
  got = table.start * noise
  for i, t in enumerate(scheduler.timesteps):
    assert table.time[i] == float(t)
    given = scheduler.scale_model_input(want, t)
    np.testing.assert_allclose(table.scale[i] * got, given, rtol=1e-5, atol=1e-5)
    want = scheduler.step(torch.tensor(network(given.numpy(), float(t))), t, want).prev_sample
    got = table.keep[i] * got + table.add[i] * network(table.scale[i] * got, table.time[i])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)
  assert len(table.time) == len(scheduler.timesteps)


def test_ddim_may_end_without_noise():
  import torch
  scheduler = theirs("ddim", set_alpha_to_one=True)
  scheduler.set_timesteps(5)
  table = make_schedule(ScheduleConfig(sampler="ddim", last_alpha_one=True), 5)
  x, e = torch.ones(3), torch.full((3,), 0.25)
  want = scheduler.step(e, scheduler.timesteps[-1], x).prev_sample
  np.testing.assert_allclose(table.keep[-1] * x + table.add[-1] * e, want, rtol=1e-5)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range(steps):
  with pytest.raises(ValueError, match=f"{steps} steps; expected 1 to 1000"):
    make_schedule(ScheduleConfig(), steps)


def test_unknown_names_are_told():
  with pytest.raises(ConfigError, match="'dpm' does not exist; one of euler, ddim"):
    dataclasses.replace(ScheduleConfig(), sampler="dpm")
