"""Readers of CIFAR-10 (Image) and of Pathfinder's image files."""

import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lra.encoding import grey_levels
from lra.examples import DataError, Example
from lra.files import decode_image, find_in_release, members
from lra.tasks import TASKS, Task

_IMAGE = TASKS["image"]
_SIDE = 32
_CIFAR = (
    r"(?:^|/)(?:(?P<batch>data_batch_[1-5]|test_batch)"
    r"|(?P<split>train|test)/(?P<name>[^/]+)/[^/]+\.(?:png|jpe?g))$"
)
_METADATA = "curv_contour_length_14/metadata"


def read_cifar(source: Path) -> Iterator[Example]:
    """Grey images of CIFAR-10, training and test set.

    The published development set is the last tenth of the training set in an order that only the
    TensorFlow data set has, so `lra.cache.write_task` draws one.

    Args:
        source: a folder or tar archive (or a folder of archives) with the batches of the Python
            version, or with images as `train/<class>/*.png`, `test/<class>/*.png` (or `.jpg`).

    Raises:
        DataError: a batch or an image is damaged, or a class is unknown.
    """
    for where, match, content in members(source, _CIFAR):
        if match["batch"]:
            split = "test" if match["batch"] == "test_batch" else "train"
            for image, label in zip(*read_batch(where, content), strict=True):
                yield _image(split, int(label), image)
        elif match["name"] in _IMAGE.class_names:
            image = decode_image(where, content, "RGB", _SIDE)
            yield _image(match["split"], _IMAGE.class_names.index(match["name"]), image)
        else:
            expected = ", ".join(_IMAGE.class_names)
            raise DataError(f"{where}: unknown class {match['name']!r}, expected {expected}")


def cifar_of(dataset: Any) -> Iterator[Example]:
    """Grey images of the hub's data set; see `read_cifar`."""
    for split in ("train", "test"):
        for row in dataset[split]:
            yield _image(split, row["label"], np.asarray(row["img"].convert("RGB")))


def _image(split: str, label: int, image: np.ndarray) -> Example:
    return Example(split, label, (grey_levels(image).reshape(-1),))


class _Array:
    """What a pickled array holds, without numpy's own code for it."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, _, self.content = state


class _Dtype:
    """A pickled element type."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        self.code = code.decode() if isinstance(code, bytes) else code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Byte order and such, nothing to a byte."""


class _BatchUnpickler(pickle.Unpickler):
    """Reads containers, numbers, bytes and arrays; every name in a file is answered by ours."""

    _names: ClassVar[dict[str, Any]] = {
        "_reconstruct": lambda *_: _Array(),
        "ndarray": _Array,
        "dtype": _Dtype,
        # how Python 3 writes bytes for Python 2
        "encode": lambda text, _: text.encode("latin1"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] in ("numpy", "_codecs") and name in self._names:
            return self._names[name]
        raise pickle.UnpicklingError(f"the file names {module}.{name}, which no batch needs")


def read_batch(where: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a batch of CIFAR-10's Python version; runs no code of the file.

    Args:
        where: for messages.
        content: bytes of the file.

    Returns:
        `[images, 32, 32, 3]`, uint8, and `[images]`, int64.

    Raises:
        DataError: it is no such batch.
    """
    try:
        loaded = _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: loaded[key] for key in loaded}
        data, labels = batch["data"], np.array(batch["labels"])
        if data.dtype.code not in ("u1", "|u1"):
            raise DataError(f"{where}: expected pixels of type u1, found {data.dtype.code}")
        pixels = np.frombuffer(data.content, np.uint8).reshape(data.shape)
        images = pixels.reshape(len(labels), 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    except DataError:
        raise
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise DataError(f"{where}: not a batch of CIFAR-10 ({error})") from error
    if labels.dtype.kind != "i" or labels.min() < 0 or labels.max() >= _IMAGE.num_classes:
        raise DataError(f"{where}: expected labels from 0 to {_IMAGE.num_classes - 1}")
    return images, labels


def read_pathfinder(task: Task, source: Path, skipped: list[str], seed: int) -> Iterator[Example]:
    """Images of the release, divided by a seeded shuffle into 80, 10 and 10 per cent.

    Args:
        task: `pathfinder` or `pathx`.
        source: the release, its folder `pathfinder32` (`pathfinder128`), or the folder
            `curv_contour_length_14` in it.
        skipped: gets the names of empty image files, of which the release has some.
        seed: of the shuffle.

    Raises:
        DataError: an image is missing or damaged, or a line of the metadata is none.
    """
    side = round(task.max_tokens**0.5)
    names = ("metadata", _METADATA, f"pathfinder{side}/{_METADATA}")
    rows = []
    for where, path, label in _metadata(find_in_release(source, *names)):
        if not path.is_file():
            raise DataError(f"{where}: the image {path} is missing")
        if path.stat().st_size:
            rows.append((path, label))
        else:
            skipped.append(f"{path}: empty file")
    ranks = np.random.default_rng(seed).permutation(len(rows))
    bounds = (len(rows) * 8 // 10, len(rows) * 9 // 10)
    places = np.searchsorted(bounds, ranks, side="right")
    for (path, label), place in zip(rows, places, strict=True):
        pixels = decode_image(str(path), path.read_bytes(), "L", side)
        yield Example(("train", "dev", "test")[place], label, (pixels.reshape(-1),))


def _metadata(folder: Path) -> Iterator[tuple[str, Path, int]]:
    """Place, image and label of each line of `0.npy`, `1.npy`, ..., which are text files."""
    files = [path for path in folder.iterdir() if re.fullmatch(r"\d+\.npy", path.name)]
    for file in sorted(files, key=lambda path: int(path.stem)):
        try:
            lines = file.read_text(encoding="ascii").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: expected lines of text ({error})") from error
        for number, line in enumerate(lines, start=1):
            where, fields = f"{file}, line {number}", line.split()
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise DataError(
                    f"{where}: expected folder, file, number, label (0 or 1), found {line[:60]!r}"
                )
            yield where, folder.parent / fields[0] / fields[1], int(fields[3])
