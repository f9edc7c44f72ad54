"""The tokenised corpus: sentences and documents in one flat, memory-mapped array of tokens.

Built once per content and settings, in a folder of its own below a cache folder:

- `tokens.bin`: the tokens of all sentences without special tokens, `uint16` or `uint32`;
- `sentences.bin`: `int64` offsets of the sentences into the tokens, one more than sentences;
- `documents.bin`: `int64` offsets of the documents into the sentences, one more than documents;
- `corpus.json`: counts, settings, and size and checksum of the three.

The folder appears complete or not at all, and its bytes do not depend on the number of workers.
`prepare` finds or makes the tokenizer and the corpus of a run.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from filelock import FileLock
from tokenizers import Tokenizer
from tqdm import tqdm

from ponet.files import current_umask, write_json
from ponet.run.cli import UsageError
from ponet.tokenizer import load_tokenizer, save_tokenizer, splitter_version, tokenizer_fingerprint
from pretrain.engine import Ranks
from pretrain.settings import PretrainConfig
from pretrain.sources import SourceReport, content_key, in_turn, iter_documents
from pretrain.tokenise import TokenisedDocuments, token_dtype, tokenise, train_tokenizer

FORMAT_VERSION = 1
"""Part of every cache key: raise it when the same documents give other files."""

_MANIFEST = "corpus.json"
_FILES: tuple[str, ...] = ("tokens.bin", "sentences.bin", "documents.bin")
_CHECKSUM_BLOCK = 2**24
_COUNTED_TOKENS = 2**24
# part of the cache key: raise it when the same text gives another vocabulary
_VOCABULARY_VERSION = 2

logger = logging.getLogger(__name__)


class DamagedCorpusError(ValueError):
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
    metadata: dict[str, Any]
    """The manifest: `counts`, `settings`, `sources`, `files`."""

    @property
    def num_documents(self) -> int:
        """Documents with at least one sentence."""
        return len(self.document_offsets) - 1

    def token_frequencies(self) -> np.ndarray:
        """How often each token of the vocabulary occurs, `int64` `[vocab_size]`."""
        counts = np.zeros(self.metadata["vocab_size"], dtype=np.int64)
        # bincount works on an int64 copy, eight bytes per token
        for start in range(0, len(self.tokens), _COUNTED_TOKENS):
            part = self.tokens[start : start + _COUNTED_TOKENS]
            counts += np.bincount(part, minlength=len(counts))
        return counts


def prepare(config: PretrainConfig, ranks: Ranks, run: Path | None) -> tuple[Tokenizer, Corpus]:
    """Tokenizer and corpus of a run: the first process of each machine makes or checks them.

    Args:
        config: the settings.
        ranks: this process among all.
        run: folder of a run to resume, whose tokenizer and cached corpus are taken; None for a
            new one.

    Raises:
        SourceError: a source cannot be read.
        UsageError: a resumed run would go on with other text, or machines read different text.
        ValueError: the vocabulary or the text is unusable.
    """
    made = _prepare(config, run) if ranks.local_rank == 0 else None
    dist.barrier(ranks.patient_group)
    shared = [made and (made[0].to_str(), made[1].folder.name)]
    dist.broadcast_object_list(shared, src=0, group=ranks.patient_group)
    assert shared[0] is not None
    tokenizer, name = shared[0]
    if made is None:
        # checked by the first process a moment ago
        folder = _corpora(config) / name
        made = Tokenizer.from_str(tokenizer), load_corpus(folder, verify=False)
    elif made[1].folder.name != name:
        raise UsageError(
            f"--data: this machine reads other text than the first one (fingerprint "
            f"{made[1].folder.name[:12]}, there {name[:12]})"
        )
    counts = made[1].metadata["counts"]
    sizes = (f"{counts[kind]:,} {kind}" for kind in ("documents", "sentences", "tokens"))
    logger.info("corpus %s: %s", made[1].folder, ", ".join(sizes))
    return made


def _prepare(config: PretrainConfig, run: Path | None) -> tuple[Tokenizer, Corpus]:
    recorded = str(json.loads((run / "run.json").read_text())["corpus"]) if run else ""
    if run and (_corpora(config) / recorded).exists():
        # the sources may have changed, the run goes on with what it began with
        try:
            return load_tokenizer(run), load_corpus(_corpora(config) / recorded)
        except DamagedCorpusError as error:
            logger.warning("%s; reading the text again", error)
    text = content_key(config.data, config.text_field, max_characters=config.max_characters)
    tokenizer = load_tokenizer(run) if run else _tokenizer(config, text)
    report = SourceReport()
    documents = iter_documents(
        config.data, config.text_field, max_characters=config.max_characters, report=report
    )
    corpus = build_corpus(
        documents,
        tokenizer,
        cache_dir=_corpora(config),
        key_parts={"text": text},
        num_workers=config.preprocessing_workers,
        report=report,
    )
    if run and recorded != corpus.folder.name:
        raise UsageError(
            f"--resume {run}: the text changed since the run began (fingerprint "
            f"{recorded[:12]}, found {corpus.folder.name[:12]}), and {_corpora(config)} no longer "
            "holds what it was"
        )
    if report.documents:
        logger.info("read %s", report)
    return tokenizer, corpus


def _corpora(config: PretrainConfig) -> Path:
    return Path(config.cache_dir).expanduser() / "corpora"


def _tokenizer(config: PretrainConfig, text: str) -> Tokenizer:
    if config.vocab is not None:
        return load_tokenizer(config.vocab)
    settings = json.dumps([text, config.vocab_size, _VOCABULARY_VERSION])
    key = hashlib.sha256(settings.encode()).hexdigest()[:32]
    folder = Path(config.cache_dir).expanduser() / "tokenizers" / key
    if not (folder / "tokenizer_config.json").is_file():
        logger.info("training a vocabulary of %d word pieces", config.vocab_size)
        save_tokenizer(train_tokenizer(vocabulary_text(config), config.vocab_size), folder)
    return load_tokenizer(folder)


def vocabulary_text(config: PretrainConfig) -> Iterator[str]:
    """Documents of all sources in turn, because a vocabulary is learned from the first of them.

    Raises:
        SourceError: a source cannot be read.
    """
    if config.max_characters is not None:
        return iter_documents(config.data, config.text_field, max_characters=config.max_characters)
    return in_turn([iter_documents([source], config.text_field) for source in config.data])


def build_corpus(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    *,
    cache_dir: str | Path,
    key_parts: Mapping[str, Any],
    num_workers: int = 0,
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
        report: counts to store with the corpus after `documents` are read.

    Raises:
        ValueError: no document has a sentence.
        OSError: the cache cannot be written; the message says where.
    """
    settings = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "sentence_splitter": splitter_version(),
        "sources": dict(key_parts),
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    cache_dir = Path(cache_dir).expanduser()
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder = cache_dir / f"corpus-{key[:20]}"
    # whoever comes second waits for the first and takes what it made
    with FileLock(cache_dir / f".{folder.name}.lock"):
        if folder.exists():
            try:
                return load_corpus(folder)
            except DamagedCorpusError as error:
                logger.warning("%s; building it again", error)
        # left by a process that was killed while it held the lock
        for stale in cache_dir.glob(f".{folder.name}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        with closing(tokenise(documents, tokenizer, num_workers)) as batches:
            _write_folder(folder, batches, tokenizer, settings, report)
        # just written and checksummed on the way
        return load_corpus(folder, verify=False)


def load_corpus(folder: str | Path, *, verify: bool = True) -> Corpus:
    """Map a finished corpus.

    Args:
        folder: a folder made by `build_corpus`.
        verify: compare checksums, which reads every byte once (about a second per GB). Sizes are
            compared in any case.

    Raises:
        DamagedCorpusError: a file is missing, has another size or other bytes than recorded.
    """
    folder = Path(folder)
    try:
        metadata = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        version, counts, files = (metadata[k] for k in ("format_version", "counts", "files"))
        dtypes = [np.dtype(metadata["dtype"]), np.dtype(np.int64), np.dtype(np.int64)]
        lengths = [counts["tokens"], counts["sentences"] + 1, counts["documents"] + 1]
        recorded = [(files[name]["bytes"], files[name]["crc32"]) for name in _FILES]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCorpusError(
            f"{folder / _MANIFEST}: not a readable manifest ({type(error).__name__}: {error})"
        ) from error
    if version != FORMAT_VERSION:
        raise DamagedCorpusError(f"{folder}: format {version}, expected {FORMAT_VERSION}")
    arrays = []
    for name, dtype, length, (size, checksum) in zip(
        _FILES, dtypes, lengths, recorded, strict=True
    ):
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found is None or found != size or found != length * dtype.itemsize:
            state = "is missing" if found is None else f"has {found} bytes"
            raise DamagedCorpusError(f"{path} {state}, expected {size} bytes")
        if verify and _file_checksum(path) != checksum:
            raise DamagedCorpusError(f"{path}: the checksum differs from the recorded one")
        arrays.append(np.memmap(path, dtype=dtype, mode="r", shape=(length,)))
    tokens, sentence_offsets, document_offsets = arrays
    return Corpus(
        tokens=tokens,
        sentence_offsets=sentence_offsets,
        document_offsets=document_offsets,
        folder=folder,
        metadata=metadata,
    )


def _file_checksum(path: Path) -> int:
    """CRC-32 of a file."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_CHECKSUM_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _write_folder(
    folder: Path,
    batches: Iterable[TokenisedDocuments],
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    report: SourceReport | None,
) -> None:
    """Write beside the final place and move there when complete."""
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        counts, checksums = _write_arrays(unfinished, batches)
        sizes = {name: (unfinished / name).stat().st_size for name in _FILES}
        manifest = {
            "format_version": FORMAT_VERSION,
            "vocab_size": tokenizer.get_vocab_size(),
            "dtype": token_dtype(tokenizer).__name__,
            "counts": counts,
            "sources": asdict(report) if report else None,
            "settings": settings,
            "files": {n: {"bytes": sizes[n], "crc32": checksums[n]} for n in _FILES},
        }
        write_json(unfinished / _MANIFEST, manifest)
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
    folder: Path, batches: Iterable[TokenisedDocuments]
) -> tuple[dict[str, int], dict[str, int]]:
    """Append batch after batch.

    Returns:
        Counts of documents, sentences, tokens and skipped documents, and checksums by file.

    Raises:
        ValueError: nothing was written.
    """
    checksums = dict.fromkeys(_FILES, 0)
    counts = {"documents": 0, "sentences": 0, "tokens": 0, "skipped_documents": 0}
    files = {name: (folder / name).open("wb") for name in _FILES}

    def append(*arrays: np.ndarray) -> None:
        for name, array in zip(_FILES, arrays, strict=True):
            data = np.ascontiguousarray(array).view(np.uint8).data
            with _errors_name(folder / name):
                files[name].write(data)
            checksums[name] = zlib.crc32(data, checksums[name])

    first = np.zeros(1, dtype=np.int64)
    # None: a bar where stderr is a terminal
    bar = tqdm(desc="tokenising", unit="tok", unit_scale=True, disable=None)
    try:
        append(first[:0], first, first)
        for batch in batches:
            append(
                batch.tokens,
                counts["tokens"] + np.cumsum(batch.sentence_sizes, dtype=np.int64),
                counts["sentences"] + np.cumsum(batch.document_sizes, dtype=np.int64),
            )
            counts["documents"] += len(batch.document_sizes)
            counts["sentences"] += len(batch.sentence_sizes)
            counts["tokens"] += len(batch.tokens)
            counts["skipped_documents"] += batch.num_skipped
            bar.update(len(batch.tokens))
    finally:
        bar.close()
        for name, file in files.items():
            with _errors_name(folder / name), file:
                file.flush()
                os.fsync(file.fileno())
    if not counts["documents"]:
        raise ValueError(
            f"no document holds a sentence ({counts['skipped_documents']} documents were read)"
        )
    return counts, checksums


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Errors of writing name no file: add it, and the free space."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        message = f"cannot write the corpus: {error.strerror} ({free:,} bytes free)"
        raise OSError(error.errno, message, str(path)) from error
