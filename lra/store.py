"""A prepared task on disk: encoded once, memory-mapped by every run.

A folder holds the different sequences end to end (`ids.npy`, `offsets.npy`), which sequences an
example is made of and its label (`inputs.npy`, `labels.npy`), the examples of each split
(`rows-*.npy`), and `manifest.json`, written last.
"""

import hashlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lra.tasks import TASKS, ArenaTask, ProtocolName
from ponet.files import current_umask, write_json

DATA_DIR = "data/lra"
"""Where prepared tasks are kept, below the current folder."""

FORMAT_VERSION = 1
"""Raise it when the files change, or when an encoding does."""

MANIFEST = "manifest.json"

SPLITS = ("train", "dev", "test")

_IDS, _OFFSETS, _INPUTS, _LABELS = "ids.npy", "offsets.npy", "inputs.npy", "labels.npy"
_BLOCK = 2**24


class ArenaError(ValueError):
    """Data that are absent, damaged or not what a task needs, in words for whoever named them."""


class Example(NamedTuple):
    """One encoded example."""

    split: str
    """`train`, `dev` or `test`."""
    label: int
    inputs: tuple[np.ndarray, ...]
    """As many sequences of ids as the task has inputs: `[tokens]`, unsigned integers."""


class Split:
    """The examples of one split; sequences stay on disk until they are asked for."""

    def __init__(
        self, ids: np.ndarray, offsets: np.ndarray, inputs: np.ndarray, labels: np.ndarray
    ) -> None:
        """Make a view of stored sequences.

        Args:
            ids: all sequences end to end, `[tokens]`.
            offsets: where each begins, and the end of the last, `[sequences + 1]`.
            inputs: number of each input's sequence, `[examples, num_inputs]`.
            labels: `[examples]`.
        """
        self.labels = labels.astype(np.int64)
        """Classes, `[examples]`, int64."""
        self.lengths = offsets[inputs + 1] - offsets[inputs]
        """Tokens of each input, `[examples, num_inputs]`, int64."""
        self.stream = ids
        """Sequences end to end, those of the other splits among them, uint8 or uint16."""
        self.starts = offsets[inputs]
        """Where each input begins there, `[examples, num_inputs]`, int64."""

    def __len__(self) -> int:
        return len(self.labels)

    def ids(self, index: int) -> tuple[np.ndarray, ...]:
        """The inputs of an example: for each `[tokens]`, uint8 or uint16, cut but not padded."""
        bounds = zip(self.starts[index], self.lengths[index], strict=True)
        return tuple(self.stream[start : start + length] for start, length in bounds)

    @property
    def majority_rate(self) -> float:
        """Accuracy of always answering the most frequent label: the majority baseline."""
        return float(np.bincount(self.labels).max() / len(self.labels))


@dataclass(frozen=True, kw_only=True)
class ArenaData:
    """A task's examples."""

    task: ArenaTask
    train: Split
    dev: Split
    """To select a checkpoint on."""
    test: Split
    manifest: dict[str, Any]
    """`source`, `settings` and `skipped` of the preparation, `digest` (the same for the same
    examples on any machine), `variant`, and by split the `examples`, `label_counts`,
    `majority_rate` and `mean_tokens`."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Examples of training, development and test."""
        return tuple(len(split) for split in (self.train, self.dev, self.test))

    @property
    def is_whole(self) -> bool:
        """Whether the splits have the published sizes."""
        train, dev, test = self.sizes
        if self.manifest["variant"] == "clean" and self.task.dev_from == "test":
            # published, the development set is the test set; clean, a part of the training set
            return (train + dev, test) == (self.task.split_sizes[0], self.task.split_sizes[2])
        return self.sizes == self.task.split_sizes

    def describe(self) -> dict[str, Any]:
        """What a result says of its data."""
        origin = {name: self.manifest[name] for name in ("digest", "source")}
        return origin | dict(zip(SPLITS, self.sizes, strict=True))


