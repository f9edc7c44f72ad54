"""The Long Range Arena model in both protocols, its schedule and its batches, without training."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lra.data import DEV, TRAIN, BatchOrder, gather_examples, whole_set_batches
from lra.model import LongRangeClassifier, model_config, model_inputs
from lra.selfpretrain import hide_tokens
from lra.settings import ArenaConfig, ArenaSettings
from lra.steps import OneCycle
from lra.store import ArenaError, Split
from lra.tasks import TASKS
from ponet.mixers import MIXERS

PUBLISHED_PARAMETERS = {
    "listops": (209_802, 226_442),
    "text": (370_562, 387_202),
    "retrieval": (395_138, 411_778),
    "image": (174_986, 191_626),
    "pathfinder": (173_954, 190_594),
}
# rows of 32 columns in segments of 32 // 5 + 1 = 7
SMALL = dataclasses.replace(TASKS["image"], seq_len=32, max_tokens=32, num_segments=5)
PAIRS = dataclasses.replace(SMALL, num_inputs=2)


def build(mixer: str, task=SMALL) -> LongRangeClassifier:
    torch.manual_seed(0)
    return LongRangeClassifier(model_config(task, mixer), task.num_inputs).double().eval()


def sequences(lengths: list[int], zeros: float = 0.3) -> list[Tensor]:
    """Ids with black pixels, at the ends too."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 256, (n,), generator=generator) for n in lengths]
    drawn = [x * (torch.rand(len(x), generator=generator) > zeros) for x in ids]
    if zeros:
        drawn[0][0] = drawn[0][-1] = 0
    return drawn


def inputs_of(ids: list[Tensor], protocol, mixer: str, task=SMALL):
    return model_inputs(
        torch.cat(ids),
        torch.tensor([len(x) for x in ids]),
        protocol=protocol,
        task=task,
        mixer=mixer,
        num_segments=task.num_segments,
    )


@pytest.mark.parametrize("task", PUBLISHED_PARAMETERS)
def test_parameters_are_as_many_as_published(task):
    counts = []
    for mixer in ("attention", "ponet"):
        model = LongRangeClassifier(model_config(TASKS[task], mixer), TASKS[task].num_inputs)
        counts.append(sum(p.numel() for p in model.parameters()))
    assert tuple(counts) == PUBLISHED_PARAMETERS[task]


def test_initial_weights_are_as_published():
    torch.manual_seed(0)
    model = LongRangeClassifier(model_config(TASKS["image"], "ponet"), 1).requires_grad_(False)
    for embedding in (model.ponet.embeddings.word, model.ponet.embeddings.position):
        assert float(embedding.weight.std()) == pytest.approx(0.02, rel=0.05)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embeddings" not in name:
            # uniform within 1 / sqrt(inputs)
            bound = parameter.shape[1] ** -0.5
            assert bound * 0.98 < float(parameter.abs().max()) <= bound, name
        elif name.endswith("bias") and "norm" not in name:
            assert float(parameter.abs().max()) > 0.01, name


def dense_mixing(mixer, hidden: Tensor, mask: Tensor, size: int) -> Tensor:
    """The published PoNet block on one row `[N, C]`, masked with -10000 as published."""
    n, c = hidden.shape
    heads = mixer.config.num_attention_heads
    low = hidden.new_full((n, c), -10_000.0)
    g = (mixer.query(hidden) * mask[:, None]).sum(0) / mask.sum()
    key = mixer.key(hidden).view(n, heads, -1)
    scores = (g.view(heads, -1) * key).sum(-1) / key.shape[-1] ** 0.5
    shares = scores.masked_fill(~mask[:, None], -10_000.0).softmax(0)
    pooled = (shares.unsqueeze(-1) * key).sum(0).flatten()
    segment = torch.where(mask[:, None], mixer.segment(hidden), low)
    tops = torch.stack([segment[i - i % size :][:size].amax(0) for i in range(n)])
    local = F.pad(torch.where(mask[:, None], mixer.local(hidden), low), (0, 0, 1, 1), value=-1e4)
    windows = torch.stack([local[i : i + 3].amax(0) for i in range(n)])
    return mixer.dense((pooled + tops) * mixer.output(hidden) + windows)


def dense_attention(mixer, hidden: Tensor, mask: Tensor, size: int) -> Tensor:
    n, _ = hidden.shape
    query, key, value = (
        f(hidden).view(n, mixer.num_heads, -1).transpose(0, 1)
        for f in (mixer.query, mixer.key, mixer.value)
    )
    scores = query @ key.mT / query.shape[-1] ** 0.5
    shares = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return mixer.dense((shares @ value).transpose(0, 1).flatten(1))


