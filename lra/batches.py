"""Which examples a batch holds, as a function of seed and number alone, and the batch itself."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lra.cache import Split
from lra.examples import DataError

# batches that are sorted by length together
_POOL = 32

# what shuffles of one seed are for
TRAIN, DEV, TEST, PRETRAIN = range(4)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples without padding, on the host."""

    ids: Tensor
    """`[T]` int64, sequences end to end, all first inputs before all second ones."""
    lengths: Tensor
    """`[num_inputs * B]` int64, tokens of each sequence."""
    labels: Tensor
    """`[B]` int64."""


def collect(split: Split, indices: np.ndarray) -> Batch:
    """Read examples.

    Args:
        split: where from.
        indices: `[B]`, which.
    """
    examples = [split.ids(index) for index in indices.tolist()]
    sequences = [sequence for inputs in zip(*examples, strict=True) for sequence in inputs]
    return Batch(
        ids=torch.from_numpy(np.concatenate(sequences).astype(np.int64)),
        lengths=torch.from_numpy(split.lengths[indices].T.ravel().astype(np.int64)),
        labels=torch.from_numpy(split.labels[indices].astype(np.int64)),
    )


class ShuffledBatches:
    """Endless full batches; every pass is another order, and leaves out what fills no batch."""

    def __init__(
        self, split: Split, batch_size: int, *, seed: int, purpose: int, by_length: bool = False
    ) -> None:
        """Make the sequence of batches.

        Args:
            split: where from.
            batch_size: examples in a batch.
            seed: of the run.
            purpose: `TRAIN`, `DEV`, `TEST` or `PRETRAIN`.
            by_length: put examples of similar length together, which saves padding where a mixer
                works on rectangles.

        Raises:
            DataError: the split does not fill one batch.
        """
        if len(split) < batch_size:
            raise DataError(f"--batch-size {batch_size}: a split has only {len(split)} examples")
        self.per_pass = len(split) // batch_size
        self._split = split
        self._batch_size = batch_size
        self._key = (seed, purpose)
        self._by_length = by_length
        self._pass = -1
        self._batches = np.empty((0, batch_size), dtype=np.int64)

    def indices(self, number: int) -> np.ndarray:
        """Examples of a batch, counted from 0: `[batch_size]`."""
        turn, place = divmod(number, self.per_pass)
        if turn != self._pass:
            self._pass, self._batches = turn, self._arrange(turn)
        return self._batches[place]

    def _arrange(self, turn: int) -> np.ndarray:
        rng = np.random.default_rng((*self._key, turn))
        order = rng.permutation(len(self._split))[: self.per_pass * self._batch_size]
        if not self._by_length:
            return order.reshape(-1, self._batch_size)
        lengths = self._split.lengths.sum(axis=1)
        pools = np.split(
            order, range(_POOL * self._batch_size, len(order), _POOL * self._batch_size)
        )
        ordered = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
        return rng.permutation(np.concatenate(ordered).reshape(-1, self._batch_size))


def batches_of_all(
    split: Split, batch_size: int, *, limit: int | None, seed: int, purpose: int
) -> list[np.ndarray]:
    """Batches that hold every example once, sorted by length; the last may be smaller.

    Args:
        split: where from.
        batch_size: examples in a batch.
        limit: at most this many examples, drawn with the seed; None: all.
        seed: of the run.
        purpose: `DEV` or `TEST`.
    """
    chosen = np.arange(len(split))
    if limit is not None and limit < len(split):
        chosen = np.random.default_rng((seed, purpose)).permutation(len(split))[:limit]
    lengths = split.lengths.sum(axis=1)[chosen]
    ordered = chosen[np.argsort(lengths, kind="stable")]
    return np.split(ordered, range(batch_size, len(ordered), batch_size))
