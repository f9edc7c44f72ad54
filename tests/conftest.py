"""Shared by all tests: their environment, and oracles where they are present."""

import os
import traceback
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
    "has no attribute 'get_bf16'": "makes no bfloat16 constants",
    "only 0-dimensional arrays can be converted": "takes no range() of a tensor with NumPy 2.5",
}
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run tests that take minutes")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip a test that asks an old interpreter for what it cannot do; a GPU needs none."""
    try:
        return (yield)
    except Exception as error:
        reason = None if torch.cuda.is_available() else _interpreter_limit(error)
        if reason is None:
            raise
        pytest.skip(f"Triton's interpreter before 3.9 {reason}")


def _interpreter_limit(error: BaseException) -> str | None:
    """Why Triton's interpreter failed, when it is old and that is a known limit of it."""
    if isinstance(error, BaseExceptionGroup):
        reasons = [_interpreter_limit(part) for part in error.exceptions]
        return None if None in reasons else reasons[0]
    text = "".join(traceback.format_exception(error))
    is_new = tuple(map(int, version("triton").split(".")[:2])) >= (3, 9)
    if is_new or "InterpreterError" not in text:
        return None
    return next((reason for known, reason in INTERPRETER_LIMITS.items() if known in text), None)


@pytest.fixture(scope="module")
def nan_in_new_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that what is read unwritten or left unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _shared(*parts: str) -> Any:
    """A fixture: the path of what lies beside some checkouts, or a skipped test."""

    @pytest.fixture
    def path() -> Path:
        found = SHARED.joinpath(*parts)
        if not found.exists():
            pytest.skip(f"{'/'.join(parts)} is not beside this checkout")
        return found

    return path


# a model and mixing steps of the published code, in float64
ponet_oracle = _shared("golden", "ponet_reference.safetensors")
lra_oracle = _shared("golden", "lra_mixer_reference.safetensors")
shared_data = _shared("data")
