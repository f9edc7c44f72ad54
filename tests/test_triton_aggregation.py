"""Triton kernels of global aggregation against formulas in float64, one sequence at a time."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ponet_kernels.testing import assert_close

pytest.importorskip("triton")
from ponet_kernels.triton_kernels import global_aggregation as kernels
from ponet_kernels.triton_kernels.launch import record_launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = 1e-5
# spans of few tokens are 64 long, tiles of scores 128
CASES = [
    (1, 1, [1]),
    (1, 2, [2200]),
    (48, 1, [0, 1, 63, 0, 130, 64, 0]),
    (48, 25, [1, 1, 0, 0, 1]),
    (64, 2, [200, 1, 129]),
    (64, 64, [65, 3]),
    (768, 12, [70, 0, 65]),
    (1000, 25, [33, 1]),
]


@pytest.fixture(autouse=True, scope="module")
def nan_in_new_memory():
    """`torch.empty` gives NaN, so that what is read unwritten or left unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def case_id(value: object) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def formulas(x: Tensor, rows: Tensor, weights: Tensor, lengths: list[int]) -> dict[str, Tensor]:
    """All five results in float64 on the CPU."""
    x, rows, weights = (t.detach().cpu().double() for t in (x, rows, weights))
    xs, ws = x.split(lengths), weights.split(lengths)
    return {
        "means": torch.stack([h.sum(0) / max(len(h), 1) for h in xs]),
        "scores": torch.cat([h @ u.T for h, u in zip(xs, rows, strict=True)]),
        "softmax": torch.cat([w.softmax(0) for w in ws]),
        "sums": torch.stack([w.T @ h for w, h in zip(ws, xs, strict=True)]),
        "spread": torch.cat([w @ u for w, u in zip(ws, rows, strict=True)]),
    }


def results(
    x: Tensor, rows: Tensor, weights: Tensor, lengths: list[int], slack: int = 0
) -> dict[str, Tensor]:
    """All five results of the kernels on the CPU, `slack` added to the longest length."""
    bounds = offsets(lengths), max(lengths, default=0) + slack
    found = {
        "means": kernels.sequence_means(x, *bounds),
        "scores": kernels.token_scores(x, rows, *bounds),
        "softmax": kernels.sequence_softmax(weights, *bounds),
        "sums": kernels.sequence_sums(weights, x, *bounds),
        "spread": kernels.spread_rows(weights, rows, *bounds, x.dtype),
    }
    for name, tensor in found.items():
        assert tensor.dtype == (x.dtype if name == "spread" else rows.dtype), name
    return {name: tensor.cpu() for name, tensor in found.items()}


def tolerance(name: str, dtype: torch.dtype) -> float:
    if name != "spread" or dtype == torch.float32:
        return TOLERANCE
    # eps is twice the largest error of rounding; the interpreter cuts off instead of rounding to
    # bfloat16, which alone reaches it
    interpreted = DEVICE == "cpu" and dtype == torch.bfloat16
    return torch.finfo(dtype).eps * (2 if interpreted else 1)


def check(x: Tensor, rows: Tensor, weights: Tensor, lengths: list[int], slack: int = 0) -> None:
    found = results(x, rows, weights, lengths, slack)
    for name, expected in formulas(x, rows, weights, lengths).items():
        assert_close(found[name], expected, tolerance(name, x.dtype), name)


def inputs(
    width: int, num_rows: int, lengths: list[int], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    x = random(sum(lengths), width, dtype=dtype, seed=seed)
    rows = random(len(lengths), num_rows, width, seed=seed + 1)
    return x, rows, random(sum(lengths), num_rows, seed=seed + 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize(("width", "num_rows", "lengths"), CASES, ids=case_id)
def test_kernels_equal_formulas(width, num_rows, lengths, dtype):
    check(*inputs(width, num_rows, lengths, dtype), lengths)


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=5),
    width=st.sampled_from([1, 3, 16, 40]),
    num_rows=st.sampled_from([1, 3, 16, 17]),
    dtype=st.sampled_from(DTYPES),
    slack=st.integers(0, 200),
    seed=st.integers(0, 99),
)
def test_kernels_equal_formulas_for_any_lengths(lengths, width, num_rows, dtype, slack, seed):
    check(*inputs(width, num_rows, lengths, dtype, seed), lengths, slack)


