"""Vesalius: the training engine for medical vision-language models.

Lower bounds are the versions that were tested together (constraints.txt pins all of them); an upper bound stands where a later
version is known not to work, and says why.
"""

from setuptools import find_packages, setup

REQUIREMENTS = [
    # Its CUDA build for Linux brings the Triton that it was built with; elsewhere the kernels' references run and need none.
    # torch 2.14 brings Triton 3.8: the kernels have been compiled with 3.7 only.
    "torch>=2.13,<2.14",
    "transformers>=5.22.2,<5.23",  # 5.23 took a class away that liger-kernel patches, and asks for another `kernels`
    "trl>=1.16",
    "peft>=0.21.2",
    "accelerate>=1.15",
    "datasets>=5.2",
    "tokenizers>=0.23.3",
    "safetensors>=0.8",
    "sentencepiece>=0.2.3",  # reads the tokenizer.model of a LLaVA checkpoint, through transformers
    "protobuf>=6",  # as sentencepiece
    "huggingface_hub>=2.4",
    "httpx2>=2.16",  # huggingface_hub's client, and ours
    "pyarrow>=26",  # Parquet; what datasets keeps rows in
    "numpy>=2.4",
    "scipy>=1.17",
    "pillow>=13",
    "nltk>=3.10",  # BLEU; what rouge-score counts with
    "rouge-score>=0.1.2",
    "scikit-learn>=1.9",  # recall and confusion of diagnoses
    "scikit-image>=0.26",  # its example images are starter data
    "simplejpeg>=1.9",  # decodes plain JPEG
    "pyspng>=0.1.4",  # decodes PNG of 8 bits
    "isal>=1.9",  # inflates what is in them
    "lz4>=4.4.5",  # VESALIUS_IMAGE_CACHE_FORM
    "tifffile>=2026.3.3",  # TIFF files that Pillow reads with a loss or not at all
    "pydicom>=3.0.2",
    "pydicom-data>=1.0",  # starter data, through pydicom.data
    "python-gdcm>=3.2",  # decodes compressed DICOM, through pydicom
    "matplotlib>=3.11",
    "jinja2>=3.1",
    "markupsafe>=3.0",
    "pyyaml>=6.0",
    "psutil>=7.2",  # memory held, on every system
    "tqdm>=4.70",
]

EXTRAS = {
    "test": [
        "pytest>=9.2",
        "pytest-xdist>=3.8",  # pytest -n 2
        "hypothesis>=6.170",
        "ruff>=0.17.6",
        "mypy>=2.4",
        "types-pyyaml",
        "types-tqdm",
        "pre-commit>=4",
        "onnx>=1.23",  # as in the extra `export`
        "onnxscript>=0.7.2",
        "onnxruntime>=1.31",
        "starlette>=1.10",  # as in the extra `serve`
        "uvicorn>=0.54",
        "blosc2>=4.14",
        "nninteractive-client>=2.6",  # drives the server that viewers of volumes ask
        "nbformat>=5.11",
        "nbclient>=0.11",  # runs notebooks/, in a kernel of ipykernel
        "ipykernel>=7.4",
        "nibabel>=5.4",  # as in the extra `volumes`
        "highdicom>=0.28.2",
        "triton>=3.7.1,<3.8; sys_platform == 'linux'",  # its interpreter runs the kernels' bodies where there is no GPU
    ],
    "volumes": ["nibabel>=5.4", "highdicom>=0.28.2"],  # NIfTI; recipes.segment_volume --out seg.dcm
    "serve": ["starlette>=1.10", "uvicorn>=0.54", "blosc2>=4.14"],  # recipes.serve_viewer
    "export": ["onnx>=1.23", "onnxscript>=0.7.2", "onnxruntime>=1.31"],  # recipes.export --target onnx, triton and tensorrt
    "tensorrt": ["tensorrt-rtx>=1.7.1"],  # --target tensorrt, beside `export`, where torch-tensorrt is not
    "gpu": [
        "liger-kernel>=0.8.5",  # --use_liger_kernel
        "xformers>=0.0.35",
        "torch-tensorrt>=2.13,<2.14",
        "nvidia-dali-cuda130>=2.3; sys_platform == 'linux'",
    ],
    "dali": ["nvidia-dali-cuda130>=2.3; sys_platform == 'linux'"],  # --loader dali, on a CPU too
    # --attn_implementation flash_attention_2. Its build needs torch and nvcc in place, so it comes after the rest and alone:
    # pip install --no-build-isolation -e '.[flash]'
    "flash": ["flash-attn>=2.8.3"],
    "scale": ["deepspeed>=0.19.8", "ninja>=1.13"],  # --deepspeed; ninja builds its operators
    "tracking": ["wandb", "tensorboard"],  # --report_to
}

setup(
    name="vesalius",
    version="0.1.0",
    description="A compiled-kernel training engine for medical vision-language models",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Healthcare Industry",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: Microsoft :: Windows",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
    packages=find_packages(include=["kernels*", "models*", "engine*", "recipes*", "bench*"]),
    package_data={
        "recipes": ["deepspeed/*.json"],
        "models": ["starter/policy/*", "starter/skin_policy/*"],
        "engine": ["report/*.html"],
    },
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)
