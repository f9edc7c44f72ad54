"""Training steps of Long Range Arena: nothing in them waits for a device."""

import copy
import dataclasses
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import nn

from lra.data import Classification
from lra.model import LongRangeClassifier
from lra.published_mixers import PUBLISHED_FORMS
from lra.resident import NOT_CAPTURED, obstacle
from lra.selfpretrain import MaskedPrediction
from lra.settings import ArenaConfig, ArenaSettings
from lra.steps import CapturedStep, FlatAdamW, OneCycle, Replay
from lra.store import ArenaData, Split
from lra.tasks import TASKS
from ponet.mixers import MIXERS
from ponet_kernels import PackedLayout, fused_pooling, use_backend
from tests.sync_counter import as_on_a_gpu, count_synchronising

WAITS = [
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
]


def test_what_waits_is_counted():
    x = torch.arange(4.0)
    with count_synchronising() as found:
        for _, work in WAITS:
            work(x)
    assert found == [name for name, _ in WAITS]


def test_operators_are_looked_into():
    layout = PackedLayout.of_sequences(torch.tensor([0, 3, 8], dtype=torch.int32), 8)
    values = torch.zeros(8, 12, requires_grad=True)
    with use_backend("torch"), count_synchronising() as found:
        fused_pooling(torch.zeros(2, 4), values, layout).sum().backward()
    assert found


CPU = torch.device("cpu")
MODELS = [name for name in MIXERS if name not in PUBLISHED_FORMS.values()]
CAPTURED = [model for model in MODELS if model not in NOT_CAPTURED]
SMALL = dataclasses.replace(TASKS["image"], seq_len=32, max_tokens=32, num_segments=5)
SCHEDULE = OneCycle(steps=20, warmup_steps=5, peak=1e-2)


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 4), (5,), ())]


def prepare_step(ours: FlatAdamW, step: int) -> list[torch.Tensor]:
    """Set the rates of the schedule and random gradients, which are returned."""
    ours.rates.copy_(torch.tensor(SCHEDULE.at(step), dtype=torch.float64))
    for parameter in ours.param_groups[0]["params"]:
        parameter.grad = torch.randn_like(parameter)
    return [parameter.grad for parameter in ours.param_groups[0]["params"]]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_flat_optimizer_is_that_of_pytorch_and_either_continues_the_other(dtype, rtol):
    first, second = parameters(dtype), parameters(dtype)
    reference = torch.optim.AdamW(first, eps=1e-6, weight_decay=0.0, fused=True)
    ours = FlatAdamW(second, beta2=0.999, eps=1e-6)
    for step in range(SCHEDULE.steps):
        if step == 10:
            state = copy.deepcopy(ours.state_dict())
            ours.load_state_dict(copy.deepcopy(reference.state_dict()))
            reference.load_state_dict(state)
        for one, gradient in zip(first, prepare_step(ours, step), strict=True):
            one.grad = gradient.clone()
        rate, beta1 = SCHEDULE.at(step)
        reference.param_groups[0] |= {"lr": rate, "betas": (beta1, 0.999)}
        reference.step()
        ours.step()
        for one, other in zip(first, second, strict=True):
            torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)
            for name, value in reference.state[one].items():
                torch.testing.assert_close(value, ours.state[other][name], rtol=rtol, atol=rtol)
    # parts of one vector still, not copies
    ours.tensors[-2].zero_()
    assert not any(state["exp_avg"].any() for state in ours.state.values())


def test_an_overflow_leaves_all_as_it_was():
    ours = FlatAdamW(parameters(torch.float64), beta2=0.999, eps=1e-6)
    for step in range(3):
        before = [x.clone() for x in ours.tensors]
        gradients = prepare_step(ours, step)
        ours.grad_scale, ours.found_inf = torch.tensor(4.0), torch.tensor([step % 2.0])
        if step % 2:
            gradients[0].fill_(torch.inf)
        ours.step()
        same = [torch.equal(a, b) for a, b in zip(before, ours.tensors, strict=True)]
        assert same == [step % 2 == 1] * len(same)


def make_data() -> ArenaData:
    """Twelve examples of up to 32 tokens."""
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], rng.integers(3, 33, 12).cumsum()])
    ids = rng.integers(0, 256, offsets[-1]).astype(np.uint8)
    split = Split(ids, offsets, np.arange(12).reshape(12, 1), np.arange(12) % 10)
    return ArenaData(task=SMALL, train=split, dev=split, test=split, manifest={})


