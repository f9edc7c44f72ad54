"""Training steps of Long Range Arena: nothing in them waits for a device."""

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.data import Classification
from lra.model import LongRangeClassifier, ModelInputs, model_config, model_inputs
from lra.resident import (
    NOT_CAPTURED,
    BatchShape,
    ResidentExamples,
    obstacle,
    resident_inputs,
    resident_stream,
)
from lra.selfpretrain import MaskedPrediction, build_masked_lm
from lra.settings import ArenaConfig, ArenaSettings
from lra.steps import CapturedStep, FlatAdamW, OneCycle, PlainStep, Replay
from lra.store import ArenaData, Split
from lra.tasks import TASKS, ArenaTask
from ponet import PoNetModel
from ponet.mixers import MIXERS
from ponet_kernels import PackedLayout, fused_pooling, use_backend
from ponet_kernels.layout import SEES_LEFT, SEES_RIGHT
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


CPU = torch.device("cpu")
CAPTURED = [mixer for mixer in MIXERS if mixer not in NOT_CAPTURED]
SMALL = dataclasses.replace(TASKS["image"], seq_len=32, max_tokens=32, num_segments=5)
TOKENS = dataclasses.replace(TASKS["text"], seq_len=32, max_tokens=32, num_segments=16)


def rows_of(task: ArenaTask) -> tuple[Tensor, list[int]]:
    """Six rows and their lengths; of pixels one is black and others begin or end with black."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(1, 256, (6, 32), generator=generator)
    lengths = [32, 32, 32, 32, 20, 1]
    if task.kind == "pixels":
        rows *= torch.rand(rows.shape, generator=generator) > 0.3
        rows[0] = 0
        rows[1, :3] = rows[1, 30:] = 0
        rows[2, 1:] = 0
    for row, length in zip(rows, lengths, strict=True):
        row[length:] = 0
    return rows, lengths


def inputs_of(task: ArenaTask, mixer: str, form: str) -> ModelInputs:
    rows, lengths = rows_of(task)
    shared = {"task": task, "mixer": mixer, "num_segments": task.num_segments}
    if form == "resident":
        real = 6 * 32 if mixer == "fnet" else int((rows != 0).sum())
        # the ghosts of another batch of the set are up to three rows
        return resident_inputs(rows, BatchShape(num_tokens=real + 70, num_ghosts=3), **shared)
    ids = torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)])
    return model_inputs(ids, torch.tensor(lengths), protocol="published", **shared)


@pytest.mark.parametrize(
    ("mixer", "task", "backend"),
    [
        *((mixer, task, "torch") for mixer in CAPTURED for task in (SMALL, TOKENS)),
        ("ponet", SMALL, "triton"),
    ],
)
def test_fixed_shapes_change_nothing(mixer, task, backend):
    torch.manual_seed(0)
    num_layers = 1 if backend == "triton" else 2
    config = model_config(task, mixer, attention_window=8, num_hidden_layers=num_layers)
    model, found = LongRangeClassifier(config, task.num_inputs).double().eval(), []
    for form in ("dynamic", "resident"):
        model.zero_grad()
        with use_backend(backend):
            logits = model(inputs_of(task, mixer, form))
            loss = F.cross_entropy(logits, torch.arange(6) % task.num_classes)
            loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), "logits": logits.detach(), **gradients})
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("task", [SMALL, TOKENS], ids=["pixels", "tokens"])
def test_shapes_are_fixed(task):
    rows, shapes = rows_of(task)[0], []
    for values in (rows, torch.ones_like(rows), torch.zeros_like(rows)):
        shape = BatchShape(num_tokens=6 * 32, num_ghosts=6)
        inputs = resident_inputs(values, shape, task=task, mixer="ponet", num_segments=5)
        tensors = inputs.layout.tensors() | {"ids": inputs.input_ids, "scale": inputs.scale}
        shapes.append({name: (x.shape, x.dtype) for name, x in tensors.items()})
        assert inputs.layout.cu_seqlens[-1] == inputs.layout.cu_segments[-1] == 6 * 32
    assert shapes[0] == shapes[1] == shapes[2]


def test_a_layout_of_fixed_shapes_by_hand():
    inputs = resident_inputs(
        torch.tensor([[5, 0, 6, 7], [0, 0, 0, 9]]),
        BatchShape(num_tokens=10, num_ghosts=2),
        task=dataclasses.replace(SMALL, seq_len=4),
        mixer="ponet",
        num_segments=3,
    )
    # columns 0 and 1 are the first chunk, 2 and 3 the second
    assert inputs.input_ids.tolist() == [5, 6, 7, 9, 0, 0, 0, 0, 0, 0]
    assert inputs.position_ids.tolist() == [0, 2, 3, 3, 0, 0, 0, 0, 0, 0]
    assert inputs.scale.tolist() == [0.75, 0.25]
    layout = inputs.layout
    assert layout.cu_seqlens.tolist() == [0, 3, 4, 8, 10]
    assert layout.cu_segments.tolist() == [0, 1, 3, 3, 4, 8, 10]
    assert layout.token_segments.tolist() == [0, 1, 1, 3, 4, 4, 4, 4, 5, 5]
    assert layout.segment_sequences.tolist() == [0, 0, 1, 1, 2, 3]
    seen = [(int(x) & SEES_LEFT, int(x) & SEES_RIGHT) for x in layout.token_marks]
    assert seen == [(0, 0), (0, 2), (1, 0), *[(0, 0)] * 7]
    assert layout.rows.places is not None
    assert layout.rows.places.tolist() == [0, 1, 2, 4, 8, 9, 10, 11, 12, 13]


SCHEDULE = OneCycle(steps=20, warmup_steps=5, peak=1e-2)


def optimizers(dtype: torch.dtype) -> tuple[torch.optim.Optimizer, FlatAdamW]:
    """PyTorch's AdamW and ours on equal parameters."""
    torch.manual_seed(0)
    first = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 4), (5,), ())]
    second = [nn.Parameter(p.detach().clone()) for p in first]
    reference = torch.optim.AdamW(first, eps=1e-6, weight_decay=0.0, fused=True)
    return reference, FlatAdamW(second, beta2=0.999, eps=1e-6)


