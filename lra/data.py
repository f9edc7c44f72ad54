"""Which examples a batch holds, and the task as loss and accuracy over batches, by protocol.

What a batch holds is a function of seed, purpose and number alone.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lra.model import LongRangeClassifier, ModelInputs, model_inputs
from lra.resident import BatchShape, ResidentExamples, resident_inputs, resident_stream
from lra.settings import ArenaSettings
from lra.steps import CapturedStep, PlainStep, Replay, TrainingStep, put_rows
from lra.store import ArenaData, ArenaError, Split
from lra.tasks import TASKS
from ponet.run.trainer import autocast

# batches that are sorted by length together
_POOL = 32

# what shuffles of one seed are for
TRAIN, DEV, TEST, PRETRAIN = range(4)


class BatchOrder:
    """Endless full batches; every pass is another order, and leaves out what fills no batch."""

    def __init__(self, split: Split, settings: ArenaSettings, purpose: int) -> None:
        """Make the sequence of batches for a purpose: `TRAIN`, `DEV`, `TEST` or `PRETRAIN`.

        In the clean protocol a batch holds examples of similar length, which saves padding where a
        mixer works on rectangles. Raises `ArenaError` if the split does not fill one batch.
        """
        self._size = settings.batch_size
        if len(split) < self._size:
            raise ArenaError(f"--batch-size {self._size}: a split has only {len(split)} examples")
        self.per_pass = len(split) // self._size
        self._lengths = split.lengths.sum(axis=1)
        self._key = (settings.seed, purpose)
        self._by_length = settings.protocol == "clean"
        self._pass, self._batches = 0, self._arrange(0)

    def indices(self, number: int) -> np.ndarray:
        """Examples of a batch, counted from 0: `[batch_size]`."""
        turn, index = divmod(number, self.per_pass)
        if turn != self._pass:
            self._pass, self._batches = turn, self._arrange(turn)
        return self._batches[index]

    def _arrange(self, turn: int) -> np.ndarray:
        rng = np.random.default_rng((*self._key, turn))
        order = rng.permutation(len(self._lengths))[: self.per_pass * self._size]
        if not self._by_length:
            return order.reshape(-1, self._size)
        pools = np.split(order, range(_POOL * self._size, len(order), _POOL * self._size))
        ordered = [pool[np.argsort(self._lengths[pool], kind="stable")] for pool in pools]
        return rng.permutation(np.concatenate(ordered).reshape(-1, self._size))


def whole_set_batches(
    split: Split, settings: ArenaSettings, purpose: int, *, limit: int | None
) -> list[np.ndarray]:
    """Batches that hold every example once, or `limit` drawn by seed and purpose, `DEV` or `TEST`;
    they are sorted by length, and the last may be smaller.
    """
    chosen = np.arange(len(split))
    if limit is not None and limit < len(split):
        chosen = np.random.default_rng((settings.seed, purpose)).permutation(len(split))[:limit]
    lengths = split.lengths.sum(axis=1)[chosen]
    ordered = chosen[np.argsort(lengths, kind="stable")]
    return np.split(ordered, range(settings.batch_size, len(ordered), settings.batch_size))


def gather_examples(split: Split, indices: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Ids `[T]` of examples `[B]` on the host, all first inputs before all second ones; tokens of
    each sequence `[num_inputs * B]`; labels `[B]`. All int64.
    """
    examples = [split.ids(index) for index in indices.tolist()]
    sequences = [sequence for inputs in zip(*examples, strict=True) for sequence in inputs]
    ids = np.concatenate(sequences).astype(np.int64)
    lengths, labels = split.lengths[indices].T.ravel(), split.labels[indices]
    return torch.from_numpy(ids), torch.from_numpy(lengths), torch.from_numpy(labels)


