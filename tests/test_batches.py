"""Packing and the stream of micro-batches: budgets, coverage, ranks, workers and resuming."""

import pickle
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data._utils.pin_memory import pin_memory

from ponet import PoNetConfig
from ponet.batch import HostBatch
from ponet.packing import layout_for, stream_of_packed
from pretrain.batches import (
    LOOK_AHEAD,
    EpochBatches,
    MicroBatch,
    MicroBatchSampler,
    PackedDataset,
    evaluation_batches,
    make_loader,
    pack_bins,
)
from pretrain.examples import ExampleSettings, draw_batch, plan_epoch

SETTINGS = ExampleSettings(
    seq_len=64, vocab_size=1000, cls_id=1, sep_id=2, mask_id=3, special_ids=(0, 1, 2, 3)
)


def make_corpus(num_documents: int, sentences: int = 40, seed: int = 0) -> Any:
    """Random tokens in sentences of 26 tokens on average, as English text has."""
    rng = np.random.default_rng(seed)
    lengths = 1 + rng.gamma(3.0, 25 / 3, size=num_documents * sentences).astype(int)
    return SimpleNamespace(
        tokens=rng.integers(4, 1000, size=lengths.sum()).astype(np.uint16),
        sentence_offsets=np.cumsum([0, *lengths]),
        document_offsets=np.arange(num_documents + 1) * sentences,
    )


CORPUS = make_corpus(20)
DOCUMENTS = np.arange(20)


def make_sampler(config: ExampleSettings = SETTINGS, **changes) -> MicroBatchSampler:
    values = {"seed": 3, "micro_batch_tokens": 512, "micro_batches_per_step": 4} | changes
    return MicroBatchSampler(CORPUS, DOCUMENTS, config, **values)


def epoch_batches(**changes) -> EpochBatches:
    values = {"seed": 0, "epoch": 0, "micro_batch_tokens": 512} | changes
    return EpochBatches(CORPUS, DOCUMENTS, SETTINGS, **values)


def stream(count: int, **changes) -> list[tuple]:
    """First items of a sampler, the sub-plan as the keys of its examples."""
    items = islice(make_sampler(**changes), count)
    return [(epoch, step, slot, plan.key.tolist()) for epoch, step, slot, plan in items]


def loaded(count: int, num_workers: int, **changes) -> list[MicroBatch]:
    return list(islice(make_loader(make_sampler(**changes), num_workers=num_workers), count))


def tensors_of(batch: MicroBatch) -> dict[str, torch.Tensor]:
    inputs = batch.inputs.to(torch.device("cpu"))
    return inputs | inputs.pop("layout").tensors()


def numbers_of(batch: MicroBatch) -> tuple:
    """All that is no tensor, the bounds of the layout among it."""
    layout = batch.inputs.to(torch.device("cpu"))["layout"]
    empty = layout.with_tensors(dict.fromkeys(layout.tensors()))
    return (empty, *(value for value in vars(batch).values() if isinstance(value, int)))


