"""Install the project: `pip install -e .`, with the tests `pip install -e ".[test]"`."""

from pathlib import Path

from setuptools import setup

setup(
    name="ponet",
    version="0.1.0",
    description="PoNet (Pooling Network) long-sequence encoder in PyTorch and Triton",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "ponet",
        "ponet.mixers",
        "ponet.run",
        "ponet_kernels",
        "ponet_kernels.triton_kernels",
        "ponet_kernels.vectorised",
        "pretrain",
        "lra",
        "glue",
    ],
    package_dir={"ponet_kernels": "kernels/ponet_kernels"},
    package_data={
        "pretrain": ["configs/*.yaml", "deepspeed.json"],
        "lra": ["configs/*.yaml"],
        "glue": ["configs/*.yaml"],
    },
    install_requires=[
        # the upper bound keeps the tested builds; a CPU-only build of 2.13 satisfies it too
        "torch>=2.11,<2.14",
        "triton>=3.6; platform_system == 'Linux'",
        "deepspeed>=0.19,<0.20",
        "datasets>=4.0",
        "tokenizers>=0.22",
        "einops>=0.8",
        "safetensors>=0.6",
        "filelock>=3.16",
        "psutil>=6.0",
        "sentencex>=1.0",
        "numpy>=2.0",
        "pyyaml>=6.0",
        "tensorboard>=2.19",
        "tqdm>=4.66",
        # metrics of GLUE
        "scikit-learn>=1.6",
        "scipy>=1.14",
        # images of Long Range Arena
        "pillow>=11",
        # plots
        "matplotlib>=3.9",
    ],
    extras_require={
        "test": [
            "pytest>=8.0",
            "hypothesis>=6.100",
            "ruff>=0.14",
            "pyright[nodejs]>=1.1.400",
            "transformers>=5.0",
        ],
    },
)
