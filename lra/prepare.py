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
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from torch.utils.data import DataLoader
from tqdm import tqdm

from lra.listops import draw_trees
from lra.pathfinder import SPECS, draw_images
from lra.sources import HUB, SOURCES, encode_listops, examples_of_hub, read_source
from lra.store import DATA_DIR, SPLITS, ArenaError, Example, load_arena_data, write_task
from lra.tasks import GENERATED, TASKS, ArenaTask, tasks_named
from ponet.run.cli import errors_in_one_line, require_at_least
from ponet.run.log import set_up_logging

Drawn = list[tuple[int, Any]]
"""Labels and what they belong to."""

_CHUNK = 100

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
    """Prepare a task, unless it is prepared already; returns its folder in `data_dir`.

    Args:
        source: files to read; None: the folder `raw/<name>` in `data_dir` if there is one,
            otherwise the generator or the hub.
        num_examples: to generate, divided into 80, 10 and 10 per cent; None: the published number.
        seed: of generators and of splits that are drawn; None: 0.
        workers: processes of the generators; None: as many as there are cores.

    Raises:
        ArenaError: the source is missing or unfit, or the task was prepared otherwise before.
        OSError: the disk is full or cannot be written.
    """
    task, data_dir = TASKS[name], Path(data_dir)
    raw = data_dir / "raw" / name
    found = Path(source) if source else raw if raw.exists() else None
    if found and not found.exists():
        raise ArenaError(f"--source {found}: not found; expected {SOURCES[name]}")
    if num_examples is not None and (found or not task.law):
        logger.warning("%s is read whole: --num-examples is for generated tasks", name)
        num_examples = None
    origin = str(found.resolve()) if found else None
    asked = {"source": source and origin, "num_examples": num_examples, "seed": seed}
    folder = data_dir / name
    data_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(data_dir / f".{name}.lock"):
        if folder.exists():
            _check_same(name, folder, asked)
        else:
            settings = {"source": origin, "num_examples": num_examples, "seed": seed or 0}
            _prepare(task, folder, settings, workers or len(os.sched_getaffinity(0)))
    return folder


def _check_same(name: str, folder: Path, asked: dict[str, Any]) -> None:
    """Refuse a prepared task that is not the one asked for, as far as anything was asked."""
    settings = load_arena_data(name, folder).manifest["settings"]
    for key, value in asked.items():
        if value is not None and settings.get(key) != value:
            raise ArenaError(
                f"{folder}: was prepared with {key} {settings.get(key)}, asked for {value}; delete "
                "the folder or give another --data-dir"
            )


def _prepare(task: ArenaTask, folder: Path, settings: dict[str, Any], workers: int) -> None:
    skipped: list[str] = []
    origin, seed = settings["source"], settings["seed"]
    advice = f"give --source PATH, or put at {folder.parent / 'raw' / task.name}: "
    advice += SOURCES[task.name]
    if origin:
        described, examples = origin, read_source(task, Path(origin), skipped, seed)
    elif task.law:
        described, examples = GENERATED, _generate(task, settings, workers)
    elif task.name in HUB:
        described, examples = f"hub: {HUB[task.name]}", examples_of_hub(task, advice)
    else:
        raise ArenaError(f"no source of {task.name} was given; {advice}")
    logger.info("preparing %s (%s)", task.name, described)
    total = settings["num_examples"] or sum(task.split_sizes)
    # disable=None: shown at a terminal
    with tqdm(examples, task.name, total, unit=" examples", disable=None) as bar:
        options = {"settings": settings, "skipped": skipped, "seed": seed}
        write_task(folder, task, bar, source=described, **options)
    if skipped:
        logger.warning("%s: skipped %d records, first %s", task.name, len(skipped), skipped[0])


def _generate(task: ArenaTask, settings: dict[str, Any], workers: int) -> Iterator[Example]:
    """Random examples; they are independent, so the splits follow one another."""
    num, seed = settings["num_examples"], settings["seed"]
    sizes = task.split_sizes if num is None else (num - 2 * (num // 10), num // 10, num // 10)
    splits = [split for split, size in zip(SPLITS, sizes, strict=True) for _ in range(size)]
    if task.name == "listops":
        trees = generate(partial(draw_trees, _CHUNK), seed=seed, workers=workers)
        drawn = ((label, encode_listops(text, task.max_tokens)) for label, text in trees)
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
    options: dict[str, Any] = {"collate_fn": partial(_draw_chunk, draw, seed)}
    if workers > 1:
        # a forked process could inherit a lock that a thread of PyTorch holds
        options |= {"num_workers": workers, "multiprocessing_context": "spawn"}
        # chunks begun before their turn, for each process: enough that none waits for the consumer
        options["prefetch_factor"] = 4
    numbers: Any = range(sys.maxsize)
    return itertools.chain.from_iterable(DataLoader(numbers, batch_size=None, **options))


def _draw_chunk(draw: Callable[[random.Random], Drawn], seed: int, number: int) -> Drawn:
    words = np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(8)
    return draw(random.Random(int.from_bytes(words.tobytes(), "little")))


def _summary(name: str, folder: Path, *, verify: bool) -> dict[str, Any]:
    """What was prepared, for the last line; numbers other than the published are pointed out."""
    data = load_arena_data(name, folder, verify=verify)
    if data.note:
        logger.warning("%s: %s; delete %s to generate it by today's", name, data.note, folder)
    elif not data.is_whole:
        message = "%s has %s training, development and test examples, the published set %s"
        logger.warning(message, name, data.sizes, data.task.split_sizes)
    keys = ("source", "digest", "splits", "skipped")
    return {"folder": str(folder), **{key: data.manifest[key] for key in keys}}


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the tasks of a command line; returns the exit status, 1 if a task failed."""
    parser = argparse.ArgumentParser(description="prepare the data of Long Range Arena tasks")
    add = parser.add_argument
    add("--task", nargs="+", required=True, choices=[*TASKS, "all"], help="all: without pathx")
    add("--source", help="files to read: a folder or an archive")
    add("--data-dir", default=DATA_DIR, help=f"where to keep them [{DATA_DIR}]")
    add("--num-examples", type=int, help="to generate per task [the published number]")
    add("--seed", type=int, help="of generators and of splits that are drawn [0]")
    add("--workers", type=int, help="processes of the generators [all cores]")
    add("--verify", action="store_true", help="compare checksums of all files")
    arguments = parser.parse_args(argv)
    require_at_least(arguments, {"num_examples": 10, "workers": 1, "seed": 0})
    options = vars(arguments)
    set_up_logging(rank=0)
    tasks, verify = tasks_named(options.pop("task")), options.pop("verify")
    prepared, failed = {}, {}
    for task in tasks:
        try:
            folder = prepare_task(task.name, **options)
            prepared[task.name] = _summary(task.name, folder, verify=verify)
        except (ArenaError, OSError) as error:
            logger.error("%s: %s", task.name, error)
            failed[task.name] = str(error)
    print(json.dumps({"prepared": prepared, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    with errors_in_one_line("lra/prepare.py", advice="; the same command continues"):
        sys.exit(main())