def assert_same_batches(first: list[MicroBatch], second: list[MicroBatch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert numbers_of(one) == numbers_of(other)
        tensors = tensors_of(other)
        assert tensors_of(one).keys() == tensors.keys()
        for name, value in tensors_of(one).items():
            assert torch.equal(value, tensors[name]), name


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=400), budget=st.integers(50, 300))
def test_bins_hold_every_example_once_within_the_budget(lengths, budget) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    order = np.random.default_rng(0).permutation(len(sizes))
    bins = pack_bins(sizes, budget, order)
    assert sorted(bins.members.tolist()) == list(range(len(sizes)))
    assert all(0 < sizes[bins[i]].sum() <= budget for i in range(len(bins)))
    # near the shuffled order: an example waits or hurries by less than the look-ahead
    place = np.empty(len(sizes), dtype=np.int64)
    place[order] = np.arange(len(sizes))
    assert (np.abs(place[bins.members] - np.arange(len(sizes))) < LOOK_AHEAD).all()


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        # in order while even the longest fits, then the longest that fits the rest
        ([5, 6, 3, 1, 2, 6], 10, [[0, 2, 4], [1, 3], [5]]),
        ([2, 1, 3, 3, 3], 8, [[0, 1, 2], [3, 4]]),
        # the short one fits beside each, but the first bin does not look so far ahead
        (
            [6] * (LOOK_AHEAD + 1) + [4],
            10,
            [[0], [1, LOOK_AHEAD + 1], *([i] for i in range(2, LOOK_AHEAD + 1))],
        ),
        ([], 10, []),
    ],
    ids=["fill", "order-first", "look-ahead", "nothing"],
)
def test_bins_are_what_a_hand_packs(lengths, budget, expected) -> None:
    bins = pack_bins(np.array(lengths, dtype=int), budget, np.arange(len(lengths)))
    assert [bins[i].tolist() for i in range(len(bins))] == expected
    with pytest.raises(IndexError):
        bins[len(expected)]
    with pytest.raises(ValueError, match="11 tokens does not fit a budget of 10"):
        pack_bins(np.array([11]), 10, np.array([0]))


@pytest.mark.parametrize(("seq_len", "budget"), [(512, 16384), (128, 4096), (512, 4096)])
def test_packing_efficiency_on_realistic_lengths(seq_len, budget) -> None:
    corpus = make_corpus(400, 150)
    config = replace(SETTINGS, seq_len=seq_len)
    options = {"seed": 0, "epoch": 0, "micro_batch_tokens": budget}
    batches = EpochBatches(corpus, np.arange(400), config, **options)
    assert batches.packing_efficiency >= 0.98
    assert batches.packing_efficiency == pytest.approx(
        batches.plan.length.sum() / len(batches.bins) / budget
    )


def test_epoch_shows_every_example_once_but_the_dropped_ones() -> None:
    num_bins = len(epoch_batches(epoch=5).bins)
    # two global batches do not fit
    size = num_bins // 2 + 1
    batches = epoch_batches(epoch=5, micro_batches_per_step=size)
    assert (batches.num_steps, batches.num_dropped_bins) == (1, num_bins - size)
    items = [batches.item(0, slot) for slot in range(size)]
    assert {item[0] for item in items} == {5}
    keys = np.concatenate([item[3].key for item in items])
    assert len(np.unique(keys)) == len(keys) == len(batches.plan) - batches.num_dropped_examples
    expected = plan_epoch(CORPUS, DOCUMENTS, SETTINGS, 0, 5)
    assert set(keys.tolist()) <= set(expected.key.tolist())
    # epochs are shuffled differently
    starts = [b.plan.start[b.bins.members] for b in (epoch_batches(), epoch_batches(epoch=1))]
    assert all((np.diff(s) < 0).mean() > 0.3 for s in starts)
    assert starts[0][:20].tolist() != starts[1][:20].tolist()


