"""Trajectories of the samplers, against diffusers' schedulers."""
import dataclasses

import numpy as np
import pytest
from diffusers_golden import TRAJECTORIES, network, normal

from mgjax.config import ConfigError
from mgjax.diffusion.config import ScheduleConfig
from mgjax.diffusion.schedule import make_schedule


@pytest.mark.parametrize("sampler,prediction,spacing,steps", TRAJECTORIES)
def test_trajectory(sdxl, sampler, prediction, spacing, steps):
  want = sdxl.golden[f"trajectory.{sampler}.{prediction}.{spacing}.{steps}"]
  table = make_schedule(ScheduleConfig(sampler=sampler, prediction=prediction, spacing=spacing),
                        steps)
  x, path = table.start * normal(5), []
  for i in range(len(table.time)):
    given = table.scale[i] * x
    x = table.keep[i] * x + table.add[i] * network(given, table.time[i])
    path.append(np.concatenate([[table.time[i]], given, x]))
  np.testing.assert_allclose(path, want, rtol=1e-5, atol=2e-5)


def test_ddim_may_end_without_noise(sdxl):
  table = make_schedule(ScheduleConfig(sampler="ddim", last_alpha_one=True), 5)
  got = table.keep[-1] * np.ones(3) + table.add[-1] * 0.25
  np.testing.assert_allclose(got, sdxl.golden["last_alpha_one"], rtol=1e-5)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range(steps):
  with pytest.raises(ValueError, match=f"{steps} steps; expected 1 to 1000"):
    make_schedule(ScheduleConfig(), steps)


def test_unknown_names_are_told():
  with pytest.raises(ConfigError, match="'dpm' does not exist; one of euler, ddim"):
    dataclasses.replace(ScheduleConfig(), sampler="dpm")
