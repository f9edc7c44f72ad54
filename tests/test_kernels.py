"""Operators: the fast path against the reference formulas, values and gradients."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ponet_kernels import (
    PackedLayout,
    active_backend,
    fused_pooling,
    global_aggregation,
    global_mean,
    local_pooling,
    segment_max,
    token_marks,
    use_backend,
)
from ponet_kernels.layout import SEES_LEFT, SEES_RIGHT, SPECIAL
from ponet_kernels.testing import assert_close
from tests.streams import DEVICE, VIEWS, offsets, owners, random, segmented, ties

pytestmark = pytest.mark.gpu

EXACT = 1e-12
# without a GPU Triton's interpreter runs the kernels, far slower than PyTorch
backends = pytest.mark.parametrize("backend", ["torch", "triton"])
examples = settings(deadline=None, max_examples=5)
OPERATORS = ("segment_max", "local_max", "global_mean", "global_aggregation", "fused_pooling")
OPERATORS += ("window_max", "window_mean")
every_operator = pytest.mark.parametrize("name", OPERATORS)
double = partial(random, dtype=torch.float64)


def whole(lengths: list[int]) -> PackedLayout:
    """Each sequence one segment."""
    return PackedLayout.of_sequences(offsets(lengths), sum(lengths), max(lengths))


def parameters(out: int, width: int, seed: int = 1) -> list[Tensor]:
    """Weights and biases of queries and keys."""
    shapes = ((out, width), (out,), (out, width), (out,))
    return [double(*shape, seed=seed + n) / width**0.5 for n, shape in enumerate(shapes)]


def windows(x: Tensor, layout: PackedLayout) -> Tensor:
    """Local max-pooling alone: without g' and S the fusion is L, and O is not asked for."""
    values = torch.cat([torch.full_like(x, 7.0), x], dim=1)
    return fused_pooling(None, values, layout, use_segment=False)


def operator(name, layout, width=5, heads=2, absent=(), seed=0, draw=random, window=5):
    """It as a function of its tensors, and those, in float64."""
    flags = {f"use_{term}": term not in absent for term in ("segment", "local")}
    g = double(layout.num_sequences, width, seed=seed)
    x = draw(layout.num_tokens, width, dtype=torch.float64, seed=seed)
    columns = width * (1 + sum(flags.values()))
    values = draw(layout.num_tokens, columns, dtype=torch.float64, seed=seed + 1)
    if name == "global_aggregation":
        inputs = [x, *parameters(2 * heads, width, seed + 1)]
        return lambda *a: global_aggregation(*a, heads, layout), inputs
    if name == "fused_pooling":
        inputs = [values] if "global" in absent else [g, values]
        return lambda *a: fused_pooling(*[None, *a][-2:], layout, **flags), inputs
    if name.startswith("window"):
        average = name == "window_mean"
        return lambda x: local_pooling(x, layout, window, average=average), [x]
    function = {"segment_max": segment_max, "local_max": windows, "global_mean": global_mean}[name]
    return lambda x: function(x, layout), [x]


def values_and_gradients(function, *inputs: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    if not out.requires_grad:
        # without tokens the formulas have nothing to differentiate
        return [out, *map(torch.zeros_like, leaves)]
    upstream = double(*out.shape, seed=7)
    finite = torch.where(out.isfinite(), out, torch.zeros_like(out))
    gradients = torch.autograd.grad(finite, leaves, upstream, materialize_grads=True)
    return [out.detach(), *gradients]


def compare(backend: str, function, *inputs: Tensor) -> None:
    results = []
    for name in (backend, "reference"):
        with use_backend(name):
            results.append(values_and_gradients(function, *inputs))
    for place, (fast, slow) in enumerate(zip(*results, strict=True)):
        infinite = slow.isinf()
        assert torch.equal(fast.isinf(), infinite)
        # inputs are of order one, so what cancels to zero is held to the same absolute error
        fast, slow = (torch.cat([x[~infinite], x.new_ones(1)]) for x in (fast, slow))
        assert_close(fast, slow, EXACT, f"result {place}")


@every_operator
@backends
@examples
@given(
    sequences=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=4),
    width=st.sampled_from([1, 3, 8, 48]),
    heads=st.sampled_from([1, 2, 4]),
    absent=st.sets(st.sampled_from(["global", "segment", "local"])),
    draw=st.sampled_from([random, ties]),
    window=st.sampled_from([1, 3, 5, 9]),
    seed=st.integers(0, 99),
)
@example(sequences=[[1]], width=5, heads=1, absent=(), draw=random, window=5, seed=0)
def test_operators_equal_reference(name, backend, sequences, seed, **choices):
    """Segments and sequences may be empty; terms are left out as ablations do."""
    function, inputs = operator(name, segmented(sequences, seed), seed=seed, **choices)
    compare(backend, function, *inputs)


