"""Which examples a batch holds, as a function of seed and number alone, and the batch itself."""

import numpy as np
import torch
from torch import Tensor

from glue.encoding import EncodedRows
from ponet import PoNetConfig
from ponet.batch import HostBatch
from ponet.packing import layout_for, stream_of_packed

# batches that are sorted by length together
_POOL = 32
_SHUFFLE = 1


def collect(rows: EncodedRows, indices: np.ndarray, config: PoNetConfig) -> HostBatch:
    """Make a batch of B examples with T tokens, without padding, as a model takes it.

    Args:
        rows: where from.
        indices: `[B]`, which.
        config: of the model.

    Returns:
        `input_ids` `[T]` int64; `labels` `[B]`, int64 or float32, where there are any;
        `token_type_ids` `[T]` int64, 1 in the second text and its [SEP], where the model knows
        them; and the layout.
    """
    lengths = rows.lengths[indices]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    within = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    places = within + np.repeat(rows.offsets[:-1][indices], lengths)
    ids = _tensor(rows.ids[places], torch.int64)
    tensors = {"input_ids": ids}
    # some encoders know no second text
    if config.type_vocab_size > 1:
        types = within >= np.repeat(rows.second[indices], lengths)
        tensors["token_type_ids"] = _tensor(types, torch.int64)
    if rows.labels is not None:
        is_number = rows.labels.dtype.kind == "f"
        labels = _tensor(rows.labels[indices], torch.float32 if is_number else torch.int64)
        tensors["labels"] = labels
    segments = None if rows.segments is None else _tensor(rows.segments[places], torch.int64)
    stream = stream_of_packed(ids, _tensor(cu_seqlens, torch.int32))
    return HostBatch(tensors, layout_for(config, stream, ids, segments))


def _tensor(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(values).to(dtype)


class ShuffledBatches:
    """Endless batches; every pass is another order, its smaller batch holds what fills no other."""

    def __init__(self, lengths: np.ndarray, batch_size: int, *, seed: int) -> None:
        """Make the sequence of batches.

        Args:
            lengths: `[N]`, tokens of each example; examples of similar length go together.
            batch_size: examples in a batch.
            seed: of the run.
        """
        self.per_pass = -(-len(lengths) // batch_size)
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._pass = -1
        self._batches: list[np.ndarray] = []

    def indices(self, number: int) -> np.ndarray:
        """Examples of a batch, counted from 0: `[batch_size]` or less."""
        turn, place = divmod(number, self.per_pass)
        if turn != self._pass:
            self._pass, self._batches = turn, self._arrange(turn)
        return self._batches[place]

    def _arrange(self, turn: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self._seed, _SHUFFLE, turn))
        order = rng.permutation(len(self._lengths))
        size = _POOL * self._batch_size
        pools = [order[begin : begin + size] for begin in range(0, len(order), size)]
        ordered = np.concatenate([p[np.argsort(self._lengths[p], kind="stable")] for p in pools])
        cuts = range(self._batch_size, len(ordered), self._batch_size)
        batches = np.split(ordered, cuts)
        return [batches[place] for place in rng.permutation(len(batches))]


def batches_of_all(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Batches that hold every example once, sorted by length.

    Args:
        lengths: `[N]`, tokens of each example.
        max_tokens: of a batch, counted as if it were padded, because some mixers pad inside; an
            example that is longer has a batch of its own.
    """
    batches: list[list[int]] = []
    for index in np.argsort(lengths, kind="stable").tolist():
        if not batches or (len(batches[-1]) + 1) * lengths[index] > max_tokens:
            batches.append([])
        batches[-1].append(index)
    return [np.array(batch) for batch in batches]
