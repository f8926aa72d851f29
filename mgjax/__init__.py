"""Mini-Gemini in JAX/Flax: what a notebook needs, by name; each is imported when first used.

    model = mgjax.load("work_dirs/demo/stage2")
    print(model.chat("photo.jpg", "what do the signs say?"))
"""

import importlib

_HOME = {
    "ModelConfig": "mgjax.config",
    "PRESETS": "mgjax.presets",
    "MiniGemini": "mgjax.models.mini_gemini",
    "make_mesh": "mgjax.sharding",
    "mesh_context": "mgjax.sharding",
    "load_model": "mgjax.checkpoint",
    "make_pipeline": "mgjax.data.pipeline",
    "run_config": "mgjax.train.config",
    "train": "mgjax.train.loop",
    "Engine": "mgjax.infer.engine",
    "Sampling": "mgjax.infer.sampling",
    "Assistant": "mgjax.infer.assistant",
    "load": "mgjax.infer.assistant",
    "open_painter": "mgjax.diffusion.painter",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
  if name not in _HOME:
    raise AttributeError(f"mgjax has no {name!r}; it has {', '.join(__all__)}")
  return getattr(importlib.import_module(_HOME[name]), name)


def __dir__():
  return __all__