def dense_fourier(mixer, hidden: Tensor, mask: Tensor, size: int) -> Tensor:
    return torch.fft.fft2(hidden).real


DENSE = {"ponet": dense_mixing, "attention": dense_attention, "fnet": dense_fourier}


def dense_states(model: LongRangeClassifier, mixer: str, row: Tensor, mask: Tensor, size: int):
    """Final states of one row `[N]`, with every sub-layer written out."""
    ponet = model.ponet
    hidden = ponet.embeddings.word(row) + ponet.embeddings.position(torch.arange(len(row)))
    for layer in ponet.encoder.layers:
        hidden = hidden + DENSE[mixer](layer.mixer, layer.mixer_norm(hidden), mask, size)
        up = layer.feed_forward.up(layer.feed_forward_norm(hidden))
        hidden = hidden + layer.feed_forward.down(F.gelu(up))
    return F.layer_norm(
        hidden, hidden.shape[1:], ponet.encoder.final_norm.weight, ponet.encoder.final_norm.bias
    )


@pytest.mark.parametrize("mixer", DENSE)
def test_published_mean_is_over_all_columns_without_black_pixels(mixer):
    model, ids = build(mixer), sequences([32, 24, 17, 1])
    found = model.pool(inputs_of(ids, "published", mixer))
    for vector, sequence in zip(found, ids, strict=True):
        row = F.pad(sequence, (0, 32 - len(sequence)))
        states = dense_states(model, mixer, row, row != 0, size=7)
        expected = (states * (row != 0)[:, None]).sum(0) / 32
        torch.testing.assert_close(vector, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mixer", DENSE)
def test_clean_mean_is_over_tokens_black_pixels_among_them(mixer):
    model, ids = build(mixer), sequences([32, 20, 1])
    found = model.pool(inputs_of(ids, "clean", mixer))
    for vector, sequence in zip(found, ids, strict=True):
        real = torch.arange(32) < len(sequence)
        # fnet alone mixes the padding, too
        seen = F.pad(sequence, (0, 32 - len(sequence))) if mixer == "fnet" else sequence
        states = dense_states(model, mixer, seen, real[: len(seen)], size=7)
        expected = states[: len(sequence)].mean(0)
        torch.testing.assert_close(vector, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("protocol", ["published", "clean"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_answers_do_not_depend_on_the_batch(mixer, protocol):
    # the readable form of PoNet knows no gaps within a sequence
    zeros = 0.0 if mixer == "ponet_published" else 0.3
    model, ids = build(mixer), sequences([24, 9, 17], zeros)
    together = model(inputs_of(ids, protocol, mixer))
    assert together.shape == (3, 10)
    alone = torch.cat([model(inputs_of([x], protocol, mixer)) for x in ids])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_a_black_image_is_answered():
    model = build("ponet")
    ids = [torch.zeros(24, dtype=torch.long), *sequences([24])]
    logits = model(inputs_of(ids, "published", "ponet"))
    expected = model.classifier(torch.zeros(64, dtype=torch.double))
    torch.testing.assert_close(logits[0], expected)
    assert logits.isfinite().all()


def test_pairs_share_the_encoder_and_meet_in_the_head():
    model, ids = build("ponet", PAIRS), sequences([20, 24, 11, 3], zeros=0.0)
    logits = model(inputs_of(ids, "clean", "ponet"))
    vectors = [model.pool(inputs_of([x], "clean", "ponet"))[0] for x in ids]
    for answer, a, b in zip(logits, vectors[:2], vectors[2:], strict=True):
        torch.testing.assert_close(answer, model.classifier(torch.cat([a, b, a * b, a - b])))


@pytest.mark.parametrize(
    ("task", "size", "number"),
    [("listops", 33, 63), ("text", 2, 2048), ("retrieval", 65, 64), ("image", 33, 32)],
)
def test_segments_are_as_long_as_published(task, size, number):
    task = TASKS[task]
    inputs = inputs_of([torch.ones(task.seq_len, dtype=torch.long)], "clean", "ponet", task)
    counts = inputs.layout.cu_segments.diff()
    assert set(counts[:-1].tolist()) == {size}
    assert len(counts) == number


@pytest.mark.parametrize("task", ["listops", "text", "pathfinder"])
def test_schedule_is_that_of_pytorch(task):
    task = TASKS[task]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], betas=(0.9, 0.999))
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=task.learning_rate,
        total_steps=task.steps,
        pct_start=task.warmup_steps / task.steps,
        anneal_strategy="linear",
    )
    schedule = OneCycle(steps=task.steps, warmup_steps=task.warmup_steps, peak=task.learning_rate)
    for step in range(task.steps):
        group = optimizer.param_groups[0]
        expected = (group["lr"], group["betas"][0])
        assert schedule.at(step) == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        if step + 1 < task.steps:
            reference.step()
    assert schedule.at(0) == pytest.approx((4e-6, 0.95))
    assert schedule.at(task.warmup_steps - 1) == pytest.approx((1e-4, 0.85))
    assert schedule.at(task.steps - 1) == pytest.approx((4e-10, 0.95))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (5, 0), (5, 5)])
