"""Documents from text sources: files, folders, hub data sets and what is already on the machine.

A source is a string:

- `builtin`: English documentation of the installed Python packages (`builtin_text.py`);
- a file or a folder (all readable files below it, in the order of their names): `.txt`, `.md`,
  `.jsonl`, `.json`, `.parquet`, each also with `.gz` or `.xz` behind it;
- a hub data set: `wikitext`, `wikipedia` or `org/name[:config]`, its train split.

A local path wins over a hub name. What a document is:

- a row of a `.jsonl`, `.json` (one object per line) or `.parquet` file or of a data set;
- a text file up to 1 MiB; in a larger one, the stretches between blank lines;
- in files and data sets that begin with a ` = Title = ` heading (WikiText): an article.

Paragraphs are the lines of a document. In text files a line of 50 characters or more that does not
end a sentence continues on the next one, so hard-wrapped text is joined.
"""

import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, groupby, tee
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ponet.run.hub import import_datasets
from pretrain.builtin_text import BUILTIN_VERSION, builtin_documents, builtin_files

READER_VERSION = 1
"""Part of every cache key: raise it when other documents come out of the same files."""

BUILTIN = "builtin"

HUB_NAMES = {
    "wikitext": "Salesforce/wikitext:wikitext-103-raw-v1",
    "wikipedia": "wikimedia/wikipedia:20231101.en",
}

_FORMATS = (".txt", ".md", ".jsonl", ".json", ".parquet")
_COMPRESSIONS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_FORMAT_LIST = f"{', '.join(_FORMATS)} (also with {' or '.join(_COMPRESSIONS)})"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")
_TITLE = re.compile(r"\s*= [^=\s](?:[^=]*[^=\s])? =\s*$")
_HEADING = re.compile(r"\s*= = .* = =\s*$")
_SENTENCE_END = re.compile(r"[.!?:;][\"')\]]*$")
_WRAPPED_LINE = 50
_WHOLE_FILE = 2**20


# where it stands, and its fields
_Record = tuple[str, dict[str, Any]]


class SourceError(ValueError):
    """A source that cannot be read, in words for whoever named it."""


@dataclass(kw_only=True)
class SourceReport:
    """What was read and what was passed over; filled while documents are drawn."""

    documents: int = 0
    characters: int = 0
    skipped_empty: int = 0
    skipped_duplicates: int = 0
    skipped_files: int = 0
    """Files of unknown type in folders."""

    def __str__(self) -> str:
        return ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in vars(self).items())


class _Source(NamedTuple):
    """What a name stands for: files, or else the builtin text or a hub data set."""

    spec: str
    files: tuple[Path, ...] = ()
    ignored_files: int = 0


def iter_documents(
    source_specs: Sequence[str],
    text_field: str = "text",
    *,
    max_characters: int | None = None,
    report: SourceReport | None = None,
) -> Iterator[str]:
    """Documents of all sources, one source after the other, none twice.

    Args:
        source_specs: sources as described at the top of this file.
        text_field: field of a JSON record, or column of a table, that holds the text.
        max_characters: stop after the document that reaches this many characters.
        report: takes the counts.

    Raises:
        SourceError: a source is unknown, empty or damaged; the message names file and line.
    """
    if max_characters is not None and max_characters < 1:
        raise SourceError(f"max_characters must be positive, got {max_characters}")
    sources = [_resolve(spec) for spec in source_specs]
    return _draw(sources, text_field, max_characters, report or SourceReport())


def _draw(
    sources: list[_Source], text_field: str, max_characters: int | None, report: SourceReport
) -> Iterator[str]:
    """Clean, count and de-duplicate what the sources hold."""
    seen: set[int] = set()
    for source in sources:
        report.skipped_files += source.ignored_files
        found = False
        for document in map(_clean, _read(source, text_field)):
            if not document:
                report.skipped_empty += 1
                continue
            found = True
            # 64 bits: among ten million documents one chance in 400,000 to drop one wrongly
            digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
            fingerprint = int.from_bytes(digest)
            if fingerprint in seen:
                report.skipped_duplicates += 1
                continue
            seen.add(fingerprint)
            report.documents += 1
            report.characters += len(document)
            yield document
            if max_characters is not None and report.characters >= max_characters:
                return
        if not found:
            raise SourceError(f"{source.spec}: no text found")


