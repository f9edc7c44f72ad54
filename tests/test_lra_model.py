"""The Long Range Arena model in both protocols, its schedule and its batches, without training."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lra.data import DEV, TRAIN, BatchOrder, gather_examples, whole_set_batches
from lra.model import (
    MIXERS_WITHOUT_MASK,
    LongRangeClassifier,
    mixer_of,
    model_config,
    model_inputs,
)
from lra.published_mixers import PUBLISHED_FORMS
from lra.resident import NOT_CAPTURED, BatchShape, resident_inputs
from lra.selfpretrain import hide_tokens
from lra.settings import ArenaConfig, ArenaSettings
from lra.steps import OneCycle
from lra.store import Split
from lra.tasks import TASKS
from ponet.mixers import MIXERS
from ponet_kernels import use_backend

# of softmax attention, by the published code's own count
PARAMETERS = {"listops": 209_802, "text": 370_562, "retrieval": 395_138}
PARAMETERS |= {"image": 174_986, "pathfinder": 173_954}
MODELS = [name for name in MIXERS if name not in PUBLISHED_FORMS.values()]
# rows of 32 columns in segments of 32 // 5 + 1 = 7
SMALL = dataclasses.replace(TASKS["image"], seq_len=32, max_tokens=32, num_segments=5)


def build(model: str, task=SMALL, protocol="published", **changes: Any) -> LongRangeClassifier:
    torch.manual_seed(0)
    config = model_config(task, mixer_of(model, protocol), **changes)
    return LongRangeClassifier(config, task.num_inputs).double().eval()


def sequences(lengths: list[int], zeros: float = 0.3) -> list[Tensor]:
    """Ids with black pixels, at the ends too."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 256, (n,), generator=generator) for n in lengths]
    drawn = [x * (torch.rand(len(x), generator=generator) > zeros) for x in ids]
    if zeros:
        drawn[0][0] = drawn[0][-1] = 0
    return drawn


def inputs_of(ids: list[Tensor], protocol, model: str, task=SMALL):
    lengths, mixer = torch.tensor([len(x) for x in ids]), mixer_of(model, protocol)
    shared = {"task": task, "mixer": mixer, "num_segments": task.num_segments}
    return model_inputs(torch.cat(ids), lengths, protocol=protocol, **shared)


@pytest.mark.parametrize("task", PARAMETERS)
def test_parameters_are_as_many_as_published(task):
    """The published count is of all that the program prints, including what nothing reads.

    Beside the query, key, value and output projections of both layers, PoNet has two more;
    Nystromformer a filter of 35 for each of two heads; Linformer 2 x 256 x N once; linear attention
    and Performer nothing. Reformer carries the key projection and the biases of query and value,
    FNet all four projections, which take no part and which we leave out.
    """
    projection, length = 64 * 64 + 64, TASKS[task].seq_len
    more = {"attention": 0, "linear": 0, "performer": 0, "ponet": 2 * 2 * projection}
    more |= {"nystromformer": 2 * 2 * 35, "linformer": 2 * 256 * length}
    more |= {"reformer": -2 * (projection + 2 * 64), "fnet": -2 * 4 * projection}
    counts = {name: sum(p.numel() for p in build(name, TASKS[task]).parameters()) for name in more}
    assert counts == {name: PARAMETERS[task] + extra for name, extra in more.items()}


def test_dropout_is_where_the_published_model_has_it():
    layer = build("ponet", TASKS["image"]).ponet.encoder.layers[0]
    torch.manual_seed(0)
    hidden = torch.randn(1000, 64).double()
    feed_forward, dropped = layer.feed_forward, 0.1
    assert feed_forward.dropout.p == layer.dropout.p == dropped
    torch.manual_seed(1)
    kept = F.dropout(F.gelu(feed_forward.up(hidden)), dropped)
    torch.manual_seed(1)
    torch.testing.assert_close(feed_forward.train()(hidden), feed_forward.down(kept))


def test_initial_weights_are_as_published():
    for name, parameter in build("ponet", TASKS["image"]).requires_grad_(False).named_parameters():
        if "embeddings" in name:
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.05)
        elif parameter.ndim == 2:
            # uniform within 1 / sqrt(inputs)
            bound = parameter.shape[1] ** -0.5
            assert bound * 0.98 < float(parameter.abs().max()) <= bound, name
        elif "norm" not in name:
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


DENSE = {
    "ponet": dense_mixing,
    "fnet": lambda _, hidden, *__: torch.fft.fft2(hidden).real,
    "fnet_linear": lambda m, hidden, *_: m.token_weight @ hidden @ m.channel_weight,
}