def test_short_schedules_stay_within_their_ends(steps, warmup):
    for step in range(steps):
        rate, beta1 = OneCycle(steps=steps, warmup_steps=warmup, peak=1.0).at(step)
        assert 4e-6 <= rate <= 1.0
        assert 0.85 <= beta1 <= 0.95


def of_four(seed: int = 0) -> ArenaSettings:
    """Settings of batches of four."""
    (settings,) = ArenaConfig(batch_size=4, first_seed=seed).runs("cpu")
    return settings


def ragged(count: int, num_inputs: int = 1) -> Split:
    """Example i has input j of i + j + 1 tokens, all equal to i, and label i % 3."""
    lengths = np.array([[i + j + 1 for j in range(num_inputs)] for i in range(count)])
    offsets = np.concatenate([[0], lengths.ravel().cumsum()])
    ids = np.repeat(np.arange(count), lengths.sum(axis=1)).astype(np.uint8)
    inputs = np.arange(lengths.size).reshape(lengths.shape)
    return Split(ids, offsets, inputs, np.arange(count) % 3)


def test_a_batch_holds_first_inputs_before_second_ones():
    ids, lengths, labels = gather_examples(ragged(5, num_inputs=2), np.array([3, 0]))
    assert lengths.tolist() == [4, 1, 5, 2]
    assert ids.tolist() == [3] * 4 + [0] + [3] * 5 + [0] * 2
    assert labels.tolist() == [0, 0]


@pytest.mark.parametrize("by_length", [False, True])
def test_training_batches_are_a_function_of_seed_and_number(by_length):
    def make(seed: int) -> BatchOrder:
        return BatchOrder(ragged(200), of_four(seed), TRAIN, by_length=by_length)

    first = make(0)
    passes = [[first.indices(i) for i in range(k * 50, (k + 1) * 50)] for k in range(2)]
    for batches in passes:
        assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    assert not np.array_equal(passes[0], passes[1])
    assert np.array_equal(make(0).indices(73), passes[1][23])
    assert not np.array_equal(make(1).indices(0), passes[0][0])
    spread = np.mean([np.ptp(batch) for batch in passes[0]])
    assert (spread < 15) == by_length


def test_batches_that_are_not_filled():
    batches = BatchOrder(ragged(11), of_four(), TRAIN)
    seen = {
        tuple(sorted(np.concatenate([batches.indices(2 * k + i) for i in (0, 1)]).tolist()))
        for k in range(20)
    }
    # every pass leaves out others
    assert all(len(set(examples)) == 8 for examples in seen)
    assert set.union(*map(set, seen)) == set(range(11))
    with pytest.raises(ArenaError, match="--batch-size 4: a split has only 3 examples"):
        BatchOrder(ragged(3), of_four(), TRAIN)


def test_complete_batches_hold_every_example_once():
    split = ragged(11)
    batches = whole_set_batches(split, of_four(), DEV, limit=None)
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert np.concatenate(batches).tolist() == list(range(11))
    drawn = np.concatenate(whole_set_batches(split, of_four(), DEV, limit=5)).tolist()
    assert len(set(drawn)) == 5
    assert drawn != list(range(5))
    assert whole_set_batches(split, of_four(), DEV, limit=5)[0].tolist() == drawn[:4]


@pytest.mark.parametrize("mixer", ["ponet", "fnet"])
@pytest.mark.parametrize("protocol", ["published", "clean"])
def test_hidden_tokens_are_real_ones_in_the_share_of_the_task(mixer, protocol):
    inputs = inputs_of(sequences([24, 17] * 200), protocol, mixer)
    hidden, places, labels = hide_tokens(inputs, SMALL, torch.Generator().manual_seed(0))
    chosen = hidden == SMALL.mask_id
    assert torch.equal(chosen.nonzero().squeeze(1), places)
    assert torch.equal(labels, inputs.input_ids[places])
    assert torch.equal(hidden[~chosen], inputs.input_ids[~chosen])
    real = torch.ones_like(chosen) if inputs.counted is None else inputs.counted
    assert not (chosen & ~real).any()
    assert float(chosen.sum() / real.sum()) == pytest.approx(0.5, abs=0.03)
