"""Tokenised texts for tests of examples and batches."""

import numpy as np

from pretrain.examples import ExampleSettings, TokenCorpus

CLS, SEP, MASK = 1, 2, 3
FIRST_ID = 10


def make_corpus(documents: list[list[int]]) -> TokenCorpus:
    """Corpus of given sentence lengths in which token `i` has the id `FIRST_ID + i`."""
    lengths = [length for document in documents for length in document]
    return TokenCorpus(
        tokens=np.arange(sum(lengths), dtype=np.uint32) + FIRST_ID,
        sentence_offsets=np.cumsum([0, *lengths]),
        document_offsets=np.cumsum([0, *map(len, documents)]),
    )


def realistic_corpus(num_documents: int, sentences: int) -> TokenCorpus:
    """Sentences of 26 tokens on average, as English text has."""
    rng = np.random.default_rng(0)
    lengths = 1 + rng.gamma(3.0, 25 / 3, size=(num_documents, sentences)).astype(int)
    return make_corpus(lengths.tolist())


def make_settings(corpus: TokenCorpus, seq_len: int = 16, **changes) -> ExampleSettings:
    values = {"seq_len": seq_len, "vocab_size": FIRST_ID + len(corpus.tokens)}
    values |= {"cls_id": CLS, "sep_id": SEP, "mask_id": MASK, "short_sequence_probability": 0.0}
    return ExampleSettings(**{**values, "special_ids": (0, CLS, SEP, MASK, 4), **changes})