def test_float64_is_exact():
    lengths = [70, 0, 1]
    double = [t.double() for t in inputs(40, 3, lengths, torch.float32)]
    found = results(double[0], double[1], double[2], lengths)
    for name, expected in formulas(double[0], double[1], double[2], lengths).items():
        assert_close(found[name], expected, 1e-13, name)


def test_softmax_joins_many_spans():
    # 34 spans of one sequence, their maxima far apart
    lengths = [3, 17_000, 600]
    scores = random(sum(lengths), 2) + torch.linspace(-80, 80, sum(lengths))[:, None].to(DEVICE)
    found = kernels.sequence_softmax(scores, offsets(lengths), max(lengths)).cpu()
    expected = torch.cat([s.softmax(0) for s in scores.cpu().double().split(lengths)])
    assert_close(found, expected, TOLERANCE)


@pytest.mark.parametrize("layout", ["columns", "rows", "transposed", "expanded"])
def test_any_strides(layout):
    lengths = [70, 1, 0, 30]
    x, rows, weights = inputs(48, 3, lengths, torch.bfloat16)
    wide = torch.full((101, 64), torch.nan, dtype=x.dtype, device=DEVICE)
    wide[:, 16:] = x
    tall = torch.full((202, 48), torch.nan, dtype=x.dtype, device=DEVICE)
    tall[::2] = x
    x = {
        "columns": wide[:, 16:],
        "rows": tall[::2],
        "transposed": x.T.contiguous().T,
        "expanded": x[:1].expand(101, -1),
    }[layout]
    assert not x.is_contiguous()
    check(x, rows.mT.contiguous().mT, weights.T.contiguous().T, lengths)


def test_weights_outside_the_range_of_half_precision():
    lengths = [100, 20]
    x, rows, weights = inputs(48, 3, lengths, torch.float16)
    for scale in (1e-12, 1e12):
        found = results(x, rows * scale, weights * scale, lengths)
        expected = formulas(x, rows * scale, weights * scale, lengths)
        for name in ("scores", "sums"):
            assert_close(found[name], expected[name], TOLERANCE, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_nan_stays_in_its_sequence(dtype):
    lengths = [3, 70, 4]
    x, rows, weights = inputs(16, 2, lengths, dtype)
    # the NaN that devices produce, with all bits set
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32, device=DEVICE).view(torch.float32)
    x[40], rows[1, 0], weights[40] = nan.to(dtype), nan, nan
    found = results(x, rows, weights, lengths)
    for name, expected in formulas(x, rows, weights, lengths).items():
        assert torch.equal(found[name].isnan(), expected.isnan()), name


@pytest.mark.parametrize("lengths", [[], [0, 0, 0]], ids=["B0", "B3"])
def test_without_tokens(lengths):
    found = results(*inputs(48, 3, lengths, torch.bfloat16), lengths)
    B = len(lengths)
    shapes = {"means": (B, 48), "scores": (0, 3), "softmax": (0, 3), "sums": (B, 3, 48)}
    for name, shape in {**shapes, "spread": (0, 48)}.items():
        assert found[name].shape == shape, name
        assert not found[name].any(), name


def test_two_runs_agree_bit_by_bit():
    lengths = [200, 0, 65, 1]
    tensors = inputs(48, 12, lengths, torch.bfloat16)
    first, second = results(*tensors, lengths), results(*tensors, lengths)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_beyond_two_to_the_31_elements(tmp_path):
    lengths, stride = [5, 1], 2**29 + 8
    size = 5 * stride + 48
    if DEVICE == "cpu":
        path = str(tmp_path / "sparse")
        memory = torch.from_file(path, shared=True, size=size, dtype=torch.bfloat16)
    else:
        memory = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
    # within a sequence and from its first token on
    assert 4 * stride > 2**31
    x = memory.as_strided((6, 48), (stride, 1))
    x.copy_(random(6, 48, dtype=x.dtype))
    _, rows, weights = inputs(48, 3, lengths, torch.bfloat16)
    check(x, rows, weights, lengths)


def test_launches_are_listed_without_a_device():
    x = torch.empty(65536, 768, dtype=torch.bfloat16, device="meta")
    weights = torch.empty(65536, 12, device="meta")
    cu_seqlens = torch.empty(17, dtype=torch.int32, device="meta")
    with record_launches() as launches:
        sums = kernels.sequence_sums(weights, x, cu_seqlens, 4096)
    assert sums.shape == (16, 12, 768)
    assert [launch.kernel.__name__ for launch in launches] == [
        "sequence_sums_kernel",
        "combine_spans_kernel",
    ]
