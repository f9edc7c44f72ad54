"""Fine-tuning steps and predictions: from the first forward pass on, nothing waits for a device."""

from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from glue import finetune, model
from glue.encoding import EncodedExamples, collect_examples
from glue.finetune import FineTuningStep
from glue.settings import FineTuningSettings
from ponet import PoNetConfig, PoNetForSequenceClassification, PoolerConfig
from ponet.model import PoNetModel
from ponet.poolers import POOLERS
from ponet_kernels import use_backend
from ponet_kernels.triton_kernels.launch import record_launches
from tests.sync_counter import count_synchronising

MIXERS = ["ponet", "attention", "fnet", "linformer", "nystromformer"]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """The kernels' operators without their kernels, and no look at ids, which only a CPU takes."""

    # making a batch is work of the host on the host
    def apart(*arguments: Any) -> Any:
        with _disable_current_modes():
            return collect_examples(*arguments)

    for module in (finetune, model):
        monkeypatch.setattr(module, "collect_examples", apart)
    monkeypatch.setattr(PoNetModel, "_check_ids", lambda *_: None)
    with use_backend("triton"), record_launches():
        yield


def classifier(
    mixer: str, pooler: PoolerConfig
) -> tuple[PoNetForSequenceClassification, EncodedExamples]:
    """A model and 24 examples of 5 to 28 tokens."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = PoNetConfig(
        vocab_size=200,
        **sizes,
        intermediate_size=64,
        max_position_embeddings=32,
        cls_token_id=1,
        sep_token_id=2,
        mixer=mixer,
        num_landmarks=8,
        num_labels=3,
        pooler=pooler,
    )
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 29, size=24)
    ids = rng.integers(4, 200, size=lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids[offsets[:-1]], ids[offsets[1:] - 1] = 1, 2
    labels = rng.integers(0, 3, size=24)
    examples = EncodedExamples(
        ids=ids, offsets=offsets, second=lengths, segments=None, labels=labels
    )
    return PoNetForSequenceClassification(config), examples


@pytest.mark.parametrize(
    ("mixer", "pooler"),
    [(mixer, "cls") for mixer in MIXERS] + [("ponet", name) for name in POOLERS if name != "cls"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fine_tuning_step(mixer, pooler, precision: Literal["fp32", "bf16"]):
    chosen = PoolerConfig(name=pooler, num_heads=2, num_layers=2)
    model, examples = classifier(mixer, chosen)
    settings = FineTuningSettings(
        name="a test",
        task="a test",
        pooler=chosen,
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
    do_step = FineTuningStep(model, examples, settings, torch.device("cpu"))
    with count_synchronising() as found:
        for step in range(2):
            do_step(step)
    assert found == []


def test_predictions_of_a_split(monkeypatch):
    monkeypatch.setattr(model, "_MAX_TOKENS", 100)
    classify, examples = classifier("ponet", PoolerConfig())
    with count_synchronising() as found:
        assert model.outputs_of(classify, examples).shape == (24, 3)
    assert found == []
