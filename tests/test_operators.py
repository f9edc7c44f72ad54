"""What PyTorch may do with the operators: check, compile, checkpoint, autocast, export them."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ponet import PoNetConfig, PoNetForPreTraining, PoNetModel
from ponet.model import Encoder
from ponet.packing import BatchLayout, layout_of, stream_of_packed
from ponet_kernels import (
    PackedLayout,
    fused_pooling,
    global_aggregation,
    global_mean,
    multi_granularity_pooling,
    segment_max,
    token_marks,
    use_backend,
)
from ponet_kernels.testing import assert_close
from tests.streams import DEVICE, offsets, owners

pytestmark = pytest.mark.gpu

WIDTH = 8
SEGMENTS = [3, 1, 5, 2, 4]
SEQUENCES = [9, 0, 6]
CLS = 101

pytest.importorskip("triton")
backends = pytest.mark.parametrize("backend", ["torch", "triton"])


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()


def small_layout() -> PackedLayout:
    """Three sequences, one without tokens; the fourth token is special, and its segment."""
    starts = torch.zeros(15, dtype=torch.bool, device=DEVICE)
    starts[[0, 3, 4, 9]] = True
    special = torch.zeros_like(starts)
    special[3] = True
    return PackedLayout(
        cu_seqlens=offsets(SEQUENCES),
        cu_segments=offsets(SEGMENTS),
        token_segments=owners(SEGMENTS),
        segment_sequences=owners([3, 0, 2]),
        token_marks=token_marks(starts, special),
        max_seqlen=9,
        max_segment_len=5,
    )


def cases(backend: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """An operator and its arguments, as the functions of the package call it."""
    ops, layout = torch.ops.ponet, small_layout()
    x, g = random(15, WIDTH), random(3, WIDTH)
    square, row = [random(WIDTH, WIDTH, seed=s) for s in (1, 2)], [random(WIDTH) for _ in "ab"]
    parameters = (square[0], row[0], square[1], row[1])
    segments = (layout.cu_segments, layout.token_segments)
    tables = (*segments, layout.segment_sequences, layout.token_marks)
    span = (layout.cu_seqlens, 9, backend)

    def fused(terms: str, longest: int = 5, has_empty: bool = True) -> tuple[Any, tuple[Any, ...]]:
        values = random(15, WIDTH * (1 + ("s" in terms) + ("l" in terms)), seed=3)
        flags = ("s" in terms, "l" in terms, longest, has_empty, "s" in terms, backend)
        return ops.fused_pooling, (g if "g" in terms else None, values, *tables, *flags)

    # what the backward operators are given, from a forward pass
    arguments = fused("gsl")[1]
    _, maxima, places = ops.fused_pooling(*(detached(a) for a in arguments))
    saved = [detached(a) for a in (arguments[0], arguments[1], maxima, places, *tables)]
    settings = (True, True, True, backend)
    up = detached(random(15, WIDTH, seed=6))
    aggregated = [detached(a) for a in (x, *parameters)]
    pooled, *kept = ops.global_aggregation(*aggregated, 2, *span)
    x_and_weights = (aggregated[0], aggregated[1], aggregated[3])
    return {
        "segment_max": (ops.segment_max, (x, *segments, 15, True, True, backend)),
        "segment_max_backward": (
            ops.segment_max_backward,
            (detached(random(5, WIDTH)), places, *segments, backend),
        ),
        **{f"fused_pooling_{terms}": fused(terms) for terms in ("gsl", "sl", "g")},
        "fused_pooling_of_many": fused("gsl", 300, False),
        "fused_pooling_backward": (ops.fused_pooling_backward, (up, *saved, *settings)),
        "fused_pooling_backward_without_global": (
            ops.fused_pooling_backward,
            (up, None, *saved[1:], *settings),
        ),
        "global_mean": (ops.global_mean, (x, *span)),
        "global_mean_backward": (ops.global_mean_backward, (detached(g), detached(x), *span)),
        "global_aggregation": (ops.global_aggregation, (x, *parameters, 2, *span)),
        "global_aggregation_backward": (
            ops.global_aggregation_backward,
            (torch.ones_like(pooled), *x_and_weights, *kept, *span),
        ),
    }


CASES = (
    "segment_max",
    "segment_max_backward",
    "fused_pooling_gsl",
    "fused_pooling_sl",
    "fused_pooling_g",
    "fused_pooling_of_many",
    "fused_pooling_backward",
    "fused_pooling_backward_without_global",
    "global_mean",
    "global_mean_backward",
    "global_aggregation",
    "global_aggregation_backward",
)


# what an operator says of its results does not depend on the backend
WITH_KERNELS = ("segment_max", "fused_pooling_gsl", "fused_pooling_backward", "global_aggregation")


def detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def test_every_operator_is_checked():
    registered = {
        name.removeprefix("ponet::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("ponet::")
    }
    assert registered == {
        op._qualified_op_name.partition("::")[2] for op, _ in cases("torch").values()
    }


@pytest.mark.parametrize(
    ("backend", "name"),
    [("torch", name) for name in CASES] + [("triton", name) for name in WITH_KERNELS],
)
def test_opcheck(name, backend):
    """Schema, fake kernel, autograd registration, and tracing with dynamic shapes."""
    op, arguments = cases(backend)[name]
    torch.library.opcheck(op.default, arguments)


class _Watcher(TorchDispatchMode):
    """Notes the operators of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ponet":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


