"""A prepared task on disk: encoded once, memory-mapped by every run.

A folder holds the different sequences end to end (`ids.npy`, `offsets.npy`), which sequences an
example is made of and its label (`inputs.npy`, `labels.npy`), the examples of each split
(`rows-*.npy`), and `manifest.json`, written last.
"""

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lra.tasks import GENERATED, TASKS, ArenaTask, ProtocolName
from ponet.files import write_json

DATA_DIR = "data/lra"
"""Where prepared tasks are kept, below the current folder."""

FORMAT_VERSION = 1
"""Raise it when the files change, or when an encoding does."""

MANIFEST = "manifest.json"
SPLITS = ("train", "dev", "test")

_IDS, _OFFSETS, _INPUTS, _LABELS = "ids.npy", "offsets.npy", "inputs.npy", "labels.npy"


class ArenaError(ValueError):
    """Data that are absent, damaged or not what a task needs, in words for whoever named them."""


class Example(NamedTuple):
    """One encoded example: a split of `SPLITS`, and `[tokens]` unsigned integers per input."""

    split: str
    label: int
    inputs: tuple[np.ndarray, ...]


class Split:
    """The examples of one split; sequences stay on disk until they are asked for."""

    def __init__(
        self, ids: np.ndarray, offsets: np.ndarray, inputs: np.ndarray, labels: np.ndarray
    ) -> None:
        """Make a view of sequences end to end `[tokens]`, their borders `[sequences + 1]`, the
        sequence of each input `[examples, num_inputs]`, and labels `[examples]`.
        """
        self.stream = ids
        """Sequences end to end, those of the other splits among them, uint8 or uint16."""
        self.starts = offsets[inputs]
        """Where each input begins there, `[examples, num_inputs]`, int64."""
        self.lengths = offsets[inputs + 1] - self.starts
        """Tokens of each input, `[examples, num_inputs]`, int64."""
        self.labels = labels.astype(np.int64)

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
    """`source`, `settings` and `skipped` of the preparation, `generator` (version of the law) of a
    generated task, `digest` (the same for the same examples on any machine), `variant`, and by
    split the `examples`, `label_counts`, `majority_rate` and `mean_tokens`."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Examples of training, development and test."""
        return tuple(len(split) for split in (self.train, self.dev, self.test))

    @property
    def is_whole(self) -> bool:
        """Whether the splits have the published sizes, and generated ones follow today's law."""
        train, dev, test = self.sizes
        if self.note:
            return False
        if self.manifest["variant"] == "clean" and self.task.dev_from == "test":
            # published, the development set is the test set; clean, a part of the training set
            return (train + dev, test) == (self.task.split_sizes[0], self.task.split_sizes[2])
        return self.sizes == self.task.split_sizes

    @property
    def note(self) -> str:
        """What sets generated examples apart from those of today's law."""
        return self.task.note(self.manifest["source"], self.manifest.get("generator", 1))

    def describe(self) -> dict[str, Any]:
        """What a result says of its data."""
        names = ("digest", "source", "generator")
        origin = {name: self.manifest[name] for name in names if name in self.manifest}
        note = {"note": self.note} if self.note else {}
        return origin | dict(zip(SPLITS, self.sizes, strict=True)) | note


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
    """Store examples; the folder appears whole or not at all. No other process may do the same.

    Where the examples, in any order, hold no development set, a tenth of each class of the
    training set, drawn by `seed`, becomes it; for Text this is the clean one, and the published one
    is the test set. `source` and `settings` say in the manifest where the examples come from,
    `skipped` which records were left out, by place and reason; it is read after the last example.

    Raises:
        ArenaError: the folder exists, or a split is empty.
        OSError: the disk is full or cannot be written.
    """
    if folder.exists():
        raise ArenaError(f"{folder}: already exists; delete it to prepare {task.name} again")
    unfinished = folder.with_name(f".{folder.name}-unfinished")
    # left by a process that was killed
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        manifest = {
            "format_version": FORMAT_VERSION,
            "task": task.name,
            "source": source,
            **({"generator": task.law} if source == GENERATED else {}),
            "settings": settings or {},
            **_write_arrays(unfinished, task, examples, source, seed),
            "skipped": {"records": len(skipped), "first": list(skipped[:5])},
        }
        manifest["digest"] = _digest(manifest)
        write_json(unfinished / MANIFEST, manifest)
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
    # bytes are stored as 1..256, all other ids fit eight bits
    dtype = np.dtype(np.uint16 if task.kind == "tokens" and task.vocab_size > 256 else np.uint8)
    raw = folder / "ids.raw"
    arrays, rows = _write_raw(raw, dtype, task, examples)
    variants, of_splits = _divide(task, rows, arrays[_LABELS], source, seed)
    arrays = {_IDS: np.memmap(raw, dtype, "r"), **arrays, **of_splits}
    files = {}
    for name, array in arrays.items():
        np.save(folder / name, array, allow_pickle=False)
        size = (folder / name).stat().st_size
        files[name] = {"bytes": size, "crc32": zlib.crc32(array.data)}
    raw.unlink()
    return {
        "dtype": dtype.name,
        "sequences": len(arrays[_OFFSETS]) - 1,
        "tokens": len(arrays[_IDS]),
        "variants": {
            variant: {split: _describe(name, arrays, task) for split, name in of.items()}
            for variant, of in variants.items()
        },
        "files": files,
    }


