"""What all baseline mixers have in common; each on its own in `test_mixers_dense` and `_sparse`."""

import pytest
import torch
from torch import Tensor

from ponet import PoNetConfig
from ponet.mixers import MIXERS
from ponet_kernels.testing import assert_close
from tests.streams import packed, padded

SOFTMAX = ("attention", "attention_naive", "attention_checkpointed")
SPARSE = ("nystromformer", "reformer", "longformer", "bigbird")
ATTENTION = (*SOFTMAX, "linear", "linformer", "performer", *SPARSE)
# keeps nothing apart: in FNet padding takes part, as in its paper
ALL = (*ATTENTION, "fnet")
CONFIG = PoNetConfig(
    hidden_size=12,
    num_attention_heads=3,
    max_position_embeddings=150,
    linformer_size=5,
    num_random_features=20,
    initializer_range=0.2,
    num_landmarks=4,
    landmark_conv_size=5,
    num_hashes=2,
    lsh_chunk_size=4,
    attention_window=8,
    block_size=4,
    num_random_blocks=2,
)
LENGTHS = [37, 0, 1, 5, 64, 3, 16]


def build(name: str, config: PoNetConfig = CONFIG):
    torch.manual_seed(0)
    mixer = MIXERS[name](config).double().eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            # weights that make attention far from uniform
            parameter.normal_(std=0.5)
    return mixer


def states(num_tokens: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, 12, dtype=torch.float64, generator=generator).requires_grad_()


def gradients(mixer, hidden: Tensor, out: Tensor) -> list[Tensor]:
    """Of the input and every parameter, for an upstream gradient that depends on the shape only."""
    upstream = states(len(out), seed=2).detach().to(out)
    return [*torch.autograd.grad(out, [hidden, *mixer.parameters()], upstream, retain_graph=True)]


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize(
    ("lengths", "layout"),
    [
        pytest.param(LENGTHS, packed(LENGTHS), id="packed"),
        pytest.param(LENGTHS, padded(LENGTHS, 64, left=True), id="padded-left"),
        pytest.param(LENGTHS, padded(LENGTHS, 150), id="wide-rows"),
        *(pytest.param([n] * 3, packed([n] * 3), id=f"no-padding-{n}") for n in (3, 21, 32)),
        *(pytest.param([n] * 3, padded([n] * 3, n + 5), id=f"equal-{n}") for n in (3, 21, 32)),
    ],
)
def test_neighbours_and_padding_change_nothing(name, lengths, layout):
    """Rows have a mask where there is padding only; each sequence alone has none."""
    assert (layout.rows.mask is None) is (layout.rows.length * len(lengths) == sum(lengths))
    mixer, hidden = build(name), states(sum(lengths))
    alone = torch.cat([mixer(part, packed([len(part)])) for part in hidden.split(lengths)])
    together = mixer(hidden, layout)
    assert_close(together, alone, 1e-12, "output")
    found, expected = gradients(mixer, hidden, together), gradients(mixer, hidden, alone)
    scale = max(float(x.abs().max()) for x in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).abs().max()) < 1e-11 * scale


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("lengths", "length"),
    [
        pytest.param([1], 1, id="one-token"),
        pytest.param([0, 3, 1], 4, id="a-row-of-padding"),
        pytest.param([0, 0], 2, id="padding-only"),
        pytest.param([0, 0], 0, id="empty-rows"),
    ],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_edge_cases_are_finite_and_differentiable(name, lengths, length):
    mixer = build(name).float()
    hidden = states(sum(lengths)).detach().float().requires_grad_()
    out = mixer(hidden, padded(lengths, length))
    assert out.shape == hidden.shape
    assert out.isfinite().all()
    # also finds a NaN at padding, which would reach no gradient below
    with torch.autograd.detect_anomaly(check_nan=True):
        out.square().sum().backward()
    leaves = [hidden, *mixer.parameters()]
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("name", [*SOFTMAX, "linear", *SPARSE])
def test_one_token_receives_its_value(name):
    mixer = build(name, CONFIG.replace(landmark_conv_size=None))
    hidden = states(1)
    assert_close(mixer(hidden, packed([1])), mixer.dense(mixer.value(hidden)), 1e-12)


@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name):
    mixer = build(name, CONFIG.replace(num_landmarks=3, landmark_conv_size=3))
    layout = padded([13, 0, 2, 6], 14)
    torch.autograd.gradcheck(lambda hidden: mixer(hidden, layout), states(21), fast_mode=True)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("lengths", [[30, 0, 16, 4], [25, 25]], ids=["ragged", "full"])
def test_bfloat16(name, lengths):
    """Under autocast and with weights of that type, as DeepSpeed keeps them."""
    mixer, hidden, layout = build(name).float(), states(50).detach().float(), packed(lengths)
    expected = mixer(hidden, layout)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mixer(hidden, layout)
    cast = mixer.bfloat16()(hidden.bfloat16(), layout)
    assert cast.dtype == torch.bfloat16
    for out in (mixed, cast):
        if out.requires_grad:
            out.sum().backward()
        # a token on the edge of two of Reformer's buckets may fall into the other
        close = (out - expected).abs().amax(dim=1) < 0.05 * expected.abs().max()
        assert close.float().mean() > (0.5 if name == "reformer" else 0.99)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("name", [*SOFTMAX, "linformer", "reformer", "longformer", "bigbird"])
def test_dropout_of_probabilities_in_training_only(name):
    mixer = build(name, CONFIG.replace(attention_probs_dropout_prob=0.5))
    hidden, layout = states(17).detach(), packed([12, 5])
    calm = mixer(hidden, layout).detach()
    assert torch.equal(calm, build(name)(hidden, layout))
    mixer.train()
    draws = torch.stack([mixer(hidden, layout).detach() for _ in range(300)])
    assert float((draws[0] - calm).abs().max()) > 0.05 * float(calm.abs().max())
    # the mean over draws is the value without dropout
    if name != "reformer":
        error = (draws.mean(dim=0) - calm).abs() / (draws.std(dim=0) / 300**0.5 + 1e-9)
        assert float(error.max()) < 5