@backends
def test_operators_show_only_where_somebody_watches(backend):
    """The direct call and the one through the dispatcher: equal bits, forward and backward."""
    places, watcher = layout([9, 4, 7]), _Watcher()
    inputs = [random(20, 8, seed=1), *(random(*s, seed=2) for s in ((8, 8), (8,), (8, 8), (8,)))]
    values = random(20, 24, seed=3)
    projections = [(random(8, 8, seed=s), random(8, seed=s)) for s in range(4, 9)]

    def run() -> list[Tensor]:
        out = fused_pooling(global_aggregation(*inputs, 2, places), values, places)
        out = out + global_mean(out, places).mean(0) + segment_max(out, places).mean(0)
        out = multi_granularity_pooling(out, projections, 2, places)
        leaves = [*inputs, values, *(part for pair in projections for part in pair)]
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    with use_backend(backend):
        direct = run()
        with watcher:
            watched = run()
    assert all(map(torch.equal, direct, watched))
    names = ("global_aggregation", "fused_pooling", "global_mean", "segment_max")
    assert set(watcher.seen) == {*names, *(f"{name}_backward" for name in names)}


def test_gradients_of_gradients_are_refused():
    places, values = layout([9, 4]), random(13, 24)
    out = fused_pooling(None, values, places).sum()
    with pytest.raises(NotImplementedError, match="fused_pooling: no gradients of gradients"):
        torch.autograd.grad(out, values, create_graph=True)


def config(**changes: Any) -> PoNetConfig:
    sizes = {
        "vocab_size": 200,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
    }
    return PoNetConfig(**(sizes | changes))


