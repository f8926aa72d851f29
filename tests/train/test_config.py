"""Config files, and what a wrong one is told."""
import pytest

from configs import demo, stage1, stage2
from mgjax.config import ConfigError, ModelConfig, build
from mgjax.models.remat import RematConfig
from mgjax.presets import PRESETS, find
from mgjax.train.config import RunConfig, run_config


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stage", [stage1, stage2])
def test_every_preset_makes_a_run(stage, preset):
  if stage is stage1 and find(preset).model.grid > 1:
    with pytest.raises(ValueError, match="high definition begins in stage 2"):
      stage.get_config(preset)
    return
  values = stage.get_config(preset).to_dict()
  values["data"]["path"] = "x.json"
  run = run_config(values)
  assert run.model == find(preset).model
  assert run.data.tokens_per_image == run.model.visual_tokens


@pytest.mark.parametrize("preset,width,tokens,template,lr", [
    ("mgm-7b", 4096, 576, "vicuna_v1", 2e-5), ("mgm-13b-hd", 5120, 2880, "vicuna_v1", 2e-5),
    ("mgm-8b", 4096, 576, "llama_3", 2e-5), ("mgm-34b-hd", 7168, 2880, "chatml_direct", 1e-5)])
def test_the_numbers_of_the_recipe(preset, width, tokens, template, lr):
  run = run_config(stage2.get_config(preset).to_dict())
  assert (run.model.decoder.width, run.model.visual_tokens) == (width, tokens)
  assert (run.data.template, run.optimizer.learning_rate) == (template, lr)
  assert (run.optimizer.weight_decay, run.optimizer.clip_norm) == (0, None)
  samples = lambda data: data.batch_size * data.images_per_row  # noqa: E731  (rows are packed)
  assert (samples(run.data), run.optimizer.warmup_ratio) == (128, 0.03)
  assert run.optimizer.table[0].lr == (2.0 if preset.startswith("mgm-34b") else 1.0)
  align = run_config(stage1.get_config(preset.removesuffix("-hd")).to_dict())
  assert (samples(align.data), align.optimizer.learning_rate) == (256, 1e-3)
  assert align.data.template == ("llama_3" if preset == "mgm-8b" else "plain")
  assert align.data.aspect == "square" and run.data.aspect == "pad"


@pytest.mark.parametrize("size", ["full", "quick"])
def test_the_demo_is_runs_in_order(size):
  values = demo.get_config(size).to_dict()
  assert set(values["order"]) == set(values["runs"])
  done = set()
  for name in values["order"]:
    run = run_config(values["runs"][name])
    assert {source for _, source in run.init_from} <= done
    done.add(name)
  twin, mining = (run_config(values["runs"][n]).model for n in ("stage2_twin", "stage2"))
  assert twin.vision_hr is None and twin.visual_tokens == mining.visual_tokens


def test_one_policy_for_all_parts_as_runs_saved_it_before():
  good = stage2.get_config("tiny").to_dict()
  old = run_config(good | {"remat": "dots_saveable"}).remat
  assert old == RematConfig("dots_saveable", "dots_saveable", "dots_saveable")


def test_wrong_keys_and_values_are_named():
  good = stage2.get_config("tiny").to_dict()
  with pytest.raises(ValueError, match=r"config.acumulate does not exist; did you mean "
                                       r"config.accumulate\?"):
    run_config(good | {"acumulate": 2})
  with pytest.raises(ValueError, match=r"config.data.batch_sise .*config.data.batch_size"):
    run_config(good | {"data": {"batch_sise": 2}})
  with pytest.raises(ValueError, match="config.steps is 'ten'; expected int"):
    run_config(good | {"steps": "ten"})
  with pytest.raises(ValueError, match="config.remat.decoder is 'all'; expected one of none"):
    run_config(good | {"remat": {"decoder": "all"}})
  with pytest.raises(ValueError, match="config.remat.towers is 'save_mlp'; expected one of none"):
    run_config(good | {"remat": {"towers": "save_mlp"}})
  with pytest.raises(ValueError, match="config.attention is 'flash'; expected one of auto"):
    run_config(good | {"attention": "flash"})
  with pytest.raises(ValueError, match="batch_size 8 is not a multiple of config.accumulate 3"):
    run_config(good | {"accumulate": 3, "data": {"path": "x", "batch_size": 8}})
  with pytest.raises(ValueError, match="preset 'mgm-7c' does not exist; did you mean 'mgm-7b'"):
    stage1.get_config("mgm-7c")
  with pytest.raises(ValueError, match="hr_size 700 must be a multiple of 32"):
    build(ModelConfig, {"hr_size": 700}, "config.model")
  with pytest.raises(ValueError, match="global_view needs grid >= 2"):
    build(ModelConfig, {"global_view": True}, "config.model")
  for key, value in [("steps", 0), ("steps", -1), ("epochs", 0.0), ("accumulate", 0),
                     ("log_every", 0), ("chat_template", "nonsense"), ("chat_aspect", "round"),
                     ("init_from", "vision="), ("init_from", ("", "x")),
                     ("init_from", (("a", "b", "c"),)), ("seed", True),
                     ("checkpoint", {"every": 0}), ("optimizer", {"learning_rate": float("nan")}),
                     ("optimizer", {"learning_rate": True}),
                     ("optimizer", {"table": (("(", 1.0),)}),
                     ("optimizer", {"table": (("", 1.0, None, 1),)}),
                     ("optimizer", {"table": (("", 1.0, 12),)})]:
    with pytest.raises(ConfigError):
      run_config(good | {key: value})
  for model in ({"decoder": {"kv_heads": 0}}, {"vision": {"patch_size": 0}},
                {"vision_hr": {"drop_path": 1.0}}, {"decoder": {"head_dim": 15}}, {"grid": 0}):
    with pytest.raises(ConfigError):
      build(ModelConfig, model, "config.model")
  with pytest.raises(ValueError, match="config needs data"):
    build(RunConfig, {"model": ModelConfig()}, "config")
