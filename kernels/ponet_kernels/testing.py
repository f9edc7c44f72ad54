"""Comparison of tensors as the tests and the benchmarks do it."""

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value, both in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if actual.shape != expected.shape:
        raise ValueError(f"expected shape {tuple(expected.shape)}, found {tuple(actual.shape)}")
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return float((actual - expected).abs().max() / scale)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "tensor") -> None:
    """Fail when `relative_error` exceeds `tolerance` or anything is not finite."""
    error = relative_error(actual, expected)
    # a NaN error compares false, so it fails too
    assert error <= tolerance, f"{what}: relative error {error:.3g} exceeds {tolerance:.3g}"
