"""Triton kernels of the poolings and their fusion against the reference in float64."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ponet_kernels import token_marks
from ponet_kernels.layout import SEES_LEFT, SPECIAL
from ponet_kernels.reference import (
    local_max_ref,
    pooling_fusion_ref,
    segment_max_ref,
)
from ponet_kernels.testing import assert_close, relative_error
from tests.streams import DEVICE, offsets, owners

pytest.importorskip("triton")
from ponet_kernels.triton_kernels import fusion, segment_max, segmented_reduce
from ponet_kernels.triton_kernels.launch import record_launches

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_in_new_memory")]

TOLERANCE = 1e-5
WINDOW = segmented_reduce.WINDOW_ROWS[-1]
HALF = [torch.bfloat16, torch.float16]
# one column, a part of a block of channels, a block, several with a rest
widths = pytest.mark.parametrize(
    ("dtype", "num_channels"),
    [(torch.float32, 1), (torch.bfloat16, 48), (torch.float16, 64), (torch.float32, 300)],
    ids=["fp32-C1", "bf16-C48", "fp16-C64", "fp32-C300"],
)

# windows of a stream this short have 16 rows: segments inside, up to, over and across their edges
RAGGED = [3, 0, 1, 12, 5, 0, 14, 1, 4, 0]
LENGTHS = {
    "ragged": RAGGED,
    "single": [1],
    "ones": [1] * 35,
    "one": [41],
    "edges": [WINDOW, 2 * WINDOW, 1, WINDOW - 1],
    "nothing": [],
    "empty": [0, 0],
}
# more windows than one step of the second level reads, and as many
LONG = [5, WINDOW * 66 + 3, 2, WINDOW * 2, 0, WINDOW * 64, 30, 1]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def ties(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator).to(DEVICE, dtype)


def double(x: Tensor) -> Tensor:
    """A leaf in float64 on the CPU."""
    return x.detach().cpu().double().requires_grad_()


def gradient(out: Tensor, leaf: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the leaf, zeros where no operation led from it."""
    if out.requires_grad:
        out.backward(grad.cpu().to(out.dtype), retain_graph=True)
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def wide_rows(x: Tensor) -> Tensor:
    """The same values as a column slice of a wider tensor."""
    wide = torch.cat([x, x, x], dim=1)
    return wide[:, x.shape[1] : 2 * x.shape[1]]


def transposed(x: Tensor) -> Tensor:
    """The same values with adjacent rows."""
    return x.t().contiguous().t()


def special_segments(lengths: list[int]) -> list[int]:
    """Every other segment of one token."""
    return [j for j, length in enumerate(lengths) if length == 1][::2]


def marks_of(lengths: list[int], every: int = 7) -> Tensor:
    """Marks of a stream whose runs end every few tokens and at special tokens."""
    total, begin = sum(lengths), offsets(lengths)[:-1].long()
    special = torch.zeros(total + 1, dtype=torch.bool, device=DEVICE)
    special[begin[special_segments(lengths)]] = True
    starts = torch.arange(total, device=DEVICE) % every == 0
    starts |= special[:-1]
    starts[1:] |= special[: max(total - 1, 0)]
    return token_marks(starts, special[:-1])


def runs_of(marks: Tensor) -> Tensor:
    starts = ((marks & SEES_LEFT) == 0).nonzero().squeeze(1)
    return torch.cat([starts, starts.new_tensor([len(marks)])]).cpu()


class Columns:
    """The last columns of a wider tensor, which a kernel writes, and nothing else of it."""

    def __init__(self, num_rows: int, num_channels: int, dtype: torch.dtype) -> None:
        self.all = torch.full((num_rows, 2 * num_channels + 3), 7.0, dtype=dtype, device=DEVICE)
        self.all[:, -num_channels:] = torch.nan
        self.written = self.all[:, -num_channels:]

    def check(self) -> Tensor:
        """What was written: each element, and none beside."""
        assert (self.all[:, : -self.written.shape[1]] == 7.0).all()
        return self.written


