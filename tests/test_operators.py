"""What PyTorch may do with the operators: check, compile, checkpoint, autocast, export them."""

import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ponet import PoNetConfig, PoNetForPreTraining, PoNetModel
from ponet.encoder import Encoder
from ponet.packing import PackedLayout, layout_of, stream_of_packed
from ponet_kernels import (
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

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH = 8
SEGMENTS = [3, 1, 5, 2, 4]
SEQUENCES = [9, 0, 6]
CLS = 101

pytest.importorskip("triton")
backends = pytest.mark.parametrize("backend", ["torch", "triton"])


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def owners(lengths: list[int]) -> Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(DEVICE)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()


def layout_arguments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Offsets, token segments, segment sequences and marks; the fourth token is special."""
    runs, special = offsets([3, 1, 5, 6]), torch.tensor([3], device=DEVICE)
    marks = token_marks(runs, 15, special)
    return offsets(SEGMENTS), owners(SEGMENTS), owners([3, 0, 2]), marks


def cases(backend: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    ops = torch.ops.ponet
    x = random(15, WIDTH)
    cu_segments, token_segments, segment_sequences, marks = layout_arguments()
    square, row = [random(WIDTH, WIDTH, seed=s) for s in (1, 2)], [random(WIDTH) for _ in "ab"]
    parameters = (square[0], row[0], square[1], row[1])
    values = [random(3, WIDTH), *(random(15, WIDTH, seed=s) for s in (3, 4, 5))]
    layout = (cu_segments, token_segments, segment_sequences, marks)
    joined = (token_segments, segment_sequences, backend)
    return {
        "segment_max": (ops.segment_max, (x, cu_segments, token_segments, 15, True, backend)),
        "local_max": (ops.local_max, (x, marks, backend)),
        "pooling_fusion": (
            ops.pooling_fusion,
            (values[0], random(5, WIDTH), values[2], values[3], *joined),
        ),
        "without_terms": (ops.pooling_fusion, (None, None, values[2], values[3], *joined)),
        "fused_pooling": (ops.fused_pooling, (*values, *layout, 15, True, backend)),
        "fused_without_segment": (
            ops.fused_pooling,
            (values[0], None, values[2], values[3], *layout, 300, True, backend),
        ),
        "global_mean": (ops.global_mean, (x, offsets(SEQUENCES), 9, backend)),
        "global_aggregation": (
            ops.global_aggregation,
            (x, *parameters, 2, offsets(SEQUENCES), 9, backend),
        ),
    }


@backends
@pytest.mark.parametrize("name", list(cases("torch")))
def test_opcheck(name, backend):
    """Schema, fake kernel, autograd registration, and tracing with dynamic shapes."""
    op, arguments = cases(backend)[name]
    torch.library.opcheck(op.default, arguments)


def config(**changes: Any) -> PoNetConfig:
    sizes = {
        "vocab_size": 200,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
    }
    return PoNetConfig(**(sizes | changes))


def layout(lengths: list[int]) -> PackedLayout:
    ids = torch.randint(0, 9, (sum(lengths),), device=DEVICE)
    special = torch.zeros(len(ids), dtype=torch.bool, device=DEVICE)
    special[offsets(lengths)[:-1].long()] = True
    return layout_of(stream_of_packed(ids, offsets(lengths)), special, ids.cumsum(0) // 40)


def encode(encoder: Callable, hidden: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor]:
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
        for lengths in ([20, 30], [41, 7], [5, 6, 7]):
            hidden = random(sum(lengths), 32)
            places = layout(lengths)
            plain, fast = encode(encoder, hidden, places), encode(compiled, hidden, places)
            assert_close(fast[0], plain[0], 1e-5, "states")
            assert_close(fast[1], plain[1], 1e-5, "gradient")


@backends
def test_activation_checkpointing_changes_nothing(backend):
    torch.manual_seed(0)
    encoder = Encoder(config()).to(DEVICE)
    hidden, places = random(50, 32), layout([20, 30])

    def recomputed(hidden: Tensor, places: PackedLayout) -> list[Tensor]:
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
    hidden, places = random(50, 32), layout([20, 30])
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
    sizes = {"hidden_size": 16, "vocab_size": 64, "num_hidden_layers": 1}
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


@backends
def test_fifty_training_steps_match_the_reference(backend):
    fast, slow = training_losses(backend, 50), training_losses("reference", 50)
    assert slow[-1] < slow[0]
    for step, (ours, theirs) in enumerate(zip(fast, slow, strict=True)):
        assert abs(ours - theirs) < 1e-4, f"step {step}: {ours} against {theirs}"


def test_operators_refuse_what_does_not_fit():
    cu_segments, token_segments, segment_sequences, marks = layout_arguments()
    places = (cu_segments, token_segments, segment_sequences, marks, 15)
    x = random(15, WIDTH)
    with pytest.raises(ValueError, match=r"fused_pooling: expected token_segments .* \[14\]"):
        fused_pooling(None, x[:14], x[:14], None, *places)
    with pytest.raises(ValueError, match=r"segment_values .*float64"):
        fused_pooling(None, x.double(), x, None, *places)
    with pytest.raises(ValueError, match=r"local is torch\.float64"):
        pooling_fusion(None, None, x, x.double(), token_segments, segment_sequences)


def test_nothing_is_kept_for_the_backward_pass_without_gradients():
    cu_segments, token_segments, _, _ = layout_arguments()
    with torch.no_grad():
        assert segment_max(random(15, WIDTH), cu_segments, token_segments).grad_fn is None


def test_empty_streams():
    empty, none = random(0, WIDTH), torch.zeros(0, dtype=torch.long, device=DEVICE)
    cu = offsets([])
    marks = token_marks(cu, 0)
    assert segment_max(empty, cu, none).shape == (0, WIDTH)
    assert local_max(empty, cu).shape == (0, WIDTH)
    assert global_mean(empty, offsets([0, 0])).tolist() == [[0.0] * WIDTH] * 2
    out = fused_pooling(random(0, WIDTH), empty, empty, empty, cu, none, none, marks, 0)
    assert out.shape == (0, WIDTH)
    out.sum().backward()
    square, bias = random(WIDTH, WIDTH), random(WIDTH)
    pooled = global_aggregation(empty, square, bias, square, bias, 2, offsets([0]))
    assert torch.equal(pooled, bias.unsqueeze(0))
