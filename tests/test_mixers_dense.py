"""Baseline mixers on whole rows: softmax, Fourier, dense, linear, Linformer, Performer.

Each against other code or its formula in float64, values and gradients.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, FNetConfig
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform

from ponet.mixers import attention
from ponet.mixers.attention import CheckpointedAttention, NaiveAttention, SoftmaxAttention
from ponet.mixers.fnet import FNetMixer
from ponet.mixers.fnet_linear import FNetLinearMixer
from ponet.mixers.linear_attention import LinearAttention
from ponet.mixers.linformer import LinformerAttention
from ponet.mixers.performer import PerformerAttention, orthogonal_features
from ponet_kernels.testing import assert_close
from tests.mixing import CONFIG, assert_all_close, build, compare, gradients, states
from tests.streams import packed

LENGTHS = [7, 1, 0, 12, 3]
REAL = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)


def in_rows(hidden: Tensor) -> Tensor:
    rows = torch.zeros(*REAL.shape, 12, dtype=torch.float64)
    return rows.masked_scatter(REAL.unsqueeze(-1), hidden)


@pytest.mark.parametrize("cls", [SoftmaxAttention, NaiveAttention, CheckpointedAttention])
def test_softmax_attention_is_that_of_bert(cls):
    mixer, hidden = build(cls), states(sum(LENGTHS))
    sizes = {"hidden_size": 12, "num_attention_heads": 3, "attention_probs_dropout_prob": 0.0}
    bert = BertSelfAttention(BertConfig(**sizes, attn_implementation="eager")).double()
    bert.query, bert.key, bert.value = mixer.query, mixer.key, mixer.value
    lowest = torch.finfo(torch.float64).min
    excluded = torch.zeros(REAL.shape, dtype=torch.float64).masked_fill(~REAL, lowest)
    expected = mixer.dense(bert(in_rows(hidden), excluded[:, None, None])[0][REAL])
    compare(mixer, packed(LENGTHS), hidden, expected, 1e-12)
    parts = ("query", "key", "value", "dense")
    names = [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    assert list(mixer.state_dict()) == names


def test_fnet_is_that_of_transformers():
    fourier = FNetBasicFourierTransform(FNetConfig(use_tpu_fourier_optimizations=False))
    mixer, hidden = build(FNetMixer), states(sum(LENGTHS))
    alone = [fourier(part[None])[0][0] for part in hidden.split(LENGTHS) if len(part)]
    compare(mixer, packed(LENGTHS), hidden, torch.cat(alone), 1e-12)
    assert not list(mixer.parameters())


def test_fnet_linear_is_two_matrices_on_rows_of_full_length():
    """By the published contraction of rows extended with zero vectors."""
    mixer, hidden = build(FNetLinearMixer), states(sum(LENGTHS))
    rows = F.pad(in_rows(hidden), (0, 0, 0, 150 - max(LENGTHS)))
    shapes = [tuple(p.shape) for p in mixer.parameters()]
    assert shapes == [(150, 150), (12, 12)]
    mixed = torch.einsum("bij,jk,ni->bnk", rows, mixer.channel_weight, mixer.token_weight)
    compare(mixer, packed(LENGTHS), hidden, mixed[:, : max(LENGTHS)][REAL], 1e-12)
    fresh = FNetLinearMixer(CONFIG.replace(initializer_range=0.02))
    for weight in fresh.parameters():
        assert float(weight.std()) == pytest.approx(0.02, rel=0.15)


def normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(dim=-1, keepdim=True)


def linear_of_one(mixer: LinearAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return normalised((F.elu(q) + 1) @ (F.elu(k) + 1).mT) @ v


def linformer_of_one(mixer: LinformerAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = torch.einsum("kn,hnd->hkd", mixer.key_projection[:, : k.shape[1]], k)
    v = torch.einsum("kn,hnd->hkd", mixer.value_projection[:, : v.shape[1]], v)
    return (q @ k.mT / 4**0.5).softmax(dim=-1) @ v


def performer_of_one(mixer: PerformerAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With the features of lemma 1 as they are written; a constant factor cancels."""
    q, k = (
        (x @ mixer.features.mT - x.square().sum(dim=-1, keepdim=True) / 2).exp()
        for x in (q / 4**0.25, k / 4**0.25)
    )
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
    mixer, hidden, mixed = build(cls), states(sum(LENGTHS)), []
    for sequence in hidden.split(LENGTHS):
        projected = (mixer.query(sequence), mixer.key(sequence), mixer.value(sequence))
        heads = (x.unflatten(1, (3, -1)).transpose(0, 1) for x in projected)
        mixed.append(attend(mixer, *heads).transpose(0, 1).flatten(1))
    compare(mixer, packed(LENGTHS), hidden, mixer.dense(torch.cat(mixed)), 1e-12)


