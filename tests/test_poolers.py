"""Sentence poolers: hand-computed cases, gradients, independence of the batch, saving."""

import json
import math
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ponet import (
    ConfigError,
    PoNetForPreTraining,
    PoNetForSequenceClassification,
    PoolerConfig,
)
from ponet.packing import BatchLayout, layout_of, stream_of_packed
from ponet.poolers import POOLERS, build_pooler, essential
from ponet_kernels.testing import assert_close
from tests import tiny

NAMES = tuple(POOLERS)
ATTENTION = ("mha", "maxseq_mha", "meanseq_mha")
names = pytest.mark.parametrize("name", NAMES)
readings = pytest.mark.parametrize("reading", ["sound", "literal"])
layer_choices = pytest.mark.parametrize("layer_choice", ["own", "norm"])

# two sequences, of three tokens and of one; what stands in the embedding must never be read
EMBEDDING = [[99.0, 99.0]] * 4
LOWER = [[2.0, -5.0], [1.0, 1.0], [-6.0, 0.0], [0.0, 3.0]]
LAST = [[1.0, -2.0], [3.0, 0.5], [-4.0, 1.0], [0.5, 2.0]]
STATES = [torch.tensor(layer, dtype=torch.float64) for layer in (EMBEDDING, LOWER, LAST)]
OFFSETS = [0, 3, 4]
WIDE = {"hidden_size": 12, "num_heads": 3}

SMALL = tiny.SMALL.replace(num_hidden_layers=3)
IDS = [[101, 7, 8, 102], [101, 9, 12, 13, 20, 55, 102], [101]]


def layout(offsets: list[int], row_length: int | None = None) -> BatchLayout:
    """Sequences in rows of a length, of the longest when None."""
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    stream = stream_of_packed(torch.zeros(offsets[-1], dtype=torch.long), cu_seqlens)
    if row_length is not None:
        stream = replace(stream, row_length=row_length)
    return layout_of(stream, torch.zeros(offsets[-1], dtype=torch.bool))


def pooler_of(name: str, hidden_size: int = 2, dense=None, **settings):
    """With weights and biases `dense` of the projection, where given."""
    torch.manual_seed(0)
    pooler = build_pooler(PoolerConfig(name=name, **settings), hidden_size, 0.5).double().eval()
    with torch.no_grad():
        for parameter in pooler.parameters():
            # biases begin at zero, which would hide them
            parameter.add_(0.1 * torch.randn_like(parameter))
        if dense is not None:
            for parameter, values in zip(pooler.dense.parameters(), dense, strict=True):
                parameter.copy_(torch.tensor(values))
    return pooler


def check(pooler, expected: list[list[float]], row_length: int | None = None) -> None:
    found = pooler(STATES, layout(OFFSETS, row_length))
    assert_close(found, torch.tensor(expected, dtype=torch.float64), 1e-12, "vectors")


def random_batch(lengths: list[int], hidden_size: int = 12, layers: int = 3):
    generator = torch.Generator().manual_seed(3)
    shape = (layers + 1, sum(lengths), hidden_size)
    states = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [*states], [0, *accumulate(lengths)]


def pooled(pooler, tokens: list[list[float]] | Tensor) -> Tensor:
    """The vector of one sequence that is the same in both layers."""
    states = torch.as_tensor(tokens, dtype=torch.float64)
    return pooler([states, states], layout([0, len(states)])).squeeze(0)


