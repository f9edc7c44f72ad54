"""Triton kernels of the poolings and their fusion against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ponet_kernels import token_marks
from ponet_kernels.layout import SPECIAL
from ponet_kernels.reference import local_pooling_ref, pooling_fusion_ref, segment_max_ref
from ponet_kernels.testing import assert_close, relative_error
from tests.streams import DEVICE, Columns, huge, offsets, owners, random, ties, views

pytest.importorskip("triton")
from ponet_kernels.triton_kernels import fusion, segment_max, segmented_reduce

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
LENGTHS = {"ragged": RAGGED, "single": [1], "ones": [1] * 35, "one": [41], "nothing": []}
LENGTHS |= {"edges": [WINDOW, 2 * WINDOW, 1, WINDOW - 1], "empty": [0, 0]}
NAMES = ("out", "dglobal", "dsegment", "doutput", "dlocal")
# more windows than one step of the second level reads, and as many
LONG = [5, WINDOW * 66 + 3, 2, WINDOW * 2, 0, WINDOW * 64, 30, 1]


def gradients(out: Tensor, leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Zeros where no operation led from a leaf."""
    if not out.requires_grad:
        return tuple(map(torch.zeros_like, leaves))
    grad = grad.cpu().to(out.dtype)
    return torch.autograd.grad(out, leaves, grad, materialize_grads=True)


def marks_of(lengths: list[int], every: int = 7) -> Tensor:
    """Runs end every few tokens and at special tokens: every other segment of one token is one."""
    total, begin = sum(lengths), offsets(lengths)[:-1].long()
    special = torch.zeros(total + 1, dtype=torch.bool, device=DEVICE)
    special[begin[[j for j, length in enumerate(lengths) if length == 1][::2]]] = True
    starts = torch.arange(total, device=DEVICE) % every == 0
    starts |= special[:-1]
    starts[1:] |= special[: max(total - 1, 0)]
    return token_marks(starts, special[:-1])


def assert_exact(actual: Tensor, expected: Tensor) -> None:
    actual = actual.detach().cpu().to(expected.dtype)
    options = {"rtol": 0, "atol": 0, "equal_nan": True, "check_stride": False}
    torch.testing.assert_close(actual, expected.detach().cpu(), **options)


def check_segment_max(x, lengths, dtype=torch.int16, view=Tensor.contiguous):
    layout = offsets(lengths), owners(lengths)
    maxima, places = segment_max.segment_max_fwd(view(x), *layout, dtype, 0 in lengths)
    assert (places.dtype, maxima.dtype) == (dtype, x.dtype)
    leaf = x.detach().cpu().double().requires_grad_()
    expected = segment_max_ref(leaf, layout[0].cpu())
    assert_exact(maxima, expected)
    assert (places[layout[0].diff() == 0] == 0).all()
    without, nothing = segment_max.segment_max_fwd(x, *layout, None, 0 in lengths)
    assert nothing is None
    assert_exact(without, maxima)

    grad, columns = random(*maxima.shape, seed=1), Columns(x)
    segment_max.segment_max_bwd(view(grad), view(places), *layout, columns.written)
    dx, (wanted,) = columns.check(), gradients(expected, [leaf], grad)
    assert_close(dx.cpu(), wanted, 2**-7 if x.dtype in HALF else 0.0, "dx")
    assert torch.equal((dx != 0).cpu(), wanted != 0)


@widths
def test_segment_max(dtype, num_channels):
    check_segment_max(random(sum(RAGGED), num_channels, dtype=dtype), RAGGED, torch.int32)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_segment_max_of_ties(lengths):
    check_segment_max(ties(sum(lengths), 5, dtype=torch.bfloat16), lengths, torch.uint8)


def test_segment_max_of_long_segments():
    x = ties(sum(LONG), 2)
    x[:, 1] = float("-inf")
    check_segment_max(x, LONG)


def test_segment_max_of_nan_and_infinity():
    x = random(300, 6, dtype=torch.float64)
    x[[4, 9, 40, 41, 299], :3] = float("nan")
    x[[2, 30, 42], :4] = float("inf")
    x[:, 5] = float("-inf")
    check_segment_max(x, [20, 0, 20, 1, 40, 219])


@views
def test_segment_max_of_views(view):
    check_segment_max(random(sum(RAGGED), 20), RAGGED, view=view)