def settings_of(mixer: str, protocol: str, **changes: Any) -> ArenaSettings:
    fixed = {"task": ("image",), "model": (mixer,), "batch_size": 4, "num_segments": 5}
    fixed |= {"steps": 20, "warmup_steps": 5, "learning_rate": 1e-2, "eval_every": 20}
    (settings,) = ArenaConfig(**fixed | {"protocol": protocol} | changes).runs("cpu")
    return settings


def classification_of(mixer: str, protocol: str, resident: bool, **changes: Any) -> Classification:
    settings = settings_of(mixer, protocol, **changes)
    torch.manual_seed(0)
    model = LongRangeClassifier(settings.model_config(), 1)
    return Classification(model, make_data(), settings, CPU, resident=resident)


def captured_step() -> CapturedStep:
    return classification_of("ponet", "published", resident=True).training_step(0)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "image", SMALL)


HOSTED = [model for model in MODELS if model != "ponet_published"]  # which looks at its layout
CASES = [(mixer, "published", True) for mixer in CAPTURED]
CASES += [(mixer, protocol, False) for mixer in HOSTED for protocol in ("published", "clean")]


@pytest.mark.parametrize(("mixer", "protocol", "resident"), CASES)
def test_a_step_never_waits(monkeypatch, mixer, protocol, resident):
    classification = classification_of(mixer, protocol, resident)
    step, batches = classification.training_step(0), torch.arange(8).view(2, 4)
    # batches and their numbers come from the host
    monkeypatch.setattr("lra.data.put_rows", lambda *_: batches)
    if not resident:
        batch = classification._read(classification._data.train, np.arange(4))
        monkeypatch.setattr(classification, "_read", lambda *_: batch)
    with as_on_a_gpu() as found:
        step(1)
        for _ in classification.answers(classification._data.dev, [np.arange(4)] * 2):
            pass
    assert found == []


@pytest.mark.parametrize("mixer", ["ponet", "attention", "fnet"])
def test_a_step_of_self_pretraining_never_waits(monkeypatch, mixer):
    settings = settings_of(mixer, "clean", pretrain_epochs=1.0)
    prediction = MaskedPrediction(make_data(), settings, CPU)
    batch = prediction.batch(0)
    monkeypatch.setattr(prediction, "batch", lambda _: batch)
    step = prediction.training_step((0, 1))
    with as_on_a_gpu() as found:
        step(0)
    assert found == []


def test_the_warm_up_of_a_captured_step_is_undone():
    step = captured_step()
    step(13)
    before = [x.detach().clone() for x in step._flat.tensors]
    torch.manual_seed(3)
    with step._undone():
        losses = [step._work(), step._work()]
        assert losses[0] != losses[1]
        assert not any(map(torch.equal, before, step._flat.tensors))
    assert all(map(torch.equal, before, step._flat.tensors))
    assert step._work() == losses[0]


def test_a_gpu_records_once_and_replays(monkeypatch):
    calls = MagicMock()
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(calls, name))
    replay = Replay(calls.work, torch.device("cuda"), calls.undone)
    assert replay() is replay()
    kept, undone, replayed = "undone().__enter__", "undone().__exit__", "CUDAGraph().replay"
    found = [name for name, *_ in calls.mock_calls if name in ("work", kept, undone, replayed)]
    assert found == [kept, *["work"] * 3, undone, "work", replayed, replayed]


def test_a_scaled_loss_neither_waits_nor_changes_a_step():
    losses = []
    for enabled in (False, True):
        step = captured_step()
        step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=enabled)
        losses.append(torch.stack([step(number).clone() for number in range(6)]))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    assert step.scaler.get_scale() == 2.0**16
    with as_on_a_gpu() as found:
        step(6)
    assert found == []


def test_what_cannot_be_captured_is_named():
    for settings, reason in (
        (settings_of("ponet", "clean"), "shapes differ from step to step"),
        (settings_of("ponet_published", "published"), "mixer ponet_published reads from"),
        (settings_of("ponet", "published", compile=True), "--compile was given"),
    ):
        assert reason in str(obstacle(settings, make_data(), CPU))
    assert obstacle(settings_of("ponet", "published"), make_data(), CPU) is None