IDENTITY = ([[1, 0], [0, 1]], [0, 0])
# softmax(1, -2) = (0.953, 0.047), softmax(0.5, 2) = (0.182, 0.818)
SWAPPED = [[1 / (1 + math.exp(-3)), 0], [0.5 / (1 + math.exp(1.5)), 2 / (1 + math.exp(-1.5))]]
MEANMAX = ([[1, 1, 0.25, 0], [0, 6, 0, 1]], [0, 0.5])


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("cls", {"dense": ([[1, 0], [0, 2]], [0, 1])}, [[1, -3], [0.5, 5]]),
        ("first", {}, [LAST[0], LAST[3]]),
        ("max_cls", {"num_layers": 2}, [[2, -2], [0.5, 3]]),
        ("max_cls", {"num_layers": 1}, [LAST[0], LAST[3]]),
        ("mean", {}, [[0, -0.5 / 3], [0.5, 2]]),
        ("max", {}, [[3, 1], [0.5, 2]]),
        ("mswap", {}, SWAPPED),
        # norms of the first sequence: sqrt 5, sqrt 9.25, sqrt 17: the third token; mean (0, -1/6)
        ("meanmax", {"dense": MEANMAX}, [[-7 / 6, 0.5], [2.625, 14.5]]),
        # sum (0, -1/2)
        ("meanmax", {"dense": MEANMAX, "reading": "literal"}, [[-1.5, -1.5], [2.625, 14.5]]),
        # positive parts 1, 3, 0 and 0, 0.5, 1: sums of squares over sums 10 / 4 and 1.25 / 1.5
        ("stochastic", {"dense": IDENTITY}, [[2.5, 1.25 / 1.5], [0.5, 2]]),
    ],
)
def test_by_hand(name, settings, expected):
    """Where there is a projection, the vectors are before the tanh."""
    pooler = pooler_of(name, **settings)
    if "dense" in settings:
        expected = torch.tensor(expected, dtype=torch.float64).tanh().tolist()
    for row_length in (None, 9):
        check(pooler, expected, row_length)


def test_windows_of_mswap():
    whole = [max(x, 0) * math.exp(x) / 11.8913945 for x in (1, -2, 0.5, 2)]
    pairs = [*SWAPPED[0], *SWAPPED[1]]
    for window, expected in {1: [1, 0, 0.5, 2], 2: pairs, 4: whole}.items():
        found = pooled(pooler_of("mswap", hidden_size=4, window=window), [[1.0, -2.0, 0.5, 2.0]])
        assert found.tolist() == pytest.approx(expected, abs=1e-7)