class FusionCase:
    """Arguments of the fusion for segments of some lengths, spread over sequences."""

    def __init__(self, lengths, num_channels, dtype=torch.float32, terms="gsl", marks=None):
        total, num_segments = sum(lengths), len(lengths)
        self.dtype, self.acc = dtype, torch.promote_types(dtype, torch.float32)
        self.cu_segments, self.has_empty = offsets(lengths), 0 in lengths
        # sequences 0 and 2 are empty
        sequences = owners([0, num_segments // 3, 0, num_segments - num_segments // 3])
        self.tables = (owners(lengths), sequences, marks_of(lengths) if marks is None else marks)
        self.values = [
            # g' comes in float32 from global aggregation
            random(4, num_channels, dtype=self.acc, seed=1) if "g" in terms else None,
            random(num_segments, num_channels, dtype=dtype, seed=2) if "s" in terms else None,
            random(total, num_channels, dtype=dtype, seed=3),
            ties(total, num_channels, dtype=dtype, seed=4) if "l" in terms else None,
        ]
        self.grad = random(total, num_channels, dtype=dtype, seed=5)

    def results(self) -> list[Tensor | None]:
        """Output, gradients of g', S, O and l; those of O and l are written beside others."""
        out = fusion.fusion_fwd(*self.values, *self.tables)
        written = [None if x is None else Columns(x) for x in self.values[2:]]
        targets = (None if columns is None else columns.written for columns in written)
        sums = fusion.fusion_bwd(
            self.grad, *self.values, self.cu_segments, *self.tables, *targets, self.has_empty
        )
        return [out, *sums, *(None if columns is None else columns.check() for columns in written)]

    def expected(self, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
        """The same by PyTorch's operations in `dtype`."""
        leaves = [
            None if v is None else v.detach().cpu().to(dtype).requires_grad_() for v in self.values
        ]
        g, s, o, local = leaves
        token_segments, sequences, marks = (table.cpu() for table in self.tables)
        special = ((marks & SPECIAL) != 0).nonzero().squeeze(1)
        if s is not None:
            s = s.index_fill(0, token_segments[special], 0.0)
        if local is not None:
            local = local_pooling_ref(local, marks)
        out = pooling_fusion_ref(g, s, o, local, token_segments, sequences)
        found = iter(gradients(out, [leaf for leaf in leaves if leaf is not None], self.grad))
        return [out.detach(), *(None if leaf is None else next(found) for leaf in leaves)]


def check_fusion(case: FusionCase) -> None:
    """Local max-pooling alone is exact: without g' and S the fusion is L, and 0 where special."""
    dtypes = (case.dtype, case.acc, case.acc, case.dtype, case.dtype)
    expected, actual = case.expected(), case.results()
    baseline = case.expected(case.dtype) if case.dtype in HALF else expected
    for name, dtype, ours, truth, torchs in zip(
        NAMES, dtypes, actual, expected, baseline, strict=True
    ):
        assert (ours is None) == (truth is None), name
        if ours is None:
            continue
        assert ours.dtype == dtype, name
        if name == "out" and case.values[:2] == [None, None]:
            assert_exact(ours, truth)
            continue
        allowed = TOLERANCE
        if case.dtype in HALF:
            allowed = max(2 * relative_error(torchs, truth), torch.finfo(dtype).eps)
        assert_close(ours.cpu(), truth, allowed, name)


@widths
@pytest.mark.parametrize("terms", ["gsl", "l"])
def test_fusion(dtype, num_channels, terms):
    check_fusion(FusionCase(RAGGED, num_channels, dtype, terms))


@pytest.mark.parametrize("terms", ["gs", "gl", "sl", "g", "s", ""])
def test_fusion_of_some_terms(terms):
    check_fusion(FusionCase(RAGGED, 9, torch.float64, terms))


@pytest.mark.parametrize("every", [1, 2, 7, 100])
def test_windows_of_nan_and_infinity(every):
    case = FusionCase([67], 5, terms="l", marks=marks_of([67], every))
    x = case.values[3]
    x[[0, 9, 10, 12, 40, 59], :3] = float("nan")
    x[[1, 30, 42], :4] = float("inf")
    x[::2, 4] = float("-inf")
    x[20:35, 4] = float("-inf")
    check_fusion(case)


@pytest.mark.parametrize("lengths", [*LENGTHS.values(), LONG[:5]], ids=[*LENGTHS, "long"])
def test_fusion_of_lengths(lengths):
    """Windows see across more than one step of the reduction where one run holds all tokens."""
    check_fusion(FusionCase(lengths, 2, marks=marks_of(lengths, every=100)))


@views
def test_fusion_of_views_and_again(view):
    """Equal bits, of other strides and of a second run."""
    case = FusionCase(RAGGED, 20)
    expected = case.results()
    case.values, case.grad = [view(v) for v in case.values], view(case.grad)
    for actual, wanted in zip(case.results(), expected, strict=True):
        assert torch.equal(actual, wanted)


@settings(max_examples=4, deadline=None)
@given(st.lists(st.integers(0, 2 * WINDOW + 3), max_size=4), st.integers(1, 9))
def test_any_lengths(lengths, num_channels):
    check_segment_max(ties(sum(lengths), num_channels), lengths)
    for terms in ("l", "gsl"):
        check_fusion(FusionCase(lengths, num_channels, terms=terms))


def test_rows_beyond_two_to_the_31(tmp_path):
    big = huge(tmp_path, 40, 2**26, torch.float16)
    far, written = big[:, :6], (big[:, 16:22], big[:, 32:38])
    far.copy_(random(40, 6, dtype=torch.float16))
    near, lengths = far.contiguous(), [30, 1, 9]
    layout = offsets(lengths), owners(lengths)
    found, expected = (
        segment_max.segment_max_fwd(x, *layout, torch.uint8, False) for x in (far, near)
    )
    assert all(map(torch.equal, found, expected))
    dx = torch.empty_like(near)
    for out in (dx, written[0]):
        segment_max.segment_max_bwd(random(3, 6), found[1], *layout, out)
    assert torch.equal(written[0], dx)
    case = FusionCase(lengths, 6, torch.float16)
    case.values[2:], case.grad = [near, near], near
    wanted = case.results()
    case.values[2:] = [far, far]
    out = fusion.fusion_fwd(*case.values, *case.tables)
    sums = fusion.fusion_bwd(far, *case.values, case.cu_segments, *case.tables, *written, False)
    assert all(map(torch.equal, (out, *sums, *written), wanted))
