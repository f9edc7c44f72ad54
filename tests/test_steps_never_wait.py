"""Training steps of pre-training and GLUE: from the first forward pass on, nothing waits."""

from typing import Any

import numpy as np
import pytest
import torch

from ponet import PoNetForPreTraining
from ponet.model import PoNetModel
from ponet_kernels import use_backend
from ponet_kernels.triton_kernels.launch import record_launches
from pretrain.batches import MicroBatch, evaluation_batches
from pretrain.engine import Engine
from pretrain.run import LossSums, train_step
from pretrain.settings import PretrainConfig
from tests.corpora import make_corpus, make_settings
from tests.sync_counter import count_synchronising

CPU = torch.device("cpu")
CORPUS = make_corpus([[6] * 40] * 8)
SETTINGS = make_settings(CORPUS, 32)
MIXERS = ["ponet", "attention", "fnet", "linformer", "nystromformer"]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """The kernels' operators without their kernels, and no look at ids, which only a CPU takes."""
    monkeypatch.setattr(PoNetModel, "_check_ids", lambda *_: None)
    with use_backend("triton"), record_launches():
        yield


def pretraining(mixer: str, **changes: Any) -> tuple[Engine, list[MicroBatch]]:
    """An engine and the micro-batches of a step."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "seq_len": 32, "batch_tokens": 512}
    config = PretrainConfig(mixer=mixer, micro_batch_tokens=256, **sizes, **changes)
    torch.manual_seed(0)
    architecture = config.model_config(SETTINGS.vocab_size, 0, SETTINGS.cls_id, SETTINGS.sep_id)
    model = PoNetForPreTraining(architecture.replace(num_landmarks=8))
    batches = evaluation_batches(
        CORPUS, np.arange(8), SETTINGS, seed=0, micro_batch_tokens=256, max_batches=2
    )
    return Engine(config, model), batches


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_pretraining_steps_and_evaluation(mixer, precision):
    engine, batches = pretraining(mixer, precision=precision)
    with count_synchronising() as found:
        for _ in range(2):
            _, norm = train_step(engine, iter(batches), LossSums(CPU), seed=0, want_norm=True)
    assert found == []
    assert norm is not None
    assert engine.learning_rate != PretrainConfig().learning_rate
    sums = LossSums(CPU)
    with torch.no_grad(), count_synchronising() as found:
        for batch in batches:
            inputs = batch.inputs.to(CPU)
            sums.add(engine.forward(inputs), inputs, batch)
    assert found == []
