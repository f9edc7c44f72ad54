"""Sentences of English text."""

import importlib.metadata
from itertools import chain

import sentencex

_LANGUAGE = "en"


def split_sentences(document: str) -> list[str]:
    """Sentences of a document; none crosses the end of a paragraph.

    Args:
        document: paragraphs separated by newlines.
    """
    paragraphs = filter(None, document.split("\n"))
    # the package gives its type checkers no stubs
    segment = sentencex.segment  # pyright: ignore[reportAttributeAccessIssue]
    segments = chain.from_iterable(segment(_LANGUAGE, paragraph) for paragraph in paragraphs)
    return list(filter(None, map(str.strip, segments)))


def splitter_version() -> str:
    """What decides how `split_sentences` splits, as part of a cache key."""
    return f"sentencex {importlib.metadata.version('sentencex')} {_LANGUAGE}"
