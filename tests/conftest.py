"""Shared by all tests: slow ones on request, the shared oracles and data where they are present."""

import os
from pathlib import Path

import pytest
import torch

# nothing here may reach for the network
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# without a GPU the kernels run in Triton's interpreter; it reads this when triton is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --run-slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


def _shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not beside this checkout")
    return path


@pytest.fixture
def ponet_oracle() -> Path:
    """Pre-training model of the published code in float64."""
    return _shared("golden", "ponet_reference.safetensors")


@pytest.fixture
def lra_oracle() -> Path:
    """Long Range Arena mixing step of the published code in float64."""
    return _shared("golden", "lra_mixer_reference.safetensors")


@pytest.fixture
def wikipedia() -> Path:
    """A compressed JSONL file of real articles."""
    return _shared("data", "wikipedia", "part-10.jsonl.xz")
