"""Drawing compiled for slices that nobody has here.  Skipped where the TPU compiler is missing."""
import importlib.util
import pickle

import pytest

from mgjax.config import ConfigError
from mgjax.diffusion.config import SdxlConfig, TextEncoderConfig, UNetConfig, VaeConfig
from mgjax.diffusion.flops import drawing_flops
from mgjax.diffusion.painter import Painting
from mgjax.tpu import account, compiler, drawing, report, slices

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                    reason="no TPU compiler: pip install -e '.[tpu]'")
TEXT = TextEncoderConfig(vocab_size=600, width=16, depth=2, heads=2, mlp_width=32)
TINY = SdxlConfig(
    TEXT, TextEncoderConfig(vocab_size=600, width=32, depth=2, heads=2, mlp_width=48,
                            projection=24),
    UNetConfig(side=16, widths=(16, 32), resnets=1, depths=(0, 2), middle_depth=1, heads=(2, 4),
               context=48, pooled=24, number_width=8, groups=8),
    VaeConfig(widths=(8, 16), resnets=1, groups=8))
STEPS = 7


@pytest.fixture(scope="module")
def jobs():
  """One picture on four chips: its two halves of guidance on two each."""
  return drawing.drawings(TINY, Painting(steps=STEPS), 1, slices.parse_slice("v5e-4"))


@needs_compiler
def test_sampling_on_a_slice(jobs):
  """Mesh, FLOPs and memory of what a painter runs."""
  encode, sample, decode = jobs
  made = account.of_job(sample, slices.parse_slice("v5e-4"))
  assert made.mesh == {"data": 2, "tensor": 2} and made.steps == STEPS
  assert made.model_flops == drawing_flops(TINY, 32, 32, STEPS)["sample"] / 4
  # Keys and values are computed on both chips of a half; nothing else is done twice.
  assert 0.9 < made.compiled_flops / made.model_flops < 1.4
  assert any(c["axes"] == "tensor" for c in made.collectives)
  assert "for each of 7 steps" in made.as_text()
  told = drawing.summary([encode, sample], [made, made])
  assert told.startswith("1 picture on v5e-4") and "encode" in told


def test_what_lies_there_beside_a_program_counts():
  """Weights that it does not read, and another model."""
  chip = slices.chip(slices.parse_slice("v5e-4"))
  compiled = compiler.Compiled("", 50, 60, 7, 3, 0.0, True)  # 50 bytes of arguments, in tiles 60
  of = lambda beside: report.memory(
      compiler.Program("sample", {}, 1.0, 0, 1, {"params": 100}, beside=beside), compiled, chip)
  assert of(0).peak == 100 - 50 + 60 + 7 + 3 and of(0).fits
  assert of(40).peak == of(0).peak + 40 and not of(chip.hbm).fits


@needs_compiler
def test_pictures_that_chips_cannot_share_are_decoded_in_turns():
  encode, sample, decode = drawing.drawings(TINY, Painting(), 6, slices.parse_slice("v5e-4"))
  assert (sample.pictures, sample.runs, decode.pictures, decode.runs) == (6, 1, 2, 3)
  devices = slices.describe(slices.parse_slice("v5e-4"))
  assert dict(sample.mesh(devices).shape)["data"] == 4  # 12 rows
  assert dict(decode.mesh(devices).shape)["data"] == 2
  assert pickle.loads(pickle.dumps(sample)) == sample  # it goes to the sketching process


@needs_compiler
@pytest.mark.parametrize("painting, said", [
    (Painting(width=33), "width 33: expected a multiple of 2"),
    (Painting(steps=0), "steps 0: expected 1 to 1000")])
def test_what_cannot_be_painted_is_refused(painting, said):
  with pytest.raises(ConfigError, match=said):
    drawing.drawings(TINY, painting, 1, slices.parse_slice("v5e-4"))
