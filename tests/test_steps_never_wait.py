"""Training steps of pre-training and GLUE: from the first forward pass on, nothing waits."""

from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from glue import inference
from glue import trainer as glue_trainer
from glue.batches import collect
from glue.encoding import EncodedRows
from glue.settings import RunSettings
from glue.trainer import Trainer
from ponet import PoNetConfig, PoNetForPreTraining, PoNetForSequenceClassification, PoolerConfig
from ponet.model import PoNetModel
from ponet.poolers import POOLERS
from ponet.run.trainer import Place
from ponet_kernels import use_backend
from ponet_kernels.triton_kernels.launch import record_launches
from pretrain.batches import MicroBatch, evaluation_batches
from pretrain.engine import Engine
from pretrain.examples import ExampleSettings
from pretrain.run import LossSums, train_step
from pretrain.settings import PretrainConfig
from tests.sync_counter import count_synchronising

CPU = torch.device("cpu")
SETTINGS = ExampleSettings(
    seq_len=32, vocab_size=200, cls_id=1, sep_id=2, mask_id=3, special_ids=(0, 1, 2, 3)
)
MIXERS = ["ponet", "attention", "fnet", "linformer", "nystromformer"]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """The kernels' operators without their kernels, and no look at ids, which only a CPU takes."""
    monkeypatch.setattr(PoNetModel, "_check_ids", lambda *_: None)
    with use_backend("triton"), record_launches():
        yield


def corpus() -> Any:
    rng = np.random.default_rng(0)
    return SimpleNamespace(
        tokens=rng.integers(4, 200, size=8 * 40 * 6).astype(np.uint16),
        sentence_offsets=np.arange(8 * 40 + 1) * 6,
        document_offsets=np.arange(9) * 40,
    )


def pretraining(mixer: str, **changes: Any) -> tuple[Engine, list[MicroBatch]]:
    """An engine and the micro-batches of a step."""
    config = PretrainConfig(
        mixer=mixer,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        seq_len=32,
        batch_tokens=512,
        micro_batch_tokens=256,
        **changes,
    )
    torch.manual_seed(0)
    model = PoNetForPreTraining(config.model_config(200, 0, 1, 2).replace(num_landmarks=8))
    batches = evaluation_batches(
        corpus(), np.arange(8), SETTINGS, seed=0, micro_batch_tokens=256, max_batches=2
    )
    return Engine(config, model), batches


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_pretraining_step(mixer, precision):
    engine, batches = pretraining(mixer, precision=precision)
    with count_synchronising() as found:
        for _ in range(2):
            _, norm = train_step(engine, iter(batches), LossSums(CPU), seed=0, want_norm=True)
    assert found == []
    assert norm is not None
    assert engine.learning_rate != PretrainConfig().learning_rate


def test_pretraining_evaluation():
    engine, batches = pretraining("ponet")
    sums = LossSums(CPU)
    with torch.no_grad(), count_synchronising() as found:
        for batch in batches:
            inputs = batch.inputs.to(CPU)
            sums.add(engine.forward(inputs), inputs, batch)
    assert found == []


def test_a_step_that_reads_its_loss_is_caught(monkeypatch):
    engine, batches = pretraining("attention")
    add = LossSums.add
    monkeypatch.setattr(
        LossSums, "add", lambda self, out, *rest: (out.loss.item(), add(self, out, *rest))
    )
    with count_synchronising() as found:
        train_step(engine, iter(batches), LossSums(CPU), seed=0, want_norm=False)
    assert found == ["_local_scalar_dense"] * 2


def classifier(
    mixer: str, pooler: PoolerConfig
) -> tuple[PoNetForSequenceClassification, EncodedRows]:
    """A model and 24 examples of 5 to 28 tokens."""
    model = PoNetForSequenceClassification(
        PoNetConfig(
            vocab_size=200,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
            cls_token_id=1,
            sep_token_id=2,
            mixer=mixer,
            num_landmarks=8,
            num_labels=3,
            pooler=pooler,
        )
    )
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 29, size=24)
    ids = rng.integers(4, 200, size=lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids[offsets[:-1]], ids[offsets[1:] - 1] = 1, 2
    labels = rng.integers(0, 3, size=24)
    rows = EncodedRows(ids=ids, offsets=offsets, second=lengths, segments=None, labels=labels)
    return model, rows


def prepare_batches_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep `collect` out of the count: that is work of the host on the host."""

    def apart(*arguments: Any) -> Any:
        with _disable_current_modes():
            return collect(*arguments)

    for module in (glue_trainer, inference):
        monkeypatch.setattr(module, "collect", apart)


def settings_of(pooler: PoolerConfig, precision: Literal["fp32", "bf16"]) -> RunSettings:
    return RunSettings(
        task="a test",
        pooler=pooler,
        from_scratch=True,
        seed=0,
        batch_size=8,
        learning_rate=1e-3,
        epochs=1,
        warmup_fraction=0.1,
        weight_decay=0.01,
        dropout=0.1,
        max_length=32,
        segments="texts",
        max_train_examples=None,
        precision=precision,
    )


@pytest.mark.parametrize(
    ("mixer", "pooler"),
    [(mixer, "cls") for mixer in MIXERS] + [("ponet", name) for name in POOLERS if name != "cls"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fine_tuning_step(monkeypatch, mixer, pooler, precision):
    prepare_batches_apart(monkeypatch)
    chosen = PoolerConfig(name=pooler, num_heads=2, num_layers=2)
    model, rows = classifier(mixer, chosen)
    place = Place(device=CPU, log_every=10, checkpoint_seconds=60, shows_bar=False)
    trainer = Trainer(model, rows, settings_of(chosen, precision), place)
    with count_synchronising() as found:
        for step in range(2):
            trainer.step(step)
    assert found == []


def test_predictions_of_a_split(monkeypatch):
    prepare_batches_apart(monkeypatch)
    monkeypatch.setattr(inference, "_MAX_TOKENS", 100)
    model, rows = classifier("ponet", PoolerConfig())
    with count_synchronising() as found:
        assert inference.outputs_of(model, rows).shape == (24, 3)
    assert found == []
