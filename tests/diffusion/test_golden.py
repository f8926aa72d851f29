"""golden.npz is what diffusers gives, where diffusers is."""
import numpy as np
import pytest


def test_golden_is_of_diffusers(sdxl):
  pytest.importorskip("diffusers")
  from diffusers_golden import make
  made = make(sdxl.source)
  assert made.keys() == sdxl.golden.keys()
  for name, value in made.items():
    np.testing.assert_allclose(value, sdxl.golden[name], atol=1e-4, rtol=0, err_msg=name)
