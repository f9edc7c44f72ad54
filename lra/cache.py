"""A prepared task on disk: encoded once, memory-mapped by every run.

A folder holds the different sequences end to end (`ids.npy`, `offsets.npy`), which sequences an
example is made of and its label (`inputs.npy`, `labels.npy`), the examples of each split
(`rows-*.npy`), and `manifest.json`, written last.
"""

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from lra.examples import DataError, Example
from lra.tasks import TASKS, Task
from ponet.checkpoint import current_umask, write_json

FORMAT_VERSION = 1
"""Raise it when the files change, or when an encoding does."""

MANIFEST = "manifest.json"

Variant = Literal["published", "clean"]
"""Whether model selection follows the publication or stays clear of test data. Only Text differs:
its published development set is the test set, the clean one a tenth of the training set."""

SPLITS = ("train", "dev", "test")

_IDS, _OFFSETS, _INPUTS, _LABELS = "ids.npy", "offsets.npy", "inputs.npy", "labels.npy"
_BLOCK = 2**24


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
        """Number of examples."""
        return len(self.labels)

    def ids(self, index: int) -> tuple[np.ndarray, ...]:
        """The inputs of an example: for each `[tokens]`, uint8 or uint16, cut but not padded."""
        bounds = zip(self.starts[index], self.lengths[index], strict=True)
        return tuple(self.stream[start : start + length] for start, length in bounds)

    @property
    def majority_rate(self) -> float:
        """Accuracy of always answering the most frequent label."""
        return float(np.bincount(self.labels).max() / len(self.labels))


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """A task's examples."""

    task: Task
    """What the task is."""
    train: Split
    """Examples to train on."""
    dev: Split
    """Examples to select a checkpoint on."""
    test: Split
    """Examples to report."""
    manifest: dict[str, Any]
    """`source`, `settings` and `skipped` of the preparation, `digest` (the same for the same
    examples on any machine), `variant`, and by split the `examples`, `label_counts`,
    `majority_rate` and `mean_tokens`."""