def layout(lengths: list[int]) -> BatchLayout:
    ids = torch.randint(0, 9, (sum(lengths),), device=DEVICE)
    special = torch.zeros(len(ids), dtype=torch.bool, device=DEVICE)
    special[offsets(lengths)[:-1].long()] = True
    return layout_of(stream_of_packed(ids, offsets(lengths)), special, ids.cumsum(0) // 40)


def encode(encoder: Callable, hidden: Tensor, layout: BatchLayout) -> tuple[Tensor, Tensor]:
    leaf = hidden.detach().requires_grad_()
    last = encoder(leaf, layout)[-1]
    (gradient,) = torch.autograd.grad(last, leaf, random(*last.shape, seed=9).to(last.dtype))
    return last.detach(), gradient


@backends
def test_encoder_compiles_without_graph_breaks(backend):
    torch.manual_seed(0)
    torch._dynamo.reset()
    encoder = Encoder(config()).to(DEVICE)
    # without a GPU nothing may need a compiler, so the graph is run as it was traced
    how = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(encoder, fullgraph=True, backend=how)
    with use_backend(backend):
        # other lengths and batch sizes run through the same compiled code
        for lengths in ([5, 9], [17, 3], [4, 2, 7]):
            hidden = random(sum(lengths), 32)
            places = layout(lengths)
            plain, fast = encode(encoder, hidden, places), encode(compiled, hidden, places)
            assert_close(fast[0], plain[0], 1e-5, "states")
            assert_close(fast[1], plain[1], 1e-5, "gradient")


@backends
def test_activation_checkpointing_changes_nothing(backend):
    torch.manual_seed(0)
    encoder = Encoder(config()).to(DEVICE)
    hidden, places = random(20, 32), layout([7, 13])

    def recomputed(hidden: Tensor, places: BatchLayout) -> list[Tensor]:
        for layer in encoder.layers:
            hidden = checkpoint(layer, hidden, places, use_reentrant=False)
        return [hidden]

    with use_backend(backend):
        plain, saved = encode(encoder, hidden, places), encode(recomputed, hidden, places)
    assert torch.equal(plain[0], saved[0])
    assert torch.equal(plain[1], saved[1])


@backends
def test_autocast_trains_in_bf16_and_keeps_fp32_gradients(backend):
    torch.manual_seed(0)
    encoder = Encoder(config()).to(DEVICE)
    hidden, places = random(20, 32), layout([7, 13])
    with use_backend(backend):
        exact, exact_gradient = encode(encoder, hidden, places)
        seen: list[torch.dtype] = []
        mixer: nn.Module = encoder.layers[0].mixer  # type: ignore[assignment]
        mixer.register_forward_hook(lambda *a: seen.append(a[2].dtype))
        with torch.autocast(DEVICE, torch.bfloat16):
            last, gradient = encode(encoder, hidden, places)
    assert seen == [torch.bfloat16]
    assert gradient.dtype == torch.float32
    assert_close(last, exact, 0.03, "states")
    assert_close(gradient, exact_gradient, 0.1, "gradient")


def test_model_exports_for_any_batch_and_length(tmp_path):
    """The exported program runs in a process that knows the operators alone."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = PoNetModel(config(), add_pooler=False).eval()
    rows = torch.randint(0, 200, (2, 40))
    rows[:, 0] = CLS
    mask = torch.ones_like(rows, dtype=torch.bool)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(
            LastState(model), (rows, mask), dynamic_shapes=(free, free), strict=False
        )
        # as in the model itself: no queries and keys of every token
        called = {str(node.target) for node in program.graph.nodes if "ponet" in str(node.target)}
        assert called == {"ponet.global_aggregation.default", "ponet.fused_pooling.default"}
        other = torch.randint(0, 200, (3, 17))
        ragged = torch.arange(17) < torch.tensor([[17], [9], [1]])
        expected = LastState(model)(other, ragged)
    assert torch.equal(program.module()(other, ragged), expected)

    torch.export.save(program, tmp_path / "model.pt2")
    torch.save({"ids": other, "mask": ragged, "out": expected}, tmp_path / "example.pt")
    script = (
        "import torch, ponet_kernels, sys\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        "e = torch.load(sys.argv[2], weights_only=True)\n"
        "assert torch.equal(program(e['ids'], e['mask']), e['out'])\n"
        "assert 'ponet' not in sys.modules\n"
    )
    arguments = [tmp_path / "model.pt2", tmp_path / "example.pt"]
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True, timeout=200)


class LastState(nn.Module):
    """The inference encoder as ids and mask in, states out."""

    def __init__(self, model: PoNetModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(ids, mask).last_hidden_state


def training_losses(backend: str, steps: int) -> list[float]:
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "vocab_size": 64}
    model = PoNetForPreTraining(config(**sizes)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(4)
    losses = []
    with use_backend(backend):
        for _ in range(steps):
            ids = torch.randint(0, 64, (2, 24), generator=generator).to(DEVICE)
            segments = torch.randint(0, 2, ids.shape, generator=generator).cumsum(1).to(DEVICE) // 4
            mask = torch.ones_like(ids)
            mask[1, 19:] = 0
            labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, ids.cpu(), -100)
            loss = model(
                ids,
                mask,
                segment_ids=segments,
                labels=labels.to(DEVICE),
                sso_labels=torch.tensor([0, 2], device=DEVICE),
            ).loss
            assert loss is not None
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("backend", "steps"), [("torch", 50), ("triton", 3)])
def test_training_steps_match_the_reference(backend, steps):
    fast, slow = training_losses(backend, steps), training_losses("reference", steps)
    assert slow[-1] < slow[0]
    for step, (ours, theirs) in enumerate(zip(fast, slow, strict=True)):
        assert abs(ours - theirs) < 1e-4, f"step {step}: {ours} against {theirs}"


@backends
def test_operators_compile_with_their_gradients(backend):
    """Each alone, with a layout among the arguments; other lengths need no other code."""
    torch._dynamo.reset()
    square, row = random(WIDTH, WIDTH, seed=1), random(WIDTH)

    def mixed(x: Tensor, values: Tensor, layout: PackedLayout) -> Tensor:
        g = global_aggregation(x, square, row, square, row, 2, layout)
        fused = fused_pooling(g + global_mean(x, layout), values, layout)
        return fused.sum() + segment_max(x, layout).square().sum()

    compiled = torch.compile(mixed, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([9, 6], [3, 1, 8]):
        places = PackedLayout.of_sequences(offsets(lengths), sum(lengths), max(lengths))
        inputs = random(sum(lengths), WIDTH), random(sum(lengths), 3 * WIDTH, seed=2)
        with use_backend(backend):
            found, expected = compiled(*inputs, places), mixed(*inputs, places)
            assert_close(found.view(1), expected.view(1), 1e-5)
            slopes = torch.autograd.grad(found, (*inputs, square, row))
            wanted = torch.autograd.grad(expected, (*inputs, square, row))
        for actual, gradient in zip(slopes, wanted, strict=True):
            assert_close(actual, gradient, 1e-5)


def test_nothing_is_kept_for_the_backward_pass_without_gradients():
    layout = small_layout()
    with torch.no_grad():
        assert segment_max(random(15, WIDTH), layout).grad_fn is None
    arguments = [detached(a) for a in cases("torch")["fused_pooling_gsl"][1]]
    arguments[-2] = False
    assert torch.ops.ponet.fused_pooling(*arguments)[2].numel() == 0


def test_an_unused_result_has_no_gradient():
    """A graph that goes on from saved values alone."""
    x = random(15, WIDTH)
    op, arguments = cases("torch")["segment_max"]
    maxima, _ = op(x, *arguments[1:])
    (gradient,) = torch.autograd.grad((maxima * 0).sum() + x.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


@backends
def test_empty_streams(backend):
    empty, square, bias = random(0, WIDTH), random(WIDTH, WIDTH), random(WIDTH)
    none = PackedLayout.of_sequences(offsets([]), 0)
    two = PackedLayout.of_sequences(offsets([0, 0]), 0)
    with use_backend(backend):
        assert segment_max(empty, none).shape == (0, WIDTH)
        assert global_mean(empty, none).shape == (0, WIDTH)
        assert global_mean(empty, two).tolist() == [[0.0] * WIDTH] * 2
        assert segment_max(empty, two).isneginf().all()
        for layout in (none, two):
            g, values = random(layout.num_sequences, WIDTH), random(0, 3 * WIDTH)
            out = fused_pooling(g, values, layout)
            assert out.shape == (0, WIDTH)
            out.sum().backward()
            assert g.grad is not None
            assert not g.grad.any()
        pooled = global_aggregation(empty, square, bias, square, bias, 2, two)
        assert torch.equal(pooled, bias.expand(2, -1))
        pooled.sum().backward()
        assert bias.grad is not None
        assert torch.equal(bias.grad, torch.full_like(bias, 2.0))