def check_segment_max(x: Tensor, lengths: list[int], dtype: torch.dtype = torch.int16) -> None:
    layout = offsets(lengths), owners(lengths)
    maxima, places = segment_max.segment_max_fwd(x, *layout, dtype, 0 in lengths)
    assert places is not None
    assert places.dtype == dtype
    assert maxima.dtype == x.dtype
    leaf = double(x)
    expected = segment_max_ref(leaf, layout[0].cpu())
    torch.testing.assert_close(
        maxima.cpu().double(), expected, rtol=0, atol=0, equal_nan=True, check_stride=False
    )
    assert (places[layout[0].diff() == 0] == 0).all()
    without, nothing = segment_max.segment_max_fwd(x, *layout, None, 0 in lengths)
    assert nothing is None
    torch.testing.assert_close(without, maxima, rtol=0, atol=0, equal_nan=True)

    grad, columns = random(*maxima.shape, seed=1), Columns(*x.shape, x.dtype)
    segment_max.segment_max_bwd(grad, places, *layout, columns.written)
    dx, wanted = columns.check(), gradient(expected, leaf, grad)
    assert_close(dx.cpu(), wanted, 2**-7 if x.dtype in HALF else 0.0, "dx")
    assert torch.equal((dx != 0).cpu(), wanted != 0)


@widths
def test_segment_max(dtype, num_channels):
    check_segment_max(random(sum(RAGGED), num_channels, dtype=dtype), RAGGED)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_segment_max_of_ties(lengths):
    check_segment_max(ties(sum(lengths), 5, dtype=torch.bfloat16), lengths, torch.uint8)


def test_segment_max_of_long_segments():
    x = ties(sum(LONG), 2)
    x[:, 1] = float("-inf")
    check_segment_max(x, LONG)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_places_of_every_dtype(dtype):
    check_segment_max(random(sum(RAGGED), 3, dtype=torch.float64), RAGGED, dtype)


def test_segment_max_of_nan_and_infinity():
    x = random(300, 6)
    x[[4, 9, 40, 41, 299], :3] = float("nan")
    x[[2, 30, 42], :4] = float("inf")
    x[:, 5] = float("-inf")
    check_segment_max(x, [20, 0, 20, 1, 40, 219])


@pytest.mark.parametrize("view", [wide_rows, transposed])
def test_segment_max_of_views(view):
    x = view(random(sum(RAGGED), 20))
    assert not x.is_contiguous()
    check_segment_max(x, RAGGED)
    layout = offsets(RAGGED), owners(RAGGED)
    _, places = segment_max.segment_max_fwd(x, *layout, torch.uint8, True)
    grad = random(len(RAGGED), 20)
    expected, actual = torch.empty_like(grad[layout[1]]), torch.empty_like(grad[layout[1]])
    segment_max.segment_max_bwd(grad, places, *layout, expected)
    segment_max.segment_max_bwd(view(grad), view(places), *layout, actual)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("has_empty", [True, False])
def test_empty_segments_are_filled_only_where_there_may_be_some(has_empty):
    """A launch less, forward and backward."""
    x = torch.empty(4096, 48, device="meta")
    layout = torch.empty(101, dtype=torch.int32, device="meta"), x[:, 0].long()
    marks, maxima = torch.empty(4096, dtype=torch.uint8, device="meta"), x[:100]
    tables = (*layout, torch.empty(100, dtype=torch.int64, device="meta"), marks)
    with record_launches() as launches:
        segment_max.segment_max_fwd(x, *layout, torch.uint8, has_empty)
        fusion.fusion_bwd(x, None, maxima, x, x, *tables, x, x, has_empty)
    names = [launch.kernel.__name__ for launch in launches]
    assert names.count("fill_empty_kernel") == 2 * has_empty
    assert len(names) == 4 + 2 * has_empty


