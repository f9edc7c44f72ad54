"""Self-pretraining: predict hidden tokens of the task's own training set, then learn the task.

After "Never Train from Scratch" (arXiv 2310.02980), with the encoder of the task and a masked-LM
head in place of the classifier. Only ids of the training set are used, never labels or test data.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lra.data import PRETRAIN, BatchOrder, read_batch
from lra.model import ModelInputs, initialise_encoder
from lra.settings import ArenaSettings
from lra.steps import OneCycle, PlainStep, TrainingStep
from lra.store import ArenaData
from lra.tasks import ArenaTask
from ponet import PoNetForMaskedLM
from ponet.run.trainer import step_seed

_WARMUP_SHARE = 0.1
# what the seed of a step is for, besides the stages of `lra.run`
_HIDING = 2


def hide_tokens(
    inputs: ModelInputs, task: ArenaTask, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Hide the task's share of the real tokens, each by an independent draw; on the host.

    Returns `[T]` ids with hidden tokens replaced, `[M]` places of these, `[M]` their original ids.
    """
    ids = inputs.input_ids
    hidden = torch.rand(ids.shape, generator=generator) < task.mask_ratio
    if inputs.counted is not None:
        hidden &= inputs.counted
    places = hidden.nonzero().squeeze(1)
    return ids.masked_fill(hidden, task.mask_id), places, ids.index_select(0, places)


class MaskedPrediction:
    """A masked-LM head on the encoder of a task, and its loss on the training set."""

    def __init__(self, data: ArenaData, settings: ArenaSettings, device: torch.device) -> None:
        """Build the model, the encoder initialised like a classifier's, and arrange batches."""
        self.model = PoNetForMaskedLM(settings.model_config())
        initialise_encoder(self.model.ponet)
        self.model.to(device)
        self._data = data
        self._settings = settings
        self._device = device
        self._batches = BatchOrder(data.train, settings, PRETRAIN)
        # the passes as steps, a tenth of them with rising learning rate
        steps = max(1, math.ceil(settings.pretrain_epochs * self._batches.per_pass))
        warmup, peak = round(_WARMUP_SHARE * steps), settings.pretrain_learning_rate
        self.schedule = OneCycle(steps=steps, warmup_steps=warmup, peak=peak)

    def training_step(self, seeds: tuple[int, ...]) -> TrainingStep:
        """What trains the model, with seeds of run and stage."""
        return PlainStep(
            self.model,
            self.schedule,
            loss=self.loss,
            precision=self._settings.precision,
            seeds=seeds,
            device=self._device,
        )

    def batch(self, step: int) -> dict[str, Any]:
        """Arguments of the model in a step, counted from 0, on the device."""
        inputs, _ = read_batch(self._data.train, self._batches.indices(step), self._settings)
        seed = step_seed(self._settings.seed, _HIDING, step)
        hidden, places, labels = hide_tokens(
            inputs, self._data.task, torch.Generator().manual_seed(seed)
        )
        inputs, others = replace(inputs, input_ids=hidden).to(
            self._device, {"labels": labels, "label_positions": places}
        )
        names = ("input_ids", "position_ids", "layout")
        return others | {name: getattr(inputs, name) for name in names}

    def loss(self, step: int) -> Tensor:
        """Mean cross-entropy at the hidden tokens of the batch of a step."""
        loss = self.model(**self.batch(step)).loss
        assert loss is not None
        return loss
