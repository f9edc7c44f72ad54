"""Operators: the fast path against the reference formulas, values and gradients."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ponet_kernels import (
    active_backend,
    fused_pooling,
    global_aggregation,
    global_mean,
    local_max,
    pooling_fusion,
    segment_max,
    token_marks,
    use_backend,
)
from ponet_kernels.testing import assert_close

EXACT = 1e-12
lengths_strategy = st.lists(st.integers(0, 9), min_size=1, max_size=8)
widths = st.sampled_from([1, 3, 8, 48])
# without a GPU Triton's interpreter runs the kernels, far slower than PyTorch
backends = pytest.mark.parametrize("backend", ["torch", "triton"])


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def owners(lengths: list[int]) -> Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths).long())


def values_and_gradients(function, *inputs: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    if not out.requires_grad:
        # without tokens the formulas have nothing to differentiate
        return [out, *(torch.zeros_like(x) for x in leaves)]
    generator = torch.Generator().manual_seed(7)
    upstream = torch.randn(out.shape, generator=generator, dtype=out.dtype)
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
        return torch.randint(0, 3, shape, generator=generator).double()
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@backends
@settings(deadline=None, max_examples=40)
@given(lengths=lengths_strategy, width=widths, ties=st.booleans(), seed=st.integers(0, 99))
def test_segment_max_equals_reference(backend, lengths, width, ties, seed):
    x = random(sum(lengths), width, ties=ties, seed=seed)
    compare(backend, lambda x: segment_max(x, offsets(lengths), owners(lengths)), x)


@backends
@settings(deadline=None, max_examples=40)
@given(lengths=lengths_strategy, width=widths, ties=st.booleans(), seed=st.integers(0, 99))
def test_local_max_equals_reference(backend, lengths, width, ties, seed):
    x = random(sum(lengths), width, ties=ties, seed=seed)
    compare(backend, lambda x: local_max(x, offsets(lengths)), x)


@backends
@settings(deadline=None, max_examples=40)
@given(lengths=lengths_strategy, width=widths, seed=st.integers(0, 99))
def test_global_mean_equals_reference(backend, lengths, width, seed):
    x = random(sum(lengths), width, seed=seed)
    compare(backend, lambda x: global_mean(x, offsets(lengths)), x)


@backends
@settings(deadline=None, max_examples=40)
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
    compare(backend, lambda *a: global_aggregation(*a, heads, offsets(lengths)), *inputs)


@backends
@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=4),
    width=widths,
    seed=st.integers(0, 99),
)
def test_fusion_equals_reference(backend, lengths, width, seed):
    segments = [length for sequence in lengths for length in sequence]
    sequence_of = owners([len(sequence) for sequence in lengths])
    token_segments = owners(segments) if segments else torch.zeros(0, dtype=torch.long)
    tokens = sum(segments)
    inputs = [random(len(lengths), width, seed=seed), random(len(segments), width, seed=seed + 1)]
    inputs += [random(tokens, width, seed=seed + 2), random(tokens, width, seed=seed + 3)]
    compare(backend, lambda *a: pooling_fusion(*a, token_segments, sequence_of), *inputs)


@backends
@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=4),
    width=widths,
    absent=st.sets(st.sampled_from(["global", "segment", "local"])),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
def test_fused_pooling_equals_reference(backend, lengths, width, absent, ties, seed):
    """One-token segments are marked special by the seed; terms are left out as ablations do."""
    segments = [length for sequence in lengths for length in sequence]
    tokens, token_segments = sum(segments), owners(segments)
    if not tokens:
        return
    generator = torch.Generator().manual_seed(seed)
    alone = torch.tensor([n == 1 for n in segments], dtype=torch.bool)
    alone &= torch.rand(len(segments), generator=generator) < 0.5
    special = alone[token_segments].nonzero().squeeze(1)
    # runs end at sequences, at special tokens and at a few places as if padding were taken out
    starts = torch.rand(tokens, generator=generator) < 0.2
    starts[offsets([sum(sequence) for sequence in lengths])[:-1].long().clamp(max=tokens - 1)] = (
        True
    )
    starts[special] = True
    starts[(special + 1)[special + 1 < tokens]] = True
    runs = torch.cat([starts.nonzero().squeeze(1), torch.tensor([tokens])]).int()
    layout = (
        offsets(segments),
        token_segments,
        owners([len(sequence) for sequence in lengths]),
        token_marks(runs, tokens, special),
    )
    terms = {
        "global": random(len(lengths), width, seed=seed),
        "segment": random(tokens, width, seed=seed + 1, ties=ties),
        "output": random(tokens, width, seed=seed + 2),
        "local": random(tokens, width, seed=seed + 3, ties=ties),
    }
    names = [name for name in terms if name not in absent]

    def call(*given: Tensor) -> Tensor:
        values = dict.fromkeys(terms) | dict(zip(names, given, strict=True))
        return fused_pooling(*values.values(), *layout, max(segments))

    compare(backend, call, *(terms[name] for name in names))


@pytest.mark.parametrize("longest", [256, 257, 40_000])
def test_places_survive_every_index_type(longest):
    """The winner stands at the last place of a segment that needs one, two or four bytes."""
    lengths = [longest, 3]
    x = torch.zeros(sum(lengths), 2)
    x[longest - 1] = 1.0
    x.requires_grad_()
    segment_max(x, offsets(lengths), owners(lengths), longest).sum().backward()
    assert x.grad is not None
    assert x.grad.nonzero()[:, 0].unique().tolist() == [longest - 1, longest]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_max_operators_are_exact_in_every_dtype(dtype):
    lengths = [1, 17, 40, 3]
    x = random(sum(lengths), 48).to(dtype)
    with use_backend("reference"):
        expected = segment_max(x, offsets(lengths), owners(lengths)), local_max(x, offsets(lengths))
    assert torch.equal(segment_max(x, offsets(lengths), owners(lengths)), expected[0])
    assert torch.equal(local_max(x, offsets(lengths)), expected[1])


def test_low_precision_aggregation_accumulates_in_fp32():
    lengths, width = [300, 211], 64
    parameters = [random(width, width, seed=1) / 8, random(width, seed=2)]
    parameters += [random(width, width, seed=3) / 8, random(width, seed=4)]
    x = random(sum(lengths), width)
    low = [t.bfloat16() for t in (x, *parameters)]
    exact = global_aggregation(*(t.double() for t in low), 4, offsets(lengths))
    with use_backend("reference"):
        plain = global_aggregation(*low, 4, offsets(lengths))
    ours = global_aggregation(*low, 4, offsets(lengths))
    error = float((ours.double() - exact).abs().max())
    assert error < 1e-5
    assert error < float((plain.double() - exact).abs().max())


def test_tied_maxima_send_the_gradient_to_the_first_token():
    x = torch.tensor([[2.0], [5.0], [5.0], [5.0], [1.0], [1.0]], requires_grad=True)
    segment_max(x, offsets([4, 2]), owners([4, 2])).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [0, 1, 0, 0, 1, 0]
    x.grad = None
    local_max(x, offsets([4, 2])).sum().backward()
    # windows (2 5)(2 5 5)(5 5 5)(5 5) and (1 1)(1 1); each gives 1 to its first maximum
    assert x.grad.flatten().tolist() == [0, 3, 1, 0, 2, 0]


@backends
def test_non_contiguous_input(backend):
    x = random(20, 12).T
    assert not x.is_contiguous()
    lengths = [5, 7]
    compare(backend, lambda x: segment_max(x, offsets(lengths), owners(lengths)), x)
    compare(backend, lambda x: local_max(x, offsets(lengths)), x)
    compare(backend, lambda x: global_mean(x, offsets(lengths)), x)


def test_gradcheck_of_the_hand_written_backward_passes():
    lengths = [3, 1, 4]
    x = random(8, 5).requires_grad_()
    weights = [random(4, 5, seed=1), random(4, seed=2), random(4, 5, seed=3), random(4, seed=4)]
    weights = [w.requires_grad_() for w in weights]
    check = torch.autograd.gradcheck
    assert check(lambda x: segment_max(x, offsets(lengths), owners(lengths)), (x,))
    assert check(lambda x: local_max(x, offsets(lengths)), (x,))
    assert check(lambda *a: global_aggregation(*a, 2, offsets(lengths)), (x, *weights))
    g, s = random(3, 5, seed=5).requires_grad_(), random(3, 5, seed=6).requires_grad_()
    o, local = random(8, 5, seed=7).requires_grad_(), random(8, 5, seed=8).requires_grad_()
    check(lambda *a: pooling_fusion(*a, owners(lengths), torch.arange(3)), (g, s, o, local))


def test_backend_choice(monkeypatch):
    assert active_backend() == "torch"
    with use_backend("reference"):
        assert active_backend() == "reference"
    monkeypatch.setenv("PONET_KERNELS", "cuda")
    with pytest.raises(ValueError, match=r"PONET_KERNELS.*'cuda'"):
        active_backend()


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="segment_max: expected x"):
        segment_max(torch.zeros(3, 2), offsets([3]), owners([2]))
    with pytest.raises(ValueError, match="local_max: expected x"):
        local_max(torch.zeros(3), offsets([3]))
    eye, zero = torch.eye(6), torch.zeros(6)
    with pytest.raises(ValueError, match="width 6 is not a multiple of 4 heads"):
        global_aggregation(torch.zeros(3, 6), eye, zero, eye, zero, 4, offsets([3]))
