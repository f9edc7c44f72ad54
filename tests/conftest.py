"""Shared by all tests: slow ones on request, the shared oracles and data where they are present."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# threads that wait for work must not take the processor from those that work; read by torch
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# nothing here may reach for the network
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

# programs that tests start find this checkout, installed or not
_ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = f"{_ROOT}{os.pathsep}{_ROOT / 'kernels'}"

# without a GPU the kernels run in Triton's interpreter; it reads this when triton is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# what the interpreter of Triton before 3.9 cannot do, by the message it ends with
INTERPRETER_LIMITS = {
    "has no attribute 'get_bf16'": "Triton's interpreter before 3.9 makes no bfloat16 constants",
    "only 0-dimensional arrays can be converted": (
        "Triton's interpreter before 3.9 takes no range() of a tensor with NumPy 2.5 or later"
    ),
}
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip a test that asks an old interpreter for what it cannot do; a GPU needs none."""
    try:
        return (yield)
    except Exception as error:
        reason = None if torch.cuda.is_available() else _interpreter_limit(error)
        if reason is None:
            raise
        pytest.skip(reason)


def _interpreter_limit(error: BaseException | None) -> str | None:
    """Why Triton's interpreter failed, when it is old and that is a known limit of it."""
    if error is None:
        return None
    if isinstance(error, BaseExceptionGroup):
        reasons = [_interpreter_limit(part) for part in error.exceptions]
        return None if None in reasons else reasons[0]
    if type(error).__name__ == "InterpreterError":
        import triton

        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
            for message, reason in INTERPRETER_LIMITS.items():
                if message in str(error):
                    return reason
    return _interpreter_limit(error.__cause__)


@pytest.fixture(scope="module")
def nan_in_new_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that what is read unwritten or left unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


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
