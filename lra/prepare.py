"""Make a task's data ready: `python lra/prepare.py --task text --source aclImdb`.

Unless a source is given, ListOps, Pathfinder and Path-X are generated and Text and Image come from
the Hugging Face hub; Retrieval needs a source. `--task all` means the five tasks of the published
comparison, without Path-X, whose 200,000 images take hours to generate. What is already prepared is
kept. The last line of stdout is one JSON document.
"""

import argparse
import itertools
import json
import logging
import os
import random
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from lra import sources
from lra.listops import distinct_trees, draw_trees
from lra.pathfinder import SPECS, draw_images
from lra.store import (
    DATA_DIR,
    SPLITS,
    ArenaError,
    Example,
    load_arena_data,
    read_manifest,
    write_task,
)
from lra.tasks import TASKS, ArenaTask, tasks_named
from ponet.run.cli import errors_in_one_line
from ponet.run.log import set_up_logging

Drawn = list[tuple[int, Any]]
"""Labels and what they belong to."""

_RELEASE = "the unpacked release of Long Range Arena (lra_release)"
_SOURCES = {
    "listops": f"{_RELEASE}, or a folder with basic_{{train,val,test}}.tsv",
    "text": "aclImdb (the folder or aclImdb_v1.tar.gz), or a folder with train*.jsonl and "
    "test*.jsonl whose lines have text and label (1 positive)",
    "retrieval": f"{_RELEASE}, a folder with new_aan_pairs.{{train,eval,test}}.tsv, or one with "
    "papers.jsonl (id, text) and pairs.{train,val,test}.tsv (label, paper1, paper2)",
    "image": "cifar-10-binary.tar.gz or its folder, or images as train/CLASS/*.png and "
    "test/CLASS/*.png in a folder or in tar archives",
    "pathfinder": f"{_RELEASE}, or its folder pathfinder32",
    "pathx": f"{_RELEASE}, or its folder pathfinder128",
}
_HUB = {"text": "stanfordnlp/imdb", "image": "uoft-cs/cifar10"}
_CHUNK = 100
# chunks begun before their turn, for each process: enough that none waits for the consumer
_AHEAD = 4

# as a script this module has another name
logger = logging.getLogger("lra.prepare")


def prepare_task(
    name: str,
    data_dir: str | Path = DATA_DIR,
    source: str | Path | None = None,
    *,
    num_examples: int | None = None,
    seed: int | None = None,
    workers: int | None = None,
) -> Path:
    """Prepare a task, unless it is prepared already.

    Args:
        name: key in `lra.tasks.TASKS`.
        data_dir: where prepared tasks are kept, each in a folder of its name.
        source: files to read; the folder `raw/<name>` in `data_dir` if there is one, otherwise the
            generator or the hub when None.
        num_examples: examples to generate, divided into 80, 10 and 10 per cent; the published
            numbers when None. Tasks that are not generated are read whole.
        seed: of generators and of splits that are drawn; 0 when None.
        workers: processes of the generators; as many as there are cores when None.

    Returns:
        The folder for `lra.store.load_arena_data`.

    Raises:
        ArenaError: the source is missing or unfit, or the task was prepared otherwise before
            than asked for now.
        OSError: the disk is full or cannot be written.
    """
    if name not in TASKS:
        raise ArenaError(f"--task: expected one of {', '.join(TASKS)}, found {name!r}")
    task, data_dir = TASKS[name], Path(data_dir)
    raw = data_dir / "raw" / name
    found = Path(source) if source else raw if raw.exists() else None
    if found and not found.exists():
        raise ArenaError(f"--source {found}: not found; expected {_SOURCES[name]}")
    if num_examples is not None and (found or not task.is_generated):
        logger.warning("%s is read whole: --num-examples is for generated tasks", name)
        num_examples = None
    origin = str(found.resolve()) if found else None
    wanted = {"source": source and origin, "num_examples": num_examples, "seed": seed}
    folder = data_dir / name
    data_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(data_dir / f".{name}.lock"):
        if folder.exists():
            _check_same(name, folder, wanted)
            return folder
        # left by a process that was killed while it held the lock
        for stale in data_dir.glob(f".{name}-*"):
            shutil.rmtree(stale)
        settings = {"source": origin, "num_examples": num_examples, "seed": seed or 0}
        return _prepare(task, folder, settings, workers or len(os.sched_getaffinity(0)))


def _check_same(name: str, folder: Path, wanted: dict[str, Any]) -> None:
    """Refuse a prepared task that is not the one asked for, as far as anything was asked."""
    settings = read_manifest(name, folder)["settings"]
    for key, value in wanted.items():
        if value is not None and settings.get(key) != value:
            raise ArenaError(
                f"{folder}: was prepared with {key} {settings.get(key)}, asked for {value}; delete "
                "the folder or give another --data-dir"
            )


def _prepare(task: ArenaTask, folder: Path, settings: dict[str, Any], workers: int) -> Path:
    skipped: list[str] = []
    origin, seed = settings["source"], settings["seed"]
    place = folder.parent / "raw" / task.name
    advice = f"give --source PATH, or put at {place}: {_SOURCES[task.name]}"
    if origin:
        described, examples = origin, _read(task, Path(origin), skipped, seed)
    elif task.is_generated:
        described, examples = "generated", _generate(task, settings, workers)
    elif task.name in _HUB:
        described, examples = f"hub: {_HUB[task.name]}", _from_hub(task, advice, skipped)
    else:
        raise ArenaError(f"no source of {task.name} was given; {advice}")
    logger.info("preparing %s (%s)", task.name, described)
    bar = tqdm(
        examples,
        desc=task.name,
        unit=" examples",
        total=settings["num_examples"] or sum(task.split_sizes),
        # None: shown at a terminal
        disable=None,
    )
    with bar:
        options = {"settings": settings, "skipped": skipped, "seed": seed}
        write_task(folder, task, bar, source=described, **options)
    if skipped:
        logger.warning("%s: skipped %d records, first %s", task.name, len(skipped), skipped[0])
    return folder


