"""Model FLOPs against what is published, what XLA says, and what the step's own program does."""
import dataclasses
import math

import jax
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

from mgjax import trees
from mgjax.checkpoint import abstract_params
from mgjax.config import ClipVitConfig
from mgjax.data.config import DataConfig
from mgjax.data.packing import Format
from mgjax.data.pipeline import batch_arrays
from mgjax.models.attention import packed_causal_mask
from mgjax.models.clip_vit import ClipVit
from mgjax.models.remat import KEEP_ALL
from mgjax.presets import find
from mgjax.sharding import make_mesh, mesh_context
from mgjax.train.config import RunConfig
from mgjax.train.flops import Work, model_flops, pairs_seen, whole_batch
from mgjax.train.optimizer import OptimizerConfig, Row, split_frozen
from mgjax.train.recipes import ALIGN, TUNE_TEXT, tune
from mgjax.train.state import model_builder
from mgjax.train.step import batch_loss

TABLES = {"align": ALIGN, "tune": tune(), "all": (("", 1.0),), "none": (("", None),),
          "vision": (("^vision/", 1.0), ("", None)), "text": TUNE_TEXT,
          "body": (("^decoder/embedding$", None), ("^decoder/", 1.0), ("", None)),
          "vision_hr": (("^(vision_hr|mining)/", 1.0), ("", None))}


def make_config(preset, table, objective="language", **changes):
  """A run of a preset whose table of TABLES says what trains, without remat."""
  model = dataclasses.replace(find(preset).model, **changes)
  data = DataConfig("data.json", "", "chatml_direct", 64, hr_size=model.hr_size,
                    tokens_per_image=max(1, model.visual_tokens),
                    images_per_row=1 if model.vision else 0)
  table = tuple(Row(*row) for row in TABLES[table])
  return RunConfig(model=model, data=data, objective=objective, remat=KEEP_ALL, dtype="float32",
                   optimizer=OptimizerConfig(table=table))


def operations(jaxpr) -> int:
  """Operations of the products and convolutions of a program, scans taken as often as they run."""
  total = 0
  for eqn in jaxpr.eqns:
    name, shapes = eqn.primitive.name, [getattr(v.aval, "shape", ()) for v in eqn.invars]
    out = eqn.outvars[0].aval.shape if eqn.outvars else ()
    if name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      total += 2 * math.prod(out) * math.prod(shapes[0][i] for i in contracted)
    elif name == "conv_general_dilated":
      _, *taps = eqn.params["dimension_numbers"].rhs_spec
      total += 2 * math.prod(out) * math.prod(shapes[1][i] for i in taps)
    elif name == "ragged_dot_general":  # M x D by D x F, and the two gradients of that
      total += 2 * math.prod(shapes[0]) * out[-1]
    elif name == "scan":
      total += eqn.params["length"] * operations(eqn.params["jaxpr"].jaxpr)
    elif name == "cond":  # the form that is not for the CPU comes last
      total += operations(eqn.params["branches"][-1].jaxpr)
    elif "resize" not in str(eqn.params.get("name")):  # interpolation is written as products
      total += sum(map(operations, jaxprs_in_params(eqn.params)))
  return total


def step_operations(config, shape) -> int:
  """What the step's own program does: the gradients of what trains, dead code left out."""
  mesh = make_mesh(devices=jax.devices()[:1])
  with mesh_context(mesh):
    graphdef, params = abstract_params(model_builder(config, shape.hr_size), mesh)
    trained, frozen = split_frozen(params, config.optimizer.table)
    batch = {k: jax.ShapeDtypeStruct(*v) for k, v in batch_arrays(shape).items()}

    def loss(trained, frozen, batch):
      return batch_loss(nnx.merge(graphdef, trees.merge(trained, frozen)), batch, None)[0]

    made = jax.make_jaxpr(jax.value_and_grad(loss) if trained else loss)(trained, frozen, batch)
    return operations(dce_jaxpr(made.jaxpr, [True] * len(made.jaxpr.outvars))[0])


TINY = Format(2, 48, 1, 128, 16)


