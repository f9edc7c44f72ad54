"""ListOps in the files of the published release: `python lra/listops_files.py FOLDER`.

The folder gets `basic_train.tsv`, `basic_val.tsv` and `basic_test.tsv`.
"""

import argparse
import csv
import itertools
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from lra.listops import generate_chunks
from ponet.checkpoint import write_atomically

SPLITS = {"train": 96_000, "val": 2_000, "test": 2_000}
"""Trees in the published files."""


def write_files(
    folder: Path, *, seed: int, workers: int = 1, splits: dict[str, int] = SPLITS
) -> list[Path]:
    """Generate trees into the files of the release.

    Args:
        folder: made when missing.
        seed: at least 0; the files depend on it and on `splits` alone.
        workers: processes.
        splits: trees of each file, by its split.

    Returns:
        The files.
    """
    chunks = generate_chunks(sum(splits.values()), seed=seed, workers=workers)
    trees = itertools.chain.from_iterable(chunks)
    paths = []
    for split, count in splits.items():
        path = folder / f"basic_{split}.tsv"
        rows = ((source, label) for label, source in itertools.islice(trees, count))
        write_atomically(path, partial(_write_rows, rows=rows))
        paths.append(path)
    return paths


def _write_rows(path: Path, rows: Iterable[tuple[str, int]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        # lines end in \r\n, as in the release
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(("Source", "Target"))
        writer.writerows(rows)


def main() -> None:
    """Write the files that the command line asks for."""
    parser = argparse.ArgumentParser(description="generate ListOps in the files of the release")
    parser.add_argument("folder", type=Path, help="where the files go, made when missing")
    parser.add_argument("--seed", type=int, default=0, help="seed of the trees [0]")
    for split, count in SPLITS.items():
        parser.add_argument(
            f"--num-{split}", type=int, default=count, metavar="N", help=f"trees [{count}]"
        )
    arguments = vars(parser.parse_args())
    splits = {split: arguments[f"num_{split}"] for split in SPLITS}
    workers = len(os.sched_getaffinity(0))
    for path in write_files(
        arguments["folder"], seed=arguments["seed"], workers=workers, splits=splits
    ):
        print(path)


if __name__ == "__main__":
    main()
