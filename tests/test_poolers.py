"""Sentence poolers: hand-computed cases, gradients, independence of the batch, saving."""

import json
import logging
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ponet import (
    ConfigError,
    PoNetConfig,
    PoNetForPreTraining,
    PoNetForSequenceClassification,
    PoNetModel,
    PoolerConfig,
)
from ponet.mixers import MIXERS
from ponet.packing import BatchLayout, layout_of, stream_of_packed
from ponet.poolers import POOLERS, build_pooler
from ponet_kernels.testing import assert_close

NAMES = tuple(POOLERS)
ATTENTION = ("mha", "maxseq_mha", "meanseq_mha")
READINGS = ("sound", "literal")

# two sequences, of three tokens and of one; what stands in the embedding must never be read
EMBEDDING = [[99.0, 99.0]] * 4
LOWER = [[2.0, -5.0], [1.0, 1.0], [-6.0, 0.0], [0.0, 3.0]]
LAST = [[1.0, -2.0], [3.0, 0.5], [-4.0, 1.0], [0.5, 2.0]]
STATES = [torch.tensor(layer, dtype=torch.float64) for layer in (EMBEDDING, LOWER, LAST)]
OFFSETS = torch.tensor([0, 3, 4], dtype=torch.int32)

SMALL = PoNetConfig(
    vocab_size=120,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=64,
    hidden_dropout_prob=0.0,
    linformer_size=8,
    num_landmarks=4,
    landmark_conv_size=3,
    attention_window=8,
    block_size=4,
    lsh_chunk_size=4,
)
IDS = [[101, 7, 8, 102], [101, 9, 12, 13, 20, 55, 102], [101]]


def layout(offsets: Tensor, row_length: int | None = None) -> BatchLayout:
    """Sequences in rows of a length, of the longest when None."""
    stream = stream_of_packed(torch.zeros(int(offsets[-1]), dtype=torch.long), offsets)
    if row_length is not None:
        stream = replace(stream, row_length=row_length)
    return layout_of(stream, torch.zeros(int(offsets[-1]), dtype=torch.bool))


def pooler_of(name: str, hidden_size: int = 2, **settings):
    torch.manual_seed(0)
    pooler = build_pooler(PoolerConfig(name=name, **settings), hidden_size, 0.5).double().eval()
    with torch.no_grad():
        for parameter in pooler.parameters():
            # biases begin at zero, which would hide them
            parameter.add_(0.1 * torch.randn_like(parameter))
    return pooler


def set_dense(pooler, weight: list[list[float]], bias: list[float]) -> None:
    with torch.no_grad():
        pooler.dense.weight.copy_(torch.tensor(weight))
        pooler.dense.bias.copy_(torch.tensor(bias))


def set_identity_attention(pooler) -> None:
    """Query, key, value and output projections that change nothing."""
    attention = pooler.attention
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.eye(2).repeat(3, 1))
        attention.in_proj_bias.zero_()
        attention.out_proj.weight.copy_(torch.eye(2))
        attention.out_proj.bias.zero_()


def check(pooler, expected: list[list[float]], **arguments) -> None:
    found = pooler(STATES, layout(OFFSETS, **arguments))
    assert_close(found, torch.tensor(expected, dtype=torch.float64), 1e-12, "vectors")


def random_batch(lengths: list[int], hidden_size: int = 12, layers: int = 3):
    generator = torch.Generator().manual_seed(3)
    states = [
        torch.randn(sum(lengths), hidden_size, generator=generator, dtype=torch.float64)
        for _ in range(layers + 1)
    ]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return states, offsets


def attended(tokens: list[list[float]], zeros: int = 0) -> list[float]:
    """One head over two features, all projections the identity, the first token asks."""
    (x, y) = tokens[0]
    terms = [math.exp((x * a + y * b) / math.sqrt(2)) for a, b in tokens]
    total = sum(terms) + zeros
    return [sum(t * v[i] for t, v in zip(terms, tokens, strict=True)) / total for i in (0, 1)]


def test_cls_by_hand():
    pooler = pooler_of("cls")
    set_dense(pooler, [[1, 0], [0, 2]], [0, 1])
    check(pooler, [[math.tanh(1), math.tanh(-3)], [math.tanh(0.5), math.tanh(5)]])


