"""Training steps of Long Range Arena: nothing in them waits for a device."""

import pytest
import torch

from ponet_kernels import PackedLayout, fused_pooling, use_backend
from ponet_kernels.triton_kernels.launch import record_launches
from tests.sync_counter import count_synchronising


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("_local_scalar_dense", lambda x: x[0].item()),
        ("_local_scalar_dense", lambda x: bool((x > 1).any())),
        ("nonzero", lambda x: (x > 1).nonzero()),
        ("index with a mask", lambda x: x[x > 1]),
        ("masked_select", lambda x: x.masked_select(x > 1)),
        ("masked_scatter", lambda x: x.masked_scatter(x > 1, x)),
        ("repeat_interleave", lambda x: x.repeat_interleave(x.long())),
        ("_unique2", lambda x: x.unique()),
        ("equal", lambda x: torch.equal(x, x)),
        ("lift_fresh", lambda x: x.new_tensor(1.0)),
        ("_to_copy", lambda x: x.to("meta")),
    ],
)
def test_what_waits_is_counted(name, work):
    x = torch.arange(4.0)
    with count_synchronising() as found:
        work(x)
    assert found == [name]


def test_what_does_not_wait_is_not_counted():
    x, places = torch.arange(4.0), torch.tensor([1, 2])
    with count_synchronising() as found:
        torch.where(x > 1, x, 0.0).masked_fill(x > 2, 1.0)
        x[places]
        x[1:] = x[:-1].clone()
        x.index_put_((places,), x[:2].clone()).to(torch.float64, non_blocking=True)
        places.repeat_interleave(places, output_size=3)
        x.cumsum(0).argsort(stable=True)
    assert found == []


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_operators_are_looked_into(backend):
    layout = PackedLayout.of_sequences(torch.tensor([0, 3, 8], dtype=torch.int32), 8)
    values = torch.zeros(8, 12, requires_grad=True)
    with use_backend(backend), record_launches(), count_synchronising() as found:
        fused_pooling(torch.zeros(2, 4), values, layout).sum().backward()
    assert ("triton" in backend) == (not found)
