"""What all baseline mixers have in common; each on its own in `test_mixers_dense` and `_sparse`."""

import pytest
import torch

from ponet import PoNetConfig
from ponet.mixers import MIXERS
from tests.mixing import CONFIG, build, compare, states
from tests.streams import packed, padded

SOFTMAX = ("attention", "attention_naive", "attention_checkpointed")
SPARSE = ("nystromformer", "reformer", "longformer", "bigbird")
ATTENTION = (*SOFTMAX, "linear", "linformer", "performer", *SPARSE)
ALL = (*ATTENTION, "fnet", "fnet_linear")
# the mixer of the package has tests of its own
EDGE = (*ALL, "ponet_published")
LENGTHS = [37, 0, 1, 5, 64, 3, 16]


@pytest.mark.parametrize("name", ALL)
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
    mixer, hidden = build(MIXERS[name]), states(sum(lengths))
    alone = torch.cat([mixer(part, packed([len(part)])) for part in hidden.split(lengths)])
    compare(mixer, layout, hidden, alone, 1e-12)


@pytest.mark.parametrize("name", EDGE)
@pytest.mark.parametrize(
    ("lengths", "length"),
    [([1], 1), ([0, 3, 1], 4), ([0, 0], 2), ([0, 0], 0), ([], 3)],
    ids=["one-token", "a-row-of-padding", "padding-only", "empty-rows", "no-rows"],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_edge_cases_are_finite_and_differentiable(name, lengths, length):
    mixer = build(MIXERS[name]).float()
    hidden = states(sum(lengths)).detach().float().requires_grad_()
    out = mixer(hidden, padded(lengths, length))
    assert out.shape == hidden.shape
    assert out.isfinite().all()
    # also finds a NaN at padding, which would reach no gradient below
    with torch.autograd.detect_anomaly(check_nan=True):
        out.square().sum().backward()
    leaves = [hidden, *mixer.parameters()]
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("lengths", [[30, 0, 16, 4], [25, 25]], ids=["ragged", "full"])
def test_bfloat16(name, lengths):
    """Under autocast and with weights of that type, as DeepSpeed keeps them."""
    mixer, layout = build(MIXERS[name]).float(), packed(lengths)
    hidden = states(50).detach().float()
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
    mixer = build(MIXERS[name], CONFIG.replace(attention_probs_dropout_prob=0.5))
    hidden, layout = states(17).detach(), packed([12, 5])
    calm = mixer(hidden, layout).detach()
    assert torch.equal(calm, build(MIXERS[name])(hidden, layout))
    mixer.train()
    draws = torch.stack([mixer(hidden, layout).detach() for _ in range(300)])
    assert float((draws[0] - calm).abs().max()) > 0.05 * float(calm.abs().max())
    # the mean over draws is the value without dropout
    if name != "reformer":
        error = (draws.mean(dim=0) - calm).abs() / (draws.std(dim=0) / 300**0.5 + 1e-9)
        assert float(error.max()) < 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["attention", *SPARSE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_on_a_gpu(name, dtype):
    """Real sizes against float64 on the CPU; gradients are finite."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "max_position_embeddings": 2048}
    torch.manual_seed(0)
    mixer, lengths = MIXERS[name](PoNetConfig(**sizes)), [2048, 0, 1, 700, 64]
    hidden = states(sum(lengths), width=128)
    expected = mixer.double()(hidden, padded(lengths, 2048)).detach()
    with torch.device("cuda"):
        layout = padded(lengths, 2048)
    out = mixer.to("cuda", dtype)(hidden.to("cuda", dtype), layout)
    slopes = torch.autograd.grad(out.square().sum(), [*mixer.parameters()])
    assert all(gradient.isfinite().all() for gradient in slopes)
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    close = (out.cpu() - expected).abs().amax(dim=1) < tolerance * expected.abs().max()
    assert close.float().mean() > (0.5 if name == "reformer" else 0.99)