def test_max_cls_by_hand():
    check(pooler_of("max_cls", num_layers=2), [[2, -2], [0.5, 3]])
    check(pooler_of("max_cls", num_layers=1), [LAST[0], LAST[3]])


def test_mswap_by_hand():
    # softmax(1, -2) = (0.95257.., 0.04742..), softmax(0.5, 2) = (0.18242.., 0.81757..)
    first, second = 1 / (1 + math.exp(-3)), 1 / (1 + math.exp(1.5))
    expected = [[first, 0], [0.5 * second, 2 * (1 - second)]]
    assert expected[0][0] == pytest.approx(0.9525741268)
    assert expected[1] == pytest.approx([0.0912127619, 1.6351489524])
    check(pooler_of("mswap"), expected)
    # windows of two and of all four features of one token, and of one, where nothing is weighted
    token = torch.tensor([[1.0, -2.0, 0.5, 2.0]], dtype=torch.float64)
    for window, wanted in (
        (1, [1, 0, 0.5, 2]),
        (2, [*expected[0], *expected[1]]),
        (4, [max(x, 0) * math.exp(x) / 11.8913945 for x in (1, -2, 0.5, 2)]),
    ):
        pooler = pooler_of("mswap", hidden_size=4, window=window)
        found = pooler([token, token], layout(torch.tensor([0, 1], dtype=torch.int32)))
        assert found.squeeze(0).tolist() == pytest.approx(wanted, abs=1e-7)


def test_mean_and_max_by_hand():
    check(pooler_of("mean"), [[0, -0.5 / 3], [0.5, 2]])
    check(pooler_of("max"), [[3, 1], [0.5, 2]])


def test_meanmax_by_hand():
    # norms of the first sequence: sqrt 5, sqrt 9.25, sqrt 17: the third token; mean (0, -1/6)
    weight, bias = [[1, 1, 0.25, 0], [0, 6, 0, 1]], [0, 0.5]
    sound = pooler_of("meanmax")
    set_dense(sound, weight, bias)
    check(sound, [[math.tanh(-7 / 6), math.tanh(0.5)], [math.tanh(2.625), math.tanh(14.5)]])
    # sum (0, -1/2)
    literal = pooler_of("meanmax", reading="literal")
    set_dense(literal, weight, bias)
    expected = [[math.tanh(-1.5), math.tanh(-1.5)], [math.tanh(2.625), math.tanh(14.5)]]
    check(literal, expected)
    check(literal, expected, row_length=9)


def test_meanmax_takes_the_first_of_equally_long_tokens():
    pooler = pooler_of("meanmax")
    set_dense(pooler, [[0, 0, 1, 0], [0, 0, 0, 1]], [0, 0])
    tokens = torch.tensor([[1.0, 0.0], [3.0, 4.0], [5.0, 0.0]], dtype=torch.float64)
    found = pooler([tokens, tokens], layout(torch.tensor([0, 3], dtype=torch.int32)))
    assert found.atanh().squeeze(0).tolist() == pytest.approx([3, 4])


def test_stochastic_expectation_by_hand():
    # positive parts 1, 3, 0 and 0, 0.5, 1: sums of squares over sums 10 / 4 and 1.25 / 1.5
    pooler = pooler_of("stochastic")
    set_dense(pooler, [[1, 0], [0, 1]], [0, 0])
    first = [math.tanh(2.5), math.tanh(1.25 / 1.5)]
    check(pooler, [first, [math.tanh(0.5), math.tanh(2)]])


@pytest.mark.parametrize("reading", READINGS)
def test_stochastic_draws_in_proportion(reading):
    pooler = pooler_of("stochastic", reading=reading).train()
    set_dense(pooler, [[1, 0], [0, 1]], [0, 0])
    count = 4000
    tokens = STATES[-1][:3].repeat(count, 1)
    offsets = torch.arange(0, 3 * count + 1, 3, dtype=torch.int32)
    torch.manual_seed(1)
    drawn = pooler([tokens, tokens], layout(offsets, row_length=5)).atanh()
    for feature, shares in ((0, {1.0: 1 / 4, 3.0: 3 / 4}), (1, {0.5: 1 / 3, 1.0: 2 / 3})):
        values = drawn[:, feature]
        found = {v: int(((values - v).abs() < 1e-9).sum()) for v in shares}
        assert sum(found.values()) == count
        for value, share in shares.items():
            assert abs(found[value] - share * count) < 4 * math.sqrt(count * share * (1 - share))