def test_the_first_of_equals_wins_and_has_the_gradient():
    pooler = pooler_of("meanmax", dense=([[0, 0, 1, 0], [0, 0, 0, 1]], [0, 0]))
    found = pooled(pooler, [[1, 0], [3, 4], [5, 0]])
    assert found.atanh().tolist() == pytest.approx([3, 4])

    tokens = torch.tensor([[2.0, 1.0], [2.0, 5.0], [0.0, 5.0]], dtype=torch.float64)
    pooled(pooler_of("max"), tokens.requires_grad_()).sum().backward()
    assert tokens.grad.tolist() == [[1, 0], [0, 1], [0, 0]]

    layers = [torch.ones(1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    pooler_of("max_cls", num_layers=2)(layers, layout([0, 1])).sum().backward()
    assert [x.grad is None or float(x.grad.sum()) for x in layers] == [True, 2, 0]


@readings
def test_stochastic_draws_in_proportion(reading):
    pooler = pooler_of("stochastic", dense=IDENTITY, reading=reading).train()
    count = 4000
    tokens = STATES[-1][:3].repeat(count, 1)
    torch.manual_seed(1)
    drawn = pooler([tokens, tokens], layout(list(range(0, 3 * count + 1, 3)), row_length=5)).atanh()
    for feature, shares in ((0, {1.0: 1 / 4, 3.0: 3 / 4}), (1, {0.5: 1 / 3, 1.0: 2 / 3})):
        values = drawn[:, feature]
        found = {v: int(((values - v).abs() < 1e-9).sum()) for v in shares}
        assert sum(found.values()) == count
        for value, share in shares.items():
            assert abs(found[value] - share * count) < 4 * math.sqrt(count * share * (1 - share))


@pytest.mark.parametrize(("reading", "factor"), [("sound", 1), ("literal", 3)])
def test_stochastic_in_training_and_evaluation(reading, factor):
    states, offsets = random_batch([6, 4])
    pooler = pooler_of("stochastic", hidden_size=12, reading=reading)
    for training in (False, True):
        pooler.train(training)
        twice = [pooler(states, layout(offsets)) for _ in range(2)]
        assert torch.equal(*twice) is (reading == "sound" and not training)
    # sequences of one token leave nothing to chance: draws are averaged, or literally added up
    pooler = pooler_of("stochastic", dense=IDENTITY, reading=reading, num_draws=3).train()
    found = pooled(pooler, LAST[3:]).atanh()
    assert found.tolist() == pytest.approx([0.5 * factor, 2.0 * factor])
    # and where nothing is active there is nothing to draw from
    tokens = torch.tensor([[-1.0, 0.0], [-2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    for training in (False, True):
        found = pooled(pooler.train(training), tokens)
        assert torch.equal(found, pooler.dense.bias.tanh())
        found.sum().backward()
        assert not tokens.grad.any()


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("num_heads", [1, 3, 12])
def test_attention_equals_the_library(name, num_heads):
    """A ragged batch against sequences given to `torch.nn.MultiheadAttention` one by one."""
    lengths = [5, 1, 9, 3]
    states, offsets = random_batch(lengths)
    pooler = pooler_of(name, hidden_size=12, num_heads=num_heads)
    library = nn.MultiheadAttention(12, num_heads, batch_first=True).double()
    library.load_state_dict(pooler.attention.state_dict())
    stacked = torch.stack(states[-3:])
    tokens = {"mha": states[-1], "maxseq_mha": stacked.amax(0), "meanseq_mha": stacked.mean(0)}
    parts = tokens[name].split(lengths)
    expected = torch.cat([library(x[None, :1], x[None], x[None])[0][0] for x in parts])
    found = pooler(states, layout(offsets))
    assert_close(found, expected, 1e-12, "vectors")

    literal = pooler_of(name, hidden_size=12, num_heads=num_heads, reading="literal")
    for length in (9, 14):
        rows = torch.stack([pad(part, (0, 0, 0, length - len(part))) for part in parts])
        expected = library(rows[:, :1], rows, rows)[0][:, 0]
        found = literal(states, layout(offsets, length))
        assert_close(found, expected, 1e-12, f"zeros in place of padding, {length} columns")


@layer_choices
@readings
@names
def test_gradients(name, reading, layer_choice):
    """Of states and parameters, against finite differences; random numbers have no ties."""
    states, offsets = random_batch([3, 1, 2], hidden_size=4)
    settings = {"num_heads": 2, "num_layers": 2, "layer_choice": layer_choice}
    pooler = pooler_of(name, hidden_size=4, reading=reading, **settings)
    layers = [state.requires_grad_() for state in states[1:]]

    def pooled(*inputs: Tensor) -> Tensor:
        torch.manual_seed(0)  # the literal reading of stochastic draws
        return pooler([states[0], *inputs[: len(layers)]], layout(offsets, row_length=4))

    assert torch.autograd.gradcheck(pooled, (*layers, *pooler.parameters()), fast_mode=True)


@layer_choices
@names
def test_sound_readings_depend_on_the_sequence_alone(name, layer_choice):
    lengths = [5, 1, 9, 3]
    states, offsets = random_batch(lengths)
    pooler = pooler_of(name, **WIDE, layer_choice=layer_choice)
    together = pooler(states, layout(offsets))
    assert together.shape == (4, pooler.output_size)
    assert_close(pooler(states, layout(offsets, row_length=17)), together, 1e-12, "more padding")
    parts = zip(*(state.split(lengths) for state in states), strict=True)
    alone = [pooler(part, layout([0, len(part[0])])) for part in parts]
    assert_close(torch.cat(alone), together, 1e-12, "alone")


@readings
@names
def test_empty_sequence_counts_as_a_zero_token(name, reading):
    states, _ = random_batch([2, 3])
    pooler = pooler_of(name, **WIDE, reading=reading)
    leaves = [state.requires_grad_() for state in states]
    found = pooler(leaves, layout([0, 2, 2, 5, 5]))
    zeros = [torch.zeros(1, 12, dtype=torch.float64)] * 4
    expected = pooler(zeros, layout([0, 1]))
    assert_close(found[[1, 3]], expected.expand(2, 12), 1e-12, "in the middle and at the end")
    found.sum().backward()
    assert all(x.grad is None or bool(x.grad.isfinite().all()) for x in leaves)


def test_layer_of_the_longest_vector():
    # norms below and above: 5.39 2.24, 1.41 3.04, 6 4.12, 3 2.06
    tokens = [LOWER[0], LAST[1], LOWER[2], LOWER[3]]
    choice = {"layer_choice": "norm", "num_layers": 2}
    check(pooler_of("max_cls", **choice), [tokens[0], tokens[3]])
    check(pooler_of("mean", **choice), [[-1 / 3, -1.5], [0, 3]])
    mixed = pooler_of("mha", num_heads=1)([torch.tensor(tokens).double()] * 2, layout(OFFSETS))
    check(pooler_of("maxseq_mha", num_heads=1, **choice), mixed.tolist())
    # of equal norms the lower layer
    twins = [torch.tensor([[x, y]], dtype=torch.float64) for x, y in ((9, 9), (3, 4), (5, 0))]
    found = pooler_of("mean", **choice)(twins, layout([0, 1]))
    assert found.tolist() == [[3, 4]]


def test_what_does_not_fit_is_refused():
    states, offsets = random_batch([2, 1], layers=2)
    for name, choice in (("max_cls", "own"), ("meanseq_mha", "own"), ("mean", "norm")):
        with pytest.raises(ValueError, match="reads the last 3 layers, found 2"):
            pooler_of(name, **WIDE, layer_choice=choice)(states, layout(offsets))
        config = PoolerConfig(name=name, num_layers=4, layer_choice=choice)
        with pytest.raises(ConfigError, match="last 4 layers, num_hidden_layers is 3"):
            PoNetForSequenceClassification(SMALL.replace(pooler=config))
    for fields, message in (
        ({"name": "mha", "num_heads": 5}, "12 is not a multiple of pooler num_heads 5"),
        ({"name": "mswap", "window": 5}, "12 is not a multiple of pooler window 5"),
        ({"name": "avg"}, "one of cls, first, .*found 'avg'"),
        ({"num_layers": 0}, "pooler num_layers must be at least 1, found 0"),
        ({"window": 0}, "pooler window must be at least 1, found 0"),
        ({"reading": "loud"}, "reading must be literal or sound, found 'loud'"),
        ({"layer_choice": "all"}, "layer_choice must be own or norm"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_pooler(PoolerConfig(**fields), 12, 0.02)


@layer_choices
@names
def test_essential_settings_are_those_that_change_vectors(name, layer_choice):
    states, offsets = random_batch([5, 2])
    # every rule takes something from the third layer from the end
    states[1] = 3 * states[1]
    usual = PoolerConfig(name=name, layer_choice=layer_choice, num_layers=2, num_heads=3)

    def vectors(config: PoolerConfig) -> Tensor:
        torch.manual_seed(0)
        pooler = build_pooler(config, 12, 0.5).double()
        drawn = pooler.train()(states, layout(offsets, row_length=9))
        return torch.cat([drawn, pooler.eval()(states, layout(offsets, row_length=9))])

    assert torch.equal(vectors(essential(usual)), vectors(usual))
    for change in (
        {"reading": "literal"},
        {"num_layers": 3},
        {"num_heads": 2},
        {"window": 3},
        {"num_draws": 2},
    ):
        changed = replace(usual, **change)
        is_same = torch.equal(vectors(changed), vectors(usual))
        assert is_same == (essential(changed) == essential(usual)), change


def test_initial_weights():
    for name in ("cls", "meanmax", "stochastic"):
        dense = build_pooler(PoolerConfig(name=name), 240, 0.02).dense
        assert float(dense.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert not dense.bias.any()
    torch.manual_seed(4)
    mha = build_pooler(PoolerConfig(name="mha", num_heads=3), 12, 0.02)
    torch.manual_seed(4)
    for name, parameter in nn.MultiheadAttention(12, 3).named_parameters():
        assert torch.equal(mha.get_parameter(f"attention.{name}"), parameter), name


ROWS = torch.tensor([s + [0] * (9 - len(s)) for s in IDS])
MASK = ROWS != 0
PACKED = {"input_ids": ROWS[MASK], "cu_seqlens": torch.tensor([0, 4, 11, 12], dtype=torch.int32)}


def classifier_of(pooler: PoolerConfig, **changes) -> PoNetForSequenceClassification:
    torch.manual_seed(0)
    config = SMALL.replace(pooler=pooler, initializer_range=0.3, **changes)
    return PoNetForSequenceClassification(config).double().eval()


@pytest.mark.parametrize("mixer", ["ponet", "attention"])
@torch.no_grad()
def test_classifier_of_padded_rows_equals_packed_and_alone(tmp_path, mixer):
    for name in NAMES:
        pooler = PoolerConfig(name=name, num_layers=2, num_heads=2, num_draws=2)
        model = classifier_of(pooler, mixer=mixer)
        together = model(ROWS, attention_mask=MASK).logits
        assert_close(model(**PACKED).logits, together, 1e-9, f"{name} packed")
        alone = torch.cat([model(torch.tensor([sequence])).logits for sequence in IDS])
        assert_close(alone, together, 1e-9, f"{name} alone")
        model.save_pretrained(tmp_path)
        again = PoNetForSequenceClassification.from_pretrained(tmp_path)
        assert again.config == model.config
        assert torch.equal(again(**PACKED).logits, model.float()(**PACKED).logits)
    # by default it is the encoder's
    model = classifier_of(PoolerConfig(), mixer=mixer)
    pooled = model.ponet(**PACKED).pooler_output
    assert torch.equal(model(**PACKED).logits, model.classifier(pooled))
    # the classifier hands the row length to literal readings
    model = classifier_of(PoolerConfig(name="mha", reading="literal"), mixer=mixer)
    wide = model(pad(ROWS, (0, 4)), attention_mask=pad(MASK, (0, 4))).logits
    assert not torch.allclose(wide, model(ROWS, attention_mask=MASK).logits)


def test_poolers_on_a_pretrained_folder(tmp_path, caplog):
    pretrained = PoNetForPreTraining(SMALL)
    pretrained.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    # folders of published code, and ours of before, know no pooler
    assert content.pop("pooler")
    path.write_text(json.dumps(content))
    cls = PoNetForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    assert "initialised at random: classifier\n" in caplog.text
    assert torch.equal(cls.ponet.pooler.weight, pretrained.ponet.pooler.weight)
    caplog.clear()
    pooler = PoolerConfig(name="mha")
    mha = PoNetForSequenceClassification.from_pretrained(tmp_path, pooler=pooler)
    assert "initialised at random: classifier, pooler\n" in caplog.text
    assert mha.ponet.pooler is None
    for bad, message in (
        ("cls", r"config\.json: .*must be a mapping, not str"),
        ({"name": "cls", "heads": 3}, "heads"),
        ({"num_heads": 0}, "num_heads must be at least 1"),
        ({"name": "avg"}, "found 'avg'"),
    ):
        path.write_text(json.dumps(content | {"pooler": bad}))
        with pytest.raises(ConfigError, match=message):
            PoNetForSequenceClassification.from_pretrained(tmp_path)