def write_task(
    folder: Path,
    task: Task,
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
        folder: where to; it must not exist.
        task: the task.
        examples: of all splits, in any order.
        source: where they come from, for the manifest.
        settings: what else decided them, for the manifest.
        skipped: records that were left out, by place and reason; read after the last example.
        seed: of the development set that is cut.

    Returns:
        `folder`.

    Raises:
        DataError: the folder exists, or a split is empty.
        OSError: the disk is full or cannot be written.
    """
    if folder.exists():
        raise DataError(f"{folder}: already exists; delete it to prepare {task.name} again")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        store = _Store(unfinished, task)
        for example in examples:
            store.add(example)
        manifest = {
            "format_version": FORMAT_VERSION,
            "task": task.name,
            "source": source,
            "settings": settings or {},
            "skipped": {"records": len(skipped), "first": list(skipped[:5])},
            **store.finish(source, seed),
        }
        manifest["digest"] = _digest(manifest)
        write_json(unfinished / MANIFEST, manifest)
        # a folder made by mkdtemp is private; the cache is not
        unfinished.chmod(0o777 & ~current_umask())
        unfinished.rename(folder)
    except OSError as error:
        if error.filename is not None:
            raise
        # errors of writing name no file
        free = shutil.disk_usage(folder.parent).free // 2**20
        message = f"cannot be written ({free} MiB free): {error.strerror}"
        raise OSError(error.errno, message, str(folder)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def load_task(
    name: str, folder: str | Path, variant: Variant = "published", *, verify: bool = False
) -> TaskData:
    """Map a prepared task.

    Args:
        name: key in `lra.tasks.TASKS`.
        folder: as `write_task` or `lra.prepare.prepare_task` returned it.
        variant: which development set, see `Variant`.
        verify: compare checksums, which reads every byte; sizes are compared in any case.

    Raises:
        DataError: the folder is damaged, of another task or another version.
        ValueError: there is no such task or variant.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be one of {', '.join(get_args(Variant))}, got {variant!r}")
    folder = Path(folder)
    manifest = read_manifest(name, folder)
    files = manifest["files"]
    arrays = {file: _map(name, folder / file, files[file]["bytes"]) for file in files}
    if verify:
        for file, array in arrays.items():
            if _checksum(array) != files[file]["crc32"]:
                raise DataError(f"{folder / file}: other bytes than were written; {_advice(name)}")
    ids, offsets = arrays[_IDS], arrays[_OFFSETS]
    splits = manifest.pop("variants")[variant]
    views = {}
    for split in SPLITS:
        rows = arrays[splits[split].pop("rows")]
        views[split] = Split(ids, offsets, arrays[_INPUTS][rows], arrays[_LABELS][rows])
    manifest |= {"variant": variant, "splits": splits}
    return TaskData(task=TASKS[name], manifest=manifest, **views)


def read_manifest(name: str, folder: Path) -> dict[str, Any]:
    """The manifest of a prepared task.

    Raises:
        DataError: there is none, or it is of another task or version.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, task, digest = (manifest[key] for key in ("format_version", "task", "digest"))
        damaged = version == FORMAT_VERSION and digest != _digest(manifest)
    except FileNotFoundError as error:
        raise DataError(
            f"{folder}: not a prepared task, {MANIFEST} is missing; make one in a new folder with "
            f"python lra/prepare.py --task {name}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a readable manifest ({type(error).__name__}: {error}); {_advice(name)}"
        ) from error
    if task != name:
        raise DataError(f"{folder}: holds the task {task}, expected {name}; give another folder")
    if version != FORMAT_VERSION:
        raise DataError(f"{folder}: format {version}, expected {FORMAT_VERSION}; {_advice(name)}")
    if damaged:
        raise DataError(f"{path}: was changed after it was written; {_advice(name)}")
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
        raise DataError(f"{path}: {state}, expected {size:,} bytes; {_advice(name)}")
    try:
        # a plain array: slices of a memmap cost ten times as much
        return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); {_advice(name)}") from error


def _checksum(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes, a block at a time."""
    checksum = 0
    flat = array.reshape(-1).view(np.uint8)
    for start in range(0, len(flat), _BLOCK):
        checksum = zlib.crc32(flat[start : start + _BLOCK].data, checksum)
    return checksum


class _GrowingArray:
    """A one-dimensional `.npy` file that is appended to."""

    def __init__(self, path: Path, dtype: type[np.unsignedinteger]) -> None:
        self.path = path
        self.size = 0
        self.dtype = np.dtype(dtype)
        self._checksum = 0
        self._file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        """Written first and last; numpy leaves room in it for the final length."""
        shape = (self.size,)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array, dtype=self.dtype).view(np.uint8).data
        self._file.write(data)
        self._checksum = zlib.crc32(data, self._checksum)
        self.size += len(array)

    def close(self) -> dict[str, int]:
        """Finish the file.

        Returns:
            Its entry in the manifest.
        """
        with self._file:
            data_start = self._file.tell() - self.size * self.dtype.itemsize
            self._file.seek(0)
            self._write_header()
            assert self._file.tell() == data_start, "the header did not keep its length"
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"bytes": self.path.stat().st_size, "crc32": self._checksum}