class FusionCase:
    """Arguments of the fusion for segments of some lengths, spread over sequences."""

    def __init__(
        self,
        lengths: list[int],
        num_channels: int,
        dtype: torch.dtype = torch.float32,
        terms: str = "gsl",
        marks: Tensor | None = None,
    ) -> None:
        total, num_segments = sum(lengths), len(lengths)
        self.lengths, self.dtype = lengths, dtype
        self.cu_segments, self.token_segments = offsets(lengths), owners(lengths)
        # sequences 0 and 2 are empty
        of_sequence = [1 + (j >= num_segments // 3) * 2 for j in range(num_segments)]
        self.segment_sequences = torch.tensor(of_sequence, dtype=torch.int64, device=DEVICE)
        self.marks = marks_of(lengths) if marks is None else marks
        # g' comes in float32 from global aggregation
        g = random(4, num_channels, dtype=dtype, seed=1).to(
            torch.float64 if dtype == torch.float64 else torch.float32
        )
        self.values = [
            g if "g" in terms else None,
            random(num_segments, num_channels, dtype=dtype, seed=2) if "s" in terms else None,
            random(total, num_channels, dtype=dtype, seed=3),
            ties(total, num_channels, dtype=dtype, seed=4) if "l" in terms else None,
        ]
        self.grad = random(total, num_channels, dtype=dtype, seed=5)
        self.has_empty = 0 in lengths

    def forward(self) -> Tensor:
        return fusion.fusion_fwd(
            *self.values, self.token_segments, self.segment_sequences, self.marks
        )

    def backward(self) -> list[Tensor | None]:
        """Gradients of g', S, O and l; those of O and l are written beside other columns."""
        layout = (self.cu_segments, self.token_segments, self.segment_sequences, self.marks)
        shape = self.values[2].shape
        written = Columns(*shape, self.dtype), Columns(*shape, self.dtype)
        local = None if self.values[3] is None else written[1].written
        sums = fusion.fusion_bwd(
            self.grad, *self.values, *layout, written[0].written, local, self.has_empty
        )
        return [*sums, written[0].check(), None if local is None else written[1].check()]

    def expected(self, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
        """Output and gradients by PyTorch's operations in `dtype`."""
        leaves = [
            None if v is None else v.detach().cpu().to(dtype).requires_grad_() for v in self.values
        ]
        g, s, o, local = leaves
        layout, marks = (self.token_segments.cpu(), self.segment_sequences.cpu()), self.marks.cpu()
        special = ((marks & SPECIAL) != 0).nonzero().squeeze(1)
        if s is not None:
            s = s.index_fill(0, layout[0][special], 0.0)
        if local is not None:
            local = local_max_ref(local, runs_of(marks)).index_fill(0, special, 0.0)
        out = pooling_fusion_ref(g, s, o, local, *layout)
        if out.requires_grad:
            out.backward(self.grad.cpu().to(dtype))
        grads = [
            None if v is None else torch.zeros_like(v) if v.grad is None else v.grad for v in leaves
        ]
        return [out.detach(), *grads]

    def results(self) -> list[Tensor | None]:
        return [self.forward(), *self.backward()]


def check_windows(x: Tensor, marks: Tensor) -> None:
    """Local max-pooling: without g' and S the fusion is L, and 0 at special tokens."""
    case, leaf = FusionCase([len(x)], x.shape[1], x.dtype, "l", marks), double(x)
    case.values[3] = x
    special = (marks.cpu() & SPECIAL) != 0
    expected = local_max_ref(leaf, runs_of(marks)).masked_fill(special.unsqueeze(1), 0.0)
    out = case.forward()
    assert out.dtype == x.dtype
    torch.testing.assert_close(
        out.cpu().double(), expected, rtol=0, atol=0, equal_nan=True, check_stride=False
    )
    dglobal, dsegment, doutput, dx = case.backward()
    assert dglobal is None
    assert dsegment is None
    assert doutput is not None
    assert not doutput.any()
    assert dx is not None
    # one rounding of a sum of three; the interpreter truncates
    wanted = gradient(expected, leaf, case.grad)
    assert_close(dx.cpu(), wanted, torch.finfo(x.dtype).eps, "dx")


@widths
def test_windows(dtype, num_channels):
    check_windows(ties(sum(RAGGED), num_channels, dtype=dtype), marks_of(RAGGED))


@pytest.mark.parametrize("every", [1, 2, 100])
def test_windows_of_runs(every):
    check_windows(ties(67, 5), marks_of([67], every))


def test_windows_of_nan_and_infinity():
    x = random(60, 5)
    x[[0, 9, 10, 12, 40, 59], :3] = float("nan")
    x[[1, 30, 42], :4] = float("inf")
    x[::2, 4] = float("-inf")
    x[20:35, 4] = float("-inf")
    check_windows(x, marks_of([60]))


@pytest.mark.parametrize("view", [wide_rows, transposed])
def test_windows_of_views(view):
    check_windows(view(random(sum(RAGGED), 20)), marks_of(RAGGED))


NAMES = ["out", "dglobal", "dsegment", "doutput", "dlocal"]


def check_fusion(case: FusionCase) -> None:
    acc = torch.float64 if case.dtype == torch.float64 else torch.float32
    wanted = [case.dtype, acc, acc, case.dtype, case.dtype]
    expected, actual = case.expected(), case.results()
    baseline = case.expected(case.dtype) if case.dtype in HALF else expected
    for name, dtype, ours, truth, torchs in zip(
        NAMES, wanted, actual, expected, baseline, strict=True
    ):
        if truth is None:
            assert ours is None, name
            continue
        assert ours is not None, name
        assert ours.dtype == dtype, name
        allowed = TOLERANCE
        if case.dtype in HALF:
            allowed = max(2 * relative_error(torchs, truth), torch.finfo(dtype).eps)
        assert_close(ours.cpu(), truth, allowed, name)


@widths
def test_fusion(dtype, num_channels):
    check_fusion(FusionCase(RAGGED, num_channels, dtype))


@pytest.mark.parametrize("terms", ["gsl", "gs", "gl", "sl", "g", "s", "l", ""])
def test_fusion_of_some_terms(terms):
    check_fusion(FusionCase(RAGGED, 9, torch.float64, terms))


@pytest.mark.parametrize("lengths", [*LENGTHS.values(), LONG[:5]], ids=[*LENGTHS, "long"])
def test_fusion_of_lengths(lengths):
    """Windows see across more than one step of the reduction where one run holds all tokens."""
    check_fusion(FusionCase(lengths, 2, marks=marks_of(lengths, every=100)))


@pytest.mark.parametrize("view", [wide_rows, transposed])
def test_fusion_of_views(view):
    case = FusionCase(RAGGED, 20)
    expected = case.results()
    case.values = [view(v) for v in case.values]
    case.grad = view(case.grad)
    assert not any(x.is_contiguous() for x in (*case.values, case.grad))
    for actual, wanted in zip(case.results(), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_runs_agree_bit_by_bit():
    case = FusionCase([5, 70, 2], 4)
    for first, second in zip(case.results(), case.results(), strict=True):
        assert torch.equal(first, second)


@settings(max_examples=4, deadline=None)
@given(st.lists(st.integers(0, 2 * WINDOW + 3), max_size=4), st.integers(1, 9))
def test_any_lengths(lengths, num_channels):
    check_segment_max(ties(sum(lengths), num_channels), lengths)
    check_windows(ties(sum(lengths), num_channels), marks_of(lengths))
    check_fusion(FusionCase(lengths, num_channels))


def test_rows_beyond_two_to_the_31(tmp_path: Path):
    num_rows, width = 40, 2**26
    if DEVICE == "cuda":
        big = torch.empty(num_rows, width, dtype=torch.float16, device=DEVICE)
    else:
        # a sparse file: only the pages of the columns in use exist
        name = str(tmp_path / "sparse")
        with open(name, "wb") as file:
            file.truncate(num_rows * width * 2)
        big = torch.from_file(name, shared=True, size=num_rows * width, dtype=torch.float16)
    assert (num_rows - 1) * width > 2**31
    big = big.view(num_rows, width)
    far, written = big[:, :6], (big[:, 16:22], big[:, 32:38])
    far.copy_(random(num_rows, 6, dtype=torch.float16))
    assert far.stride() == (width, 1)
    near, lengths = far.contiguous(), [30, 1, 9]
    layout = offsets(lengths), owners(lengths)
    maxima, places = segment_max.segment_max_fwd(far, *layout, torch.uint8, False)
    expected = segment_max.segment_max_fwd(near, *layout, torch.uint8, False)
    assert torch.equal(maxima, expected[0])
    assert torch.equal(places, expected[1])
    dx, grad = torch.empty_like(near), random(3, 6)
    segment_max.segment_max_bwd(grad, places, *layout, dx)
    segment_max.segment_max_bwd(grad, places, *layout, written[0])
    assert torch.equal(written[0], dx)
    case = FusionCase(lengths, 6, torch.float16)
    case.values[2], case.values[3], case.grad = near, near, near
    out, *sums, doutput, dlocal = case.results()
    case.values[2], case.values[3], case.grad = far, far, far
    assert torch.equal(case.forward(), out)
    tables = (case.cu_segments, case.token_segments, case.segment_sequences, case.marks)
    found = fusion.fusion_bwd(far, *case.values, *tables, *written, False)
    for actual, wanted in zip((*found, *written), (*sums, doutput, dlocal), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize(
    ("num_rows", "num_channels", "itemsize"),
    [(65536, 768, 2), (131072, 64, 2), (1, 1, 8), (0, 768, 4), (10**6, 1000, 4)],
)
def test_windows_cover_all_rows(num_rows, num_channels, itemsize):
    windows = segmented_reduce.cut_rows(num_rows, num_channels, itemsize, 2048)
    assert windows.count * windows.rows >= num_rows > (windows.count - 1) * windows.rows
    columns = -(-num_channels // windows.block_c)
    assert windows.grid == (-(-windows.count // windows.block_w) * columns,)