@pytest.mark.parametrize("longest", [256, 257, 40_000])
def test_places_survive_every_index_type(longest):
    """The winner stands at the last place of a segment that needs one, two or four bytes."""
    lengths = [longest, 3]
    x = torch.zeros(sum(lengths), 6, device=DEVICE)
    x[longest - 1] = 1.0
    x[:, :2] = 1.0
    for function in (segment_max, partial(fused_pooling, None)):
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf, whole(lengths)).sum(), leaf)
        # of the fusion, the columns of the segments
        assert gradient[:, 2:4].nonzero()[:, 0].unique().tolist() == [longest - 1, longest]


def test_low_precision_aggregation_accumulates_in_fp32():
    lengths, width = [300, 211], 64
    inputs = [x.bfloat16() for x in (double(sum(lengths), width), *parameters(width, width))]
    exact = global_aggregation(*(t.double() for t in inputs), 4, whole(lengths))
    ours = global_aggregation(*inputs, 4, whole(lengths))
    with use_backend("reference"):
        plain = global_aggregation(*inputs, 4, whole(lengths))
    error = float((ours.double() - exact).abs().max())
    assert error < 1e-5
    assert error < float((plain.double() - exact).abs().max())


@backends
def test_tied_maxima_send_the_gradient_to_the_first_token(backend):
    x = torch.tensor([[2.0], [5.0], [5.0], [5.0], [1.0], [1.0]], device=DEVICE, requires_grad=True)
    # windows (2 5)(2 5 5)(5 5 5)(5 5) and (1 1)(1 1); each gives 1 to its first maximum
    of_three = [0, 3, 1, 0, 2, 0]
    cases = [(segment_max, [0, 1, 0, 0, 1, 0]), (windows, of_three), (local_pooling, of_three)]
    # (2 5 5)(2 5 5 5)(2 5 5 5)(5 5 5) and (1 1)(1 1)
    cases.append((partial(local_pooling, window=5), [0, 4, 0, 0, 2, 0]))
    for function, expected in cases:
        with use_backend(backend):
            (gradient,) = torch.autograd.grad(function(x, whole([4, 2])).sum(), x)
        assert gradient.flatten().tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_local_pooling_in_low_precision(dtype):
    """Windows of three are the fused ones, bit for bit; means are rounded once."""
    layout, x = segmented([[9, 1, 1], [1], [40]], seed=4), random(52, 6, dtype=dtype)
    assert layout.special.any()
    found, expected = (
        values_and_gradients(lambda x, pool=pool: pool(x, layout).float(), x)
        for pool in (local_pooling, windows)
    )
    assert torch.equal(found[0], expected[0])
    assert_close(found[1], expected[1], 4 * torch.finfo(dtype).eps)
    mean = local_pooling(x, layout, 9, average=True)
    exact = local_pooling(x.double(), layout, 9, average=True)
    error = (mean.double() - exact).abs() / exact.abs().clamp(min=0.1)
    assert mean.dtype == dtype
    assert float(error.max()) <= 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("average", [False, True], ids=["max", "average"])
def test_what_is_not_finite_stays_in_its_windows(average, value):
    """Runs of 4, 1, 8 and 5 tokens, the one alone special; the value is the first of the eight."""
    starts = torch.zeros(18, dtype=torch.bool, device=DEVICE)
    starts[[0, 4, 5, 13]] = True
    special = torch.arange(18, device=DEVICE) == 4
    x = double(18, 3)
    x[5] = value
    layout = replace(whole([13, 5]), token_marks=token_marks(starts, special))
    out, gradient = values_and_gradients(lambda x: local_pooling(x, layout, 5, average=average), x)
    assert (~out.isfinite()).any(dim=1).nonzero().flatten().tolist() == [5, 6, 7]
    assert gradient.isfinite().all()
    assert not out[4].any()
    assert not gradient[4].any()


GRADIENT_VIEWS = {
    "sliced": lambda out: out[:, ::2].square().sum().unsqueeze(0),
    "expanded": lambda out: out.sum().unsqueeze(0),
}


@every_operator
@backends
@pytest.mark.parametrize("view", [*VIEWS, *GRADIENT_VIEWS])
def test_inputs_and_gradients_of_any_strides(name, backend, view):
    """What comes from above may be a view of anything, of one value even."""
    function, inputs = operator(name, segmented([[2, 3], [7]], seed=1))
    if view in VIEWS:
        compare(backend, function, *(VIEWS[view](x) if x.ndim == 2 else x for x in inputs))
    else:
        compare(backend, lambda *a: GRADIENT_VIEWS[view](function(*a)), *inputs)


@every_operator
def test_gradcheck_of_the_hand_written_backward_passes(name):
    """Those of the kernels are compared with the formulas' above."""
    layout = segmented([[2, 1], [1], [4]], seed=3)
    assert layout.special.any()
    function, inputs = operator(name, layout)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with use_backend("torch"):
        # PyTorch's scatter adds in any order on a GPU
        assert torch.autograd.gradcheck(function, leaves, nondet_tol=1e-12)


@backends
def test_only_what_is_asked_for_is_differentiated(backend):
    """A parameter without gradient, an input without gradient."""
    layout, g, values = segmented([[2, 3], [7]]), double(2, 5), double(12, 15)
    with use_backend(backend):
        fused_pooling(g, values.requires_grad_(), layout).sum().backward()
        assert g.grad is None
        assert values.grad is not None
        values = values.detach()
        fused_pooling(g.requires_grad_(), values, layout).sum().backward()
    expected = torch.stack([part.sum(0) for part in values[:, :5].split([5, 7])])
    assert_close(g.grad, expected, EXACT)


def test_backend_choice(monkeypatch):
    monkeypatch.delenv("PONET_KERNELS", raising=False)
    assert active_backend() == "torch"
    with use_backend("reference"):
        assert active_backend() == "reference"
    monkeypatch.setenv("PONET_KERNELS", "cuda")
    with pytest.raises(ValueError, match=r"PONET_KERNELS.*'cuda'"):
        active_backend()


def test_wrong_shapes_are_refused():
    layout, zeros = whole([3]), torch.zeros
    for shape in ((2, 2), (3,), (3, 1, 1)):
        with pytest.raises(ValueError, match=r"segment_max: expected x \[3, C\], found"):
            segment_max(zeros(shape), layout)
    for shape, found in (((3, 7), r"\(3, 7\)"), ((4, 9), r"\(4, 9\)")):
        with pytest.raises(ValueError, match=r"expected values \[3, 3 C\].*" + found):
            fused_pooling(None, zeros(shape), layout)
    with pytest.raises(ValueError, match=r"fused_pooling: expected values \[3, 2 C\].*\(3, 9\)"):
        fused_pooling(None, zeros(3, 9), layout, use_local=False)
    for shape in ((1, 9), (2, 3), (3,)):
        with pytest.raises(ValueError, match=r"expected global_vectors \(1, 3\)"):
            fused_pooling(zeros(shape), zeros(3, 9), layout)
    with pytest.raises(ValueError, match=r"local_pooling: expected x \[3, C\].*\(2, 2\)"):
        local_pooling(zeros(2, 2), layout)
    for window in (0, 4, -3):
        with pytest.raises(ValueError, match=f"window must be odd and at least 1, found {window}"):
            local_pooling(zeros(3, 2), layout, window)
    with pytest.raises(ValueError, match="width 6 is not a multiple of 4 heads"):
        global_aggregation(zeros(3, 6), *parameters(6, 6), 4, layout)


def test_marks_of_a_stream():
    """Two sequences, the second with a special token in front: s a b | S c."""
    starts = torch.tensor([True, False, False, True, True])
    special = torch.tensor([False, False, False, True, False])
    expected = [SEES_RIGHT, SEES_LEFT | SEES_RIGHT, SEES_LEFT, SPECIAL, 0]
    assert token_marks(starts, special).tolist() == expected
    assert token_marks(starts).tolist() == [2, 3, 1, 0, 0]
    assert token_marks(starts[:0], special[:0]).tolist() == []


@examples
@given(lengths=st.lists(st.integers(0, 4), max_size=6))
def test_layout_of_sequences(lengths):
    layout = PackedLayout.of_sequences(offsets(lengths), sum(lengths))
    assert layout.num_tokens == layout.max_seqlen == layout.max_segment_len == sum(lengths)
    assert layout.num_sequences == len(lengths)
    assert torch.equal(layout.token_segments, owners(lengths))
    assert torch.equal(layout.token_sequences, owners(lengths))
    assert layout.segment_sequences.tolist() == list(range(len(lengths)))
    assert not layout.special.any()
    # a token sees its neighbours in its sequence
    marks = [SEES_LEFT * (t > 0) + SEES_RIGHT * (t < n - 1) for n in lengths for t in range(n)]
    assert layout.token_marks.tolist() == marks
    assert layout.has_empty_segments
    assert PackedLayout.of_sequences(offsets(lengths), sum(lengths), 9).max_segment_len == 9