@pytest.mark.parametrize("world_size", [2, 4])
def test_world_size_does_not_change_the_global_batches(world_size) -> None:
    num_steps = make_sampler().first_epoch.num_steps + 2
    whole = stream(num_steps * 4)
    ranks = [
        stream(num_steps * 4 // world_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert sorted(item for rank in ranks for item in rank) == whole
    assert all(item[2] % world_size == rank for rank in range(world_size) for item in ranks[rank])


def test_stream_counts_steps_within_epochs_and_resumes_with_its_tail() -> None:
    num_steps = make_sampler().first_epoch.num_steps
    whole = stream((num_steps + 8) * 4)
    expected = [(0, step, slot) for step in range(num_steps) for slot in range(4)]
    expected += [(1, 0, slot) for slot in range(4)]
    assert [item[:3] for item in whole[: len(expected)]] == expected
    # in the middle, at the end of the epoch, in the next one
    for epoch, step in [(0, 3), (0, num_steps), (1, 2)]:
        tail = whole[(epoch * num_steps + step) * 4 :]
        assert stream(len(tail), start_epoch=epoch, start_step=step) == tail


def test_workers_spawned_ones_too_give_the_same_batches() -> None:
    assert_same_batches(loaded(12, 0, start_step=2), loaded(12, 2, start_step=2))
    # what a spawned worker is sent
    dataset = pickle.loads(pickle.dumps(PackedDataset(CORPUS, SETTINGS)))
    items = pickle.loads(pickle.dumps(list(islice(make_sampler(), 3))))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert_same_batches(loaded(3, 0), [dataset[item] for item in items])
    assert torch.equal(torch.rand(3), expected), "the loader leaves the default generator alone"


def test_batch_fits_its_budget_and_names_its_place() -> None:
    for number, batch in enumerate(loaded(9, 0)):
        tensors = tensors_of(batch)
        assert (batch.epoch, batch.step, batch.slot) == (0, number // 4, number % 4)
        assert tensors["cu_seqlens"][-1] == len(tensors["input_ids"]) == batch.tokens <= 512
        assert tensors["input_ids"].dtype == tensors["labels"].dtype == torch.int64
        assert len(tensors["labels"]) == len(tensors["label_positions"]) == batch.masked
        assert len(tensors["sso_labels"]) == batch.sequences


@pytest.mark.parametrize("objective", ["mlm+sso", "mlm"])
def test_layout_and_masked_places_are_what_the_model_would_find(objective) -> None:
    config = replace(SETTINGS, objective=objective)
    for item in islice(make_sampler(config), 5):
        batch = PackedDataset(CORPUS, config)[item]
        arrays = draw_batch(CORPUS, item[3], config)
        drawn = {name: torch.from_numpy(array) for name, array in arrays.items()}
        stream = stream_of_packed(drawn["input_ids"], drawn["cu_seqlens"])
        model = PoNetConfig(cls_token_id=config.cls_id, sep_token_id=config.sep_id)
        expected = layout_for(model, stream, drawn["input_ids"], drawn["segment_ids"])
        layout = batch.inputs.to(torch.device("cpu"))["layout"]
        for name, value in expected.tensors().items():
            assert torch.equal(layout.tensors()[name], value), name
        assert layout.max_seqlen == expected.max_seqlen
        assert layout.max_segment_len == expected.max_segment_len
        assert (layout.rows.num_rows, layout.rows.length) == (len(item[3]), expected.max_seqlen)
        assert batch.sequences == (0 if objective == "mlm" else len(item[3]))


def test_the_loader_pins_a_batch_as_one_block(monkeypatch) -> None:
    pinned = []
    monkeypatch.setattr(HostBatch, "pin_memory", lambda self: pinned.append(self) or self)
    (batch,) = loaded(1, 0)
    assert pin_memory(batch) is batch
    assert pinned == [batch.inputs]


def test_evaluation_set_is_fixed() -> None:
    options = {"seed": 9, "micro_batch_tokens": 512}
    first, again, everything = (
        evaluation_batches(CORPUS, DOCUMENTS[:4], SETTINGS, max_batches=most, **options)
        for most in (3, 3, 9999)
    )
    assert len(first) == 3
    assert_same_batches(first, again)
    assert_same_batches(first, everything[:3])
    examples = sum(batch.sequences for batch in everything)
    assert examples == len(plan_epoch(CORPUS, DOCUMENTS[:4], SETTINGS, 9, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 3}, "micro_batches_per_step 4 .* world_size 3"),
        ({"world_size": 2, "rank": 2}, "rank 2"),
        ({"start_step": 10**6}, "cannot start at step 1000000"),
        ({"micro_batch_tokens": 63}, "cannot hold an example of seq_len 64"),
        ({"micro_batches_per_step": 0}, "must be positive"),
        ({"micro_batches_per_step": 4000}, "takes 4000 .*lower --batch-tokens or --micro-batch"),
    ],
)
def test_unusable_batch_settings_are_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_sampler(**changes)
