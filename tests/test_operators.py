"""What PyTorch may do with the operators: check, compile, checkpoint, autocast, export them."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
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
    local_pooling,
    segment_max,
    use_backend,
)
from ponet_kernels.testing import assert_close
from tests import streams
from tests.streams import DEVICE, offsets, segmented

pytestmark = pytest.mark.gpu

WIDTH = 8
ABSENT = {"use_segment": False, "use_local": False}

SIZES = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 64}
SIZES |= {"num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64}
CONFIG = PoNetConfig(**SIZES, hidden_dropout_prob=0.0)
AVERAGE = CONFIG.replace(segment_pooling="average", local_pooling="average", local_window=5)

pytest.importorskip("triton")
backends = pytest.mark.parametrize("backend", ["torch", "triton"])
# what averages add is the same code on every backend
models = pytest.mark.parametrize(
    ("backend", "config"),
    [("torch", CONFIG), ("triton", CONFIG), ("torch", AVERAGE)],
    ids=["torch", "triton", "average"],
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return streams.random(*shape, seed=seed).requires_grad_()


class Watcher(TorchDispatchMode):
    """Notes the operators of this package, what they are called with and what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "ponet":
            self.calls.append((func, args, result))
        return result


def every_operator(x: Tensor, values: Tensor, *parameters: Any) -> Tensor:
    layout = parameters[-1]
    g = global_aggregation(x, *parameters[:-1], 2, layout)
    fused = fused_pooling(g + global_mean(x, layout), values, layout)
    local = local_pooling(x, layout, 5) * local_pooling(x, layout, 7, average=True)
    return fused.sum() + local.sum() + segment_max(x, layout).square().sum()


def out_and_gradients(function: Callable[..., Tensor], layout: PackedLayout) -> list[Tensor]:
    shapes = [(layout.num_tokens, WIDTH), (layout.num_tokens, 3 * WIDTH)]
    shapes += [(WIDTH, WIDTH), (WIDTH,), (WIDTH, WIDTH), (WIDTH,)]
    leaves = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    out = function(*leaves, layout)
    return [out.view(1), *torch.autograd.grad(out, leaves)]


@backends
def test_operators_pass_opcheck_and_show_only_where_somebody_watches(backend):
    """The direct call and the one through the dispatcher: equal bits, forward and backward.

    Of each operator schema, fake kernel, autograd registration, and tracing with dynamic shapes.
    """
    layout, watcher = segmented([[3, 1, 5], [], [2, 4]], seed=1), Watcher()
    assert layout.special.any()
    with use_backend(backend):
        direct = out_and_gradients(every_operator, layout)
        with watcher:
            watched = out_and_gradients(every_operator, layout)
            if backend == "torch":
                fused_pooling(None, random(15, 3 * WIDTH), layout).sum().backward()
                fused_pooling(random(3, WIDTH), random(15, WIDTH), layout, **ABSENT)
                fused_pooling(None, random(300, 3 * WIDTH), segmented([[300]]))
    assert all(map(torch.equal, direct, watched))
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    called = {f"ponet::{func._opname}" for func, _, _ in watcher.calls}
    assert called == {name for name in names if name.startswith("ponet::")}
    for func, arguments, _ in watcher.calls:
        arguments = [a.detach() if torch.is_tensor(a) else a for a in arguments]
        for a in arguments:
            # a backward pass is checked without one of its own
            if torch.is_tensor(a) and a.is_floating_point() and "backward" not in func._opname:
                a.requires_grad_()
        torch.library.opcheck(func, arguments)


