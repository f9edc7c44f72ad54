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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ponet.run.hub import import_datasets
from pretrain.builtin_text import BUILTIN_VERSION, builtin_documents, builtin_files

READER_VERSION = 1
"""Part of every cache key: raise it when other documents come out of the same files."""

BUILTIN = "builtin"

HUB_NAMES = {
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
}
"""Short names of hub data sets: id and configuration."""

_SCRIPT_DATA_SETS = frozenset({"bookcorpus", "bookcorpus/bookcorpus"})
_FORMATS = (".txt", ".md", ".jsonl", ".json", ".parquet")
_COMPRESSIONS = (".gz", ".xz")
_FORMAT_LIST = f"{', '.join(_FORMATS)} (also with {' or '.join(_COMPRESSIONS)})"
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?$")
_TITLE = re.compile(r"\s*= [^=\s](?:[^=]*[^=\s])? =\s*$")
_HEADING = re.compile(r"\s*= = .* = =\s*$")
_SENTENCE_END = re.compile(r"[.!?:;][\"')\]]*$")
_WRAPPED_LINE = 50
_WHOLE_FILE = 2**20


class SourceError(ValueError):
    """A source that cannot be read, in words for whoever named it."""


@dataclass(kw_only=True)
class SourceReport:
    """What was read and what was passed over; filled while documents are drawn."""

    documents: int = 0
    characters: int = 0
    skipped_empty: int = 0
    """Records without text."""
    skipped_duplicates: int = 0
    skipped_files: int = 0
    """Files of unknown type in folders."""

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {self.characters:,} characters (skipped: "
            f"{self.skipped_empty:,} empty, {self.skipped_duplicates:,} duplicates, "
            f"{self.skipped_files:,} files of other types)"
        )


@dataclass(frozen=True, kw_only=True)
class _Source:
    """One resolved source: exactly one of the three kinds is set (none of them: builtin)."""

    spec: str
    files: tuple[Path, ...] = ()
    hub_id: str | None = None
    hub_config: str | None = None
    ignored_files: int = 0


def iter_documents(
    source_specs: Sequence[str],
    text_field: str = "text",
    *,
    max_characters: int | None = None,
    report: SourceReport | None = None,
) -> Iterator[str]:
    """Documents of all sources, one source after the other.

    Args:
        source_specs: sources as described at the top of this file.
        text_field: field of a JSON record, or column of a table, that holds the text.
        max_characters: stop after the document that reaches this many characters; all by default.
        report: counts to add to.

    Returns:
        An iterator of documents: non-empty paragraphs separated by newlines, no document twice.

    Raises:
        SourceError: a source is unknown, empty or damaged; the message names file and line.
    """
    if max_characters is not None and max_characters < 1:
        raise SourceError(f"max_characters must be positive, got {max_characters}")
    sources = _resolve_all(source_specs)
    report = SourceReport() if report is None else report
    return _draw(sources, text_field, max_characters, report)


def in_turn(iterators: Iterable[Iterator[str]]) -> Iterator[str]:
    """One document of each iterator after the other, of those that have not ended."""
    waiting = deque(iterators)
    while waiting:
        documents = waiting.popleft()
        document = next(documents, None)
        if document is not None:
            yield document
            waiting.append(documents)


def _draw(
    sources: list[_Source], text_field: str, max_characters: int | None, report: SourceReport
) -> Iterator[str]:
    """Clean, count and de-duplicate what the sources hold."""
    seen: set[int] = set()
    characters = 0
    for source in sources:
        report.skipped_files += source.ignored_files
        found = False
        for text in _read_source(source, text_field):
            document = _clean(text)
            if not document:
                report.skipped_empty += 1
                continue
            found = True
            # 64 bits: among ten million documents one chance in 400,000 to drop one wrongly
            digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
            fingerprint = int.from_bytes(digest, "little")
            if fingerprint in seen:
                report.skipped_duplicates += 1
                continue
            seen.add(fingerprint)
            characters += len(document)
            report.documents += 1
            report.characters += len(document)
            yield document
            if max_characters is not None and characters >= max_characters:
                return
        if not found:
            raise SourceError(f"{source.spec}: no text found, only empty records")


def _clean(text: str) -> str:
    """Non-empty stripped lines; half surrogate pairs, which JSON can spell, become U+FFFD."""
    document = "\n".join(filter(None, map(str.strip, text.split("\n"))))
    try:
        document.encode()
    except UnicodeEncodeError:
        return document.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return document


