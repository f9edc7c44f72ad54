"""Make a task's data ready: `python lra/prepare.py --task text --source aclImdb`.

Unless a source is given, ListOps, Pathfinder and Path-X are generated and Text and Image come from
the Hugging Face hub; Retrieval needs a source. `--task all` means the five tasks of the published
comparison, without Path-X, whose 200,000 images take hours to generate. What is already prepared is
kept. The last line of stdout is one JSON document.
"""

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from lra.cache import SPLITS, load_task, read_manifest, write_task
from lra.encoding import encode_listops
from lra.examples import DataError, Example
from lra.files import load_hub
from lra.image_sources import cifar_of, read_cifar, read_pathfinder
from lra.listops import generate_chunks as generate_expressions
from lra.pathfinder import generate_chunks as generate_images
from lra.pathfinder import pathfinder_spec
from lra.tasks import COMPARED, TASKS, Task
from lra.text_sources import read_listops, read_pairs, read_reviews, reviews_of
from ponet.run.log import set_up_logging

DATA_DIR = "data/lra"
"""Where prepared tasks are kept, below the current folder."""

GENERATED = ("listops", "pathfinder", "pathx")
"""Tasks that need no source."""

_RELEASE = "the unpacked release of Long Range Arena (lra_release)"
_SOURCES = {
    "listops": f"{_RELEASE}, or a folder with basic_{{train,val,test}}.tsv",
    "text": "aclImdb (the folder or aclImdb_v1.tar.gz), or a folder with train*.jsonl and "
    "test*.jsonl whose lines have text and label (1 positive)",
    "retrieval": f"{_RELEASE}, a folder with new_aan_pairs.{{train,eval,test}}.tsv, or one with "
    "papers.jsonl (id, text) and pairs.{train,val,test}.tsv (label, paper1, paper2)",
    "image": "cifar-10-python.tar.gz or its folder, or images as train/CLASS/*.png and "
    "test/CLASS/*.png in a folder or in tar archives",
    "pathfinder": f"{_RELEASE}, or its folder pathfinder32",
    "pathx": f"{_RELEASE}, or its folder pathfinder128",
}
_HUB = {"text": "stanfordnlp/imdb", "image": "uoft-cs/cifar10"}

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
            numbers when None.
        seed: of generators and of splits that are drawn; 0 when None.
        workers: processes of the generators; as many as there are cores when None.

    Returns:
        The folder for `lra.cache.load_task`.

    Raises:
        DataError: the source is missing or unfit, or the task was prepared otherwise before than
            asked for now.
        OSError: the disk is full or cannot be written.
    """
    if name not in TASKS:
        raise DataError(f"--task: expected one of {', '.join(TASKS)}, found {name!r}")
    data_dir = Path(data_dir)
    raw = data_dir / "raw" / name
    found = Path(source) if source else raw if raw.exists() else None
    if found and not found.exists():
        raise DataError(f"--source {found}: not found; expected {_SOURCES[name]}")
    if num_examples is not None and (found or name not in GENERATED):
        raise DataError(f"--num-examples: {name} is not generated but read whole from its source")
    origin = str(found.resolve()) if found else None
    wanted = {"source": source and origin, "num_examples": num_examples, "seed": seed}
    folder = data_dir / name
    data_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(data_dir / f".{name}.lock"):
        if folder.exists():
            _check_same(name, folder, {key: x for key, x in wanted.items() if x is not None})
            return folder
        # left by a process that was killed while it held the lock
        for stale in data_dir.glob(f".{name}-*"):
            shutil.rmtree(stale)
        settings = {"source": origin, "num_examples": num_examples, "seed": seed or 0}
        return _prepare(TASKS[name], folder, settings, workers or len(os.sched_getaffinity(0)))


def _check_same(name: str, folder: Path, wanted: dict[str, Any]) -> None:
    """Refuse a prepared task that is not the one asked for."""
    settings = read_manifest(name, folder)["settings"]
    for key, value in wanted.items():
        if settings.get(key) != value:
            raise DataError(
                f"{folder}: was prepared with {key} {settings.get(key)}, asked for {value}; delete "
                "the folder or give another --data-dir"
            )


def _prepare(task: Task, folder: Path, settings: dict[str, Any], workers: int) -> Path:
    skipped: list[str] = []
    origin, seed = settings["source"], settings["seed"]
    if origin:
        described, examples = origin, _read(task, Path(origin), skipped, seed)
    elif task.name in GENERATED:
        described, examples = "generated", _generate(task, settings, workers)
    elif task.name in _HUB:
        described, examples = f"hub: {_HUB[task.name]}", _from_hub(task, folder, skipped)
    else:
        raise DataError(f"no source of {task.name} was given; {_advice(task, folder)}")
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


def _advice(task: Task, folder: Path) -> str:
    place = folder.parent / "raw" / task.name
    return f"give --source PATH, or put at {place}: {_SOURCES[task.name]}"


def _read(task: Task, source: Path, skipped: list[str], seed: int) -> Iterator[Example]:
    """Examples from files."""
    match task.name:
        case "listops":
            return read_listops(source)
        case "text":
            return read_reviews(source, skipped)
        case "retrieval":
            return read_pairs(source, skipped, seed)
        case "image":
            return read_cifar(source)
        case _:
            return read_pathfinder(task, source, skipped, seed)


def _from_hub(task: Task, folder: Path, skipped: list[str]) -> Iterator[Example]:
    dataset = load_hub(_HUB[task.name], _advice(task, folder))
    return reviews_of(dataset, skipped) if task.name == "text" else cifar_of(dataset)


def _generate(task: Task, settings: dict[str, Any], workers: int) -> Iterator[Example]:
    """Random examples; they are independent, so the splits follow one another."""
    num = settings["num_examples"]
    sizes = task.split_sizes if num is None else (num - 2 * (num // 10), num // 10, num // 10)
    splits = (split for split, size in zip(SPLITS, sizes, strict=True) for _ in range(size))
    drawn = _expressions if task.name == "listops" else _images
    pairs = drawn(task, sum(sizes), settings["seed"], workers)
    for split, (label, ids) in zip(splits, pairs, strict=True):
        yield Example(split, label, (ids,))


def _expressions(task: Task, num: int, seed: int, workers: int) -> Iterator[tuple[int, Any]]:
    for chunk in generate_expressions(num, seed=seed, workers=workers):
        for label, source in chunk:
            yield label, encode_listops(source, task.max_tokens)


def _images(task: Task, num: int, seed: int, workers: int) -> Iterator[tuple[int, Any]]:
    spec = pathfinder_spec(round(task.max_tokens**0.5), "hard")
    for images, labels in generate_images(spec, num, seed=seed, workers=workers):
        yield from zip(labels.tolist(), images.reshape(len(images), -1), strict=True)


def _summary(name: str, folder: Path, *, verify: bool) -> dict[str, Any]:
    """What was prepared, for the last line; numbers other than the published are pointed out."""
    data = load_task(name, folder, verify=verify)
    sizes = tuple(len(split) for split in (data.train, data.dev, data.test))
    if sizes != data.task.split_sizes:
        logger.warning(
            "%s has %d / %d / %d training, development and test examples, the published set "
            "%d / %d / %d",
            *(name, *sizes, *data.task.split_sizes),
        )
    keys = ("source", "digest", "splits", "skipped")
    return {"folder": str(folder), **{key: data.manifest[key] for key in keys}}


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the tasks of a command line.

    Returns:
        Exit status: 1 if a task failed.
    """
    parser = argparse.ArgumentParser(description="prepare the data of Long Range Arena tasks")
    parser.add_argument(
        "--task", nargs="+", required=True, choices=[*TASKS, "all"], help="all: without pathx"
    )
    parser.add_argument("--source", help="files to read: a folder or an archive")
    parser.add_argument("--data-dir", default=DATA_DIR, help=f"where to keep them [{DATA_DIR}]")
    parser.add_argument(
        "--num-examples", type=int, help="examples to generate, in all [the published number]"
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
    everything = "all" in arguments.task
    for name in COMPARED if everything else arguments.task:
        generated = name in GENERATED or not everything
        try:
            folder = prepare_task(
                name,
                arguments.data_dir,
                arguments.source,
                num_examples=arguments.num_examples if generated else None,
                seed=arguments.seed,
                workers=arguments.workers,
            )
            prepared[name] = _summary(name, folder, verify=arguments.verify)
        except (DataError, OSError) as error:
            logger.error("%s: %s", name, error)
            failed[name] = str(error)
    print(json.dumps({"prepared": prepared, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
