"""Training steps of pre-training and GLUE: from the first forward pass on, nothing waits."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from glue import finetune, model
from glue.encoding import EncodedExamples, collect_examples
from glue.settings import parse
from glue.tasks import TASKS
from ponet import PoNetForPreTraining, PoNetForSequenceClassification, PoolerConfig
from ponet.poolers import POOLERS
from pretrain.batches import MicroBatch, evaluation_batches
from pretrain.engine import Engine
from pretrain.run import LossSums, train_step
from pretrain.settings import PretrainConfig
from tests.corpora import make_corpus, make_settings
from tests.sync_counter import as_on_a_gpu
from tests.tiny import TINY

CPU = torch.device("cpu")
CORPUS = make_corpus([[6] * 40] * 8)
SETTINGS = make_settings(CORPUS, 32)
MIXERS = ["ponet", "attention", "fnet", "linformer", "nystromformer"]
AVERAGE = {"segment_pooling": "average", "local_pooling": "average"}


def pretraining(mixer: str, **changes: Any) -> tuple[Engine, list[MicroBatch]]:
    """An engine and the micro-batches of a step."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "seq_len": 32, "batch_tokens": 512}
    config = PretrainConfig(mixer=mixer, micro_batch_tokens=256, **sizes, **changes)
    torch.manual_seed(0)
    architecture = config.model_config(SETTINGS.vocab_size, 0, SETTINGS.cls_id, SETTINGS.sep_id)
    encoder = PoNetForPreTraining(architecture.replace(num_landmarks=8))
    batches = evaluation_batches(
        CORPUS, np.arange(8), SETTINGS, seed=0, micro_batch_tokens=256, max_batches=2
    )
    return Engine(config, encoder), batches


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("mixer", "changes"),
    [*((mixer, {}) for mixer in MIXERS), ("ponet", AVERAGE), ("ponet", {"local_window": 5})],
)
def test_pretraining_steps_and_evaluation(mixer, changes, precision):
    engine, batches = pretraining(mixer, precision=precision, **changes)
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


@pytest.mark.parametrize(
    ("mixer", "pooler"),
    [(mixer, "cls") for mixer in MIXERS] + [("ponet", name) for name in POOLERS if name != "cls"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fine_tuning_steps_and_predictions(mixer, pooler, precision, monkeypatch):
    # making a batch is work of the host on the host
    def apart(*arguments: Any) -> Any:
        with _disable_current_modes():
            return collect_examples(*arguments)

    for module in (finetune, model):
        monkeypatch.setattr(module, "collect_examples", apart)
    monkeypatch.setattr(model, "_MAX_TOKENS", 100)
    heads = PoolerConfig(name=pooler, num_heads=2, num_layers=2)
    config = TINY.replace(mixer=mixer, num_landmarks=8, num_labels=3, pooler=heads)
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 29, size=24)
    ids = rng.integers(5, config.vocab_size, size=lengths.sum()).astype(np.int32)
    offsets = np.cumsum([0, *lengths])
    ids[offsets[:-1]], ids[offsets[1:] - 1] = config.cls_token_id, config.sep_token_id
    labels = rng.integers(0, 3, size=24)
    examples = EncodedExamples(
        ids=ids, offsets=offsets, second=lengths, segments=None, labels=labels
    )
    classify = PoNetForSequenceClassification(config)
    flags = ["--checkpoint", "x", "--batch-size", "8", "--precision", precision]
    (settings,) = parse(flags).runs_of(TASKS["rte"], 2490, "cpu")
    do_step = finetune.FineTuningStep(classify, examples, settings, CPU)
    with as_on_a_gpu() as found:
        for step in range(2):
            do_step(step)
        assert model.outputs_of(classify, examples, precision).shape == (24, 3)
    assert found == []