def _clean(text: str) -> str:
    """Non-empty stripped lines; half surrogate pairs, which JSON can spell, become U+FFFD."""
    document = "\n".join(filter(None, map(str.strip, text.split("\n"))))
    return document.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def content_key(
    source_specs: Sequence[str], text_field: str = "text", *, max_characters: int | None = None
) -> str:
    """Hash of everything that decides which documents `iter_documents` gives: 64 hex digits.

    Bytes of files count, their names, places and times do not; of a hub data set its fingerprint.
    """
    parts: list[Any] = [READER_VERSION, text_field, max_characters]
    for source in map(_resolve, source_specs):
        if source.files:
            parts.append([[_format_of(path), _sha256(path)] for path in source.files])
        elif source.spec == BUILTIN:
            digests = [[path.name, _sha256(path)] for path in builtin_files()]
            parts.append([BUILTIN, BUILTIN_VERSION, digests])
        else:
            parts.append(["hub", _load_hub(source.spec)._fingerprint])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _resolve(spec: str) -> _Source:
    path = Path(spec).expanduser()
    if spec == BUILTIN:
        return _Source(spec)
    if path.is_dir():
        return _resolve_folder(spec, path)
    if path.exists():
        if _format_of(path) not in _FORMATS:
            raise SourceError(f"{spec}: expected a file of type {_FORMAT_LIST}")
        return _Source(spec, (path,))
    if spec in HUB_NAMES or (_HUB_ID.fullmatch(spec) and _format_of(path) not in _FORMATS):
        return _Source(spec)
    raise SourceError(
        f"{spec!r} is neither a file or folder here nor a known source; expected {BUILTIN}, a "
        f"path, {', '.join(HUB_NAMES)}, or a hub data set as org/name[:config]"
    )


def _resolve_folder(spec: str, folder: Path) -> _Source:
    """All readable files below a folder in the order of their relative names."""
    names = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    readable = [name for name in shown if _format_of(name) in _FORMATS]
    if not readable:
        raise SourceError(f"{spec}: no file of type {_FORMAT_LIST} in this folder or below it")
    files = tuple(names[name] for name in sorted(readable, key=Path.as_posix))
    return _Source(spec, files, ignored_files=len(shown) - len(files))


def _format_of(path: Path) -> str:
    """Suffix that says how a file is read, the one before a compression's."""
    plain = path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path
    return plain.suffix.lower()


def _read(source: _Source, text_field: str) -> Iterator[str]:
    if source.files:
        return chain.from_iterable(_read_file(path, text_field) for path in source.files)
    if source.spec == BUILTIN:
        return builtin_documents()
    dataset = _load_hub(source.spec)
    if text_field in dataset.column_names:
        dataset = dataset.select_columns([text_field])
    return _row_documents(_numbered(source.spec, dataset), text_field)


@cache
def _load_hub(spec: str) -> Any:
    """The train split of a hub data set, downloaded or from the local cache."""
    datasets = import_datasets()

    hub_id, _, config = HUB_NAMES.get(spec, spec).partition(":")
    try:
        return datasets.load_dataset(hub_id, config or None, split="train")
    # HF_HUB_OFFLINE or no network; not found; a loading script; no such configuration or split
    except (ConnectionError, FileNotFoundError, RuntimeError, ValueError) as error:
        raise SourceError(
            f"{spec}: cannot load {hub_id} from the hub ({error}); give a local copy with "
            "--data PATH"
        ) from error


def _read_file(path: Path, text_field: str) -> Iterator[str]:
    file_format = _format_of(path)
    try:
        if path.stat().st_size == 0:
            # one empty record in whatever format
            yield ""
        elif file_format == ".parquet":
            yield from _row_documents(_parquet_records(path, text_field), text_field)
        elif file_format in (".jsonl", ".json"):
            yield from _row_documents(_json_records(path), text_field)
        else:
            yield from _text_documents(path)
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise SourceError(f"{path}: the compressed file is damaged ({error})") from error


