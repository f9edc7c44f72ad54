"""The task itself: its loss, and its accuracy on the development and test sets by protocol."""

import copy
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lra.batches import DEV, TEST, TRAIN, ShuffledBatches, batches_of_all, collect
from lra.cache import Split, TaskData
from lra.model import LongRangeClassifier
from lra.protocol import ModelInputs, model_inputs
from lra.replay import Replay
from lra.resident import ResidentExamples, Shape, resident_inputs, resident_stream
from lra.schedule import Plan
from lra.settings import RunSettings
from lra.steps import CapturedStep, PlainStep, Step, put
from lra.tasks import TASKS
from ponet.run.trainer import autocast


def read(
    split: Split, indices: np.ndarray, settings: RunSettings
) -> tuple[ModelInputs, dict[str, Tensor]]:
    """Examples in the form of the run's protocol, and their `labels`, all on the host."""
    batch = collect(split, indices)
    inputs = model_inputs(
        batch.ids,
        batch.lengths,
        protocol=settings.protocol,
        task=TASKS[settings.task],
        mixer=settings.model,
        num_segments=settings.num_segments,
    )
    return inputs, {"labels": batch.labels}


class Classification:
    """Loss and accuracies of a classifier on a task.

    published   The development set is an endless shuffled stream of full batches, of which an
                evaluation takes the next `eval_batches`; the test leaves out what fills no batch.
                All batches being equal, the published mean of batch means is the share of right
                answers.
    clean       Evaluations take all examples, or the same drawn ones when told to take fewer.
    """

    def __init__(
        self,
        model: LongRangeClassifier,
        data: TaskData,
        settings: RunSettings,
        device: torch.device,
        *,
        resident: bool = False,
    ) -> None:
        """Arrange the batches.

        Args:
            model: on the device.
            data: of the task, in the variant of the protocol.
            settings: of the run.
            device: of the model.
            resident: put the data on the device, make batches there, in fixed shapes, and capture
                steps and evaluations; `lra.resident.obstacle` must have found none.

        Raises:
            DataError: a split does not fill one batch.
        """
        self.model = model
        self._data = data
        self._settings = settings
        self._device = device
        clean = settings.protocol == "clean"
        self._train = self._shuffled(data.train, TRAIN, by_length=clean)
        self._dev = None if clean else self._shuffled(data.dev, DEV)
        self._test = None if clean else self._shuffled(data.test, TEST)
        self._resident: dict[Split, ResidentExamples] | None = None
        if resident:
            stream = resident_stream(data.train, device)
            self._resident = {
                split: ResidentExamples(split, data.task, settings.model, stream)
                for split in (data.train, data.dev, data.test)
            }
        self._shapes: dict[Split, Shape] = {}
        self._replays: dict[Split, tuple[Tensor, Replay]] = {}

    def probe(self) -> "Classification":
        """The same on a copy of the model."""
        other = copy.copy(self)
        other.model, other._replays = copy.deepcopy(self.model), {}
        return other

    def step(self, plan: Plan, stage: int) -> Step:
        """What trains the model by a plan, as a stage of the run; evaluations follow the plan."""
        settings = self._settings
        seeds = (settings.seed, stage)
        if self._resident is None:
            return PlainStep(
                self.model,
                plan,
                loss=self.loss,
                precision=settings.precision,
                seeds=seeds,
                device=self._device,
            )
        data, evaluations = self._data, -(-plan.steps // plan.eval_every)
        self._shapes = {
            data.train: self._resident[data.train].shape(
                map(self._train.indices, range(plan.steps))
            ),
            data.dev: self._resident[data.dev].shape(
                batch for number in range(evaluations) for batch in self.dev_batches(number)
            ),
            data.test: self._resident[data.test].shape(self.test_batches()),
        }
        return CapturedStep(
            self.model,
            plan,
            loss=self.loss_of,
            indices=self._train.indices,
            precision=settings.precision,
            seeds=seeds,
            device=self._device,
        )

    def _shuffled(self, split: Split, purpose: int, by_length: bool = False) -> ShuffledBatches:
        settings = self._settings
        return ShuffledBatches(
            split,
            settings.batch_size,
            seed=settings.seed,
            purpose=purpose,
            by_length=by_length,
        )

    def loss(self, step: int) -> Tensor:
        """Mean cross-entropy on the batch of a training step."""
        inputs, labels = self._read(self._data.train, self._train.indices(step))
        return F.cross_entropy(self.model(inputs).float(), labels)

    def loss_of(self, indices: Tensor) -> Tensor:
        """The same of training examples `[B]` on the device, where the data are."""
        inputs, labels = self._take(self._data.train, indices)
        return F.cross_entropy(self.model(inputs).float(), labels)

    def _read(self, split: Split, indices: np.ndarray) -> tuple[ModelInputs, Tensor]:
        inputs, beside = read(split, indices, self._settings)
        inputs, beside = inputs.to(self._device, beside)
        return inputs, beside["labels"]

    def _take(self, split: Split, indices: Tensor) -> tuple[ModelInputs, Tensor]:
        assert self._resident is not None
        examples, settings = self._resident[split], self._settings
        inputs = resident_inputs(
            examples.rows(indices),
            self._shapes[split],
            task=self._data.task,
            mixer=settings.model,
            num_segments=settings.num_segments,
        )
        return inputs, examples.labels.index_select(0, indices)

    def dev_batches(self, evaluation: int) -> list[np.ndarray]:
        """Examples of an evaluation on the development set, counted from 0."""
        settings = self._settings
        if self._dev is None:
            count = settings.eval_batches
            limit = None if count is None else count * settings.batch_size
            return self._all(self._data.dev, DEV, limit)
        assert settings.eval_batches is not None
        first = evaluation * settings.eval_batches
        return [self._dev.indices(first + i) for i in range(settings.eval_batches)]

    def test_batches(self) -> list[np.ndarray]:
        """Examples of the test."""
        limit = self._settings.test_examples
        if self._test is None:
            return self._all(self._data.test, TEST, limit)
        count = self._test.per_pass
        if limit is not None:
            count = min(count, max(1, limit // self._settings.batch_size))
        return [self._test.indices(i) for i in range(count)]

    def _all(self, split: Split, purpose: int, limit: int | None) -> list[np.ndarray]:
        settings = self._settings
        return batches_of_all(
            split, settings.batch_size, limit=limit, seed=settings.seed, purpose=purpose
        )

    def dev_accuracy(self, evaluation: int) -> float:
        """Share of right answers in an evaluation, counted from 0."""
        return self._accuracy(self._data.dev, self.dev_batches(evaluation))

    def test_accuracy(self) -> float:
        """Share of right answers in the test."""
        return self._accuracy(self._data.test, self.test_batches())

    def _accuracy(self, split: Split, batches: Sequence[np.ndarray]) -> float:
        correct, total = torch.zeros((), dtype=torch.long, device=self._device), 0
        for right in self.answers(split, batches):
            correct += right.sum()
            total += len(right)
        return int(correct) / total

    @torch.no_grad()
    def answers(self, split: Split, batches: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """Whether the model is right about each example of each batch: `[B]` bool.

        An answer is good until the next one is asked for.
        """
        self.model.eval()
        if self._resident is None:
            for indices in batches:
                yield self._right(*self._read(split, indices))
            return
        if split not in self._replays:
            chosen = torch.zeros(len(batches[0]), dtype=torch.long, device=self._device)
            work = partial(self._right_of, split, chosen)
            self._replays[split] = chosen, Replay(work, self._device)
        chosen, replay = self._replays[split]
        for indices in put(batches, self._device):
            chosen.copy_(indices)
            yield replay()

    def _right(self, inputs: ModelInputs, labels: Tensor) -> Tensor:
        with autocast(self._settings.precision, self._device):
            logits = self.model(inputs)
        return logits.argmax(dim=1) == labels

    def _right_of(self, split: Split, indices: Tensor) -> Tensor:
        return self._right(*self._take(split, indices))