def dense_states(model: LongRangeClassifier, mixer: str, row: Tensor, mask: Tensor, size: int):
    """Final states of one row `[N]`, with every sub-layer written out."""
    ponet = model.ponet
    hidden = ponet.embeddings.word(row) + ponet.embeddings.position(torch.arange(len(row)))
    for layer in ponet.encoder.layers:
        hidden = hidden + DENSE[mixer](layer.mixer, layer.mixer_norm(hidden), mask, size)
        up = layer.feed_forward.up(layer.feed_forward_norm(hidden))
        hidden = hidden + layer.feed_forward.down(F.gelu(up))
    norm = ponet.encoder.final_norm
    return F.layer_norm(hidden, hidden.shape[1:], norm.weight, norm.bias)


@pytest.mark.parametrize("mixer", DENSE)
def test_the_mean_of_a_protocol_is_over_its_own_tokens(mixer):
    model, ids = build(mixer), sequences([32, 24, 17, 1])
    published = model.pool(inputs_of(ids, "published", mixer))
    clean = model.pool(inputs_of(ids, "clean", mixer))
    for sequence, *vectors in zip(ids, published, clean, strict=True):
        # over all columns, without black pixels
        row = F.pad(sequence, (0, 32 - len(sequence)))
        states = dense_states(model, mixer, row, row != 0, size=7)
        expected = (states * (row != 0)[:, None]).sum(0) / 32
        torch.testing.assert_close(vectors[0], expected, rtol=1e-9, atol=1e-9)
        # over tokens, black pixels among them; some mix the padding, too
        seen = row if mixer in MIXERS_WITHOUT_MASK else sequence
        states = dense_states(model, mixer, seen, torch.arange(len(seen)) < len(sequence), size=7)
        expected = states[: len(sequence)].mean(0)
        torch.testing.assert_close(vectors[1], expected, rtol=1e-6, atol=1e-6)


# so that 32 columns are more than one block, chunk or landmark
FEW: dict[str, Any] = {"attention_window": 8, "lsh_chunk_size": 8, "num_landmarks": 8}
# their published forms take a maximum over the batch
OF_THE_BATCH = ("nystromformer", "performer")


@pytest.mark.parametrize(
    ("model", "protocol"),
    [(model, "clean") for model in MODELS]
    + [(model, "published") for model in MODELS if model not in OF_THE_BATCH],
)
def test_answers_do_not_depend_on_the_batch(model, protocol):
    # the readable form of PoNet knows no gaps within a sequence
    zeros = 0.0 if model == "ponet_published" else 0.3
    classifier, ids = build(model, protocol=protocol, **FEW), sequences([24, 9, 17], zeros)

    def answer(ids: list[Tensor]) -> Tensor:
        torch.manual_seed(1)
        return classifier(inputs_of(ids, protocol, model))

    together = answer(ids)
    assert together.shape == (3, 10)
    alone = torch.cat([answer([x]) for x in ids])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


CAPTURED = [(model, "torch") for model in MODELS if model not in NOT_CAPTURED]


@pytest.mark.parametrize(("mixer", "backend"), [*CAPTURED, ("ponet", "triton")])
def test_fixed_shapes_change_nothing(mixer, backend):
    model = build(mixer, **FEW, num_hidden_layers=1 if backend == "triton" else 2)
    ids = [*sequences([32, 32, 32, 20, 1]), torch.zeros(24, dtype=torch.long)]
    rows = torch.stack([F.pad(x, (0, 32 - len(x))) for x in ids])
    real = rows.numel() if mixer in MIXERS_WITHOUT_MASK else int(rows.count_nonzero())
    # the ghosts of another batch of the set are up to three rows
    shape = BatchShape(num_tokens=real + 70, num_ghosts=3)
    form: dict[str, Any] = {"mixer": mixer_of(mixer, "published"), "num_segments": 5}
    fixed, found = resident_inputs(rows, shape, task=SMALL, **form), []
    for inputs in (fixed, inputs_of(ids, "published", mixer)):
        model.zero_grad()
        torch.manual_seed(1)
        with use_backend(backend):
            logits = model(inputs)
            F.cross_entropy(logits, torch.arange(6)).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"logits": logits.detach(), **gradients})
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_black_images_are_answered_and_pairs_share_the_encoder():
    model, black = build("ponet"), torch.zeros(24, dtype=torch.long)
    logits = model(inputs_of([black, *sequences([24])], "published", "ponet"))
    torch.testing.assert_close(logits[0], model.classifier(torch.zeros(64, dtype=torch.double)))
    assert logits.isfinite().all()
    model = build("ponet", dataclasses.replace(SMALL, num_inputs=2))
    ids = sequences([20, 24, 11, 3], zeros=0.0)
    logits = model(inputs_of(ids, "clean", "ponet"))
    vectors = [model.pool(inputs_of([x], "clean", "ponet"))[0] for x in ids]
    for answer, a, b in zip(logits, vectors[:2], vectors[2:], strict=True):
        torch.testing.assert_close(answer, model.classifier(torch.cat([a, b, a * b, a - b])))