def read_batch(
    split: Split, indices: np.ndarray, settings: ArenaSettings
) -> tuple[ModelInputs, Tensor]:
    """Examples in the form of the run's protocol, and their labels, all on the host."""
    ids, lengths, labels = gather_examples(split, indices)
    inputs = model_inputs(
        ids,
        lengths,
        protocol=settings.protocol,
        task=TASKS[settings.task],
        mixer=settings.mixer,
        num_segments=settings.num_segments,
    )
    return inputs, labels


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
        data: ArenaData,
        settings: ArenaSettings,
        device: torch.device,
        *,
        resident: bool = False,
    ) -> None:
        """Arrange the batches for a model on the device, of data in the variant of the protocol.

        `resident` puts the data on the device, makes batches there, in fixed shapes, and captures
        steps and evaluations; `lra.resident.obstacle` must have found none. Raises `ArenaError` if
        a split does not fill one batch.
        """
        self.model = model
        self._data = data
        self._settings = settings
        self._device = device
        clean = settings.protocol == "clean"
        self._train = BatchOrder(data.train, settings, TRAIN)
        self._dev = None if clean else BatchOrder(data.dev, settings, DEV)
        self._test = None if clean else BatchOrder(data.test, settings, TEST)
        self._resident: dict[Split, ResidentExamples] | None = None
        if resident:
            stream = resident_stream(data.train, device)
            self._resident = {
                split: ResidentExamples(split, data.task, settings.mixer, stream)
                for split in (data.train, data.dev, data.test)
            }
        self._shapes: dict[Split, BatchShape] = {}
        self._replays: dict[Split, tuple[Tensor, Replay]] = {}

    def training_step(self, stage: int) -> TrainingStep:
        """What trains the model by the settings, as a stage of the run."""
        settings, data, indices = self._settings, self._data, self._train.indices
        fixed = {"precision": settings.precision, "device": self._device}
        fixed["seeds"] = (settings.seed, stage)
        if self._resident is None:
            return PlainStep(self.model, settings.schedule, loss=self.loss, **fixed)
        evaluations = range(-(-settings.steps // settings.eval_every))
        batches = {
            data.train: map(indices, range(settings.steps)),
            data.dev: itertools.chain.from_iterable(map(self.dev_batches, evaluations)),
            data.test: self.test_batches(),
        }
        self._shapes = {split: self._resident[split].shape(b) for split, b in batches.items()}
        return CapturedStep(
            self.model, settings.schedule, loss=self.loss_of, indices=indices, **fixed
        )

    def loss(self, step: int) -> Tensor:
        """Mean cross-entropy on the batch of a training step."""
        return self.loss_of(self._train.indices(step))

    def loss_of(self, indices: Any) -> Tensor:
        """The same of training examples `[B]`, numbers on the device if the data are there."""
        inputs, labels = self._read(self._data.train, indices)
        return F.cross_entropy(self.model(inputs).float(), labels)

    def _read(self, split: Split, indices: Any) -> tuple[ModelInputs, Tensor]:
        settings = self._settings
        if self._resident is None:
            inputs, labels = read_batch(split, indices, settings)
            inputs, others = inputs.to(self._device, {"labels": labels})
            return inputs, others["labels"]
        examples = self._resident[split]
        form: dict[str, Any] = {"mixer": settings.mixer, "num_segments": settings.num_segments}
        rows, shape = examples.rows(indices), self._shapes[split]
        inputs = resident_inputs(rows, shape, task=self._data.task, **form)
        return inputs, examples.labels.index_select(0, indices)

    def dev_batches(self, evaluation: int) -> list[np.ndarray]:
        """Examples of an evaluation on the development set, counted from 0."""
        settings, count = self._settings, self._settings.eval_batches
        if self._dev is None:
            limit = None if count is None else count * settings.batch_size
            return whole_set_batches(self._data.dev, settings, DEV, limit=limit)
        assert count is not None
        return [self._dev.indices(evaluation * count + i) for i in range(count)]

    def test_batches(self) -> list[np.ndarray]:
        """Examples of the test."""
        settings, limit = self._settings, self._settings.test_examples
        if self._test is None:
            return whole_set_batches(self._data.test, settings, TEST, limit=limit)
        count = self._test.per_pass
        if limit is not None:
            count = min(count, max(1, limit // settings.batch_size))
        return [self._test.indices(i) for i in range(count)]

    def dev_accuracy(self, evaluation: int) -> dict[str, float]:
        """Share of right answers in an evaluation, counted from 0."""
        return {"accuracy": self._accuracy(self._data.dev, self.dev_batches(evaluation))}

    def test_accuracy(self) -> float:
        """Share of right answers in the test."""
        return self._accuracy(self._data.test, self.test_batches())

    def _accuracy(self, split: Split, batches: Sequence[np.ndarray]) -> float:
        # stays on the device until the end
        correct = sum(right.sum() for right in self.answers(split, batches))
        return int(correct) / sum(map(len, batches))

    @torch.no_grad()
    def answers(self, split: Split, batches: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """Whether the model is right on each example of each batch: `[B]` bool, until the next."""
        self.model.eval()
        # some mixers draw at every forward: what came before has no say in it
        torch.manual_seed(self._settings.seed)
        if self._resident is None:
            for indices in batches:
                yield self._right(split, indices)
            return
        if split not in self._replays:
            chosen = torch.zeros(len(batches[0]), dtype=torch.long, device=self._device)
            replay = Replay(partial(self._right, split, chosen), self._device)
            self._replays[split] = chosen, replay
        chosen, replay = self._replays[split]
        for indices in put_rows(batches, self._device):
            chosen.copy_(indices)
            yield replay()

    def _right(self, split: Split, indices: Any) -> Tensor:
        inputs, labels = self._read(split, indices)
        with autocast(self._settings.precision, self._device):
            logits = self.model(inputs)
        return logits.argmax(dim=1) == labels
