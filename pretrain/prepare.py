"""From the settings to a tokenizer and a tokenised corpus, made once and shared by all ranks."""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tokenizers import Tokenizer

from ponet.run.cli import UsageError
from ponet.tokenizer import (
    SpecialTokens,
    load_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
)
from pretrain.corpus import Corpus, build_corpus
from pretrain.launch import Launch
from pretrain.objectives import ExampleSettings
from pretrain.settings import PretrainConfig
from pretrain.sources import SourceReport, content_key, in_turn, iter_documents
from pretrain.vocabulary import train_tokenizer

# part of the cache key: raise it when the same text gives another vocabulary
_VOCABULARY_VERSION = 2

logger = logging.getLogger(__name__)


def prepare(config: PretrainConfig, launch: Launch, run: Path | None) -> tuple[Tokenizer, Corpus]:
    """Tokenizer and corpus of a run; the first process of each machine makes them.

    Args:
        config: the settings.
        launch: this process.
        run: folder of a run to resume, whose tokenizer is taken; None for a new one.

    Raises:
        DataError: a source cannot be read.
        ValueError: the vocabulary or the text is unusable.
    """
    if launch.local_rank == 0:
        result = _prepare(config, run)
        dist.barrier(launch.patient_group)
        return result
    dist.barrier(launch.patient_group)
    return _prepare(config, run)


def _prepare(config: PretrainConfig, run: Path | None) -> tuple[Tokenizer, Corpus]:
    text = content_key(config.data, config.text_field, max_characters=config.max_characters)
    cache = Path(config.cache_dir).expanduser()
    tokenizer = load_tokenizer(run) if run else _tokenizer(config, cache, text)
    report = SourceReport()
    documents = iter_documents(
        config.data, config.text_field, max_characters=config.max_characters, report=report
    )
    corpus = build_corpus(
        documents,
        tokenizer,
        cache_dir=cache / "corpora",
        key_parts={"text": text},
        num_workers=config.preprocessing_workers,
        progress=True,
        report=report,
    )
    if report.documents:
        logger.info("read %s", report)
    counts = (corpus.num_documents, corpus.num_sentences, corpus.num_tokens)
    logger.info(
        "corpus %s: %s documents, %s sentences, %s tokens",
        corpus.folder,
        *(f"{count:,}" for count in counts),
    )
    return tokenizer, corpus


def _tokenizer(config: PretrainConfig, cache: Path, text: str) -> Tokenizer:
    if config.vocab is not None:
        return load_tokenizer(config.vocab)
    settings = json.dumps([text, config.vocab_size, _VOCABULARY_VERSION])
    key = hashlib.sha256(settings.encode()).hexdigest()[:32]
    folder = cache / "tokenizers" / key
    if not (folder / "tokenizer_config.json").is_file():
        logger.info("training a vocabulary of %d word pieces", config.vocab_size)
        save_tokenizer(train_tokenizer(vocabulary_text(config), config.vocab_size), folder)
    return load_tokenizer(folder)


def vocabulary_text(config: PretrainConfig) -> Iterator[str]:
    """Documents of all sources in turn, because a vocabulary is learned from the first of them.

    Raises:
        DataError: a source cannot be read.
    """
    if config.max_characters is not None:
        return iter_documents(config.data, config.text_field, max_characters=config.max_characters)
    return in_turn([iter_documents([source], config.text_field) for source in config.data])


def check_unchanged(corpus: Corpus, saved: dict[str, Any], run: Path) -> None:
    """Refuse to resume on other text than the run began with.

    Raises:
        UsageError: the corpus has another fingerprint.
    """
    if corpus.folder.name != saved["corpus"]:
        raise UsageError(
            f"--resume {run}: the text changed since the run began (fingerprint "
            f"{saved['corpus'][:12]}, found {corpus.folder.name[:12]})"
        )


def describe(tokenizer: Tokenizer, corpus: Corpus) -> dict[str, str]:
    """What `check_unchanged` compares, for the run's record."""
    return {"corpus": corpus.folder.name, "tokenizer": tokenizer_fingerprint(tokenizer)}


def example_settings(config: PretrainConfig, tokenizer: Tokenizer) -> ExampleSettings:
    """How examples are drawn for a tokenizer."""
    special = SpecialTokens.from_tokenizer(tokenizer)
    return ExampleSettings(
        seq_len=config.seq_len,
        objective=config.objective,
        mask_probability=config.mask_probability,
        short_sequence_probability=config.short_sequence_probability,
        vocab_size=tokenizer.get_vocab_size(),
        cls_id=special.cls,
        sep_id=special.sep,
        mask_id=special.mask,
        special_ids=special.as_tuple(),
    )
