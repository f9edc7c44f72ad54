"""The tokenised corpus: sentences and documents in one flat, memory-mapped array of tokens.

Built once per content and settings, in a folder of its own below a cache folder:

- `tokens.bin`: the tokens of all sentences without special tokens, `uint16` or `uint32`;
- `sentences.bin`: `int64` offsets of the sentences into the tokens, one more than sentences;
- `documents.bin`: `int64` offsets of the documents into the sentences, one more than documents;
- `corpus.json`: counts, settings, and size and checksum of the three.

The folder appears complete or not at all, and its bytes do not depend on the number of workers.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tokenizers import Tokenizer
from tqdm import tqdm

from ponet.checkpoint import current_umask
from ponet.sentences import split_sentences, splitter_version
from ponet.tokenizer import tokenizer_fingerprint
from pretrain.sources import SourceReport
from pretrain.vocabulary import SentenceEncoder, token_dtype

FORMAT_VERSION = 1
"""Part of every cache key: raise it when the same documents give other files."""

_MANIFEST = "corpus.json"
_FILES = ("tokens.bin", "sentences.bin", "documents.bin")
# characters handed to a worker at once: seconds of work would starve the others at the end,
# and far less would be spent on handing over
_BATCH_CHARACTERS = 2**20
_CHECKSUM_BLOCK = 2**24
# worker processes need seconds to start (they import torch with the caller's main module) and
# have each to meet the words of the language: with less text than this they cost more than they
# save
_BATCHES_WITHOUT_WORKERS = 48

# tokens counted at once
_COUNTED_TOKENS = 2**24

_log = logging.getLogger(__name__)


class DamagedCacheError(ValueError):
    """A corpus folder that is incomplete or was changed."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A tokenised text; the arrays are read from disk as they are used."""

    tokens: np.ndarray
    """`[num_tokens]` `uint16` (`uint32` if the vocabulary is larger), without special tokens."""
    sentence_offsets: np.ndarray
    """`[num_sentences + 1]` `int64`, where each sentence begins in `tokens`."""
    document_offsets: np.ndarray
    """`[num_documents + 1]` `int64`, where each document begins among the sentences."""
    folder: Path
    """Where the files lie."""
    metadata: dict[str, Any]
    """The manifest: `counts`, `settings`, `sources`, `files`."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all sentences."""
        return len(self.tokens)

    @property
    def num_sentences(self) -> int:
        """Sentences of all documents."""
        return len(self.sentence_offsets) - 1

    @property
    def num_documents(self) -> int:
        """Documents with at least one sentence."""
        return len(self.document_offsets) - 1

    def token_counts(self, documents: np.ndarray) -> np.ndarray:
        """Length of documents.

        Args:
            documents: `[K]` indices of documents.

        Returns:
            `[K]` `int64` number of tokens of each.
        """
        documents = np.asarray(documents)
        first = self.sentence_offsets[self.document_offsets[documents]]
        last = self.sentence_offsets[self.document_offsets[documents + 1]]
        return last - first

    def token_frequencies(self) -> np.ndarray:
        """How often each token of the vocabulary occurs.

        Returns:
            `[vocab_size]` `int64` counts; the largest is the majority baseline of MLM.
        """
        counts = np.zeros(self.metadata["vocab_size"], dtype=np.int64)
        # bincount works on an int64 copy, eight bytes a token
        for start in range(0, self.num_tokens, _COUNTED_TOKENS):
            part = self.tokens[start : start + _COUNTED_TOKENS]
            counts += np.bincount(part, minlength=len(counts))
        return counts

    def split(self, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Part the documents for training and validation.

        The draw is a hash of the document's index: the same corpus is always parted alike.

        Args:
            validation_fraction: share of the documents to validate on.

        Returns:
            `int64` indices of the training and of the validation documents, each in ascending
            order, at least one in each.

        Raises:
            ValueError: the fraction is not between 0 and 1, or there are fewer than 4 documents.
        """
        if not 0 < validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must lie between 0 and 1, got {validation_fraction}"
            )
        if self.num_documents < 4:
            raise ValueError(
                f"the corpus has {self.num_documents} documents; 4 are needed to set some apart "
                "for validation (blank lines part the documents of a text file over 1 MiB)"
            )
        order = np.argsort(_mix(np.arange(self.num_documents, dtype=np.uint64)), kind="stable")
        size = round(validation_fraction * self.num_documents)
        size = min(max(size, 1), self.num_documents - 1)
        return np.sort(order[size:]), np.sort(order[:size])


def _mix(index: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea and Flood 2014): a well scattered `uint64` for every index."""
    mixed = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def build_corpus(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    *,
    cache_dir: str | Path,
    key_parts: Mapping[str, Any],
    num_workers: int = 0,
    progress: bool = True,
    report: SourceReport | None = None,
) -> Corpus:
    """Tokenise documents into the cache, or load them when they are there already.

    Args:
        documents: paragraphs separated by newlines; not touched when the cache has the corpus.
        tokenizer: splits sentences to tokens.
        cache_dir: made if missing; each corpus gets a folder of its own in it.
        key_parts: JSON values that decide what `documents` holds, above all `content_key`. The
            tokenizer, the sentence splitter and the format are added here.
        num_workers: processes that split and tokenise; 0 works in this one. They start only when
            the text is longer than 48 MiB. As ever with processes, the caller's main module must
            be safe to import.
        progress: show a bar on stderr if it is a terminal.
        report: counts to store with the corpus after `documents` are read.

    Raises:
        ValueError: no document has a sentence.
        OSError: the cache cannot be written; the message says where.
    """
    settings = _settings(tokenizer, key_parts)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    cache_dir = Path(cache_dir).expanduser()
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder = cache_dir / f"corpus-{key[:20]}"
    # whoever comes second waits for the first and takes what it made
    with FileLock(cache_dir / f".{folder.name}.lock"):
        if folder.exists():
            try:
                return load_corpus(folder)
            except DamagedCacheError as error:
                _log.warning("%s; building it again", error)
        # left by a process that was killed while it held the lock
        for stale in cache_dir.glob(f".{folder.name}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        with (
            closing(_tokenise(documents, tokenizer, num_workers)) as batches,
            tqdm(desc="tokenising", unit="tok", unit_scale=True, disable=_hide(progress)) as bar,
        ):
            _write_folder(folder, batches, bar, tokenizer, settings, report)
        # just written and checksummed on the way
        return load_corpus(folder, verify=False)


def load_corpus(folder: str | Path, *, verify: bool = True) -> Corpus:
    """Map a finished corpus.

    Args:
        folder: a folder made by `build_corpus`.
        verify: compare checksums, which reads every byte once (about a second per GB). Sizes are
            compared in any case.

    Raises:
        DamagedCacheError: a file is missing, has another size or other bytes than recorded.
    """
    folder = Path(folder)
    try:
        metadata = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        version, counts, files = (metadata[k] for k in ("format_version", "counts", "files"))
        dtypes = [np.dtype(metadata["dtype"]), np.dtype(np.int64), np.dtype(np.int64)]
        lengths = [counts["tokens"], counts["sentences"] + 1, counts["documents"] + 1]
        recorded = [(files[name]["bytes"], files[name]["crc32"]) for name in _FILES]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCacheError(
            f"{folder / _MANIFEST}: not a readable manifest ({type(error).__name__}: {error})"
        ) from error
    if version != FORMAT_VERSION:
        raise DamagedCacheError(f"{folder}: format {version}, expected {FORMAT_VERSION}")
    arrays = []
    for name, dtype, length, (size, checksum) in zip(
        _FILES, dtypes, lengths, recorded, strict=True
    ):
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found is None or found != size or found != length * dtype.itemsize:
            state = "is missing" if found is None else f"has {found} bytes"
            raise DamagedCacheError(f"{path} {state}, expected {size} bytes")
        if verify and _file_checksum(path) != checksum:
            raise DamagedCacheError(f"{path}: the checksum differs from the recorded one")
        arrays.append(np.memmap(path, dtype=dtype, mode="r", shape=(length,)))
    tokens, sentence_offsets, document_offsets = arrays
    return Corpus(
        tokens=tokens,
        sentence_offsets=sentence_offsets,
        document_offsets=document_offsets,
        folder=folder,
        metadata=metadata,
    )


def _settings(tokenizer: Tokenizer, key_parts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides the bytes of a corpus."""
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "sentence_splitter": splitter_version(),
        "sources": dict(key_parts),
    }


def _hide(progress: bool) -> bool | None:
    """tqdm's `disable`: None lets it look whether stderr is a terminal."""
    return None if progress else True


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Some consecutive documents, tokenised."""

    tokens: np.ndarray
    sentence_sizes: np.ndarray
    document_sizes: np.ndarray
    num_skipped: int


def _tokenise(
    documents: Iterable[str], tokenizer: Tokenizer, num_workers: int
) -> Generator[_Batch, None, None]:
    """Tokenised batches in the order of the documents, made here or by worker processes."""
    batches = _batched(documents)
    encoder = SentenceEncoder(tokenizer)
    for batch in batches if num_workers == 0 else islice(batches, _BATCHES_WITHOUT_WORKERS):
        yield _tokenise_batch(encoder, batch)
    first = next(batches, None)
    if first is not None:
        yield from _tokenise_in_pool(chain([first], batches), tokenizer, num_workers)


def _tokenise_in_pool(
    batches: Iterable[list[str]], tokenizer: Tokenizer, num_workers: int
) -> Iterator[_Batch]:
    """Tokenised batches from worker processes, in order."""
    # fork is unsafe beside the threads of torch and tokenizers
    pool = ProcessPoolExecutor(
        num_workers, get_context("spawn"), _start_worker, (tokenizer.to_str(),)
    )
    pending: deque[Future[_Batch]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_tokenise_in_worker, batch))
            # enough to keep all workers busy, few enough to bound memory
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
    """Consecutive documents with about `_BATCH_CHARACTERS` together."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch = []
            characters = 0
    if batch:
        yield batch


_worker_encoder: SentenceEncoder | None = None


def _start_worker(tokenizer_json: str) -> None:
    """Prepare a worker process; it shall not start threads of its own beside the others."""
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_encoder = SentenceEncoder(Tokenizer.from_str(tokenizer_json))


def _tokenise_in_worker(documents: list[str]) -> _Batch:
    """One batch in a worker process."""
    assert _worker_encoder is not None
    return _tokenise_batch(_worker_encoder, documents)


def _tokenise_batch(encoder: SentenceEncoder, documents: list[str]) -> _Batch:
    """Split and encode; sentences without tokens and documents without sentences are left out."""
    sentences = [split_sentences(document) for document in documents]
    tokens, sizes = encoder.encode(list(chain.from_iterable(sentences)))
    document_of = np.repeat(np.arange(len(documents)), [len(listed) for listed in sentences])
    kept = sizes > 0
    document_sizes = np.bincount(document_of[kept], minlength=len(documents))
    return _Batch(
        tokens=tokens,
        sentence_sizes=sizes[kept],
        document_sizes=document_sizes[document_sizes > 0],
        num_skipped=int((document_sizes == 0).sum()),
    )


class _OutputFile:
    """A growing file with its size and checksum; a full disk is reported with the file's name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self.num_bytes = 0
        self.checksum = 0

    def write(self, array: np.ndarray) -> None:
        """Append an array's bytes."""
        data = np.ascontiguousarray(array).view(np.uint8).data
        try:
            self._file.write(data)
        except OSError as error:
            raise self._named(error) from error
        self.num_bytes += len(data)
        self.checksum = zlib.crc32(data, self.checksum)

    def close(self) -> None:
        """Bring everything to the disk."""
        try:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            raise self._named(error) from error

    def _named(self, error: OSError) -> OSError:
        """The same error with the place and the free space; errors of `write` name no file."""
        free = shutil.disk_usage(self._path.parent).free
        message = f"cannot write the corpus: {error.strerror} ({free:,} bytes free)"
        return OSError(error.errno, message, str(self._path))


def _write_folder(
    folder: Path,
    batches: Iterable[_Batch],
    bar: "tqdm[Any]",
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    report: SourceReport | None,
) -> None:
    """Write beside the final place and move there when complete."""
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        counts, files = _write_arrays(unfinished, batches, bar)
        manifest = {
            "format_version": FORMAT_VERSION,
            "vocab_size": tokenizer.get_vocab_size(),
            "dtype": token_dtype(tokenizer).__name__,
            "counts": counts,
            "sources": report.as_dict() if report else None,
            "settings": settings,
            "files": files,
        }
        output = _OutputFile(unfinished / _MANIFEST)
        output.write(np.frombuffer(json.dumps(manifest, indent=2).encode() + b"\n", np.uint8))
        output.close()
        # a folder made by mkdtemp is private; the cache is not
        unfinished.chmod(0o777 & ~current_umask())
        if folder.exists():
            # damaged, or it would have been used; moved first, so that no half of it is ever seen
            damaged = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
            folder.rename(damaged / folder.name)
            shutil.rmtree(damaged)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_arrays(
    folder: Path, batches: Iterable[_Batch], bar: "tqdm[Any]"
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Append batch after batch.

    Returns:
        Counts of documents, sentences, tokens and skipped documents; bytes and checksum by file.

    Raises:
        ValueError: nothing was written.
    """
    outputs = [_OutputFile(folder / name) for name in _FILES]
    tokens, sentences, documents = outputs
    counts = {"documents": 0, "sentences": 0, "tokens": 0, "skipped_documents": 0}
    try:
        sentences.write(np.zeros(1, dtype=np.int64))
        documents.write(np.zeros(1, dtype=np.int64))
        for batch in batches:
            tokens.write(batch.tokens)
            sentences.write(counts["tokens"] + np.cumsum(batch.sentence_sizes, dtype=np.int64))
            documents.write(counts["sentences"] + np.cumsum(batch.document_sizes, dtype=np.int64))
            counts["documents"] += len(batch.document_sizes)
            counts["sentences"] += len(batch.sentence_sizes)
            counts["tokens"] += len(batch.tokens)
            counts["skipped_documents"] += batch.num_skipped
            bar.update(len(batch.tokens))
    finally:
        for output in outputs:
            output.close()
    if not counts["documents"]:
        raise ValueError(
            f"no document holds a sentence ({counts['skipped_documents']} documents were read)"
        )
    files = {
        name: {"bytes": output.num_bytes, "crc32": output.checksum}
        for name, output in zip(_FILES, outputs, strict=True)
    }
    return counts, files


def _file_checksum(path: Path) -> int:
    """CRC-32 of a file."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_CHECKSUM_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum
