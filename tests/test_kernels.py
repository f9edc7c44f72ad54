"""Operators: the fast path against the reference formulas, values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ponet_kernels import (
    PackedLayout,
    active_backend,
    fused_pooling,
    global_aggregation,
    global_mean,
    segment_max,
    token_marks,
    use_backend,
)
from ponet_kernels.layout import SEES_LEFT, SEES_RIGHT, SPECIAL
from ponet_kernels.testing import assert_close
from tests.streams import DEVICE, offsets, owners

pytestmark = pytest.mark.gpu

EXACT = 1e-12
lengths_strategy = st.lists(st.integers(0, 9), min_size=1, max_size=8)
widths = st.sampled_from([1, 3, 8, 48])
# without a GPU Triton's interpreter runs the kernels, far slower than PyTorch
backends = pytest.mark.parametrize("backend", ["torch", "triton"])
examples = settings(deadline=None, max_examples=5)


def whole(lengths: list[int]) -> PackedLayout:
    """Each sequence one segment."""
    return PackedLayout.of_sequences(offsets(lengths), sum(lengths), max(lengths))


def layout_of(sequences: list[list[int]], seed: int | None = None) -> PackedLayout:
    """Segments of some lengths in each sequence.

    Args:
        seed: marks some of the one-token segments as special, and ends runs at a few places as if
            padding were taken out there; None: neither.
    """
    segments = [length for sequence in sequences for length in sequence]
    lengths = [sum(sequence) for sequence in sequences]
    token_segments, total = owners(segments), sum(segments)
    starts = torch.zeros(total + 1, dtype=torch.bool, device=DEVICE)
    special = torch.zeros(total, dtype=torch.bool, device=DEVICE)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        alone = torch.tensor([n == 1 for n in segments], dtype=torch.bool)
        alone &= torch.rand(len(segments), generator=generator) < 0.5
        special = alone.to(DEVICE)[token_segments]
        starts |= (torch.rand(total + 1, generator=generator) < 0.2).to(DEVICE)
        starts[:-1] |= special
        starts[1:] |= special
    starts[offsets(lengths).long()] = True
    return PackedLayout(
        cu_seqlens=offsets(lengths),
        cu_segments=offsets(segments),
        token_segments=token_segments,
        segment_sequences=owners([len(sequence) for sequence in sequences]),
        token_marks=token_marks(starts[:-1], special),
        max_seqlen=max(lengths),
        max_segment_len=max(segments, default=0),
        has_empty_segments=0 in segments,
    )


def windows(x: Tensor, layout: PackedLayout) -> Tensor:
    """Local max-pooling alone: without g' and S the fusion is L, and O is not asked for."""
    values = torch.cat([torch.full_like(x, 7.0), x], dim=1)
    return fused_pooling(None, values, layout, use_segment=False)


def values_and_gradients(function, *inputs: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    if not out.requires_grad:
        # without tokens the formulas have nothing to differentiate
        return [out, *(torch.zeros_like(x) for x in leaves)]
    generator = torch.Generator().manual_seed(7)
    upstream = torch.randn(out.shape, generator=generator, dtype=out.dtype).to(DEVICE)
    finite = torch.where(out.isfinite(), out, torch.zeros_like(out))
    gradients = torch.autograd.grad(finite, leaves, upstream, allow_unused=True)
    return [
        out.detach(),
        *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)),
    ]


def compare(backend: str, function, *inputs: Tensor, tolerance: float = EXACT) -> None:
    results = []
    for name in (backend, "reference"):
        with use_backend(name):
            results.append(values_and_gradients(function, *inputs))
    for place, (fast, slow) in enumerate(zip(*results, strict=True)):
        infinite = slow.isinf()
        assert torch.equal(fast.isinf(), infinite)
        fast, slow = fast[~infinite], slow[~infinite]
        # inputs are of order one, so what cancels to zero is held to the same absolute error
        one = slow.new_ones(1)
        assert_close(torch.cat([fast, one]), torch.cat([slow, one]), tolerance, f"result {place}")


def random(*shape: int, ties: bool = False, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(0, 3, shape, generator=generator).double().to(DEVICE)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


@backends
@examples
@given(lengths=lengths_strategy, width=widths, ties=st.booleans(), seed=st.integers(0, 99))
def test_segment_max_equals_reference(backend, lengths, width, ties, seed):
    x = random(sum(lengths), width, ties=ties, seed=seed)
    compare(backend, lambda x: segment_max(x, whole(lengths)), x)


@backends
@examples
@given(lengths=lengths_strategy, width=widths, ties=st.booleans(), seed=st.integers(0, 99))
def test_local_max_equals_reference(backend, lengths, width, ties, seed):
    x = random(sum(lengths), width, ties=ties, seed=seed)
    compare(backend, lambda x: windows(x, whole(lengths)), x)


@backends
@examples
@given(lengths=lengths_strategy, width=widths, seed=st.integers(0, 99))
def test_global_mean_equals_reference(backend, lengths, width, seed):
    x = random(sum(lengths), width, seed=seed)
    compare(backend, lambda x: global_mean(x, whole(lengths)), x)


@backends
@examples
@given(
    lengths=lengths_strategy,
    heads=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([8, 24]),
    seed=st.integers(0, 99),
)
def test_projected_mean_equals_five_projections(backend, lengths, heads, width, seed):
    """The absorbed form is the published function, gradients of all parameters included."""
    inputs = [random(sum(lengths), width, seed=seed)]
    inputs += [random(width, width, seed=seed + 1) / width**0.5, random(width, seed=seed + 2)]
    inputs += [random(width, width, seed=seed + 3) / width**0.5, random(width, seed=seed + 4)]
    compare(backend, lambda *a: global_aggregation(*a, heads, whole(lengths)), *inputs)


@backends
@examples
@given(
    sequences=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=4),
    width=widths,
    absent=st.sets(st.sampled_from(["global", "segment", "local"])),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
def test_fused_pooling_equals_reference(backend, sequences, width, absent, ties, seed):
    """Segments and sequences may be empty; terms are left out as ablations do."""
    layout = layout_of(sequences, seed)
    tokens = layout.num_tokens
    terms = {
        "global": random(len(sequences), width, seed=seed),
        "output": random(tokens, width, seed=seed + 2),
        "segment": random(tokens, width, seed=seed + 1, ties=ties),
        "local": random(tokens, width, seed=seed + 3, ties=ties),
    }
    names = [name for name in terms if name not in absent]

    def call(*given: Tensor) -> Tensor:
        values = dict(zip(names, given, strict=True))
        g = values.pop("global", None)
        return fused_pooling(
            g,
            torch.cat([*values.values()], dim=1),
            layout,
            use_segment="segment" in values,
            use_local="local" in values,
        )

    compare(backend, call, *(terms[name] for name in names))


@backends
def test_one_sequence_one_token(backend):
    compare(backend, lambda *a: fused_pooling(*a, layout_of([[1]])), random(1, 5), random(1, 15))


@pytest.mark.parametrize("longest", [256, 257, 40_000])
def test_places_survive_every_index_type(longest):
    """The winner stands at the last place of a segment that needs one, two or four bytes."""
    lengths = [longest, 3]
    x = torch.zeros(sum(lengths), 2, device=DEVICE)
    x[longest - 1] = 1.0
    x.requires_grad_()
    segment_max(x, whole(lengths)).sum().backward()
    assert x.grad is not None
    assert x.grad.nonzero()[:, 0].unique().tolist() == [longest - 1, longest]
    values = torch.cat([torch.ones_like(x), x, x], dim=1).detach().requires_grad_()
    fused_pooling(None, values, whole(lengths), use_local=True).sum().backward()
    assert values.grad is not None
    assert values.grad[:, 2:4].nonzero()[:, 0].unique().tolist() == [longest - 1, longest]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_max_operators_are_exact_in_every_dtype(dtype):
    layout = layout_of([[1, 17], [40, 3]])
    x = random(61, 48).to(dtype)
    with use_backend("reference"):
        expected = segment_max(x, layout), windows(x, layout)
    assert torch.equal(segment_max(x, layout), expected[0])
    assert torch.equal(windows(x, layout), expected[1])


def test_low_precision_aggregation_accumulates_in_fp32():
    lengths, width = [300, 211], 64
    parameters = [random(width, width, seed=1) / 8, random(width, seed=2)]
    parameters += [random(width, width, seed=3) / 8, random(width, seed=4)]
    x = random(sum(lengths), width)
    low = [t.bfloat16() for t in (x, *parameters)]
    exact = global_aggregation(*(t.double() for t in low), 4, whole(lengths))
    with use_backend("reference"):
        plain = global_aggregation(*low, 4, whole(lengths))
    ours = global_aggregation(*low, 4, whole(lengths))
    error = float((ours.double() - exact).abs().max())
    assert error < 1e-5
    assert error < float((plain.double() - exact).abs().max())


@backends
def test_tied_maxima_send_the_gradient_to_the_first_token(backend):
    x = torch.tensor([[2.0], [5.0], [5.0], [5.0], [1.0], [1.0]], device=DEVICE, requires_grad=True)
    with use_backend(backend):
        segment_max(x, whole([4, 2])).sum().backward()
        assert x.grad is not None
        assert x.grad.flatten().tolist() == [0, 1, 0, 0, 1, 0]
        x.grad = None
        windows(x, whole([4, 2])).sum().backward()
    # windows (2 5)(2 5 5)(5 5 5)(5 5) and (1 1)(1 1); each gives 1 to its first maximum
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [0, 3, 1, 0, 2, 0]


@backends
def test_non_contiguous_input(backend):
    layout, lengths = layout_of([[2, 3], [7]], seed=1), [5, 7]
    x = random(20, 12).T
    wide = random(12, 70)[:, 5:65]
    assert not x.is_contiguous()
    assert not wide.is_contiguous()
    for values in (x, wide):
        compare(backend, lambda x: segment_max(x, whole(lengths)), values)
        compare(backend, lambda x: windows(x, whole(lengths)), values)
        compare(backend, lambda x: global_mean(x, whole(lengths)), values)
    g = random(60, 2).T
    for values in (random(60, 12).T, wide):
        compare(backend, lambda *a: fused_pooling(*a, layout), g[:, :20], values)
    parameters = [random(20, 24, seed=1).T, random(24), random(20, 24, seed=2).T, random(24)]
    for values in (x, wide[:, 40:]):
        compare(backend, lambda *a: global_aggregation(*a, 3, whole(lengths)), values, *parameters)


@backends
def test_gradients_are_those_of_a_sliced_or_expanded_output(backend):
    """What comes from above may be a view of anything, of one value even."""
    layout, x = layout_of([[2, 3], [7]], seed=1), random(12, 9)
    w, b = random(3, 9, seed=4), random(3, seed=5)
    for use in (lambda t: t.sum(), lambda t: t[:, ::2].square().sum()):
        compare(backend, lambda x, use=use: use(segment_max(x, layout)).unsqueeze(0), x)
        compare(backend, lambda x, use=use: use(global_mean(x, layout)).unsqueeze(0), x)
        compare(
            backend,
            lambda g, x, use=use: use(fused_pooling(g, x, layout)).unsqueeze(0),
            random(2, 3),
            x,
        )
        compare(
            backend,
            lambda x, *p, use=use: use(global_aggregation(x, *p, 1, layout)).unsqueeze(0),
            x,
            *(w, b, w.flip(0), b),
        )


def test_gradcheck_of_the_hand_written_backward_passes():
    """Those of the kernels are compared with the formulas' above."""
    lengths, layout = [3, 1, 4], layout_of([[2, 1], [1], [4]], seed=3)
    assert layout.special.any()
    x = random(8, 5).requires_grad_()
    weights = [random(4, 5, seed=1), random(4, seed=2), random(4, 5, seed=3), random(4, seed=4)]
    weights = [w.requires_grad_() for w in weights]
    g, values = random(3, 5, seed=5).requires_grad_(), random(8, 15, seed=6).requires_grad_()
    with use_backend("torch"):
        for function, inputs in (
            (lambda x: segment_max(x, whole(lengths)), (x,)),
            (lambda x: global_mean(x, whole(lengths)), (x,)),
            (lambda *a: global_aggregation(*a, 2, whole(lengths)), (x, *weights)),
            (lambda *a: fused_pooling(*a, layout), (g, values)),
        ):
            # PyTorch's scatter adds in any order on a GPU
            assert torch.autograd.gradcheck(function, inputs, nondet_tol=1e-12)


@backends
def test_only_what_is_asked_for_is_differentiated(backend):
    """A parameter without gradient, an input without gradient."""
    layout, frozen = layout_of([[2, 3], [7]]), random(2, 5)
    values = random(12, 15)
    with use_backend(backend):
        fused_pooling(frozen, values.requires_grad_(), layout).sum().backward()
        assert frozen.grad is None
        assert values.grad is not None
        g = random(2, 5).requires_grad_()
        fused_pooling(g, values.detach(), layout).sum().backward()
    expected = torch.stack([part.sum(0) for part in values.detach()[:, :5].split([5, 7])])
    assert g.grad is not None
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
    layout = whole([3])
    for x in (torch.zeros(2, 2), torch.zeros(3), torch.zeros(3, 1, 1)):
        with pytest.raises(ValueError, match=r"segment_max: expected x \[3, C\], found"):
            segment_max(x, layout)
    with pytest.raises(ValueError, match=r"fused_pooling: expected values \[3, 3 C\].*\(3, 7\)"):
        fused_pooling(None, torch.zeros(3, 7), layout)
    with pytest.raises(ValueError, match=r"expected values \[3, 2 C\].*\(3, 9\)"):
        fused_pooling(None, torch.zeros(3, 9), layout, use_local=False)
    with pytest.raises(ValueError, match=r"expected values \[3, 3 C\].*\(4, 9\)"):
        fused_pooling(None, torch.zeros(4, 9), layout)
    for g in (torch.zeros(1, 9), torch.zeros(2, 3), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"expected global_vectors \(1, 3\)"):
            fused_pooling(g, torch.zeros(3, 9), layout)
    eye, zero = torch.eye(6), torch.zeros(6)
    with pytest.raises(ValueError, match="width 6 is not a multiple of 4 heads"):
        global_aggregation(torch.zeros(3, 6), eye, zero, eye, zero, 4, layout)


def test_marks_of_a_stream():
    """Two sequences, the second with a special token in front: s a b | S c."""
    starts = torch.tensor([True, False, False, True, True])
    special = torch.tensor([False, False, False, True, False])
    assert token_marks(starts, special).tolist() == [
        SEES_RIGHT,
        SEES_LEFT | SEES_RIGHT,
        SEES_LEFT,
        SPECIAL,
        0,
    ]
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
    marks = [
        (SEES_LEFT if t else 0) | (SEES_RIGHT if t < n - 1 else 0)
        for n in lengths
        for t in range(n)
    ]
    assert layout.token_marks.tolist() == marks
    assert layout.has_empty_segments
    assert PackedLayout.of_sequences(offsets(lengths), sum(lengths), 9).max_segment_len == 9