@pytest.mark.parametrize("preset,table,shape,changes", [
    ("tiny", "align", TINY, {}), ("tiny", "tune", TINY, {}), ("tiny", "all", TINY, {}),
    ("tiny", "vision", TINY, {}), ("tiny", "vision_hr", TINY, {}),
    ("tiny-lr", "align", TINY, {"projector_depth": 3}),
    ("tiny-hd", "tune", Format(1, 96, 1, 256, 80), {}),
    ("tiny", "tune", Format(1, 96, 1, 256, 80), {}),
    ("tiny", "tune", Format(2, 48, 0, 128, 16), {}),
    ("tiny", "text", Format(2, 48, 0, 0, 0), {"vision": None, "vision_hr": None})])
def test_counts_what_the_step_computes(preset, table, shape, changes):
  """Stages, one tower, high definition, the larger of two resolutions, rows of text alone, and a
  language model alone.  The step masks the upper triangle of attention, but computes it."""
  config = make_config(preset, table, **changes)
  square = dataclasses.replace(whole_batch(shape), pairs=shape.rows * shape.length**2)
  assert model_flops(config, square).total == step_operations(config, shape)


@pytest.mark.parametrize("table,decoder", [
    ("tune", {"experts": 4}), ("align", {"experts": 4}), ("tune", {"tied_head": True}),
    ("body", {"tied_head": True})])
def test_counts_only_the_experts_that_a_token_uses(table, decoder):
  """And a head that is the embedding, trained or not."""
  decoder = dataclasses.replace(find("tiny").model.decoder, **decoder)
  config = make_config("tiny", table, decoder=decoder)
  square = dataclasses.replace(whole_batch(TINY), pairs=TINY.rows * TINY.length**2)
  assert model_flops(config, square).total == step_operations(config, TINY)


@pytest.mark.parametrize("tower", ["vision", "vision_hr"])
def test_counts_the_pre_training_of_a_tower(tower):
  """With the head of its own that the tower gets."""
  config = make_config("tiny", "all", f"tags:{tower}")
  assert model_flops(config, whole_batch(TINY)).total == step_operations(config, TINY)


def test_agrees_with_xla():
  """XLA also counts what is no product: little beside wide ones.  One block: it counts the body of
  a scan once."""
  config = make_config("tiny", "none", vision=ClipVitConfig(56, width=256, depth=2, heads=4,
                                                            mlp_width=1024))
  mesh = make_mesh(devices=jax.devices()[:1])
  with mesh_context(mesh):
    graphdef, params = abstract_params(
        lambda: ClipVit(config.model.vision, dtype="float32", rngs=nnx.Rngs(0)), mesh)
    run = jax.jit(lambda params, images: nnx.merge(graphdef, params)(images))
    xla = run.lower(params, jax.ShapeDtypeStruct((8, 56, 56, 3), "float32")).compile()
  ours = model_flops(config, Work(1, 1, 8, 128)).forward["vision"]
  assert 1 < xla.cost_analysis()["flops"] / ours < 1.02


def test_published_sizes_of_the_towers():
  """timm's tables: 191.11 G multiply-adds for CLIP ViT-L/14 at 336 with all 24 blocks, 34.40 G for
  ConvNeXt-L at 224 with its head of 1000 classes."""
  whole = dataclasses.replace(find("mgm-7b").model.vision, select_layer=-1)
  config = make_config("mgm-7b", "none", vision=whole)
  assert model_flops(config, Work(1, 1, 1, 768)).forward["vision"] / 2e9 == pytest.approx(
      191.11, rel=1e-3)
  config = make_config("mgm-7b", "none", "tags:vision_hr")
  assert model_flops(config, Work(1, 1, 1, 224)).forward["vision_hr"] / 2e9 == pytest.approx(
      34.40, rel=2e-3)


def test_six_and_four_operations_per_weight_of_llama_2_7b():
  """6,738,415,616 parameters, less the embedding that is looked up and 65 norms; 4 of 6 where the
  decoder only hands gradients on."""
  weights = 6_738_415_616 - 32000 * 4096 - 65 * 4096
  for table, each in ("tune", 6), ("align", 4):
    flops = model_flops(make_config("mgm-7b", table), Work(10, 0, 1, 768))
    assert flops.of("decoder") + flops.of("head") == each * weights * 10
  # The towers stay frozen and have nothing in front of them.
  assert not flops.backward["vision"] and not flops.backward["vision_hr"]


def test_pairs_seen_are_those_of_the_mask():
  """Also where a window cuts them off."""
  segments = jax.numpy.ones((1, 7), int)
  for window in (None, 1, 3, 7, 9):
    assert pairs_seen(7, window) == packed_causal_mask(segments, window).sum()
