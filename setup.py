"""Vesalius: the training engine for medical vision-language models. The pins are versions that were run together."""

from setuptools import find_packages, setup

REQUIREMENTS = [
    "torch==2.13.0",
    "triton==3.7.1",
    "numpy==2.4.6",
    "pillow==13.0.0",
    "transformers==5.22.2",
    "tokenizers==0.23.3",
    "huggingface_hub==2.4.0",
    "httpx2==2.16.2",  # huggingface_hub's client, and ours
    "safetensors==0.8.0",
    "trl==1.16.0",
    "peft==0.21.2",
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "liger-kernel==0.8.5",
    "deepspeed==0.19.8",
    "ninja==1.13.2",
    "pydicom==3.0.2",
    "pydicom-data==1.0.0",
    "python-gdcm",
    "scikit-image==0.26.0",
    "scipy",
    "sentencepiece",
    "protobuf",
    "matplotlib",
    "jinja2",
    "tqdm",
]

setup(
    name="vesalius",
    version="0.1.0",
    description="A compiled-kernel training engine for medical vision-language models",
    python_requires=">=3.11",
    packages=find_packages(include=["kernels*", "models*", "engine*", "recipes*", "bench*"]),
    package_data={"models": ["starter/policy/*"], "engine": ["report/*.html"]},
    install_requires=REQUIREMENTS,
    extras_require={
        "test": ["pytest", "ruff"],
        "gpu": ["flash-attn", "xformers", "torch-tensorrt", "nvidia-dali-cuda130"],
        "tracking": ["wandb", "tensorboard"],
    },
)