def test_linear_attention_of_many_tokens_and_of_features_that_vanish():
    mixer, hidden = build(LinearAttention).half(), torch.ones(20000, 12, dtype=torch.float16)
    out = mixer(hidden, packed([20000]))
    assert_close(out[:1], mixer.dense(mixer.value(hidden[:1])), 2e-3)
    mixer, hidden = build(LinearAttention), states(4)
    with torch.no_grad():
        mixer.query.bias.fill_(-1000.0)
    out = mixer(hidden, packed([4]))
    out.sum().backward()
    assert_close(out, mixer.dense.bias.expand(4, 12), 1e-12)
    assert hidden.grad.isfinite().all()


def test_checkpointing_repeats_dropout_and_keeps_no_scores():
    config = CONFIG.replace(attention_probs_dropout_prob=0.3)
    kept, slopes = [], []
    for cls in (NaiveAttention, CheckpointedAttention):
        mixer, hidden = build(cls, config).train(), states(73)
        sizes: list[int] = []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor,
            lambda tensor: tensor,
        ):
            out = mixer(hidden, packed([40, 33]))
        kept.append(max(sizes))
        slopes.append(gradients(mixer, hidden, out))
    assert_all_close(slopes[1], slopes[0], 1e-12)
    scores = 2 * 3 * 40 * 40
    assert kept[1] < kept[0] == scores


def test_checkpointed_attention_is_float32_inside_autocast():
    mixer, hidden = build(CheckpointedAttention).float(), states(12).detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        out = mixer(hidden, packed([12]))
        projected = [part(hidden) for part in (mixer.query, mixer.key, mixer.value)]
    assert projected[0].dtype == torch.bfloat16
    mixed = build(NaiveAttention).mix(*(x.float() for x in projected), packed([12]))
    dense = map(Tensor.bfloat16, mixer.dense.parameters())
    assert torch.equal(out, F.linear(mixed.bfloat16(), *dense))


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

    hidden = states(sum(LENGTHS))
    mixer = build(SoftmaxAttention, CONFIG.replace(attention_probs_dropout_prob=0.1))
    expected = mixer(hidden, packed(LENGTHS))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    monkeypatch.setattr(attention, "_packed_kernel_runs", lambda stream, size: size == 4)
    assert_close(mixer(hidden, packed(LENGTHS)), expected, 1e-12)
    assert calls == [(12, 12)]
    mixer(states(24), packed([12, 12]))
    mixer.train()(hidden, packed(LENGTHS))
    assert len(calls) == 1


@pytest.mark.parametrize("cls", [LinformerAttention, FNetLinearMixer])
def test_long_rows_are_refused(cls):
    with pytest.raises(ValueError, match="rows have 151 tokens, max_position_embeddings is 150"):
        build(cls)(states(152), packed([151, 1]))


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
        assert PerformerAttention(CONFIG).features.is_meta


def test_performer_holds_out_where_plain_features_overflow():
    mixer = build(PerformerAttention).float()
    hidden = (states(30) * 100).detach().float().requires_grad_()
    out = mixer(hidden, packed([20, 10]))
    out.square().sum().backward()
    assert out.isfinite().all()
    assert hidden.grad.isfinite().all()
    assert_close(out, mixer.double()(hidden.double(), packed([20, 10])), 1e-3)
