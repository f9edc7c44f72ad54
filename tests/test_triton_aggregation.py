"""Triton kernels of global aggregation against formulas in float64, one sequence at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ponet_kernels.testing import assert_close
from tests.streams import DEVICE, offsets

pytest.importorskip("triton")
from ponet_kernels.triton_kernels import global_aggregation as kernels
from ponet_kernels.triton_kernels.launch import _limit_on, launch, record_launches

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_in_new_memory")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = 1e-5
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
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


class Inputs:
    """Tokens x, rows and weights of each sequence, and what the backward pass adds to them."""

    def __init__(
        self,
        width: int,
        num_rows: int,
        lengths: list[int],
        dtype: torch.dtype,
        seed: int = 0,
        slack: int = 0,
    ) -> None:
        """Draw them; no sequence is said to be longer than the longest and `slack` more."""
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        self.lengths, self.longest = lengths, max(lengths, default=0) + slack
        self.x = random(sum(lengths), width, dtype=dtype, seed=seed)
        self.rows = random(len(lengths), num_rows, width, dtype=acc, seed=seed + 1)
        self.weights = random(sum(lengths), num_rows, dtype=acc, seed=seed + 2)
        self.more_rows = random(len(lengths), num_rows, width, dtype=acc, seed=seed + 3)
        self.more_weights = random(sum(lengths), num_rows, dtype=acc, seed=seed + 4)
        self.centre = random(len(lengths), num_rows, dtype=acc, seed=seed + 5)
        self.shared = random(len(lengths), width, dtype=acc, seed=seed + 6)

    def expected(self) -> dict[str, Tensor]:
        """All results in float64 on the CPU, one sequence at a time."""
        names = ("x", "rows", "weights", "more_rows", "more_weights", "centre", "shared")
        tensors = {name: getattr(self, name).detach().cpu().double() for name in names}
        for name in ("x", "weights", "more_weights"):
            tensors[name] = tensors[name].split(self.lengths)
        xs, rows, ws, more_rows, more_ws, centres, shared = tensors.values()
        every = list(zip(xs, rows, ws, more_rows, more_ws, centres, shared, strict=True))
        return {
            "means": torch.stack([h.sum(0) / max(len(h), 1) for h in xs]),
            "totals": torch.stack([h.sum(0) for h in xs]),
            "scores": torch.cat([h @ u.T for h, u, *_ in every]),
            "slopes": torch.cat([w * (h @ u.T - c) for h, u, w, _, _, c, _ in every]),
            "softmax": torch.cat([w.softmax(0) for w in ws]),
            "sums": torch.stack([w.T @ h for h, _, w, *_ in every]),
            "spread": torch.cat([s / max(len(h), 1) + w @ u for h, u, w, _, _, _, s in every]),
            "spread_of_two": torch.cat(
                [s / max(len(h), 1) + w @ u + w2 @ u2 for h, u, w, u2, w2, _, s in every]
            ),
            "share": torch.cat([(s / max(len(h), 1)).expand(len(h), -1) for h, *_, s in every]),
        }

    def found(self) -> dict[str, Tensor]:
        """All results of the kernels, on the CPU; each element of them is written."""
        span = offsets(self.lengths), self.longest
        one = (self.weights, self.rows)
        pairs = {"spread": (one,), "spread_of_two": (one, (self.more_weights, self.more_rows))}
        found = {
            "means": kernels.sequence_means(self.x, *span),
            "totals": kernels.sequence_totals(self.x, *span),
            "scores": kernels.token_scores(self.x, self.rows, *span),
            "slopes": kernels.score_gradients(self.x, self.rows, self.weights, self.centre, *span),
            "softmax": kernels.sequence_softmax(self.weights, *span),
            "sums": kernels.sequence_sums(self.weights, self.x, *span),
        }
        for name, tensor in found.items():
            assert tensor.dtype == self.rows.dtype, name
        for name, chosen in {**pairs, "share": ()}.items():
            # the last columns of a wider tensor, of which nothing else may change
            wide = torch.full((len(self.x), 2 * self.x.shape[1] + 3), 7.0).to(self.x)
            out = wide[:, self.x.shape[1] + 3 :].fill_(torch.nan)
            kernels.spread_rows(chosen, self.shared, *span, out)
            assert (wide[:, : self.x.shape[1] + 3] == 7.0).all(), name
            found[name] = out
        return {name: tensor.cpu() for name, tensor in found.items()}


SPREAD = ("spread", "spread_of_two", "share")


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
    check(Inputs(width, num_rows, lengths, dtype, seed, slack))


def test_softmax_joins_many_spans():
    # 34 spans of one sequence, their maxima far apart
    lengths = [3, 17_000, 60]
    scores = random(sum(lengths), 2) + torch.linspace(-80, 80, sum(lengths))[:, None].to(DEVICE)
    found = kernels.sequence_softmax(scores, offsets(lengths), max(lengths)).cpu()
    expected = torch.cat([s.softmax(0) for s in scores.cpu().double().split(lengths)])
    assert_close(found, expected, TOLERANCE)


@pytest.mark.parametrize("layout", ["columns", "rows", "transposed", "expanded"])
def test_any_strides(layout):
    inputs = Inputs(48, 3, [70, 1, 0, 30], torch.bfloat16)
    x = inputs.x
    wide = torch.full((101, 64), torch.nan, dtype=x.dtype, device=DEVICE)
    wide[:, 16:] = x
    tall = torch.full((202, 48), torch.nan, dtype=x.dtype, device=DEVICE)
    tall[::2] = x
    inputs.x = {
        "columns": wide[:, 16:],
        "rows": tall[::2],
        "transposed": x.T.contiguous().T,
        "expanded": x[:1].expand(101, -1),
    }[layout]
    assert not inputs.x.is_contiguous()
    for name in ("rows", "weights", "more_rows", "more_weights", "centre", "shared"):
        tensor = getattr(inputs, name)
        setattr(inputs, name, tensor.mT.contiguous().mT)
        assert not getattr(inputs, name).is_contiguous()
    check(inputs)


def test_weights_outside_the_range_of_half_precision():
    for scale in (1e-12, 1e12):
        inputs = Inputs(48, 3, [100, 20], torch.float16)
        inputs.rows, inputs.weights = inputs.rows * scale, inputs.weights * scale
        found, expected = inputs.found(), inputs.expected()
        for name in ("scores", "slopes", "sums"):
            assert_close(found[name], expected[name], TOLERANCE, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_nan_stays_in_its_sequence(dtype):
    inputs = Inputs(16, 2, [3, 70, 4], dtype)
    # the NaN that devices produce, with all bits set
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32, device=DEVICE).view(torch.float32)
    inputs.x[40], inputs.rows[1, 0], inputs.weights[40] = nan.to(dtype), nan, nan
    found = inputs.found()
    for name, expected in inputs.expected().items():
        assert torch.equal(found[name].isnan(), expected.isnan()), name


@pytest.mark.parametrize("lengths", [[], [0, 0, 0]], ids=["B0", "B3"])
def test_without_tokens(lengths):
    found, B = Inputs(48, 3, lengths, torch.bfloat16).found(), len(lengths)
    shapes = {
        **dict.fromkeys(("means", "totals"), (B, 48)),
        **dict.fromkeys(("scores", "slopes", "softmax"), (0, 3)),
        "sums": (B, 3, 48),
        **dict.fromkeys(SPREAD, (0, 48)),
    }
    assert set(shapes) == set(found)
    for name, shape in shapes.items():
        assert found[name].shape == shape, name
        assert not found[name].any(), name


def test_two_runs_agree_bit_by_bit():
    inputs = Inputs(48, 3, [130, 0, 1], torch.bfloat16)
    first, second = inputs.found(), inputs.found()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_beyond_two_to_the_31_elements(tmp_path):
    """Read and written; between two tokens of a sequence and before its first one."""
    inputs, stride = Inputs(48, 3, [5, 1], torch.bfloat16), 2**29 + 8
    size = 5 * stride + 128
    if DEVICE == "cpu":
        path = str(tmp_path / "sparse")
        memory = torch.from_file(path, shared=True, size=size, dtype=torch.bfloat16)
    else:
        memory = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
    assert 4 * stride > 2**31
    out = memory[64:].as_strided((6, 48), (stride, 1))
    inputs.x = memory.as_strided((6, 48), (stride, 1)).copy_(inputs.x)
    found, expected = {}, inputs.expected()
    span = offsets(inputs.lengths), 5
    found["means"] = kernels.sequence_means(inputs.x, *span)
    found["scores"] = kernels.token_scores(inputs.x, inputs.rows, *span)
    found["sums"] = kernels.sequence_sums(inputs.weights, inputs.x, *span)
    kernels.spread_rows(((inputs.weights, inputs.rows),), inputs.shared, *span, out)
    found["spread"] = out
    for name, tensor in found.items():
        assert_close(tensor.cpu(), expected[name], tolerance(name, inputs.x.dtype), name)


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


def test_launches_of_a_backward_pass():
    """Score gradients are one launch, and so are both products of the spread."""
    x = torch.empty(65536, 768, dtype=torch.bfloat16, device="meta")
    weights, rows = torch.empty(65536, 12, device="meta"), torch.empty(128, 12, 768, device="meta")
    span = torch.empty(129, dtype=torch.int32, device="meta"), 512
    with record_launches() as launches:
        kernels.score_gradients(x, rows, weights, rows[:, :, 0], *span)
        kernels.spread_rows(((weights, rows), (weights, rows)), rows[:, 0], *span, x)
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["token_scores_kernel", "spread_rows_kernel"]


class FakeKernel:
    """Notes the device that is current when it is launched."""

    def __init__(self) -> None:
        self.launched: list[tuple[int, dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launched.append((FakeDevice.current, options))


class FakeDevice:
    """Stands for `torch.cuda.device`."""

    current = 0

    def __init__(self, device: torch.device) -> None:
        self.index = device.index

    def __enter__(self) -> None:
        self.before, FakeDevice.current = FakeDevice.current, self.index

    def __exit__(self, *_: object) -> None:
        FakeDevice.current = self.before


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, which need not be that of the arguments."""
    monkeypatch.setattr(torch.cuda, "device", FakeDevice)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: FakeDevice.current)
    monkeypatch.setattr(
        torch.Tensor, "device", property(lambda x: torch.device("cuda", x.shape[0]))
    )
    kernel = FakeKernel()
    for index in (0, 1):
        # a term that is left out comes first
        launch(kernel, (3,), None, torch.empty(index), 5, num_warps=4, SIZE=16)
    launch(kernel, (0,), torch.empty(1), num_warps=4)
    options = {"num_warps": 4, "SIZE": 16}
    assert kernel.launched == [(0, options), (1, options)]
    assert FakeDevice.current == 0


@pytest.mark.parametrize(
    ("hip", "capability", "options"),
    [
        (None, (9, 0), {"maxnreg": 168}),
        (None, (10, 0), {"maxnreg": 168}),
        (None, (8, 0), {"maxnreg": 184}),
        ("6.4", (9, 4), {}),
    ],
)
def test_registers_are_limited_on_nvidia(monkeypatch, hip, capability, options):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.Tensor, "device", property(lambda _: torch.device("cuda", 0)))
    _limit_on.cache_clear()
    kernel = FakeKernel()
    launch(kernel, (1,), torch.empty(1), num_warps=1, max_registers=168)
    launch(kernel, (1,), torch.empty(1), num_warps=1)
    _limit_on.cache_clear()
    assert kernel.launched == [(0, {"num_warps": 1} | options), (0, {"num_warps": 1})]
