"""Triton kernels of global aggregation against formulas in float64, one sequence at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ponet_kernels.testing import assert_close
from tests.streams import DEVICE, Columns, huge, offsets, random, views

pytest.importorskip("triton")
from ponet_kernels import triton_kernels as kernels
from ponet_kernels.triton_kernels.launch import _limit_on, launch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_in_new_memory")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = 1e-5
SPREAD = {"share": 0, "spread": 1, "spread_of_two": 2}
# spans of few tokens are 64 long, tiles of scores 128
CASES = [
    (1, 1, [1], torch.float32),
    (1, 2, [1100], torch.bfloat16),
    (48, 1, [0, 1, 63, 0, 130, 64, 0], torch.float16),
    (48, 25, [1, 1, 0, 0, 1], torch.bfloat16),
    (64, 2, [200, 1, 129], torch.float32),
    (64, 64, [65, 3], torch.float16),
    (300, 12, [70, 0, 5], torch.bfloat16),
    (1000, 3, [5, 1], torch.float32),
    (40, 3, [70, 0, 1], torch.float64),
]


def case_id(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, list) else str(value).split(".")[-1]


class Inputs:
    """Tokens x, rows and weights of each sequence, and what the backward pass adds to them."""

    def __init__(self, width, num_rows, lengths, dtype, seed=0):
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        T, B = sum(lengths), len(lengths)
        self.lengths, self.span = lengths, (offsets(lengths), max(lengths, default=0))
        self.x = random(T, width, dtype=dtype, seed=seed)
        self.rows = random(B, num_rows, width, dtype=acc, seed=seed + 1)
        self.weights = random(T, num_rows, dtype=acc, seed=seed + 2)
        self.more_rows = random(B, num_rows, width, dtype=acc, seed=seed + 3)
        self.more_weights = random(T, num_rows, dtype=acc, seed=seed + 4)
        self.centre = random(B, num_rows, dtype=acc, seed=seed + 5)
        self.shared = random(B, width, dtype=acc, seed=seed + 6)

    def expected(self) -> dict[str, Tensor]:
        """All results in float64 on the CPU, one sequence at a time."""
        per_token = (self.x, self.weights, self.more_weights)
        hs, ws, more_ws = (x.cpu().double().split(self.lengths) for x in per_token)
        per_sequence = (self.rows, self.more_rows, self.centre, self.shared)
        rest = (x.cpu().double() for x in per_sequence)
        found: dict[str, list[Tensor]] = {}
        for h, w, w2, u, u2, centre, shared in zip(hs, ws, more_ws, *rest, strict=True):
            share = (shared / max(len(h), 1)).expand(len(h), -1)
            for name, value in {
                "means": h.sum(0, keepdim=True) / max(len(h), 1),
                "totals": h.sum(0, keepdim=True),
                "scores": h @ u.T,
                "slopes": w * (h @ u.T - centre),
                "softmax": w.softmax(0),
                "sums": (w.T @ h).unsqueeze(0),
                "spread": share + w @ u,
                "spread_of_two": share + w @ u + w2 @ u2,
                "share": share,
            }.items():
                found.setdefault(name, []).append(value)
        return {name: torch.cat(values) for name, values in found.items()}

    def found(self) -> dict[str, Tensor]:
        """All results of the kernels, on the CPU; each element of them is written."""
        x, weights, rows, span = self.x, self.weights, self.rows, self.span
        found = {
            "means": kernels.sequence_totals(x, *span, mean=True),
            "totals": kernels.sequence_totals(x, *span),
            "scores": kernels.token_scores(x, rows, *span),
            "slopes": kernels.token_scores(x, rows, *span, weights, self.centre),
            "softmax": kernels.sequence_softmax(weights, *span),
            "sums": kernels.sequence_sums(weights, x, *span),
        }
        for name, tensor in found.items():
            assert tensor.dtype == rows.dtype, name
        pairs = ((weights, rows), (self.more_weights, self.more_rows))
        for name, number in SPREAD.items():
            columns = Columns(x)
            kernels.spread_rows(pairs[:number], self.shared, *span, columns.written)
            found[name] = columns.check()
        return {name: tensor.cpu() for name, tensor in found.items()}


def tolerance(name: str, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return 1e-13
    if name not in SPREAD or dtype == torch.float32:
        return TOLERANCE
    # eps is twice the largest error of rounding; the interpreter cuts off instead of rounding to
    # bfloat16, which alone reaches it
    interpreted = DEVICE == "cpu" and dtype == torch.bfloat16
    return torch.finfo(dtype).eps * (2 if interpreted else 1)


def check(inputs: Inputs) -> None:
    found = inputs.found()
    for name, expected in inputs.expected().items():
        assert_close(found[name], expected, tolerance(name, inputs.x.dtype), name)


@pytest.mark.parametrize(("width", "num_rows", "lengths", "dtype"), CASES, ids=case_id)
def test_kernels_equal_formulas(width, num_rows, lengths, dtype):
    check(Inputs(width, num_rows, lengths, dtype))


# on a GPU kernels are compiled for most of them
@settings(deadline=None, max_examples=5)
@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=3),
    width=st.sampled_from([1, 3, 16, 40]),
    num_rows=st.sampled_from([1, 3, 16, 17]),
    dtype=st.sampled_from(DTYPES),
    slack=st.integers(0, 200),
    seed=st.integers(0, 99),
)
def test_kernels_equal_formulas_for_any_lengths(lengths, width, num_rows, dtype, slack, seed):
    inputs = Inputs(width, num_rows, lengths, dtype, seed)
    inputs.span = (inputs.span[0], max(lengths) + slack)
    check(inputs)


def test_softmax_joins_many_spans():
    # 34 spans of one sequence, their maxima far apart
    lengths = [3, 17_000, 60]
    scores = random(sum(lengths), 2) + torch.linspace(-80, 80, sum(lengths))[:, None].to(DEVICE)
    found = kernels.sequence_softmax(scores, offsets(lengths), max(lengths)).cpu()
    expected = torch.cat([s.softmax(0) for s in scores.cpu().double().split(lengths)])
    assert_close(found, expected, TOLERANCE)


@views
def test_any_strides(view):
    inputs = Inputs(48, 3, [70, 1, 0, 30], torch.bfloat16)
    inputs.x = view(inputs.x)
    for name in ("rows", "weights", "more_rows", "more_weights", "centre", "shared"):
        setattr(inputs, name, getattr(inputs, name).mT.contiguous().mT)
    assert not any(x.is_contiguous() for x in (inputs.x, inputs.rows, inputs.weights))
    check(inputs)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_weights_outside_the_range_of_half_precision(scale):
    """A second run gives equal bits."""
    inputs = Inputs(48, 3, [130, 0, 1], torch.float16)
    inputs.rows, inputs.weights = inputs.rows * scale, inputs.weights * scale
    found, again, expected = inputs.found(), inputs.found(), inputs.expected()
    for name in ("scores", "slopes", "sums"):
        assert_close(found[name], expected[name], TOLERANCE, name)
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_nan_stays_in_its_sequence(dtype):
    inputs = Inputs(16, 2, [3, 70, 4], dtype)
    # the NaN that devices produce, with all bits set
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32, device=DEVICE).view(torch.float32)
    inputs.x[40], inputs.rows[1, 0], inputs.weights[40] = nan.to(dtype), nan, nan
    found = inputs.found()
    for name, expected in inputs.expected().items():
        assert torch.equal(found[name].isnan(), expected.isnan()), name


def test_rows_beyond_two_to_the_31_elements(tmp_path):
    """Read and written; between two tokens of a sequence and before its first one."""
    inputs, big = Inputs(48, 3, [5, 1], torch.bfloat16), huge(tmp_path, 6, 2**29, torch.bfloat16)
    inputs.x, out = big[:, :48].copy_(inputs.x), big[:, 64:112]
    expected, span = inputs.expected(), inputs.span
    kernels.spread_rows(((inputs.weights, inputs.rows),), inputs.shared, *span, out)
    found = {
        "means": kernels.sequence_totals(inputs.x, *span, mean=True),
        "scores": kernels.token_scores(inputs.x, inputs.rows, *span),
        "sums": kernels.sequence_sums(inputs.weights, inputs.x, *span),
        "spread": out,
    }
    for name, tensor in found.items():
        assert_close(tensor.cpu(), expected[name], tolerance(name, inputs.x.dtype), name)


@pytest.mark.parametrize(
    ("hip", "capability", "limit"),
    [(None, (9, 0), {"maxnreg": 168}), (None, (8, 0), {"maxnreg": 184}), ("6.4", (9, 4), {})],
)
def test_kernels_run_on_the_device_of_their_tensors(monkeypatch, hip, capability, limit):
    """It need not be the current one. Registers are limited on NVIDIA's."""
    current, launched = [0], []

    @contextmanager
    def switch(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    def note(*args: Any, **options: Any) -> None:
        launched.append((current[0], options))

    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "device", switch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(Tensor, "device", property(lambda x: torch.device("cuda", len(x))))
    _limit_on.cache_clear()
    for index, options in ((0, {}), (1, {"max_registers": 168})):
        # a term that is left out comes first
        operands = (None, torch.empty(index), 5)
        launch({(3,): note}, (3,), operands, {"SIZE": 16}, num_warps=4, **options)
    launch({}, (0,), (torch.empty(1),), {}, num_warps=4)
    _limit_on.cache_clear()
    options = {"num_warps": 4, "SIZE": 16}
    assert launched == [(0, options), (1, options | limit)]
    assert current == [0]