def test_stochastic_in_training_and_evaluation():
    states, offsets = random_batch([6, 4])
    for reading, draws_in_evaluation in (("sound", False), ("literal", True)):
        pooler = pooler_of("stochastic", hidden_size=12, reading=reading)
        again = [pooler(states, layout(offsets)) for _ in range(2)]
        assert torch.equal(*again) is not draws_in_evaluation
        pooler.train()
        assert not torch.equal(pooler(states, layout(offsets)), pooler(states, layout(offsets)))
    # sequences of one token leave nothing to chance: draws are averaged, or literally added up
    for reading, factor in (("sound", 1), ("literal", 3)):
        pooler = pooler_of("stochastic", reading=reading, num_draws=3).train()
        set_dense(pooler, [[1, 0], [0, 1]], [0, 0])
        alone = [state[3:] for state in STATES]
        found = pooler(alone, layout(torch.tensor([0, 1], dtype=torch.int32)))
        assert found.atanh().squeeze(0).tolist() == pytest.approx([0.5 * factor, 2.0 * factor])


@pytest.mark.parametrize("training", [False, True])
def test_stochastic_without_activation(training):
    pooler = pooler_of("stochastic").train(training)
    tokens = torch.tensor([[-1.0, 0.0], [-2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    found = pooler([tokens, tokens], layout(torch.tensor([0, 2], dtype=torch.int32)))
    assert torch.equal(found.squeeze(0), pooler.dense.bias.tanh())
    found.sum().backward()
    assert tokens.grad is not None
    assert bool((tokens.grad == 0).all())


def test_attention_by_hand():
    joined = {
        "mha": LAST,
        "maxseq_mha": [[2, -2], [3, 1], [-4, 1], [0.5, 3]],
        "meanseq_mha": [[1.5, -3.5], [2, 0.75], [-5, 0.5], [0.25, 2.5]],
    }
    for name, tokens in joined.items():
        sound = pooler_of(name, num_heads=1, num_layers=2)
        set_identity_attention(sound)
        check(sound, [attended(tokens[:3]), tokens[3]], row_length=5)
        literal = pooler_of(name, num_heads=1, num_layers=2, reading="literal")
        set_identity_attention(literal)
        check(literal, [attended(tokens[:3]), attended(tokens[3:], zeros=2)])
        wider = [attended(tokens[:3], zeros=2), attended(tokens[3:], zeros=4)]
        check(literal, wider, row_length=5)


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

    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for (key, ours), theirs in zip(
        pooler.attention.named_parameters(), library.parameters(), strict=True
    ):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert_close(ours.grad, theirs.grad, 1e-12, key)

    literal = pooler_of(name, hidden_size=12, num_heads=num_heads, reading="literal")
    padded = nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    expected = library(padded[:, :1], padded, padded)[0][:, 0]
    assert_close(literal(states, layout(offsets)), expected, 1e-12, "zeros in place of padding")


@pytest.mark.parametrize("layer_choice", ["own", "norm"])
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients(name, reading, layer_choice):
    """Of states and parameters, against finite differences; random numbers have no ties."""
    states, offsets = random_batch([3, 1, 2], hidden_size=4)
    settings = {"num_heads": 2, "num_layers": 2, "layer_choice": layer_choice}
    pooler = pooler_of(name, hidden_size=4, reading=reading, **settings)
    layers = [state.requires_grad_() for state in states[1:]]
    parameters = tuple(pooler.parameters())

    def pooled(*inputs: Tensor) -> Tensor:
        torch.manual_seed(0)  # the literal reading of stochastic draws
        return pooler([states[0], *inputs[: len(layers)]], layout(offsets, row_length=4))

    assert torch.autograd.gradcheck(pooled, (*layers, *parameters), fast_mode=True)


def test_equal_maxima_send_the_gradient_to_the_first():
    tokens = torch.tensor([[2.0, 1.0], [2.0, 5.0], [0.0, 5.0]], dtype=torch.float64)
    tokens.requires_grad_()
    place = layout(torch.tensor([0, 3], dtype=torch.int32))
    pooler_of("max")([tokens, tokens], place).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.tolist() == [[1, 0], [0, 1], [0, 0]]

    layers = [torch.ones(1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    pooler = pooler_of("max_cls", num_layers=2)
    pooler(layers, layout(torch.tensor([0, 1], dtype=torch.int32))).sum().backward()
    assert [x.grad is None or float(x.grad.sum()) for x in layers] == [True, 2, 0]


@pytest.mark.parametrize("layer_choice", ["own", "norm"])
@pytest.mark.parametrize("name", NAMES)
def test_sound_readings_depend_on_the_sequence_alone(name, layer_choice):
    lengths = [5, 1, 9, 3]
    states, offsets = random_batch(lengths)
    settings = {"num_heads": 3, "layer_choice": layer_choice}
    pooler = pooler_of(name, hidden_size=12, **settings)
    together = pooler(states, layout(offsets))
    assert together.shape == (4, pooler.output_size)
    assert_close(pooler(states, layout(offsets, row_length=17)), together, 1e-12, "more padding")
    for number, parts in enumerate(zip(*(s.split(lengths) for s in states), strict=True)):
        alone = pooler(parts, layout(torch.tensor([0, lengths[number]], dtype=torch.int32)))
        assert_close(alone[0], together[number], 1e-12, f"sequence {number}")


def test_literal_readings_that_the_batch_changes():
    """The documented exceptions, no more and no less: softmax over padding."""
    states, offsets = random_batch([5, 1, 9])
    changed = set()
    for name in NAMES:
        pooler = pooler_of(name, hidden_size=12, num_heads=3, reading="literal")
        torch.manual_seed(0)
        tight = pooler(states, layout(offsets))
        torch.manual_seed(0)
        if name != "stochastic" and not torch.allclose(
            tight, pooler(states, layout(offsets, row_length=17))
        ):
            changed.add(name)
    assert changed == set(ATTENTION)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", NAMES)
def test_empty_sequence_counts_as_a_zero_token(name, reading):
    states, _ = random_batch([2, 3])
    settings = {"num_heads": 3, "reading": reading}
    pooler = pooler_of(name, hidden_size=12, **settings).eval()
    leaves = [state.requires_grad_() for state in states]
    found = pooler(leaves, layout(torch.tensor([0, 2, 2, 5, 5], dtype=torch.int32)))
    zeros = [torch.zeros(1, 12, dtype=torch.float64)] * 4
    expected = pooler(zeros, layout(torch.tensor([0, 1], dtype=torch.int32)))
    assert_close(found[1], expected[0], 1e-12, "in the middle")
    assert_close(found[3], expected[0], 1e-12, "at the end")
    found.sum().backward()
    assert all(x.grad is None or bool(x.grad.isfinite().all()) for x in leaves)


def test_one_layer_is_the_last():
    states, offsets = random_batch([5, 1, 4])
    mha = pooler_of("mha", hidden_size=12, num_heads=3)
    expected = mha(states, layout(offsets))
    for name in ("maxseq_mha", "meanseq_mha"):
        pooler = pooler_of(name, hidden_size=12, num_heads=3, num_layers=1)
        pooler.load_state_dict(mha.state_dict())
        assert torch.equal(pooler(states, layout(offsets)), expected)
    for name in NAMES:
        plain, by_norm = (
            pooler_of(name, hidden_size=12, num_layers=1, layer_choice=choice)
            for choice in ("own", "norm")
        )
        assert torch.equal(plain(states, layout(offsets)), by_norm(states, layout(offsets)))


def test_layer_of_the_longest_vector():
    # norms below and above: 5.39 2.24, 1.41 3.04, 6 4.12, 3 2.06
    tokens = [LOWER[0], LAST[1], LOWER[2], LOWER[3]]
    choice = {"layer_choice": "norm", "num_layers": 2}
    check(pooler_of("max_cls", **choice), [tokens[0], tokens[3]])
    check(pooler_of("mean", **choice), [[-1 / 3, -1.5], [0, 3]])
    attention = pooler_of("maxseq_mha", num_heads=1, **choice)
    set_identity_attention(attention)
    check(attention, [attended(tokens[:3]), tokens[3]])
    # of equal norms the lower layer
    twins = [torch.tensor([[x, y]], dtype=torch.float64) for x, y in ((9, 9), (3, 4), (5, 0))]
    found = pooler_of("mean", **choice)(twins, layout(torch.tensor([0, 1], dtype=torch.int32)))
    assert found.tolist() == [[3, 4]]


def test_what_does_not_fit_is_refused():
    states, offsets = random_batch([2, 1], layers=2)
    for name in ("max_cls", "maxseq_mha", "meanseq_mha"):
        with pytest.raises(ValueError, match="reads the last 3 layers, found 2"):
            pooler_of(name, hidden_size=12)(states, layout(offsets))
        config = SMALL.replace(pooler=PoolerConfig(name=name, num_layers=4))
        with pytest.raises(ConfigError, match="last 4 layers, num_hidden_layers is 3"):
            PoNetForSequenceClassification(config)
    config = SMALL.replace(pooler=PoolerConfig(name="mean", num_layers=4, layer_choice="norm"))
    with pytest.raises(ConfigError, match="last 4 layers"):
        PoNetForSequenceClassification(config)
    with pytest.raises(ConfigError, match="12 is not a multiple of pooler num_heads 5"):
        build_pooler(PoolerConfig(name="mha", num_heads=5), 12, 0.02)
    with pytest.raises(ConfigError, match="12 is not a multiple of pooler window 5"):
        build_pooler(PoolerConfig(name="mswap", window=5), 12, 0.02)
    with pytest.raises(ConfigError, match=r"one of cls, meanmax, .*found 'avg'"):
        build_pooler(PoolerConfig(name="avg"), 12, 0.02)
    for field in ("num_layers", "num_heads", "window", "num_draws"):
        with pytest.raises(ConfigError, match=f"pooler {field} must be at least 1, found 0"):
            PoolerConfig(**{field: 0})
    with pytest.raises(ConfigError, match="reading must be literal or sound, found 'loud'"):
        PoolerConfig(reading="loud")
    with pytest.raises(ConfigError, match="layer_choice must be own or norm"):
        PoolerConfig(layer_choice="all")


def test_initial_weights():
    for name in ("cls", "meanmax", "stochastic"):
        dense = build_pooler(PoolerConfig(name=name), 240, 0.02).dense
        assert dense is not None
        assert float(dense.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert bool((dense.bias == 0).all())
    torch.manual_seed(4)
    attention = build_pooler(PoolerConfig(name="mha", num_heads=3), 12, 0.02).get_submodule(
        "attention"
    )
    torch.manual_seed(4)
    library = nn.MultiheadAttention(12, 3)
    for ours, theirs in zip(attention.parameters(), library.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def rows_of_ids() -> tuple[Tensor, Tensor]:
    length = max(len(ids) for ids in IDS) + 2
    ids = torch.tensor([s + [0] * (length - len(s)) for s in IDS])
    mask = torch.tensor([[1] * len(s) + [0] * (length - len(s)) for s in IDS])
    return ids, mask


def classifier_of(pooler: PoolerConfig, **changes) -> PoNetForSequenceClassification:
    torch.manual_seed(0)
    config = SMALL.replace(pooler=pooler, initializer_range=0.3, **changes)
    return PoNetForSequenceClassification(config).double().eval()


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_every_pooler_on_every_mixer(mixer):
    """Vectors of all sequences, and a gradient for every weight, from packed input."""
    torch.manual_seed(0)
    encoder = PoNetModel(SMALL.replace(mixer=mixer, initializer_range=0.3)).double()
    stream = torch.tensor([token for sequence in IDS for token in sequence])
    offsets = torch.tensor([0, 4, 11, 12], dtype=torch.int32)
    encoded = encoder.encode(stream, cu_seqlens=offsets)
    for name in NAMES:
        pooler = pooler_of(name, hidden_size=24, num_layers=2)
        vectors = pooler(encoded.states, encoded.layout)
        assert vectors.shape == (3, 24)
        (vectors * torch.randn_like(vectors)).sum().backward(retain_graph=True)
        for key, parameter in pooler.named_parameters():
            assert parameter.grad is not None
            assert bool((parameter.grad != 0).any()), f"{name} {key}"


@pytest.mark.parametrize("mixer", ["ponet", "attention"])
def test_classifier_of_padded_rows_equals_packed_and_alone(mixer):
    ids, mask = rows_of_ids()
    stream, offsets = ids[mask.bool()], torch.tensor([0, 4, 11, 12], dtype=torch.int32)
    for name in NAMES:
        model = classifier_of(PoolerConfig(name=name, num_layers=2), mixer=mixer)
        with torch.no_grad():
            together = model(ids, attention_mask=mask).logits
            assert_close(model(stream, cu_seqlens=offsets).logits, together, 1e-9, f"{name} packed")
            alone = torch.cat([model(torch.tensor([sequence])).logits for sequence in IDS])
        assert_close(alone, together, 1e-9, f"{name} alone")


def test_classifier_hands_the_row_length_to_literal_readings():
    model = classifier_of(PoolerConfig(name="mha", reading="literal"))
    ids, mask = rows_of_ids()
    wider = [torch.nn.functional.pad(x, (0, 4)) for x in (ids, mask)]
    with torch.no_grad():
        narrow = model(ids, attention_mask=mask).logits
        assert not torch.allclose(model(wider[0], attention_mask=wider[1]).logits, narrow)


def test_default_pools_as_ever():
    """The encoder's own pooler under its published name, and the same initial weights."""
    torch.manual_seed(0)
    classifier = PoNetForSequenceClassification(SMALL)
    torch.manual_seed(0)
    encoder = PoNetModel(SMALL)
    head = nn.Linear(24, 2)
    nn.init.normal_(head.weight, std=SMALL.initializer_range)
    nn.init.zeros_(head.bias)
    ids = torch.tensor([IDS[1]])
    pooled = encoder.eval()(ids).pooler_output
    assert torch.equal(classifier.eval()(ids).logits, head(pooled))
    names = {f"ponet.{name}" for name, _ in encoder.named_parameters()}
    assert {name for name, _ in classifier.named_parameters()} == {
        *names,
        "classifier.weight",
        "classifier.bias",
    }
    assert "ponet.pooler.weight" in classifier.named_weights()


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", NAMES)
def test_folder_loads_in_one_line(tmp_path, name, reading):
    pooler = PoolerConfig(name=name, reading=reading, num_layers=2, num_heads=2, num_draws=2)
    model = classifier_of(pooler).float()
    model.save_pretrained(tmp_path)
    again = PoNetForSequenceClassification.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.config.pooler == pooler
    logits = []
    for each in (model, again):
        torch.manual_seed(0)
        logits.append(each(torch.tensor([IDS[1]])).logits)
    assert torch.equal(*logits)


def test_poolers_on_a_pretrained_folder(tmp_path, caplog):
    torch.manual_seed(0)
    pretrained = PoNetForPreTraining(SMALL)
    pretrained.save_pretrained(tmp_path)
    # folders of published code, and ours of before, know no pooler
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    del content["pooler"]
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        cls = PoNetForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    assert "holds no classifier.weight, classifier.bias:" in caplog.text
    ours, theirs = cls.ponet.pooler, pretrained.ponet.pooler
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours.weight, theirs.weight)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        mha = PoNetForSequenceClassification.from_pretrained(
            tmp_path, pooler=PoolerConfig(name="mha")
        )
    assert "pooler.attention.in_proj_weight" in caplog.text
    assert mha.ponet.pooler is None


def test_bad_pooler_in_a_folder(tmp_path):
    classifier_of(PoolerConfig()).float().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for pooler, message in (
        ("cls", "pooler: expected a JSON object, found 'cls'"),
        ({"name": "cls", "heads": 3}, "heads"),
        ({"num_heads": 0}, "num_heads must be at least 1"),
        ({"name": "avg"}, "found 'avg'"),
    ):
        path.write_text(json.dumps(content | {"pooler": pooler}))
        with pytest.raises(ConfigError, match=message):
            PoNetForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name):
    """Under autocast, in training: close to the vectors of full precision."""
    states, offsets = random_batch([5, 1, 9], hidden_size=24)
    pooler = pooler_of(name, hidden_size=24, num_heads=3).float()
    states = [state.float() for state in states]
    expected = pooler(states, layout(offsets))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pooler(states, layout(offsets))
    assert float((found.float() - expected).detach().abs().max()) < 0.05
    for state in states:
        state.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooler.train()(states, layout(offsets)).sum().backward()
    assert bool(states[-1].grad.isfinite().all())
