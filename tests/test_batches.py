"""Packing and the stream of micro-batches: budgets, coverage, ranks, workers and resuming."""

from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ponet import PoNetConfig
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
from pretrain.examples import draw_batch, plan_epoch
from tests.corpora import make_settings, realistic_corpus

CORPUS = realistic_corpus(20, 40)
SETTINGS = make_settings(CORPUS, 64, short_sequence_probability=0.1)
DOCUMENTS = np.arange(20)


sampler_options = {"seed": 3, "micro_batch_tokens": 512, "micro_batches_per_step": 4}
make_sampler = partial(MicroBatchSampler, CORPUS, DOCUMENTS, settings=SETTINGS, **sampler_options)
epoch_batches = partial(EpochBatches, CORPUS, DOCUMENTS, SETTINGS, 0, micro_batch_tokens=512)


def stream(count: int, **changes) -> list[tuple]:
    """First items of a sampler, the sub-plan as the keys of its examples."""
    items = islice(make_sampler(**changes), count)
    return [(epoch, step, slot, plan.key.tolist()) for epoch, step, slot, plan in items]


def loaded(count: int, num_workers: int, **changes) -> list[MicroBatch]:
    return list(islice(make_loader(make_sampler(**changes), num_workers=num_workers), count))


def inputs_of(batch: MicroBatch) -> dict[str, torch.Tensor]:
    """All tensors, those of the layout among them."""
    inputs = batch.inputs.to(torch.device("cpu"))
    return inputs | inputs.pop("layout").tensors()


def assert_same_batches(first: list[MicroBatch], second: list[MicroBatch]) -> None:
    for one, other in zip(first, second, strict=True):
        assert replace(one, inputs=None) == replace(other, inputs=None)
        torch.testing.assert_close(inputs_of(one), inputs_of(other), rtol=0, atol=0)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=400), budget=st.integers(50, 300))
def test_bins_hold_every_example_once_within_the_budget(lengths, budget) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    order = np.random.default_rng(0).permutation(len(sizes))
    bins = pack_bins(sizes, budget, order)
    assert all(0 < sizes[members].sum() <= budget for members in bins)
    packed = np.concatenate([order[:0], *bins])
    assert sorted(packed.tolist()) == list(range(len(sizes)))
    # near the shuffled order: an example waits or hurries by less than the look-ahead
    assert (np.abs(np.argsort(order)[packed] - np.arange(len(sizes))) < LOOK_AHEAD).all()


def test_bins_are_what_a_hand_packs() -> None:
    # in order while even the longest fits, then the longest that fits the rest
    bins = pack_bins(np.array([5, 6, 3, 1, 2, 6]), 10, np.arange(6))
    assert [members.tolist() for members in bins] == [[0, 2, 4], [1, 3], [5]]


@pytest.mark.parametrize(("seq_len", "budget"), [(512, 16384), (128, 4096), (512, 4096)])
def test_packing_efficiency_on_realistic_lengths(seq_len, budget) -> None:
    corpus = realistic_corpus(400, 150)
    config = make_settings(corpus, seq_len, short_sequence_probability=0.1)
    options = {"seed": 0, "epoch": 0, "micro_batch_tokens": budget}
    batches = EpochBatches(corpus, np.arange(400), config, **options)
    efficiency = batches.plan.length.sum() / len(batches.bins) / budget
    assert 0.98 <= batches.packing_efficiency == pytest.approx(efficiency)


def test_epoch_shows_every_example_once_but_the_dropped_ones() -> None:
    num_bins = len(epoch_batches(epoch=5).bins)
    # two global batches do not fit
    size = num_bins // 2 + 1
    batches = epoch_batches(epoch=5, micro_batches_per_step=size)
    assert batches.num_steps == 1
    keys = np.concatenate([batches.item(0, slot)[3].key for slot in range(size)])
    assert len(np.unique(keys)) == len(keys) == len(batches.plan) - batches.num_dropped_examples
    expected = plan_epoch(CORPUS, DOCUMENTS, SETTINGS, 0, 5)
    assert set(keys.tolist()) <= set(expected.key.tolist())
    # epochs are shuffled differently
    first, second = (np.concatenate(epoch_batches(epoch=epoch).bins)[:20] for epoch in (0, 1))
    assert len({*map(tuple, (first, second, np.sort(first)))}) == 3


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


def test_workers_give_the_same_batches_and_leave_the_default_generator_alone() -> None:
    before = torch.get_rng_state()
    assert_same_batches(loaded(12, 0, start_step=2), loaded(12, 2, start_step=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("objective", ["mlm+sso", "mlm"])
def test_layout_and_masked_places_are_what_the_model_would_find(objective) -> None:
    config = replace(SETTINGS, objective=objective)
    for item in islice(make_sampler(settings=config), 5):
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
        assert batch.sequences == (item[3].label >= 0).sum()
        assert (batch.epoch, batch.step, batch.slot) == item[:3]
        assert batch.tokens == len(drawn["input_ids"]) <= 512
        assert batch.masked == len(drawn["labels"])


def test_evaluation_set_is_fixed() -> None:
    options = {"seed": 9, "micro_batch_tokens": 512}
    first, everything = (
        evaluation_batches(CORPUS, DOCUMENTS[:4], SETTINGS, max_batches=most, **options)
        for most in (3, 9999)
    )
    assert_same_batches(first, everything[:3])
    examples = sum(batch.sequences for batch in everything)
    assert examples == (plan_epoch(CORPUS, DOCUMENTS[:4], SETTINGS, 9, 0).label >= 0).sum()


def test_unusable_batch_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot start at step 1000000 of epoch 0"):
        make_sampler(start_step=10**6)
    with pytest.raises(ValueError, match=r"takes 4000 .*lower --batch-tokens or --micro-batch"):
        make_sampler(micro_batches_per_step=4000)