def _open(path: Path) -> IO[bytes]:
    return _COMPRESSIONS.get(path.suffix.lower(), open)(path, "rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file without their line ends."""
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if b"\0" in line:
                raise SourceError(f"{path}, line {number}: a NUL byte; expected text, found binary")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise SourceError(f"{path}, line {number}: expected UTF-8 ({error})") from None
            yield number, text.removeprefix("\ufeff").rstrip("\r\n")


def _json_records(path: Path) -> Iterator[_Record]:
    """Records of a file with one JSON object per line; blank lines are passed over."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise SourceError(f"{where}: expected one JSON object per line ({error})") from None
        if not isinstance(record, dict):
            found = type(record).__name__
            raise SourceError(f"{where}: expected one JSON object per line, found a {found}")
        yield where, record


def _parquet_records(path: Path, text_field: str) -> Iterator[_Record]:
    packed = path.suffix.lower() in _COMPRESSIONS
    try:
        with _open(path) as file:
            # the reader begins at the end of a file, where a compressed one cannot be entered
            table = pq.ParquetFile(pa.BufferReader(file.read()) if packed else file)
            columns = [text_field] if text_field in table.schema_arrow.names else None
            batches = table.iter_batches(columns=columns)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from _numbered(str(path), rows)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{path}: not a readable parquet file ({error})") from error


def _numbered(where: str, rows: Iterable[dict[str, Any]]) -> Iterator[_Record]:
    return ((f"{where}, row {number}", row) for number, row in enumerate(rows))


def _row_documents(records: Iterable[_Record], text_field: str) -> Iterator[str]:
    """Texts of rows, unless they are the lines of WikiText."""
    rows, ahead = tee(_texts(records, text_field))
    return _articles(rows) if _is_wikitext(ahead) else rows


def _texts(records: Iterable[_Record], text_field: str) -> Iterator[str]:
    for where, record in records:
        if text_field not in record:
            fields = ", ".join(record) or "no field"
            raise SourceError(f"{where}: no field {text_field!r}; found {fields}")
        text = record[text_field]
        if not isinstance(text, str | None):
            found = type(text).__name__
            raise SourceError(f"{where}: expected text in field {text_field!r}, found {found}")
        yield text or ""


def _text_documents(path: Path) -> Iterator[str]:
    """Documents of a text file by the rule at the top of this file."""
    lines = (line for _, line in _lines(path))
    head: list[str] = []
    size = 0
    for line in lines:
        head.append(line)
        size += len(line) + 1
        if size > _WHOLE_FILE:
            break
    lines = chain(head, lines)
    if _is_wikitext(head):
        yield from _articles(lines)
    elif size <= _WHOLE_FILE:
        yield _unwrap(lines)
    else:
        for blank, document in groupby(lines, lambda line: not line.strip()):
            if not blank:
                yield _unwrap(document)


def _is_wikitext(lines: Iterable[str]) -> bool:
    first = next((line for line in lines if line.strip()), "")
    return _TITLE.match(first) is not None


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """Articles of WikiText without headings."""
    article: list[str] = []
    previous = ""
    for line in lines:
        # a real title stands between blank lines; " = 0 = " within a table does not
        if _TITLE.match(line) and not previous.strip():
            if article:
                yield "\n".join(article)
            article = []
        elif line.strip() and not _HEADING.match(line):
            article.append(line.strip())
        previous = line
    if article:
        yield "\n".join(article)


def _unwrap(lines: Iterable[str]) -> str:
    """Join hard-wrapped lines to paragraphs."""
    paragraphs: list[str] = []
    continues = False
    for line in lines:
        text = line.strip()
        if continues and text:
            paragraphs[-1] += " " + text
        elif text:
            paragraphs.append(text)
        continues = len(text) >= _WRAPPED_LINE and not _SENTENCE_END.search(text)
    return "\n".join(paragraphs)
