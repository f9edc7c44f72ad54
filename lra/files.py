"""Finding and opening the files of data sources."""

import gzip
import io
import logging
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lra.examples import DataError

logger = logging.getLogger(__name__)

# the archive of the release unpacks to a folder in a folder of the same name
_RELEASE = (".", "lra_release", "lra_release/lra_release")
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, tarfile.TarError)


class Member(NamedTuple):
    """A file in a folder or an archive."""

    where: str
    """For messages."""
    match: re.Match[str]
    """Of its name."""
    content: bytes


def find_in_release(source: Path, *names: str) -> Path:
    """A file or folder of the published release.

    Args:
        source: the unpacked release, or a folder in it.
        names: paths that it may have below `source`.

    Raises:
        DataError: there is none.
    """
    if not source.is_dir():
        raise DataError(f"{source}: expected a folder; an archive must be unpacked first")
    places = [source / base / name for base in _RELEASE for name in names]
    found = [place for place in places if place.exists()]
    if not found:
        raise DataError(f"{source}: expected {' or '.join(names)} in it or in lra_release below it")
    if len(found) > 1:
        ignored = ", ".join(map(str, found[1:]))
        logger.warning("reading %s, not %s; --source chooses", found[0], ignored)
    return found[0]


def lines_of(path: Path) -> Iterator[tuple[str, bytes]]:
    """Lines of a file, which may be compressed (`.gz`, `.xz`), without their ends.

    Returns:
        Place for messages, and bytes.

    Raises:
        DataError: the file is missing or damaged.
    """
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    opener = openers.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield f"{path}, line {number}", line.rstrip(b"\r\n")
    except _DAMAGE as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def fields_of(where: str, line: bytes, *names: str) -> list[bytes]:
    """Fields of a line of an unquoted TSV file.

    Raises:
        DataError: there are more or fewer than `names`.
    """
    fields = line.split(b"\t")
    if len(fields) != len(names):
        raise DataError(
            f"{where}: expected {len(names)} columns ({', '.join(names)}), found {len(fields)}"
        )
    return fields


def label_of(where: str, field: bytes, num_classes: int) -> int:
    """A label, also one written as 1.0.

    Raises:
        DataError: it is none, or out of range.
    """
    text = field.removesuffix(b".0")
    if text.isdigit() and int(text) < num_classes:
        return int(text)
    found = field[:40].decode(errors="replace")
    raise DataError(f"{where}: expected a label from 0 to {num_classes - 1}, found {found!r}")


def is_archive(path: Path) -> bool:
    """Whether a file is named like a tar archive."""
    return bool(re.search(r"\.(tar|tgz|tar\.\w+)$", path.name)) and path.is_file()


def members(source: Path, pattern: str) -> Iterator[Member]:
    """Files below a folder or in a tar archive whose names match.

    Args:
        source: an archive, a folder of files, or a folder that holds archives, which are read.
        pattern: regular expression, searched in the name with `/` between folders.

    Raises:
        DataError: an archive is damaged, or `source` is neither.
    """
    wanted = re.compile(pattern)
    if is_archive(source):
        yield from _archive_members(source, wanted)
    elif not source.is_dir():
        raise DataError(f"{source}: expected a folder or a tar archive")
    elif archives := sorted(filter(is_archive, source.iterdir())):
        for archive in archives:
            yield from _archive_members(archive, wanted)
    else:
        paths = ((path, path.relative_to(source).as_posix()) for path in source.rglob("*"))
        matches = ((path, wanted.search(name)) for path, name in paths)
        for path, match in sorted((path, match) for path, match in matches if match):
            yield Member(str(path), match, path.read_bytes())


def _archive_members(archive: Path, wanted: re.Pattern[str]) -> Iterator[Member]:
    try:
        with tarfile.open(archive, "r|*") as tar:
            for entry in tar:
                match = wanted.search(entry.name)
                file = tar.extractfile(entry) if match and entry.isfile() else None
                if match and file:
                    yield Member(f"{archive}: {entry.name}", match, file.read())
    except _DAMAGE as error:
        raise DataError(f"{archive}: not a readable archive ({error})") from error


def decode_image(where: str, content: bytes, mode: str, side: int) -> np.ndarray:
    """Pixels of a square image file.

    Args:
        where: for messages.
        content: bytes of the file.
        mode: `L` (grey) or `RGB`.
        side: expected height and width.

    Returns:
        `[side, side]` or `[side, side, 3]`, uint8.

    Raises:
        DataError: it is no image, or of another size.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.asarray(image.convert(mode))
    except (OSError, SyntaxError) as error:
        # damaged PNG files raise SyntaxError
        raise DataError(f"{where}: not a readable image ({error})") from error
    if pixels.shape[:2] != (side, side):
        found = f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise DataError(f"{where}: expected an image of {side} x {side} pixels, found {found}")
    return pixels


def load_hub(name: str, advice: str) -> Any:
    """A data set of the Hugging Face hub with all its splits, downloaded or from the local cache.

    Raises:
        DataError: it cannot be had; the message ends with `advice`.
    """
    # a second to import, and needed by this kind of source only
    import datasets

    try:
        return datasets.load_dataset(name)
    except (ConnectionError, FileNotFoundError, RuntimeError, ValueError) as error:
        raise DataError(f"the hub's {name} cannot be loaded ({error}); {advice}") from error
