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
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from filelock import FileLock
from tokenizers import Tokenizer
from tqdm import tqdm

from ponet.files import write_json
from ponet.run.cli import UsageError
from ponet.tokenizer import load_tokenizer, save_tokenizer, splitter_version, tokenizer_fingerprint
from pretrain.engine import Ranks
from pretrain.examples import TokenCorpus
from pretrain.settings import PretrainConfig
from pretrain.sources import SourceReport, content_key, iter_documents
from pretrain.tokenise import TokenisedDocuments, token_dtype, tokenise, train_tokenizer

FORMAT_VERSION = 1
"""Part of every cache key: raise it when the same documents give other files."""

_MANIFEST = "corpus.json"
_FILES = {
    "tokens": "tokens.bin",
    "sentence_offsets": "sentences.bin",
    "document_offsets": "documents.bin",
}
# part of the cache key: raise it when the same text gives another vocabulary
_VOCABULARY_VERSION = 2

logger = logging.getLogger(__name__)


class DamagedCorpusError(ValueError):
    """A corpus folder that is incomplete or was changed."""


@dataclass(frozen=True, kw_only=True)
class Corpus(TokenCorpus):
    """A tokenised text; the arrays are read from disk as they are used."""

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
        # in parts: bincount works on an int64 copy, eight bytes per token
        for part in np.array_split(self.tokens, 1 + len(self.tokens) // 2**24):
            counts += np.bincount(part, minlength=len(counts))
        return counts


def prepare(config: PretrainConfig, ranks: Ranks, run: Path | None) -> tuple[Tokenizer, Corpus]:
    """Tokenizer and corpus of a run: the first process of each machine makes or checks them.

    With the folder of a `run` to resume they are those it began with.

    Raises:
        SourceError: a source cannot be read.
        UsageError: a resumed run would go on with other text, or machines read different text.
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
    """Documents of all sources in turn, because a vocabulary is learned from the first of them."""
    if config.max_characters is not None:
        return iter_documents(config.data, config.text_field, max_characters=config.max_characters)
    sources = [iter_documents([source], config.text_field) for source in config.data]
    return filter(None, chain.from_iterable(zip_longest(*sources)))


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
        documents: as `tokenise` takes them; not touched when the cache has the corpus.
        cache_dir: made if missing; each corpus gets a folder of its own in it.
        key_parts: JSON values that decide what `documents` holds, above all `content_key`.
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
        with closing(tokenise(documents, tokenizer, num_workers)) as batches:
            _write_folder(folder, batches, tokenizer, settings, report)
        return load_corpus(folder, verify=False)


def load_corpus(folder: str | Path, *, verify: bool = True) -> Corpus:
    """Map a corpus that `build_corpus` made.

    Raises:
        DamagedCorpusError: a file is missing, has another size or, where `verify` asks for a
            look at every byte (about a second per GB), another checksum than recorded.
    """
    folder = Path(folder)
    manifest, arrays = folder / _MANIFEST, {}
    try:
        metadata = json.loads(manifest.read_text(encoding="utf-8"))
        if metadata["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {metadata['format_version']}, expected {FORMAT_VERSION}")
        dtype, files = np.dtype(metadata["dtype"]), metadata["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCorpusError(
            f"{manifest}: not a readable manifest ({type(error).__name__}: {error})"
        ) from error
    for field, name in _FILES.items():
        path, recorded = folder / name, files[name]
        if not path.is_file():
            raise DamagedCorpusError(f"{path} is missing")
        found = path.stat().st_size
        if found != recorded["bytes"]:
            raise DamagedCorpusError(f"{path} has {found} bytes, expected {recorded['bytes']}")
        mapped = np.memmap(path, dtype=dtype if field == "tokens" else np.int64, mode="r")
        if verify and zlib.crc32(mapped.data) != recorded["crc32"]:
            raise DamagedCorpusError(f"{path}: the checksum differs from the recorded one")
        # a plain view: every slice of np.memmap costs more
        arrays[field] = np.asarray(mapped)
    return Corpus(**arrays, folder=folder, metadata=metadata)


def _write_folder(
    folder: Path,
    batches: Iterable[TokenisedDocuments],
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    report: SourceReport | None,
) -> None:
    """Write beside the final place and move there when complete."""
    unfinished = folder.with_name(f".{folder.name}-unfinished")
    # left by a process that was killed while it held the lock
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        counts, files = _write_arrays(unfinished, batches)
        manifest = {
            "format_version": FORMAT_VERSION,
            "vocab_size": tokenizer.get_vocab_size(),
            "dtype": token_dtype(tokenizer).__name__,
            "counts": counts,
            "sources": asdict(report) if report else None,
            "settings": settings,
            "files": files,
        }
        write_json(unfinished / _MANIFEST, manifest)
        # a damaged one
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_arrays(
    folder: Path, batches: Iterable[TokenisedDocuments]
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Append batch after batch; returns counts, and sizes and checksums of the files."""
    counts = {"documents": 0, "sentences": 0, "tokens": 0, "skipped_documents": 0}
    first = np.zeros(1, dtype=np.int64)
    _append(folder, sentence_offsets=first, document_offsets=first)
    # None: a bar where stderr is a terminal
    with tqdm(desc="tokenising", unit="tok", unit_scale=True, disable=None) as bar:
        for batch in batches:
            _append(
                folder,
                tokens=batch.tokens,
                sentence_offsets=counts["tokens"] + np.cumsum(batch.sentence_sizes),
                document_offsets=counts["sentences"] + np.cumsum(batch.document_sizes),
            )
            counts["documents"] += len(batch.document_sizes)
            counts["sentences"] += len(batch.sentence_sizes)
            counts["tokens"] += len(batch.tokens)
            counts["skipped_documents"] += batch.num_skipped
            bar.update(len(batch.tokens))
    if not counts["documents"]:
        raise ValueError(
            f"no document holds a sentence ({counts['skipped_documents']} documents were read)"
        )
    files = {}
    for name in _FILES.values():
        path = folder / name
        with _errors_name(path), path.open("rb") as file:
            os.fsync(file.fileno())
        checksum = zlib.crc32(np.memmap(path, mode="r").data)
        files[name] = {"bytes": path.stat().st_size, "crc32": checksum}
    return counts, files


def _append(folder: Path, **arrays: np.ndarray) -> None:
    for field, array in arrays.items():
        path = folder / _FILES[field]
        with _errors_name(path), path.open("ab") as file:
            file.write(array.tobytes())


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Errors of writing name no file: add it, and the free space."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        message = f"cannot write the corpus: {error.strerror} ({free:,} bytes free)"
        raise OSError(error.errno, message, str(path)) from error