def _write_raw(
    raw: Path, dtype: np.dtype, task: ArenaTask, examples: Iterable[Example]
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
            rows[example.split].append(len(labels))
            labels.append(example.label)
            inputs.append([])
            for ids in example.inputs:
                assert 0 < len(ids) <= task.max_tokens, len(ids)
                content = ids.astype(dtype).tobytes()
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


def _view(name: str, arrays: dict[str, np.ndarray]) -> Split:
    """A split by the file that holds its rows."""
    rows = arrays[name]
    return Split(arrays[_IDS], arrays[_OFFSETS], arrays[_INPUTS][rows], arrays[_LABELS][rows])


def _describe(name: str, arrays: dict[str, np.ndarray], task: ArenaTask) -> dict[str, Any]:
    split = _view(name, arrays)
    return {
        "rows": name,
        "examples": len(split),
        "label_counts": np.bincount(split.labels, minlength=task.num_classes).tolist(),
        "majority_rate": split.majority_rate,
        "mean_tokens": float(split.lengths.mean()),
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
    variants = {"published": own, "clean": own}
    arrays = {own[split]: rows[split] for split in SPLITS}
    if len(rows["dev"]):
        return variants, arrays
    train = rows["train"]
    cut = draw_tenth(labels[train], seed)
    if cut.all():
        raise ArenaError(f"{source}: {len(cut)} training examples, too few to cut a dev set")
    if task.dev_from == "train":
        return variants, arrays | {own["train"]: train[~cut], own["dev"]: train[cut]}
    del arrays[own["dev"]]
    clean = {"train": "rows-train-clean.npy", "dev": "rows-dev-clean.npy"}
    variants = {"published": own | {"dev": own["test"]}, "clean": own | clean}
    return variants, arrays | {clean["train"]: train[~cut], clean["dev"]: train[cut]}


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

    The variants differ for Text only, whose published development set is the test set, the clean
    one a tenth of the training set. `verify` compares checksums, which reads every byte; sizes are
    compared in any case.

    Raises:
        ArenaError: the folder is damaged, of another task or another version.
    """
    folder = Path(folder)
    manifest = _read_manifest(name, folder)
    arrays = {}
    for file, expected in manifest["files"].items():
        path = folder / file
        try:
            # a plain array: slices of a memmap cost ten times as much
            array = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        except (OSError, ValueError, EOFError) as error:
            raise ArenaError(f"{path}: cannot be read ({error}); {_advice(name)}") from error
        size = path.stat().st_size
        if size != expected["bytes"] or (verify and zlib.crc32(array.data) != expected["crc32"]):
            raise ArenaError(f"{path}: other bytes than were written; {_advice(name)}")
        arrays[file] = array
    splits = manifest.pop("variants")[variant]
    views = {split: _view(splits[split].pop("rows"), arrays) for split in SPLITS}
    manifest |= {"variant": variant, "splits": splits}
    return ArenaData(task=TASKS[name], manifest=manifest, **views)


def _read_manifest(name: str, folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, task = manifest["format_version"], manifest["task"]
        damaged = manifest["digest"] != _digest(manifest)
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
    """Of the examples; where they came from does not count, but for the law that changed."""
    content = [manifest[key] for key in ("format_version", "task", "variants", "files")]
    if (generator := manifest.get("generator", 1)) > 1:
        content.append(generator)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
