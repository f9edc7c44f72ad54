"""Batches on their way to a device, and layouts taken apart and put together."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from ponet.batch import HostBatch
from ponet.packing import BatchLayout, layout_of, layout_of_segments, stream_of_packed

OFFSETS = {"ragged": [0, 4, 4, 9], "full": [0, 3, 6, 9], "nothing": [0, 0]}
offsets = pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)


def layout(offsets: list[int]) -> BatchLayout:
    """With a special token where there is room for one."""
    ids = torch.arange(offsets[-1])
    return layout_of(stream_of_packed(ids, torch.tensor(offsets, dtype=torch.int32)), ids % 5 == 3)


def tensors(num_tokens: int) -> dict[str, Tensor]:
    """Of sizes and types that leave gaps between aligned places."""
    return {
        "input_ids": torch.arange(num_tokens),
        "flags": torch.arange(num_tokens) % 2 == 0,
        "weights": torch.arange(15, dtype=torch.float64).view(3, 5).T,
        "half": torch.arange(7).bfloat16(),
        "none": torch.zeros(0, 4),
        "rate": torch.tensor(0.25),
    }


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].is_contiguous(), name
        assert torch.equal(found[name].cpu(), tensor), name


def assert_same(found: BatchLayout, expected: BatchLayout) -> None:
    for name in ("max_seqlen", "max_segment_len", "has_empty_segments", "num_tokens"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.rows.num_rows == expected.rows.num_rows
    assert found.rows.length == expected.rows.length
    assert_equal(found.tensors(), expected.tensors())


def assert_holds(batch: HostBatch, offsets: list[int], device: str) -> None:
    """On the device, what was put in."""
    found = batch.to(torch.device(device))
    moved = found.pop("layout")
    assert {x.device.type for x in (*moved.tensors().values(), *found.values())} == {device}
    assert_same(moved, layout(offsets))
    assert_equal(found, tensors(offsets[-1]))


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=6),
    st.integers(1, 5),
)
def test_layout_of_segments_equals_layout_of(sequences, segment_size):
    """1 is a special token; sentences are of one size."""
    ids = torch.tensor([token for sequence in sequences for token in sequence])
    lengths = [len(sequence) for sequence in sequences]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    segments = torch.cat([torch.arange(n) // segment_size for n in lengths])
    expected = layout_of(stream_of_packed(ids, cu_seqlens), ids == 1, segments)
    special = np.flatnonzero(ids.numpy())
    found = layout_of_segments(cu_seqlens.numpy(), expected.cu_segments.numpy(), special)
    assert_same(found, expected)


@offsets
def test_batch_equals_what_was_put_in(offsets):
    """Pickled too, and as it was even where what was put in changes later."""
    given = tensors(offsets[-1])
    batch = HostBatch(given, layout(offsets))
    for tensor in given.values():
        tensor.zero_()
    for each in (batch, pickle.loads(pickle.dumps(batch))):
        assert_holds(each, offsets, "cpu")


def test_batch_is_one_aligned_block():
    """One copy moves it, and kernels load 16 bytes at a time from every tensor of it."""
    found = HostBatch(tensors(9), layout([0, 4, 4, 9])).to(torch.device("cpu"))
    parts = [*found.pop("layout").tensors().values(), *found.values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in parts}) == 1
    assert all(tensor.storage_offset() * tensor.element_size() % 16 == 0 for tensor in parts)
    assert parts[0].untyped_storage().nbytes() < sum(tensor.nbytes + 16 for tensor in parts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
@offsets
def test_batch_on_a_gpu(offsets):
    given, place = tensors(offsets[-1]), layout(offsets)
    loader = DataLoader([0], collate_fn=lambda _: HostBatch(given, place), pin_memory=True)
    for batch in (HostBatch(given, place), next(iter(loader))):
        assert_holds(batch, offsets, "cuda")
