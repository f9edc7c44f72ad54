"""Baseline mixers on whole rows: softmax, Fourier, linear, Linformer, Performer.

Each against other code or its formula in float64, values and gradients.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, FNetConfig
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform

from ponet import PoNetConfig
from ponet.mixers import attention
from ponet.mixers.attention import (
    CheckpointedAttention,
    NaiveAttention,
    SoftmaxAttention,
)
from ponet.mixers.fnet import FNetMixer
from ponet.mixers.linear_attention import LinearAttention
from ponet.mixers.linformer import LinformerAttention
from ponet.mixers.performer import PerformerAttention, orthogonal_features
from ponet_kernels.testing import assert_close, relative_error
from tests.streams import packed, padded

SMALL = PoNetConfig(
    hidden_size=24,
    num_attention_heads=3,
    max_position_embeddings=64,
    linformer_size=5,
    num_random_features=20,
    initializer_range=0.2,
)
SOFTMAX = [SoftmaxAttention, NaiveAttention, CheckpointedAttention]
LENGTHS = [7, 1, 0, 12, 3]


def build(cls, config: PoNetConfig = SMALL):
    torch.manual_seed(0)
    mixer = cls(config).double().eval()
    # small initial weights would leave the softmax flat
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.mul_(3)
    return mixer


def tokens(total: int, seed: int = 1, width: int = SMALL.hidden_size) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(total, width, generator=generator, dtype=torch.float64)


def gradients(mixer, hidden: Tensor, out: Tensor) -> dict[str, Tensor]:
    """Of the input and every parameter, for an upstream gradient that depends on the shape only."""
    leaves = {"hidden": hidden, **dict(mixer.named_parameters())}
    upstream = tokens(len(out), 2, out.shape[1]).to(out)
    found = torch.autograd.grad(out, list(leaves.values()), upstream)
    return dict(zip(leaves, found, strict=True))


def check_against(mixer, expected_of, lengths: list[int] = LENGTHS) -> None:
    """Values and gradients of `mixer` against `expected_of(hidden [T, C]) -> [T, C]`."""
    hidden = tokens(sum(lengths)).requires_grad_()
    out, expected = mixer(hidden, packed(lengths)), expected_of(hidden)
    assert_close(out, expected, 1e-12, "output")
    ours, theirs = gradients(mixer, hidden, out), gradients(mixer, hidden, expected)
    largest = max(float(g.abs().max()) for g in theirs.values())
    for name, gradient in theirs.items():
        # a gradient that is zero but for rounding, the key bias, has no scale of its own
        floor = torch.full_like(gradient[:1], 1e-3 * largest)
        assert_close(torch.cat([ours[name], floor]), torch.cat([gradient, floor]), 1e-11, name)


REAL = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)


def in_rows(hidden: Tensor) -> Tensor:
    rows = torch.zeros(*REAL.shape, 24, dtype=torch.float64)
    return rows.masked_scatter(REAL.unsqueeze(-1), hidden)


@pytest.mark.parametrize("cls", SOFTMAX)
def test_softmax_attention_is_that_of_bert(cls):
    mixer = build(cls)
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "attention_probs_dropout_prob": 0.0}
    bert = BertSelfAttention(BertConfig(**sizes, attn_implementation="eager")).double()
    bert.query, bert.key, bert.value = mixer.query, mixer.key, mixer.value
    lowest = torch.finfo(torch.float64).min
    excluded = torch.zeros(REAL.shape, dtype=torch.float64).masked_fill(~REAL, lowest)
    excluded = excluded[:, None, None]
    check_against(mixer, lambda hidden: mixer.dense(bert(in_rows(hidden), excluded)[0][REAL]))
    parts = ("query", "key", "value", "dense")
    names = [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    assert list(mixer.state_dict()) == names


def test_fnet_is_that_of_transformers_and_sees_padding_as_zero_vectors():
    fourier = FNetBasicFourierTransform(FNetConfig(use_tpu_fourier_optimizations=False))
    mixer = build(FNetMixer)
    check_against(mixer, lambda hidden: fourier(in_rows(hidden))[0][REAL])
    assert not list(mixer.parameters())
    hidden = tokens(18)
    rows = F.pad(hidden.view(2, 9, 24), (0, 0, 0, 4))
    expected = torch.fft.fft2(rows).real[:, :9].flatten(0, 1)
    assert_close(mixer(hidden, padded([9, 9], 13)), expected, 1e-12)


def positive_features(x: Tensor, features: Tensor) -> Tensor:
    """Lemma 1 as it is written: `[..., D]` -> `[..., M]`."""
    exponents = x @ features.mT - x.square().sum(dim=-1, keepdim=True) / 2
    return exponents.exp() / len(features) ** 0.5


def normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(dim=-1, keepdim=True)


def linear_of_one(mixer: LinearAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return normalised((F.elu(q) + 1) @ (F.elu(k) + 1).mT) @ v


def linformer_of_one(mixer: LinformerAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = torch.einsum("kn,hnd->hkd", mixer.key_projection[:, : k.shape[1]], k)
    v = torch.einsum("kn,hnd->hkd", mixer.value_projection[:, : v.shape[1]], v)
    return (q @ k.mT / 8**0.5).softmax(dim=-1) @ v


def performer_of_one(mixer: PerformerAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = (positive_features(x / 8**0.25, mixer.features) for x in (q, k))
    return normalised(q @ k.mT) @ v


@pytest.mark.parametrize(
    ("cls", "attend"),
    [
        (LinearAttention, linear_of_one),
        (LinformerAttention, linformer_of_one),
        (PerformerAttention, performer_of_one),
    ],
)
def test_quadratic_formula(cls, attend):
    """On queries, keys and values `[H, N, D]` of one sequence at a time, without padding."""
    mixer = build(cls)

    def expected_of(hidden: Tensor) -> Tensor:
        mixed = []
        for sequence in hidden.split(LENGTHS):
            projected = (mixer.query(sequence), mixer.key(sequence), mixer.value(sequence))
            heads = (x.unflatten(1, (mixer.num_heads, -1)).transpose(0, 1) for x in projected)
            mixed.append(attend(mixer, *heads).transpose(0, 1).flatten(1))
        return mixer.dense(torch.cat(mixed))

    check_against(mixer, expected_of)


def test_linear_attention_of_many_tokens_and_of_features_that_vanish():
    mixer, hidden = build(LinearAttention).half(), torch.ones(20000, 24, dtype=torch.float16)
    out = mixer(hidden, packed([20000]))
    assert_close(out[:1], mixer.dense(mixer.value(hidden[:1])), 2e-3)
    mixer, hidden = build(LinearAttention), tokens(4).requires_grad_()
    with torch.no_grad():
        mixer.query.bias.fill_(-1000.0)
    out = mixer(hidden, packed([4]))
    out.sum().backward()
    assert_close(out, mixer.dense.bias.expand(4, 24), 1e-12)
    assert hidden.grad.isfinite().all()


def test_checkpointing_repeats_dropout_and_keeps_no_scores():
    config = SMALL.replace(attention_probs_dropout_prob=0.3)
    place, length = packed([40, 33]), 40
    kept, slopes = {}, []
    for cls in (NaiveAttention, CheckpointedAttention):
        mixer = build(cls, config).train()
        hidden = tokens(73).requires_grad_()
        sizes: list[int] = []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor,
            lambda tensor: tensor,
        ):
            out = mixer(hidden, place)
        kept[cls] = max(sizes)
        slopes.append(gradients(mixer, hidden, out)["hidden"])
    assert_close(slopes[1], slopes[0], 1e-12)
    scores = 2 * 3 * length * length
    assert kept[NaiveAttention] == scores
    assert kept[CheckpointedAttention] < scores


def test_checkpointed_attention_is_float32_inside_autocast():
    mixer, hidden, place = build(CheckpointedAttention).float(), tokens(12).float(), packed([12])
    with torch.autocast("cpu", torch.bfloat16):
        out = mixer(hidden, place)
        projected = [part(hidden) for part in (mixer.query, mixer.key, mixer.value)]
    mixed = build(NaiveAttention).mix(*(x.float() for x in projected), place)
    assert projected[0].dtype == torch.bfloat16
    assert torch.equal(
        out, F.linear(mixed.bfloat16(), *map(Tensor.bfloat16, mixer.dense.parameters()))
    )


def test_packed_kernel_gets_the_stream(monkeypatch):
    """Its arguments, with a stand-in; the kernel itself needs a GPU."""
    calls = []

    def stand_in(query, key, value, cu_query, cu_key, longest_query, longest_key):
        assert cu_query is cu_key
        calls.append((longest_query, longest_key))
        lengths = cu_query.diff().tolist()
        parts = (x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value))
        mixed = [F.scaled_dot_product_attention(*qkv) for qkv in zip(*parts, strict=True)]
        return torch.cat(mixed, dim=1).transpose(0, 1)

    hidden = tokens(sum(LENGTHS))
    mixer = build(SoftmaxAttention, SMALL.replace(attention_probs_dropout_prob=0.1))
    expected = mixer(hidden, packed(LENGTHS))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    monkeypatch.setattr(attention, "_packed_kernel_runs", lambda stream, size: size == 8)
    assert_close(mixer(hidden, packed(LENGTHS)), expected, 1e-12)
    assert calls == [(12, 12)]
    mixer(tokens(24), packed([12, 12]))
    mixer.train()(hidden, packed(LENGTHS))
    assert len(calls) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_packed_kernel_on_a_gpu(dtype):
    lengths = [70, 1, 0, 333, 128]
    config = SMALL.replace(hidden_size=128, num_attention_heads=4)
    exact = build(NaiveAttention, config).cuda()
    torch.set_default_device("cuda")
    try:
        place = packed(lengths)
    finally:
        torch.set_default_device("cpu")
    hidden = tokens(sum(lengths), width=128).cuda().requires_grad_()
    expected = exact(hidden, place)
    slope = gradients(exact, hidden, expected)["hidden"]
    errors = []
    for cls in (SoftmaxAttention, NaiveAttention):
        mixer = build(cls, config).to("cuda", dtype)
        coarse = hidden.detach().to(dtype).requires_grad_()
        out = mixer(coarse, place)
        found = gradients(mixer, coarse, out)["hidden"]
        errors.append((relative_error(out, expected), relative_error(found, slope)))
    assert attention._packed_kernel_runs(coarse, 32)
    (fused, fused_slope), (naive, naive_slope) = errors
    assert fused <= 2 * naive
    assert fused_slope <= 2 * naive_slope


def test_linformer_refuses_long_rows():
    with pytest.raises(ValueError, match="rows have 65 tokens, max_position_embeddings is 64"):
        build(LinformerAttention)(tokens(66), packed([65, 1]))


def test_performer_features_are_orthogonal_and_the_same_in_every_run():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    features = orthogonal_features(20, 8)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(features, orthogonal_features(20, 8))
    assert features.shape == (20, 8)
    for block in features.split(8):
        products = block @ block.mT
        assert_close(products, products.diagonal().diag(), 1e-12)
    mixer = build(PerformerAttention)
    assert "features" in mixer.state_dict()
    assert not mixer.features.requires_grad
    with torch.device("meta"):
        assert PerformerAttention(SMALL).features.is_meta


def test_performer_features_estimate_the_softmax_kernel_without_bias():
    q, k = tokens(2, seed=4, width=8) * 0.5
    estimates = [
        positive_features(q, features) @ positive_features(k, features)
        for features in (orthogonal_features(8, 8, seed) for seed in range(3000))
    ]
    estimate = torch.stack(estimates)
    error = (estimate.mean() - (q @ k).exp()) / (estimate.std() / len(estimates) ** 0.5)
    assert abs(float(error)) < 3


@torch.no_grad()
def test_performer_approaches_softmax_attention_as_one_over_the_root_of_its_features():
    hidden, place = tokens(60) * 0.2, packed([40, 20])
    expected = build(NaiveAttention)(hidden, place)
    mixer = build(PerformerAttention)

    def error(num_features: int) -> float:
        squares = []
        for seed in range(20):
            mixer.features = orthogonal_features(num_features, 8, seed)
            squares.append((mixer(hidden, place) - expected).square().sum())
        return float((sum(squares) / 20 / expected.square().sum()) ** 0.5)

    few, many = error(64), error(1024)
    assert 2.5 < few / many < 6
    assert many < 0.01


def test_performer_holds_out_where_plain_features_overflow():
    mixer = build(PerformerAttention).float()
    hidden = (tokens(30) * 100).float().requires_grad_()
    out = mixer(hidden, packed([20, 10]))
    out.square().sum().backward()
    assert out.isfinite().all()
    assert hidden.grad.isfinite().all()
    assert_close(out, mixer.double()(hidden.double(), packed([20, 10])), 1e-3)