def content_key(
    source_specs: Sequence[str],
    text_field: str = "text",
    *,
    max_characters: int | None = None,
) -> str:
    """Hash of everything that decides which documents `iter_documents` gives: 64 hex digits.

    Bytes of files count, their names, places and times do not; of a hub data set its fingerprint.
    Arguments are those of `iter_documents`.

    Raises:
        SourceError: a source is unknown or cannot be reached.
    """
    parts: list[Any] = [READER_VERSION, text_field, max_characters]
    for source in _resolve_all(source_specs):
        if source.hub_id:
            dataset = _load_hub(source.spec, source.hub_id, source.hub_config)
            parts.append(["hub", dataset._fingerprint])
        elif source.files:
            parts.append([[_format_of(path), _sha256(path)] for path in source.files])
        else:
            digests = [[path.name, _sha256(path)] for path in builtin_files()]
            parts.append([BUILTIN, BUILTIN_VERSION, digests])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _resolve_all(source_specs: Sequence[str]) -> list[_Source]:
    """Check all names before anything is read."""
    if isinstance(source_specs, str):
        raise SourceError(f"sources must be a list of strings, not the string {source_specs!r}")
    if not source_specs:
        raise SourceError("no source of text was named")
    return [_resolve(spec) for spec in source_specs]


def _resolve(spec: str) -> _Source:
    path = Path(spec).expanduser()
    if spec == BUILTIN:
        return _Source(spec=spec)
    if path.is_dir():
        return _resolve_folder(spec, path)
    if path.exists():
        if _format_of(path) not in _FORMATS:
            raise SourceError(f"{spec}: expected a file of type {_FORMAT_LIST}")
        if path.stat().st_size == 0:
            raise SourceError(f"{spec}: the file is empty")
        return _Source(spec=spec, files=(path,))
    if spec in _SCRIPT_DATA_SETS:
        raise SourceError(
            f"{spec} exists on the hub only as a loading script, which the datasets library no "
            "longer runs; give a local copy (--data PATH to .txt, .jsonl or .parquet files), a "
            "parquet copy as org/name, or use wikipedia or wikitext instead"
        )
    if spec in HUB_NAMES:
        hub_id, config = HUB_NAMES[spec]
        return _Source(spec=spec, hub_id=hub_id, hub_config=config)
    match = _HUB_ID.match(spec)
    if match and spec[0] not in "./~" and _format_of(path) not in _FORMATS:
        return _Source(spec=spec, hub_id=match["id"], hub_config=match["config"])
    raise SourceError(
        f"{spec!r} is neither a file or folder here nor a known source; expected {BUILTIN}, a "
        f"path, {', '.join(HUB_NAMES)}, or a hub data set as org/name[:config]"
    )