@backends
def test_operators_compile_with_their_gradients(backend):
    """With a layout among the arguments; other lengths need no other code."""
    torch._dynamo.reset()
    compiled = torch.compile(every_operator, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([9, 6], [3, 1, 8]):
        places = PackedLayout.of_sequences(offsets(lengths), sum(lengths), max(lengths))
        with use_backend(backend):
            found = out_and_gradients(compiled, places)
            wanted = out_and_gradients(every_operator, places)
        for actual, expected in zip(found, wanted, strict=True):
            assert_close(actual, expected, 1e-5)


def test_gradients_of_gradients_are_refused():
    places, values = layout([9, 4]), random(13, 24)
    out = fused_pooling(None, values, places).sum()
    with pytest.raises(NotImplementedError, match="fused_pooling: no gradients of gradients"):
        torch.autograd.grad(out, values, create_graph=True)


def new_encoder(config: PoNetConfig = CONFIG) -> Encoder:
    torch.manual_seed(0)
    torch._dynamo.reset()
    return Encoder(config).to(DEVICE)


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


@models
def test_encoder_compiles_without_graph_breaks(backend, config):
    encoder = new_encoder(config)
    # without a GPU nothing may need a compiler, so the graph is run as it was traced
    how = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(encoder, fullgraph=True, backend=how)
    with use_backend(backend):
        # other lengths and batch sizes run through the same compiled code
        for lengths in ([5, 9], [17, 3], [4, 2, 7]):
            hidden, places = random(sum(lengths), 32), layout(lengths)
            plain, fast = encode(encoder, hidden, places), encode(compiled, hidden, places)
            assert_close(fast[0], plain[0], 1e-5, "states")
            assert_close(fast[1], plain[1], 1e-5, "gradient")


@backends
def test_activation_checkpointing_changes_nothing(backend):
    encoder, hidden, places = new_encoder(), random(20, 32), layout([7, 13])

    def recomputed(hidden: Tensor, places: BatchLayout) -> list[Tensor]:
        for layer in encoder.layers:
            hidden = checkpoint(layer, hidden, places, use_reentrant=False)
        return [hidden]

    with use_backend(backend):
        plain, saved = encode(encoder, hidden, places), encode(recomputed, hidden, places)
    assert all(map(torch.equal, plain, saved))


@models
def test_autocast_trains_in_bf16_and_keeps_fp32_gradients(backend, config):
    encoder, hidden, places = new_encoder(config), random(20, 32), layout([7, 13])
    seen: list[torch.dtype] = []
    with use_backend(backend):
        exact, exact_gradient = encode(encoder, hidden, places)
        encoder.layers[0].mixer.register_forward_hook(lambda *a: seen.append(a[2].dtype))
        with torch.autocast(DEVICE, torch.bfloat16):
            last, gradient = encode(encoder, hidden, places)
    assert seen == [torch.bfloat16]
    assert gradient.dtype == torch.float32
    assert_close(last, exact, 0.03, "states")
    assert_close(gradient, exact_gradient, 0.1, "gradient")


class LastState(PoNetModel):
    """The inference encoder as ids and mask in, states out."""

    def forward(self, ids, mask):
        return super().forward(ids, mask).last_hidden_state


@pytest.mark.parametrize("config", [CONFIG, AVERAGE], ids=["max", "average"])
def test_model_exports_for_any_batch_and_length(tmp_path, config):
    """The exported program runs in a process that knows the operators alone."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = LastState(config, add_pooler=False).eval()
    rows = torch.randint(0, 200, (2, 40))
    rows[:, 0] = 101
    mask = torch.ones_like(rows, dtype=torch.bool)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        shapes = (free, free)
        program = torch.export.export(model, (rows, mask), dynamic_shapes=shapes, strict=False)
        # as in the model itself: no queries and keys of every token
        expected = {"global_aggregation", "fused_pooling"}
        expected |= {"global_mean", "local_pooling"} if config is AVERAGE else set()
        targets = {str(node.target) for node in program.graph.nodes}
        called = {name for name in targets if name.startswith("ponet.")}
        assert called == {f"ponet.{name}.default" for name in expected}
        other = torch.randint(0, 200, (3, 17))
        ragged = torch.arange(17) < torch.tensor([[17], [9], [1]])
        expected = model(other, ragged)
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
    arguments = [str(tmp_path / name) for name in ("model.pt2", "example.pt")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, timeout=200)


def training_losses(backend: str, steps: int) -> list[float]:
    torch.manual_seed(3)
    model = PoNetForPreTraining(CONFIG).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator, losses = torch.Generator().manual_seed(4), []
    mask = torch.ones(2, 24, dtype=torch.long, device=DEVICE)
    mask[1, 19:] = 0
    with use_backend(backend):
        for _ in range(steps):
            ids = torch.randint(0, 64, (2, 24), generator=generator)
            segments = torch.randint(0, 2, ids.shape, generator=generator).cumsum(1) // 4
            labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, ids, -100)
            inputs = {"segment_ids": segments, "labels": labels, "sso_labels": torch.tensor([0, 2])}
            inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
            loss = model(ids.to(DEVICE), mask, **inputs).loss
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


def test_nothing_is_kept_for_the_backward_pass_without_gradients():
    with torch.no_grad(), Watcher() as watcher:
        out = fused_pooling(None, random(15, 3 * WIDTH), segmented([[15]]))
    assert out.grad_fn is None
    assert watcher.calls[0][2][2].numel() == 0


def test_an_unused_result_has_no_gradient():
    """A graph that goes on from saved values alone."""
    x, layout = random(15, WIDTH), segmented([[15]])
    tables = (layout.cu_segments, layout.token_segments)
    maxima, _ = torch.ops.ponet.segment_max(x, *tables, 15, False, True, "torch")
    (gradient,) = torch.autograd.grad((maxima * 0).sum() + x.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


@backends
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=["B0", "B2"])
def test_empty_streams(backend, lengths):
    B, layout = len(lengths), PackedLayout.of_sequences(offsets(lengths), 0)
    empty, square, bias = random(0, WIDTH), random(WIDTH, WIDTH), random(WIDTH)
    g, values = random(B, WIDTH), random(0, 3 * WIDTH)
    with use_backend(backend):
        assert segment_max(empty, layout).tolist() == [[float("-inf")] * WIDTH] * B
        assert global_mean(empty, layout).tolist() == [[0.0] * WIDTH] * B
        out = fused_pooling(g, values, layout)
        pooled = global_aggregation(empty, square, bias, square, bias, 2, layout)
        local = local_pooling(empty, layout, 5) + local_pooling(empty, layout, 5, average=True)
        (out.sum() + pooled.sum() + local.sum()).backward()
    assert out.shape == (0, WIDTH)
    assert not g.grad.any()
    assert torch.equal(pooled, bias.expand(B, -1))
    assert torch.equal(bias.grad, torch.full_like(bias, float(B)))