def write_task(
    folder: Path,
    task: ArenaTask,
    examples: Iterable[Example],
    *,
    source: str,
    settings: dict[str, Any] | None = None,
    skipped: Sequence[str] = (),
    seed: int = 0,
) -> Path:
    """Store examples; the folder appears whole or not at all.

    Where the examples hold no development set, a seeded tenth of each class of the training set
    becomes it; for Text this is the clean one, and the published one is the test set.

    Args:
        folder: where to; it must not exist. It is returned.
        task: the task.
        examples: of all splits, in any order.
        source: where they come from, for the manifest.
        settings: what else decided them, for the manifest.
        skipped: records that were left out, by place and reason; read after the last example.
        seed: of the development set that is cut.

    Raises:
        ArenaError: the folder exists, or a split is empty.
        OSError: the disk is full or cannot be written.
    """
    if folder.exists():
        raise ArenaError(f"{folder}: already exists; delete it to prepare {task.name} again")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        manifest = {
            "format_version": FORMAT_VERSION,
            "task": task.name,
            "source": source,
            "settings": settings or {},
            **_write_arrays(unfinished, task, examples, source, seed),
            "skipped": {"records": len(skipped), "first": list(skipped[:5])},
        }
        manifest["digest"] = _digest(manifest)
        write_json(unfinished / MANIFEST, manifest)
        # a folder made by mkdtemp is private; the store is not
        unfinished.chmod(0o777 & ~current_umask())
        unfinished.rename(folder)
    except OSError as error:
        if error.filename is not None:
            raise
        # errors of writing name no file
        free = shutil.disk_usage(folder.parent).free // 2**20
        message = f"cannot be written ({free} MiB free): {error.strerror or error}"
        raise OSError(error.errno, message, str(folder)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write_arrays(
    folder: Path, task: ArenaTask, examples: Iterable[Example], source: str, seed: int
) -> dict[str, Any]:
    """Write all but the manifest; returns its entries on tokens, variants and files."""
    raw = folder / "ids.raw"
    arrays, rows = _write_raw(raw, task, examples)
    variants, of_splits = _divide(task, rows, arrays[_LABELS], source, seed)
    arrays = {_IDS: np.memmap(raw, _dtype(task), "r"), **arrays, **of_splits}
    files = {}
    for name, array in arrays.items():
        np.save(folder / name, array, allow_pickle=False)
        size = (folder / name).stat().st_size
        files[name] = {"bytes": size, "crc32": _checksum(array)}
    raw.unlink()
    lengths = np.diff(arrays[_OFFSETS])[arrays[_INPUTS]]
    return {
        "dtype": _dtype(task).name,
        "sequences": len(arrays[_OFFSETS]) - 1,
        "tokens": len(arrays[_IDS]),
        "variants": {
            variant: {split: _describe(name, arrays, lengths, task) for split, name in of.items()}
            for variant, of in variants.items()
        },
        "files": files,
    }


def _dtype(task: ArenaTask) -> np.dtype:
    # bytes are stored as 1..256, all other ids fit eight bits
    return np.dtype(np.uint16 if task.kind == "tokens" and task.vocab_size > 256 else np.uint8)


def _write_raw(
    raw: Path, task: ArenaTask, examples: Iterable[Example]
) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """Write ids without a header; returns the arrays beside them, and the rows of each split.

    Equal sequences are stored once: documents of Retrieval stand in many pairs.
    """
    numbers: dict[bytes, int] = {}
    offsets, inputs, labels = [0], [], []
    rows: dict[str, list[int]] = {split: [] for split in SPLITS}
    with raw.open("wb") as file:
        for example in examples:
            assert 0 <= example.label < task.num_classes, example.label
            assert len(example.inputs) == task.num_inputs, len(example.inputs)
            rows[example.split].append(len(labels))
            labels.append(example.label)
            inputs.append([])
            for ids in example.inputs:
                assert 0 < len(ids) <= task.max_tokens, len(ids)
                content = ids.astype(_dtype(task)).tobytes()
                digest = hashlib.blake2b(content, digest_size=16).digest()
                number = numbers.setdefault(digest, len(numbers))
                if number == len(offsets) - 1:
                    file.write(content)
                    offsets.append(offsets[-1] + len(ids))
                inputs[-1].append(number)
    arrays = {
        _OFFSETS: np.array(offsets, np.int64),
        _INPUTS: np.array(inputs, np.int64),
        _LABELS: np.array(labels, np.uint8),
    }
    return arrays, rows


def _describe(
    name: str, arrays: dict[str, np.ndarray], lengths: np.ndarray, task: ArenaTask
) -> dict[str, Any]:
    """A split by the file that holds its rows."""
    rows = arrays[name]
    counts = np.bincount(arrays[_LABELS][rows], minlength=task.num_classes)
    return {
        "rows": name,
        "examples": len(rows),
        "label_counts": counts.tolist(),
        "majority_rate": float(counts.max() / len(rows)),
        "mean_tokens": float(lengths[rows].mean()),
    }


def _divide(
    task: ArenaTask, found: dict[str, list[int]], labels: np.ndarray, source: str, seed: int
) -> tuple[dict[str, dict[str, str]], dict[str, np.ndarray]]:
    """The file of each split in both variants, and the rows in those files."""
    rows = {split: np.array(numbers, np.int64) for split, numbers in found.items()}
    needed = ("train", "test", "dev") if task.dev_from == "source" else ("train", "test")
    missing = [split for split in needed if not len(rows[split])]
    if missing:
        raise ArenaError(f"{source}: no example for {', '.join(missing)}")
    own = {split: f"rows-{split}.npy" for split in SPLITS}
    if len(rows["dev"]):
        return {"published": own, "clean": own}, {own[split]: rows[split] for split in SPLITS}
    train, test = rows["train"], rows["test"]
    cut = draw_tenth(labels[train], seed)
    if not 0 < cut.sum() < len(cut):
        raise ArenaError(f"{source}: {len(cut)} training examples, too few to cut a dev set")
    if task.dev_from == "train":
        variants = {"published": own, "clean": own}
        return variants, {own["train"]: train[~cut], own["dev"]: train[cut], own["test"]: test}
    clean = own | {"train": "rows-train-clean.npy", "dev": "rows-dev-clean.npy"}
    return {"published": own | {"dev": own["test"]}, "clean": clean}, {
        own["train"]: train,
        own["test"]: test,
        clean["train"]: train[~cut],
        clean["dev"]: train[cut],
    }


def draw_tenth(groups: np.ndarray, seed: int) -> np.ndarray:
    """Choose a seeded tenth of each group, at least one member: `[items]` bool of `[items]`."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(groups), bool)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        chosen[rng.permutation(members)[: max(1, round(len(members) / 10))]] = True
    return chosen


def load_arena_data(
    name: str, folder: str | Path, variant: ProtocolName = "published", *, verify: bool = False
) -> ArenaData:
    """Map a prepared task.

    Args:
        name: key in `lra.tasks.TASKS`.
        folder: as `write_task` or `lra.prepare.prepare_task` returned it.
        variant: whether model selection follows the publication or stays clear of test data. Only
            Text differs: its published development set is the test set, the clean one a tenth of
            the training set.
        verify: compare checksums, which reads every byte; sizes are compared in any case.

    Raises:
        ArenaError: the folder is damaged, of another task or another version.
    """
    folder = Path(folder)
    manifest = read_manifest(name, folder)
    files = manifest["files"]
    arrays = {file: _map(name, folder / file, files[file]["bytes"]) for file in files}
    if verify:
        for file, array in arrays.items():
            if _checksum(array) != files[file]["crc32"]:
                raise ArenaError(f"{folder / file}: other bytes than were written; {_advice(name)}")
    ids, offsets = arrays[_IDS], arrays[_OFFSETS]
    splits = manifest.pop("variants")[variant]
    views = {}
    for split in SPLITS:
        rows = arrays[splits[split].pop("rows")]
        views[split] = Split(ids, offsets, arrays[_INPUTS][rows], arrays[_LABELS][rows])
    manifest |= {"variant": variant, "splits": splits}
    return ArenaData(task=TASKS[name], manifest=manifest, **views)


def read_manifest(name: str, folder: Path) -> dict[str, Any]:
    """The manifest of a prepared task.

    Raises:
        ArenaError: there is none, or it is of another task or version.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, task, digest = (manifest[key] for key in ("format_version", "task", "digest"))
        damaged = version == FORMAT_VERSION and digest != _digest(manifest)
    except FileNotFoundError as error:
        raise ArenaError(
            f"{folder}: not a prepared task, {MANIFEST} is missing; make one in a new folder with "
            f"python lra/prepare.py --task {name}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArenaError(
            f"{path}: not a readable manifest ({type(error).__name__}: {error}); {_advice(name)}"
        ) from error
    if task != name:
        raise ArenaError(f"{folder}: holds the task {task}, expected {name}; give another folder")
    if version != FORMAT_VERSION:
        raise ArenaError(f"{folder}: format {version}, expected {FORMAT_VERSION}; {_advice(name)}")
    if damaged:
        raise ArenaError(f"{path}: was changed after it was written; {_advice(name)}")
    return manifest


def _advice(name: str) -> str:
    return f"delete the folder and prepare it again (python lra/prepare.py --task {name})"


def _digest(manifest: dict[str, Any]) -> str:
    """Of the examples; where they came from does not count."""
    content = [manifest[key] for key in ("format_version", "task", "variants", "files")]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _map(name: str, path: Path, size: int) -> np.ndarray:
    """A memory map of a file that has the recorded size."""
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        state = "is missing" if found is None else f"has {found:,} bytes"
        raise ArenaError(f"{path}: {state}, expected {size:,} bytes; {_advice(name)}")
    try:
        # a plain array: slices of a memmap cost ten times as much
        return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except ValueError as error:
        raise ArenaError(f"{path}: damaged ({error}); {_advice(name)}") from error


def _checksum(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes, a block at a time."""
    checksum = 0
    flat = array.reshape(-1).view(np.uint8)
    for start in range(0, len(flat), _BLOCK):
        checksum = zlib.crc32(flat[start : start + _BLOCK].data, checksum)
    return checksum
