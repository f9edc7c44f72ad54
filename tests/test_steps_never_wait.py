"""Training steps of pre-training and GLUE: from the first forward pass on, nothing waits."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ponet import PoNetForPreTraining
from pretrain.batches import MicroBatch, evaluation_batches
from pretrain.engine import Engine
from pretrain.examples import ExampleSettings
from pretrain.run import LossSums, train_step
from pretrain.settings import PretrainConfig
from tests.sync_counter import as_on_a_gpu

CPU = torch.device("cpu")
SETTINGS = ExampleSettings(
    seq_len=32, vocab_size=200, cls_id=1, sep_id=2, mask_id=3, special_ids=(0, 1, 2, 3)
)
MIXERS = ["ponet", "attention", "fnet", "linformer", "nystromformer"]


def pretraining(mixer: str, **changes: Any) -> tuple[Engine, list[MicroBatch]]:
    """An engine and the micro-batches of a step."""
    corpus: Any = SimpleNamespace(
        tokens=np.random.default_rng(0).integers(4, 200, size=8 * 40 * 6).astype(np.uint16),
        sentence_offsets=np.arange(8 * 40 + 1) * 6,
        document_offsets=np.arange(9) * 40,
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "seq_len": 32, "batch_tokens": 512}
    config = PretrainConfig(mixer=mixer, micro_batch_tokens=256, **sizes, **changes)
    torch.manual_seed(0)
    model = PoNetForPreTraining(config.model_config(200, 0, 1, 2).replace(num_landmarks=8))
    batches = evaluation_batches(
        corpus, np.arange(8), SETTINGS, seed=0, micro_batch_tokens=256, max_batches=2
    )
    return Engine(config, model), batches


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_pretraining_steps_and_evaluation(mixer, precision):
    engine, batches = pretraining(mixer, precision=precision)
    with as_on_a_gpu() as found:
        for _ in range(2):
            _, norm = train_step(engine, iter(batches), LossSums(CPU), seed=0, want_norm=True)
    assert found == []
    assert norm is not None
    assert engine.learning_rate != PretrainConfig().learning_rate
    sums = LossSums(CPU)
    with torch.no_grad(), as_on_a_gpu() as found:
        for batch in batches:
            inputs = batch.inputs.to(CPU)
            sums.add(engine.forward(inputs), inputs, batch)
    assert found == []
