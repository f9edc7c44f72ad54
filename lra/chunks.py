"""Random examples in chunks: the same for a seed, however many processes make them."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import numpy as np

Result = TypeVar("Result")

# chunks begun before their turn, for each process: enough that none waits for the consumer
_AHEAD = 4


def chunk_random(seed: int, chunk: int) -> random.Random:
    """The generator of one chunk, independent of those of all others.

    Args:
        seed: of the whole, at least 0.
        chunk: number of the chunk, from 0.
    """
    words = np.random.SeedSequence(seed, spawn_key=(chunk,)).generate_state(8)
    return random.Random(int.from_bytes(words.tobytes(), "little"))


def map_chunks(
    make: Callable[[int], Result], chunks: Iterable[int], *, workers: int
) -> Iterator[Result]:
    """Results of `make` for each number of `chunks`, in their order.

    Args:
        make: a function that can be sent to another process, called with the number of a chunk.
        chunks: may be endless; chunks that the consumer leaves are not made, but for a few.
        workers: processes; 1 makes all in this one.

    Raises:
        ValueError: `workers` is below 1.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, found {workers}")
    return map(make, chunks) if workers == 1 else _map_in_pool(make, iter(chunks), workers)


def _map_in_pool(
    make: Callable[[int], Result], chunks: Iterator[int], workers: int
) -> Iterator[Result]:
    # a forked process could inherit a lock that a thread of PyTorch holds
    pool = ProcessPoolExecutor(workers, get_context("spawn"))
    pending: deque[Future[Result]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(make, chunk))
            if len(pending) >= _AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