class _Store:
    """Files of a task while they are written."""

    def __init__(self, folder: Path, task: Task) -> None:
        self._folder = folder
        self._task = task
        # bytes are stored as 1..256, all other ids fit eight bits
        wide = task.kind == "tokens" and task.vocab_size > 256
        self._ids = _GrowingArray(folder / _IDS, np.uint16 if wide else np.uint8)
        self._offsets = [0]
        self._numbers: dict[bytes, int] = {}
        self._inputs: list[list[int]] = []
        self._labels: list[int] = []
        self._rows: dict[str, list[int]] = {split: [] for split in SPLITS}

    def add(self, example: Example) -> None:
        """Append an example; sequences equal to earlier ones are stored once."""
        task = self._task
        assert 0 <= example.label < task.num_classes, example.label
        assert len(example.inputs) == task.num_inputs, len(example.inputs)
        self._rows[example.split].append(len(self._labels))
        self._labels.append(example.label)
        self._inputs.append([self._number(ids) for ids in example.inputs])

    def _number(self, ids: np.ndarray) -> int:
        assert 0 < len(ids) <= self._task.max_tokens, len(ids)
        # documents of Retrieval stand in many pairs
        digest = hashlib.blake2b(ids.astype(self._ids.dtype).tobytes(), digest_size=16).digest()
        number = self._numbers.setdefault(digest, len(self._numbers))
        if number == len(self._offsets) - 1:
            self._ids.append(ids)
            self._offsets.append(self._ids.size)
        return number

    def finish(self, source: str, seed: int) -> dict[str, Any]:
        """Write what is not written yet.

        Returns:
            The entries `dtype`, `sequences`, `tokens`, `variants` and `files` of the manifest.
        """
        labels = np.array(self._labels, np.uint8)
        variants, rows = self._divide(labels, source, seed)
        files = {_IDS: self._ids.close()}
        arrays = {
            _OFFSETS: np.array(self._offsets, np.int64),
            _INPUTS: np.array(self._inputs, np.int64),
            _LABELS: labels,
            **rows,
        }
        for name, array in arrays.items():
            path = self._folder / name
            np.save(path, array, allow_pickle=False)
            files[name] = {"bytes": path.stat().st_size, "crc32": _checksum(array)}
        lengths = np.diff(arrays[_OFFSETS])[arrays[_INPUTS]]
        described = {
            variant: {
                split: {"rows": file, **self._describe(labels[rows[file]], lengths[rows[file]])}
                for split, file in splits.items()
            }
            for variant, splits in variants.items()
        }
        return {
            "dtype": self._ids.dtype.name,
            "sequences": len(self._numbers),
            "tokens": self._ids.size,
            "variants": described,
            "files": files,
        }

    def _describe(self, labels: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
        counts = np.bincount(labels, minlength=self._task.num_classes)
        return {
            "examples": len(labels),
            "label_counts": counts.tolist(),
            "majority_rate": float(counts.max() / len(labels)),
            "mean_tokens": float(lengths.mean()),
        }

    def _divide(
        self, labels: np.ndarray, source: str, seed: int
    ) -> tuple[dict[str, dict[str, str]], dict[str, np.ndarray]]:
        """The file of each split in both variants, and the rows in those files."""
        rows = {split: np.array(found, np.int64) for split, found in self._rows.items()}
        missing = [split for split in ("train", "test") if not len(rows[split])]
        if not len(rows["dev"]) and self._task.dev_from == "source":
            missing.append("dev")
        if missing:
            raise DataError(f"{source}: no example for {', '.join(missing)}")
        own = {split: f"rows-{split}.npy" for split in SPLITS}
        if len(rows["dev"]):
            return {"published": own, "clean": own}, {own[split]: rows[split] for split in SPLITS}
        train = rows["train"]
        cut = draw_tenth(labels[train], seed)
        if not 0 < cut.sum() < len(cut):
            raise DataError(f"{source}: {len(cut)} training examples, too few to cut a dev set")
        if self._task.dev_from == "train":
            files = {"train": train[~cut], "dev": train[cut], "test": rows["test"]}
            variants = {"published": own, "clean": own}
            return variants, {own[split]: files[split] for split in SPLITS}
        clean = {"train": "rows-train-clean.npy", "dev": "rows-dev-clean.npy", "test": own["test"]}
        published = own | {"dev": own["test"]}
        return {"published": published, "clean": clean}, {
            own["train"]: train,
            own["test"]: rows["test"],
            clean["train"]: train[~cut],
            clean["dev"]: train[cut],
        }


def draw_tenth(groups: np.ndarray, seed: int) -> np.ndarray:
    """Choose a seeded tenth of each group, at least one member.

    Args:
        groups: the group of each item, `[items]`.
        seed: of the choice.

    Returns:
        Whether each item is chosen, `[items]`, bool.
    """
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(groups), bool)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        chosen[rng.permutation(members)[: max(1, round(len(members) / 10))]] = True
    return chosen
