"""The published forms of five baselines against the published code's arithmetic, in float64.

The formulas are on rectangles `[R, N, C]` in which absent tokens have states of their own, as they
have in the published code.
"""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from lra.model import model_config, model_inputs
from lra.published_mixers import PUBLISHED_FORMS, draw_features
from lra.resident import BatchShape, resident_inputs
from lra.tasks import TASKS
from ponet import PoNetConfig
from ponet.mixers import mixer_class
from ponet.packing import BatchLayout
from ponet_kernels.testing import assert_close
from tests.mixing import build, compare, states

TASK = dataclasses.replace(TASKS["image"], seq_len=32, max_tokens=32)
HEADS, SIZE, LENGTH = 3, 4, 32
FEATURES = torch.randn(20, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def config_of(model: str, **changes) -> PoNetConfig:
    sizes = {"hidden_size": HEADS * SIZE, "num_attention_heads": HEADS, "linformer_size": 5}
    sizes |= {"num_landmarks": 8, "landmark_conv_size": 5, "lsh_chunk_size": 8}
    sizes |= {"num_random_features": len(FEATURES), **changes}
    return model_config(TASK, PUBLISHED_FORMS[model], **sizes)


def heads(rows: Tensor) -> Tensor:
    return rows.unflatten(2, (HEADS, SIZE)).transpose(1, 2)


def linear(mixer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k = (F.elu(q) + 1) / LENGTH**0.25, (F.elu(k) + 1) * mask / LENGTH**0.25
    return (q @ k.mT) @ (v * mask)


def performer(mixer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = q / SIZE**0.25, k / SIZE**0.25 * mask, v * mask

    def features(x: Tensor, largest) -> Tensor:
        projected = (x / SIZE**0.25) @ FEATURES.mT
        half = (x**2).sum(-1, keepdim=True) / 2 / SIZE**0.5
        return ((projected - half - largest(projected)).exp() + 1e-4) / len(FEATURES) ** 0.5

    q = features(q, lambda x: x.max(dim=-1, keepdim=True).values)
    scores = q @ features(k, torch.max).mT
    return scores / scores.sum(-1, keepdim=True) @ v


def linformer(mixer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = (torch.einsum("hkn,rhnd->rhkd", mixer.projection, x * mask) for x in (k, v))
    return (q @ k.mT / SIZE**0.5).softmax(-1) @ v


def nystromformer(mixer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k = (x * mask / SIZE**0.25 for x in (q, k))
    skip = F.conv2d(v * mask, mixer.conv.weight, padding=(2, 0), groups=HEADS)
    penalty = 1e9 * (1 - mask.mT)
    m = mixer.num_landmarks
    if m == LENGTH:
        return (q @ k.mT - penalty).softmax(-1) @ v + skip
    marks = [torch.stack([x[:, :, i : i + 4].mean(2) for i in range(0, 32, 4)], 2) for x in (q, k)]
    matrix = (marks[0] @ marks[1].mT).softmax(-1)
    one, inverse = torch.eye(m, dtype=torch.float64), matrix.mT / matrix.sum(-2).max()
    for _ in range(6):
        az = matrix @ inverse
        inverse = inverse / 4 @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
    summary = (marks[0] @ k.mT - penalty).softmax(-1) @ v
    return (q @ marks[1].mT).softmax(-1) @ inverse @ summary + skip


def of_projections(formula):
    def formula_of_rows(mixer, rows: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (heads(part(rows)) for part in (mixer.query, mixer.key, mixer.value))
        return formula(mixer, q, k, v, mask[:, None, :, None].double()).transpose(1, 2).flatten(2)

    return formula_of_rows


def reformer(mixer, rows: Tensor, mask: Tensor) -> Tensor:
    """The published program calls this very module, without its padding to whole chunks."""
    published = LSHSelfAttention(
        ReformerConfig(
            attention_head_size=SIZE,
            num_attention_heads=HEADS,
            hidden_size=HEADS * SIZE,
            num_hashes=2,
            lsh_attn_chunk_length=mixer.chunk_size,
            max_position_embeddings=LENGTH,
            hash_seed=7,
        )
    ).double()
    published.query_key, published.value = mixer.query_key, mixer.value
    return published(rows, attention_mask=mask.double()).hidden_states


ATTEND = {"linear": linear, "performer": performer, "linformer": linformer}
ATTEND |= {"nystromformer": nystromformer}
FORMULAS = {model: of_projections(attend) for model, attend in ATTEND.items()}
FORMULAS["reformer"] = reformer
CASES = [(model, {}) for model in FORMULAS]
CASES += [("nystromformer", {"num_landmarks": LENGTH}), ("reformer", {"lsh_chunk_size": LENGTH})]


def some_rows(zeros: float) -> Tensor:
    """Ids `[R, N]`, 0 at black pixels and padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 256, (5, LENGTH), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < zeros] = 0
    if zeros:
        lengths = torch.tensor([32, 25, 11, 1, 0])
        ids[0, 0] = ids[1, 3] = 0
        ids[torch.arange(LENGTH) >= lengths[:, None]] = 0
    return ids


def layout_of(model: str, rows: Tensor, resident: bool = False) -> BatchLayout:
    """As made on the host, or in a fixed shape with ghosts behind the tokens."""
    form = {"task": TASK, "mixer": PUBLISHED_FORMS[model], "num_segments": 5}
    if resident:
        shape = BatchShape(num_tokens=int(rows.count_nonzero()) + 40, num_ghosts=2)
        return resident_inputs(rows, shape, **form).layout
    lengths = torch.full((len(rows),), LENGTH)
    return model_inputs(rows.flatten(), lengths, protocol="published", **form).layout


@pytest.mark.parametrize("zeros", [0.3, 0.0], ids=["absent", "full"])
@pytest.mark.parametrize("resident", [False, True], ids=["host", "resident"])
@pytest.mark.parametrize(("model", "changes"), CASES)
def test_formula_of_the_published_code(monkeypatch, model, changes, resident, zeros):
    monkeypatch.setattr("lra.published_mixers.draw_features", lambda *_: FEATURES)
    rows = some_rows(zeros)
    mask, layout = rows != 0, layout_of(model, rows, resident)
    mixer = build(mixer_class(PUBLISHED_FORMS[model]), config_of(model, **changes))
    mixer.register_forward_pre_hook(lambda *_: torch.manual_seed(7) and None)
    hidden, total = states(layout.num_tokens), int(mask.sum())
    absent = states(mask.numel(), seed=9).detach().view(*mask.shape, -1)
    filled = absent.masked_scatter(mask.unsqueeze(-1), hidden[:total])
    # ghosts, which stand in no row, are given nothing
    mixed = F.pad(FORMULAS[model](mixer, filled, mask)[mask], (0, 0, 0, len(hidden) - total))
    expected = mixer.dense(mixed)
    # Reformer's sums are of scores of -1e5
    compare(mixer, layout, hidden, expected, 1e-11)


@pytest.mark.parametrize("model", ATTEND)
def test_between_the_projections_all_is_float32(monkeypatch, model):
    monkeypatch.setattr("lra.published_mixers.draw_features", lambda *_: FEATURES.float())
    cls, config, rows = mixer_class(PUBLISHED_FORMS[model]), config_of(model), some_rows(0.3)
    exact, mixer, given = build(cls, config), build(cls, config).float(), []
    mixer.dense.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    layout = layout_of(model, rows)
    hidden = states(layout.num_tokens).detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        mixer(hidden, layout)
        projected = [part(hidden) for part in (mixer.query, mixer.key, mixer.value)]
    q, k, v = (heads(layout.rows.from_stream(x.double())) for x in projected)
    expected = ATTEND[model](exact, q, k, v, (rows != 0)[:, None, :, None].double())
    # nothing but the last rounding
    assert_close(given[0], expected.transpose(1, 2).flatten(2)[rows != 0], 2**-8)


def test_features_have_the_law_of_the_published_draw():
    """Columns of LAPACK's Q, whose signs make some elements negative in the mean."""
    count, size = 20_000, 4
    torch.manual_seed(0)
    features = draw_features(count * size, torch.empty(size, dtype=torch.float64))
    lengths = features.norm(dim=1, keepdim=True)
    blocks = (features / lengths).view(count, size, size)
    products = blocks @ blocks.mT
    assert_close(products, torch.eye(size, dtype=torch.float64).expand_as(products), 1e-12)
    drawn = torch.linalg.qr(torch.randn(count, size, size, dtype=torch.float64)).Q.mT
    for power in (1, 2, 3):
        means = [(x**power).mean(0) for x in (blocks, drawn)]
        assert float((means[0] - means[1]).abs().max()) < 5 * (2 / count) ** 0.5
    # the square of a length is a sum of as many squares of normal numbers
    assert float(lengths.square().mean()) == pytest.approx(size, rel=0.02)
    assert float(lengths.square().var()) == pytest.approx(2 * size, rel=0.05)
    # a number of features that is no multiple, in single precision and of the published size
    features = draw_features(250, torch.empty(32))
    assert features.shape == (250, 32)
    block = F.normalize(features[32:64])
    assert_close(block @ block.mT, torch.eye(32), 1e-5)