def prepare_step(reference: torch.optim.Optimizer, ours: FlatAdamW, step: int) -> None:
    """Equal gradients, and the rates of the schedule."""
    groups = reference.param_groups[0], ours.param_groups[0]
    for one, other in zip(*(group["params"] for group in groups), strict=True):
        one.grad = torch.randn_like(one)
        other.grad = one.grad.clone()
    groups[0]["lr"], beta1 = SCHEDULE.at(step)
    groups[0]["betas"] = (beta1, 0.999)
    ours.rates.copy_(torch.tensor(SCHEDULE.at(step), dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_flat_optimizer_is_that_of_pytorch_and_either_continues_the_other(dtype, rtol):
    reference, ours = optimizers(dtype)
    for step in range(SCHEDULE.steps):
        if step == 10:
            state = copy.deepcopy(ours.state_dict())
            ours.load_state_dict(copy.deepcopy(reference.state_dict()))
            reference.load_state_dict(state)
        prepare_step(reference, ours, step)
        reference.step()
        ours.step()
        groups = reference.param_groups[0], ours.param_groups[0]
        for one, other in zip(*(group["params"] for group in groups), strict=True):
            torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)
            for name, value in reference.state[one].items():
                torch.testing.assert_close(value, ours.state[other][name], rtol=rtol, atol=rtol)
    # parts of one vector still, not copies
    ours.tensors[-3].zero_()
    assert not any(state["exp_avg"].any() for state in ours.state.values())


def test_an_overflow_leaves_all_as_it_was():
    reference, ours = optimizers(torch.float64)
    for step in range(3):
        before = [x.clone() for x in ours.tensors]
        prepare_step(reference, ours, step)
        ours.grad_scale, ours.found_inf = torch.tensor(4.0), torch.tensor([step % 2.0])
        if step % 2:
            ours.param_groups[0]["params"][0].grad.fill_(torch.inf)
        ours.step()
        same = [torch.equal(a, b) for a, b in zip(before, ours.tensors, strict=True)]
        assert same == [step % 2 == 1] * len(same)


def data_of(task: ArenaTask) -> ArenaData:
    """Twelve examples of up to 32 tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 33, 12 * task.num_inputs)
    offsets = np.concatenate([[0], lengths.cumsum()])
    low = 0 if task.kind == "pixels" else 1
    ids = rng.integers(low, 256, offsets[-1]).astype(np.uint8)
    inputs = np.arange(len(lengths)).reshape(12, -1)
    split = Split(ids, offsets, inputs, np.arange(12) % task.num_classes)
    return ArenaData(task=task, train=split, dev=split, test=split, manifest={})


def settings_of(mixer: str, protocol: str, **changes: Any) -> ArenaSettings:
    fixed = {"task": ("image",), "model": (mixer,), "batch_size": 4, "num_segments": 5}
    fixed |= {"steps": 20, "warmup_steps": 5, "learning_rate": 1e-2, "eval_every": 20}
    (settings,) = ArenaConfig(**fixed | {"protocol": protocol} | changes).runs("cpu")
    return settings


def classification_of(mixer: str, protocol: str, resident: bool, **changes: Any) -> Classification:
    settings = settings_of(mixer, protocol, **changes)
    torch.manual_seed(0)
    model = LongRangeClassifier(settings.model_config(), 1)
    return Classification(model, data_of(TASKS["image"]), settings, CPU, resident=resident)


def captured_step() -> CapturedStep:
    step = classification_of("ponet", "published", resident=True).training_step(0)
    assert isinstance(step, CapturedStep)
    return step


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(TASKS, "image", SMALL)
    # a look at ids that a GPU is spared
    monkeypatch.setattr(PoNetModel, "_check_ids", lambda *_: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def as_on_a_gpu() -> Iterator[list[str]]:
    with use_backend("triton"), record_launches(), count_synchronising() as found:
        yield found


HOSTED = [mixer for mixer in MIXERS if mixer != "ponet_published"]  # which looks at its layout


@pytest.mark.parametrize(
    ("mixer", "protocol", "resident"),
    [
        *((mixer, "published", True) for mixer in CAPTURED),
        *((mixer, protocol, False) for mixer in HOSTED for protocol in ("published", "clean")),
    ],
)
def test_a_step_never_waits(small, monkeypatch, mixer, protocol, resident):
    classification = classification_of(mixer, protocol, resident)
    step = classification.training_step(0)
    if resident:
        # tables of batches are made on the host
        with use_backend("triton"), record_launches():
            step(0)
        batches = torch.arange(8).view(2, 4)
        monkeypatch.setattr("lra.data.put_rows", lambda *_: batches)
    else:
        batch = classification._read(classification._data.train, np.arange(4))
        monkeypatch.setattr(classification, "_read", lambda *_: batch)
    with as_on_a_gpu() as found:
        step(1)
        for _ in classification.answers(classification._data.dev, [np.arange(4)] * 2):
            pass
    assert found == []


@pytest.mark.parametrize("mixer", ["ponet", "attention", "fnet"])
def test_a_step_of_self_pretraining_never_waits(small, monkeypatch, mixer):
    settings = settings_of(mixer, "clean", pretrain_epochs=1.0)
    model = build_masked_lm(settings)
    prediction = MaskedPrediction(model, data_of(SMALL), settings, CPU)
    batch = prediction.batch(0)
    monkeypatch.setattr(prediction, "batch", lambda _: batch)
    fixed = {"precision": "fp32", "seeds": (0, 1), "device": CPU}
    step = PlainStep(model, SCHEDULE, loss=prediction.loss, **fixed)
    with as_on_a_gpu() as found:
        step(0)
    assert found == []


@pytest.mark.parametrize("mixer", CAPTURED)
def test_both_forms_of_a_step_train_alike(small, mixer):
    losses, answers = [], []
    for resident in (False, True):
        changes = {"dropout": 0.0, "attention_dropout": 0.0}
        classification = classification_of(mixer, "published", resident, **changes)
        step = classification.training_step(0)
        losses.append(torch.stack([step(number).clone() for number in range(10)]))
        answers.append(classification.test_accuracy())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    assert answers[0] == answers[1]
    assert losses[0][-1] < losses[0][0] - 0.05


def test_a_captured_step_follows_the_schedule_and_its_warm_up_is_undone(small):
    step = captured_step()
    # forwards, and anywhere, as after a checkpoint
    for number in (*range(8), 13, 14, 2, 19):
        step(number)
        assert tuple(step._flat.rates.tolist()) == SCHEDULE.at(number)
    before = [x.detach().clone() for x in step._flat.tensors]
    torch.manual_seed(3)
    undo = step._keep()
    losses = [step._work(), step._work()]
    assert losses[0] != losses[1]
    assert not any(map(torch.equal, before, step._flat.tensors))
    undo()
    assert all(map(torch.equal, before, step._flat.tensors))
    assert step._work() == losses[0]


def test_a_gpu_records_once_and_replays(monkeypatch):
    log: list[str] = []
    graph = SimpleNamespace(replay=lambda: log.append("replay"))
    stream = SimpleNamespace(wait_stream=lambda _: None)
    fakes = {"Stream": stream, "current_stream": stream, "CUDAGraph": graph}
    for name, fake in (fakes | {"stream": nullcontext(), "graph": nullcontext()}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, fake=fake: fake)

    def work() -> Tensor:
        log.append("work")
        return torch.ones(())

    def keep():
        log.append("keep")
        return lambda: log.append("undo")

    replay = Replay(work, torch.device("cuda"), keep)
    assert replay() is replay()
    assert log == ["keep", "work", "work", "work", "undo", "work", "replay", "replay"]


def test_a_scaled_loss_neither_waits_nor_changes_a_step(small):
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


def test_rows_come_from_the_device_in_the_order_of_the_inputs(small):
    data = data_of(dataclasses.replace(SMALL, num_inputs=2))
    stream = resident_stream(data.train, CPU)
    examples = ResidentExamples(data.train, data.task, "ponet", stream)
    rows = examples.rows(torch.tensor([3, 0, 11]))
    expected = [data.train.ids(i)[j] for j in (0, 1) for i in (3, 0, 11)]
    assert rows.shape == (6, 32)
    for row, ids in zip(rows.tolist(), expected, strict=True):
        assert row == [*ids.tolist(), *[0] * (32 - len(ids))]


@pytest.mark.parametrize(
    ("mixer", "protocol", "changes", "reason"),
    [
        ("ponet", "clean", {}, "shapes differ from step to step"),
        ("ponet_published", "published", {}, "mixer ponet_published reads from the device"),
        ("ponet", "published", {"compile": True}, "--compile was given"),
    ],
)
def test_what_cannot_be_captured_is_named(small, mixer, protocol, changes, reason):
    found = obstacle(settings_of(mixer, protocol, **changes), data_of(SMALL), CPU)
    assert reason in str(found)
    assert obstacle(settings_of("ponet", "published"), data_of(SMALL), CPU) is None