def _read(task: ArenaTask, source: Path, skipped: list[str], seed: int) -> Iterator[Example]:
    """Examples from files."""
    match task.name:
        case "listops":
            return sources.read_listops(source)
        case "text":
            return sources.read_reviews(source, skipped)
        case "retrieval":
            return sources.read_pairs(source, skipped, seed)
        case "image":
            return sources.read_cifar(source)
        case _:
            return sources.read_pathfinder(task, source, skipped, seed)


def _from_hub(task: ArenaTask, advice: str, skipped: list[str]) -> Iterator[Example]:
    dataset = sources.load_hub(_HUB[task.name], advice)
    if task.name == "text":
        yield from sources.reviews_of_hub(dataset, skipped)
    else:
        yield from sources.cifar_of_hub(dataset)


def _generate(task: ArenaTask, settings: dict[str, Any], workers: int) -> Iterator[Example]:
    """Random examples; they are independent, so the splits follow one another."""
    num, seed = settings["num_examples"], settings["seed"]
    sizes = task.split_sizes if num is None else (num - 2 * (num // 10), num // 10, num // 10)
    splits = [split for split, size in zip(SPLITS, sizes, strict=True) for _ in range(size)]
    if task.name == "listops":
        trees = distinct_trees(generate(partial(draw_trees, _CHUNK), seed=seed, workers=workers))
        drawn = ((label, sources.encode_listops(text, task.max_tokens)) for label, text in trees)
    else:
        spec = SPECS[round(task.max_tokens**0.5)]
        images = generate(partial(draw_images, spec, _CHUNK), seed=seed, workers=workers)
        drawn = ((label, image.reshape(-1)) for label, image in images)
    for split, (label, ids) in zip(splits, drawn, strict=False):
        yield Example(split, label, (ids,))


def generate(
    draw: Callable[[random.Random], Drawn], *, seed: int, workers: int
) -> Iterator[tuple[int, Any]]:
    """Random examples without end: the same for a seed, however many processes draw chunks."""
    make, numbers = partial(_draw_chunk, draw, seed), itertools.count()
    chunks = map(make, numbers) if workers == 1 else _map_in_pool(make, numbers, workers)
    return itertools.chain.from_iterable(chunks)


def _draw_chunk(draw: Callable[[random.Random], Drawn], seed: int, number: int) -> Drawn:
    words = np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(8)
    return draw(random.Random(int.from_bytes(words.tobytes(), "little")))


def _map_in_pool(
    make: Callable[[int], Drawn], numbers: Iterator[int], workers: int
) -> Iterator[Drawn]:
    # a forked process could inherit a lock that a thread of PyTorch holds
    pool = ProcessPoolExecutor(workers, get_context("spawn"))
    pending: deque[Future[Drawn]] = deque()
    try:
        for number in numbers:
            pending.append(pool.submit(make, number))
            if len(pending) >= _AHEAD * workers:
                yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _summary(name: str, folder: Path, *, verify: bool) -> dict[str, Any]:
    """What was prepared, for the last line; numbers other than the published are pointed out."""
    data = load_arena_data(name, folder, verify=verify)
    if not data.is_whole:
        logger.warning(
            "%s has %d / %d / %d training, development and test examples, the published set "
            "%d / %d / %d",
            *(name, *data.sizes, *data.task.split_sizes),
        )
    keys = ("source", "digest", "splits", "skipped")
    return {"folder": str(folder), **{key: data.manifest[key] for key in keys}}


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the tasks of a command line; returns the exit status, 1 if a task failed."""
    parser = argparse.ArgumentParser(description="prepare the data of Long Range Arena tasks")
    parser.add_argument(
        "--task", nargs="+", required=True, choices=[*TASKS, "all"], help="all: without pathx"
    )
    parser.add_argument("--source", help="files to read: a folder or an archive")
    parser.add_argument("--data-dir", default=DATA_DIR, help=f"where to keep them [{DATA_DIR}]")
    parser.add_argument(
        "--num-examples",
        type=int,
        help="examples to generate per task, in all its splits [the published number]",
    )
    parser.add_argument("--seed", type=int, help="of generators and of splits that are drawn [0]")
    parser.add_argument("--workers", type=int, help="processes of the generators [all cores]")
    parser.add_argument("--verify", action="store_true", help="compare checksums of all files")
    arguments = parser.parse_args(argv)
    for flag, least in (("num_examples", 10), ("workers", 1), ("seed", 0)):
        if (given := getattr(arguments, flag)) is not None and given < least:
            parser.error(f"--{flag.replace('_', '-')}: expected at least {least}, found {given}")
    set_up_logging(rank=0)
    prepared, failed = {}, {}
    for task in tasks_named(arguments.task):
        try:
            folder = prepare_task(
                task.name,
                arguments.data_dir,
                arguments.source,
                num_examples=arguments.num_examples,
                seed=arguments.seed,
                workers=arguments.workers,
            )
            prepared[task.name] = _summary(task.name, folder, verify=arguments.verify)
        except (ArenaError, OSError) as error:
            logger.error("%s: %s", task.name, error)
            failed[task.name] = str(error)
    print(json.dumps({"prepared": prepared, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    with errors_in_one_line("lra/prepare.py", advice="; the same command continues"):
        sys.exit(main())