def _resolve_folder(spec: str, folder: Path) -> _Source:
    """All readable files below a folder in the order of their relative names."""
    found = [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    files = [path for path in found if _format_of(path) in _FORMATS]
    if not files:
        raise SourceError(f"{spec}: no file of type {_FORMAT_LIST} in this folder or below it")
    files.sort(key=lambda path: path.relative_to(folder).as_posix())
    return _Source(spec=spec, files=tuple(files), ignored_files=len(found) - len(files))


def _format_of(path: Path) -> str:
    """Suffix that says how a file is read, the one before a compression's."""
    plain = path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path
    return plain.suffix.lower()


def _read_source(source: _Source, text_field: str) -> Iterator[str]:
    if source.hub_id:
        dataset = _load_hub(source.spec, source.hub_id, source.hub_config)
        yield from _join_articles(_hub_rows(source.spec, dataset, text_field))
    elif source.files:
        for path in source.files:
            yield from _read_file(path, text_field)
    else:
        yield from builtin_documents()


@lru_cache(maxsize=4)
def _load_hub(spec: str, hub_id: str, config: str | None) -> Any:
    """The train split of a hub data set, downloaded or from the local cache."""
    datasets = import_datasets()

    advice = "give a local copy with --data PATH"
    try:
        return datasets.load_dataset(hub_id, config, split="train", streaming=False)
    except ConnectionError as error:
        # HF_HUB_OFFLINE and a missing network both end here
        raise SourceError(
            f"{spec}: the hub cannot be reached for the data set {hub_id}; {advice}"
        ) from error
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        # not found, a loading script, no such configuration or split
        raise SourceError(f"{spec}: cannot load {hub_id} ({error}); {advice}") from error


def _hub_rows(spec: str, dataset: Any, text_field: str) -> Iterator[str]:
    if text_field not in dataset.column_names:
        raise SourceError(
            f"{spec}: no column {text_field!r}; found {', '.join(dataset.column_names)}"
        )
    for number, row in enumerate(dataset.select_columns([text_field])):
        yield _text_of(row, text_field, f"{spec}, row {number}")


def _read_file(path: Path, text_field: str) -> Iterator[str]:
    if path.stat().st_size == 0:
        # one of many in a folder; an empty file that was named is refused before
        yield ""
        return
    file_format = _format_of(path)
    try:
        if file_format == ".parquet":
            yield from _join_articles(_parquet_rows(path, text_field))
        elif file_format in (".jsonl", ".json"):
            yield from _join_articles(_json_rows(path, text_field))
        else:
            yield from _text_documents(path)
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise SourceError(f"{path}: the compressed file is damaged ({error})") from error


def _open(path: Path) -> IO[bytes]:
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    return openers.get(path.suffix.lower(), open)(path, "rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file without their line ends."""
    offset = 0
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if b"\0" in line:
                raise SourceError(f"{path}, line {number}: a NUL byte; expected text, found binary")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise SourceError(
                    f"{path}, line {number}, byte {offset + error.start}: expected UTF-8, found "
                    f"byte 0x{line[error.start]:02x}"
                ) from None
            offset += len(line)
            yield number, text.removeprefix("\ufeff").rstrip("\r\n")


def _json_rows(path: Path, text_field: str) -> Iterator[str]:
    """Texts of a file with one JSON object per line; blank lines are passed over."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise SourceError(f"{where}: expected one JSON object per line ({error})") from None
        if not isinstance(record, dict):
            raise SourceError(
                f"{where}: expected one JSON object per line, found a {type(record).__name__}"
            )
        if text_field not in record:
            fields = ", ".join(record)
            raise SourceError(f"{where}: no field {text_field!r}; found {fields or 'no field'}")
        yield _text_of(record, text_field, where)


def _text_of(record: dict[str, Any], text_field: str, where: str) -> str:
    text = record[text_field]
    if not isinstance(text, str | None):
        found = type(text).__name__
        raise SourceError(f"{where}: expected text in field {text_field!r}, found {found}")
    return text or ""


def _parquet_rows(path: Path, text_field: str) -> Iterator[str]:
    """Texts of a table, one per row."""
    try:
        if path.suffix.lower() in _COMPRESSIONS:
            with _open(path) as file:
                table = pq.ParquetFile(pa.BufferReader(file.read()))
        else:
            table = pq.ParquetFile(path)
        schema = table.schema_arrow
        if text_field not in schema.names:
            raise SourceError(f"{path}: no column {text_field!r}; found {', '.join(schema.names)}")
        kind = schema.field(text_field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise SourceError(f"{path}: expected text in column {text_field!r}, found {kind}")
        for batch in table.iter_batches(columns=[text_field]):
            for text in batch.column(0).to_pylist():
                yield text or ""
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{path}: not a readable parquet file ({error})") from error


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
    if _begins_with_title(head):
        yield from _join_articles(chain(head, lines))
    elif size <= _WHOLE_FILE:
        yield _unwrap(head)
    else:
        for blank, document in groupby(chain(head, lines), lambda line: not line.strip()):
            if not blank:
                yield _unwrap(document)


def _begins_with_title(lines: Iterable[str]) -> bool:
    first = next((line for line in lines if line.strip()), "")
    return _TITLE.match(first) is not None


def _join_articles(rows: Iterator[str]) -> Iterator[str]:
    """Rows as they are, unless they are the lines of WikiText: then articles without headings."""
    head: list[str] = []
    for row in rows:
        head.append(row)
        if row.strip():
            break
    rows = chain(head, rows)
    if not _begins_with_title(head):
        yield from rows
        return
    article: list[str] = []
    previous = ""
    for row in rows:
        # a real title stands between blank lines; " = 0 = " within a table does not
        if _TITLE.match(row) and not previous.strip():
            if article:
                yield "\n".join(article)
            article = []
        elif row.strip() and not _HEADING.match(row):
            article.append(row.strip())
        previous = row
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
