"""Self-pretraining: predict hidden tokens of the task's own training set, then learn the task.

After "Never Train from Scratch" (arXiv 2310.02980), with the encoder of the task and a masked-LM
head in place of the classifier. Only ids of the training set are used, never labels or test data.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lra.batches import PRETRAIN, ShuffledBatches
from lra.cache import TaskData
from lra.classify import read
from lra.model import initialise_linear_layers
from lra.protocol import ModelInputs
from lra.schedule import Plan
from lra.settings import RunSettings
from lra.tasks import Task
from ponet import PoNetForMaskedLM
from ponet.run.trainer import step_seed

_WARMUP_SHARE = 0.1
# what the seed of a step is for, besides the stages of `lra.experiment`
_HIDING = 2


def build_masked_lm(settings: RunSettings) -> PoNetForMaskedLM:
    """The encoder of a task under a masked-LM head, initialised like the classifier's."""
    model = PoNetForMaskedLM(settings.model_config())
    initialise_linear_layers(model.ponet)
    return model


def hide_tokens(
    inputs: ModelInputs, task: Task, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Hide a share of the real tokens, each by an independent draw; on the host.

    Args:
        inputs: with the tokens as they are.
        task: decides share and id of hidden tokens.
        generator: of the draws.

    Returns:
        `[T]` ids with hidden tokens replaced, `[M]` places of these, `[M]` their original ids.
    """
    ids = inputs.input_ids
    hidden = torch.rand(ids.shape, generator=generator) < task.mask_ratio
    if inputs.counted is not None:
        hidden &= inputs.counted
    places = hidden.nonzero().squeeze(1)
    return ids.masked_fill(hidden, task.mask_id), places, ids.index_select(0, places)


class MaskedPrediction:
    """Loss of self-pretraining."""

    def __init__(
        self,
        model: PoNetForMaskedLM,
        data: TaskData,
        settings: RunSettings,
        device: torch.device,
    ) -> None:
        """Arrange the batches.

        Args:
            model: on the device.
            data: of the task; the training set alone is read.
            settings: of the run.
            device: of the model.

        Raises:
            DataError: the training set does not fill one batch.
        """
        self._model = model
        self._data = data
        self._settings = settings
        self._device = device
        self._batches = ShuffledBatches(
            data.train,
            settings.batch_size,
            seed=settings.seed,
            purpose=PRETRAIN,
            by_length=settings.protocol == "clean",
        )

    def plan(self) -> Plan:
        """The passes as steps, a tenth of them with rising learning rate."""
        steps = max(1, math.ceil(self._settings.pretrain_epochs * self._batches.per_pass))
        return Plan(
            steps=steps,
            warmup_steps=round(_WARMUP_SHARE * steps),
            learning_rate=self._settings.pretrain_learning_rate,
            eval_every=steps,
        )

    def batch(self, step: int) -> dict[str, Any]:
        """Arguments of the model in a step, counted from 0, on the device."""
        inputs, _ = read(self._data.train, self._batches.indices(step), self._settings)
        seed = step_seed(self._settings.seed, _HIDING, step)
        hidden, places, labels = hide_tokens(
            inputs, self._data.task, torch.Generator().manual_seed(seed)
        )
        inputs, beside = replace(inputs, input_ids=hidden).to(
            self._device, {"labels": labels, "label_positions": places}
        )
        return beside | {
            "input_ids": inputs.input_ids,
            "position_ids": inputs.position_ids,
            "layout": inputs.layout,
        }

    def loss(self, step: int) -> Tensor:
        """Mean cross-entropy at the hidden tokens of the batch of a step."""
        loss = self._model(**self.batch(step)).loss
        assert loss is not None
        return loss