def test_segments_are_as_long_as_published():
    sizes = {"listops": (33, 63), "text": (2, 2048), "retrieval": (65, 64), "image": (33, 32)}
    for name, expected in sizes.items():
        row = torch.ones(TASKS[name].seq_len, dtype=torch.long)
        counts = inputs_of([row], "clean", "ponet", TASKS[name]).layout.cu_segments.diff()
        assert (*set(counts[:-1].tolist()), len(counts)) == expected


def test_schedule_is_that_of_pytorch():
    total, peak, warmup = 20_000, 1e-4, 8000
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], betas=(0.9, 0.999))
    shape = {"pct_start": warmup / total, "anneal_strategy": "linear"}
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total, **shape)
    schedule = OneCycle(steps=total, warmup_steps=warmup, peak=peak)
    (group,) = optimizer.param_groups
    for step in range(total):
        assert schedule.at(step) == pytest.approx((group["lr"], group["betas"][0]), rel=1e-6)
        optimizer.step()
        if step + 1 < total:
            reference.step()
    # short ones stay within their ends
    for steps, warmup in ((1, 0), (1, 1), (2, 1), (5, 0), (5, 5)):
        schedule = OneCycle(steps=steps, warmup_steps=warmup, peak=1.0)
        rates, betas = zip(*map(schedule.at, range(steps)), strict=True)
        assert 4e-6 <= min(rates) <= max(rates) <= 1.0
        assert 0.85 <= min(betas) <= max(betas) <= 0.95


def of_four(seed: int = 0, protocol="published") -> ArenaSettings:
    return ArenaConfig(batch_size=4, protocol=protocol, seeds=seed + 1).runs("cpu")[seed]


def ragged(count: int, num_inputs: int = 1) -> Split:
    """Example i has input j of i + j + 1 tokens, all equal to i, and label i % 3."""
    lengths = np.array([[i + j + 1 for j in range(num_inputs)] for i in range(count)])
    offsets = np.concatenate([[0], lengths.ravel().cumsum()])
    ids = np.repeat(np.arange(count), lengths.sum(axis=1)).astype(np.uint8)
    inputs = np.arange(lengths.size).reshape(lengths.shape)
    return Split(ids, offsets, inputs, np.arange(count) % 3)


@pytest.mark.parametrize("protocol", ["published", "clean"])
def test_training_batches_are_a_function_of_seed_and_number(protocol):
    orders = [BatchOrder(ragged(200), of_four(seed, protocol), TRAIN) for seed in (0, 0, 1)]
    passes = [[orders[0].indices(i) for i in range(k * 50, (k + 1) * 50)] for k in range(2)]
    for batches in passes:
        assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    assert not np.array_equal(*passes)
    assert np.array_equal(orders[1].indices(73), passes[1][23])
    assert not np.array_equal(orders[2].indices(0), passes[0][0])
    # the clean protocol sorts by length
    spread = np.mean([np.ptp(batch) for batch in passes[0]])
    assert (spread < 15) == (protocol == "clean")


def test_batches_that_are_not_filled_or_of_pairs():
    ids, lengths, labels = gather_examples(ragged(5, num_inputs=2), np.array([3, 0]))
    assert lengths.tolist() == [4, 1, 5, 2]
    assert ids.tolist() == [3] * 4 + [0] + [3] * 5 + [0] * 2
    assert labels.tolist() == [0, 0]
    split = ragged(11)
    batches = BatchOrder(split, of_four(), TRAIN)
    pairs = ((batches.indices(2 * k), batches.indices(2 * k + 1)) for k in range(20))
    seen = [set(np.concatenate(pair).tolist()) for pair in pairs]
    # every pass leaves out others
    assert {len(examples) for examples in seen} == {8}
    assert set.union(*seen) == set(range(11))
    # of the whole set the last may be smaller
    parts, *drawn = (whole_set_batches(split, of_four(), DEV, limit=n) for n in (None, 5, 5))
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    first, second = (np.concatenate(batches).tolist() for batches in drawn)
    assert first == second != list(range(5))
    assert len(set(first)) == 5


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
