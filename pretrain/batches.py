"""Packed batches of pre-training examples: the same stream for any number of ranks and workers.

The examples of an epoch are shuffled and packed into bins of at most `micro_batch_tokens` tokens;
`micro_batches_per_step` bins in a row are one global batch. Everything follows from
(seed, epoch), so a position in the stream is the pair (epoch, step) and resuming replays nothing.
Loader workers receive only the rows of the examples they draw.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ponet.batch import HostBatch
from ponet.model import IGNORED_LABEL
from ponet.packing import BatchLayout, layout_of_segments
from pretrain.examples import ExamplePlan, ExampleSettings, TokenCorpus, draw_batch, plan_epoch

# epoch, step and slot of a micro-batch, and its examples
BatchItem = tuple[int, int, int, ExamplePlan]

# what the model reads; its positions and segments are those of the layout
_INPUTS = ("input_ids", "token_type_ids", "labels", "label_positions", "sso_labels")

# how far ahead of the shuffled order a bin may look for an example that fits its rest: a handful
# of short ones is enough
LOOK_AHEAD = 128

# tells the shuffle's random stream from any other use of the same seed
_SHUFFLE = 0x5F0E


def pack_bins(lengths: np.ndarray, budget: int, order: np.ndarray) -> list[np.ndarray]:
    """Pack examples into bins of at most `budget` tokens, nearly in the given order.

    A bin takes the next examples of the order while any of them fits, then fills its rest with
    the longest that fits among the `LOOK_AHEAD` next ones. The oldest waiting example opens the
    next bin, so none is put off for long.

    Args:
        lengths: Tokens of each example, from 1 to `budget`, `int64` `[num_examples]`.
        order: Indices of the examples to pack, `int64` `[N]`; each gets into one bin.
    """
    sizes: list[int] = lengths[order].tolist()
    longest = max(sizes, default=0)
    num_examples = len(sizes)
    # one integer per example sorts by length, then the earlier in the order the greater
    ranks: list[int] = (lengths[order] * num_examples + np.arange(num_examples)[::-1]).tolist()
    waiting: list[int] = []
    placed = bytearray(num_examples)
    members: list[int] = []
    offsets = [0]
    arrived = oldest = 0
    while len(members) < num_examples:
        left = budget
        while True:
            while oldest < num_examples and placed[oldest]:
                oldest += 1
            while arrived < min(oldest + LOOK_AHEAD, num_examples):
                insort(waiting, ranks[arrived])
                arrived += 1
            if waiting and left >= longest:
                slot = bisect_left(waiting, ranks[oldest])
            else:
                slot = bisect_left(waiting, (left + 1) * num_examples) - 1
            if slot < 0:
                break
            position = num_examples - 1 - waiting.pop(slot) % num_examples
            placed[position] = True
            members.append(position)
            left -= sizes[position]
        offsets.append(len(members))
    packed = order[members]
    return [packed[start:end] for start, end in pairwise(offsets)]


@dataclass
class EpochBatches:
    """The micro-batches of one epoch, in the order in which all ranks together take them.

    A step takes `micro_batches_per_step`, of all ranks together; the incomplete global batch at the
    end of the epoch is dropped.

    Raises:
        ValueError: If the documents fill no global batch, or for what `plan_epoch` refuses.
    """

    corpus: TokenCorpus
    documents: np.ndarray
    settings: ExampleSettings
    seed: int
    epoch: int
    micro_batch_tokens: int
    micro_batches_per_step: int = 1

    def __post_init__(self) -> None:
        assert self.settings.seq_len <= self.micro_batch_tokens
        self.plan = plan_epoch(self.corpus, self.documents, self.settings, self.seed, self.epoch)
        # SeedSequence takes no negative numbers
        shuffle = np.random.default_rng([_SHUFFLE, self.seed & 0xFFFFFFFFFFFFFFFF, self.epoch])
        order = shuffle.permutation(len(self.plan))
        self.bins = pack_bins(self.plan.length, self.micro_batch_tokens, order)
        self.num_steps = len(self.bins) // self.micro_batches_per_step
        """Complete global batches."""
        if self.num_steps == 0:
            raise ValueError(
                f"the corpus fills no global batch: {len(self.documents)} documents give "
                f"{len(self.plan)} examples with {self.plan.length.sum()} tokens in "
                f"{len(self.bins)} micro-batches of {self.micro_batch_tokens} tokens, but a step "
                f"takes {self.micro_batches_per_step} of them; lower --batch-tokens or "
                "--micro-batch-tokens, or give more text"
            )
        dropped = self.bins[self.num_steps * self.micro_batches_per_step :]
        self.num_dropped_examples = sum(map(len, dropped))
        """Examples of the incomplete last global batch, which this epoch does not show."""
        room = len(self.bins) * self.micro_batch_tokens
        self.packing_efficiency = float(self.plan.length.sum()) / room
        """Share of the token budget of all bins that examples fill."""

    def item(self, step: int, slot: int) -> BatchItem:
        """The examples of a micro-batch: `slot` within the global batch `step` of the epoch."""
        members = self.bins[step * self.micro_batches_per_step + slot]
        return self.epoch, step, slot, self.plan.take(members)


class MicroBatchSampler(Sampler[BatchItem]):
    """Endless stream of the micro-batches of one rank.

    Global batch `s` of an epoch is the same `micro_batches_per_step` bins for any `world_size`,
    which divides their number; rank `r` takes slots `r`, `r + world_size`, and so on. Every rank
    plans every epoch itself, which is cheaper than sending plans around, and plans the next one
    while this one is consumed.

    The stream begins with step `start_step` of `start_epoch`; the number of steps of that epoch
    means the beginning of the next one, so that "the step after the last done" is always valid.

    Raises:
        ValueError: If the start lies beyond the epoch, or for what `EpochBatches` refuses.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        documents: np.ndarray,
        settings: ExampleSettings,
        *,
        seed: int,
        micro_batch_tokens: int,
        micro_batches_per_step: int,
        rank: int = 0,
        world_size: int = 1,
        start_epoch: int = 0,
        start_step: int = 0,
    ) -> None:
        assert micro_batches_per_step % world_size == 0
        self._slots = range(rank, micro_batches_per_step, world_size)
        self._start_step = start_step
        self.first_epoch = EpochBatches(
            corpus,
            documents,
            settings,
            seed=seed,
            epoch=start_epoch,
            micro_batch_tokens=micro_batch_tokens,
            micro_batches_per_step=micro_batches_per_step,
        )
        if not 0 <= start_step <= self.first_epoch.num_steps:
            raise ValueError(
                f"cannot start at step {start_step} of epoch {start_epoch}, which has "
                f"{self.first_epoch.num_steps} steps; was the checkpoint written with other text "
                f"or other batch settings?"
            )

    def __iter__(self) -> Iterator[BatchItem]:
        batches, step = self.first_epoch, self._start_step
        with ThreadPoolExecutor(max_workers=1) as planner:
            while True:
                upcoming = planner.submit(replace, batches, epoch=batches.epoch + 1)
                for current in range(step, batches.num_steps):
                    for slot in self._slots:
                        yield batches.item(current, slot)
                batches, step = upcoming.result(), 0


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A micro-batch on the host, and its place in the run."""

    inputs: HostBatch
    """Arguments of `PoNetForPreTraining.forward`."""
    epoch: int
    step: int
    slot: int
    tokens: int
    """T, special ones included."""
    masked: int
    """M, tokens to predict."""
    sequences: int
    """Sentence pairs to judge, at most B."""

    def pin_memory(self) -> Self:
        """Move the tensors to page-locked memory; a `DataLoader` calls it."""
        self.inputs.pin_memory()
        return self


@dataclass
class PackedDataset(Dataset[MicroBatch]):
    """Draws the micro-batch that an item of `MicroBatchSampler` describes."""

    corpus: TokenCorpus
    settings: ExampleSettings

    def __getitem__(self, index: BatchItem) -> MicroBatch:
        epoch, step, slot, plan = index
        arrays = draw_batch(self.corpus, plan, self.settings)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return MicroBatch(
            inputs=HostBatch({name: tensors[name] for name in _INPUTS}, self._layout(arrays)),
            epoch=epoch,
            step=step,
            slot=slot,
            tokens=len(tensors["input_ids"]),
            masked=len(tensors["labels"]),
            sequences=int((plan.label != IGNORED_LABEL).sum()),
        )

    def _layout(self, arrays: dict[str, np.ndarray]) -> BatchLayout:
        """The layout that the model would make of the ids: made here, no step waits for it."""
        ids, segment_ids = arrays["input_ids"], arrays["segment_ids"]
        starts = np.flatnonzero(segment_ids[1:] != segment_ids[:-1]) + 1
        cu_segments = np.concatenate([[0], starts, [len(ids)]])
        special = (ids == self.settings.cls_id) | (ids == self.settings.sep_id)
        return layout_of_segments(arrays["cu_seqlens"], cu_segments, np.flatnonzero(special))


def make_loader(
    sampler: MicroBatchSampler, *, num_workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """The endless loader of one rank; its batches do not depend on the number of workers."""
    return DataLoader(
        PackedDataset(sampler.first_epoch.corpus, sampler.first_epoch.settings),
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        # forked workers share the corpus arrays of this process; a spawned one that is stopped
        # while it sends a batch may also abort in its own shutdown
        multiprocessing_context="fork" if num_workers else None,
        # the loader draws a seed for its workers: not from the generator that dropout uses, or a
        # resumed run would draw other numbers than an uninterrupted one
        generator=torch.Generator(),
    )


def evaluation_batches(
    corpus: TokenCorpus,
    documents: np.ndarray,
    settings: ExampleSettings,
    *,
    seed: int,
    micro_batch_tokens: int,
    max_batches: int,
) -> list[MicroBatch]:
    """Draw the fixed set of micro-batches a run is evaluated on, spread over all documents.

    There are fewer than `max_batches` where the documents give fewer.

    Raises:
        ValueError: If the documents give no example.
    """
    batches = EpochBatches(
        corpus, documents, settings, seed=seed, epoch=0, micro_batch_tokens=micro_batch_tokens
    )
    dataset = PackedDataset(corpus, settings)
    return [dataset[batches.item(step, 0)] for step in range(min(max_batches, batches.num_steps))]
