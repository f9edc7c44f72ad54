"""Pre-training examples: masked language modelling with sentence structural objective (MLM + SSO).

An example is `[CLS] A [SEP] B [SEP]`, A and B being consecutive sentences of one document; SSO
(PoNet, arXiv 2110.02442, section 3.2) asks whether B follows A, precedes it, or comes from another
document. Two steps make it, both vectorised over flat memory-mapped arrays:

1. `plan_epoch` decides where every example of an epoch lies: a few numbers each, no token read.
2. `draw_batch` turns any selection of these rows into one packed batch of masked tokens.

Every random decision is a counter-based hash of (seed, epoch, first token of the example), for
masking also of the position in the example. So an example is the same in whatever batch, process
or resumed run it is drawn. Quirks of the published builder that are not reproduced: a one-line
chunk paired with itself, and one length drawn for a whole window of 1000 lines.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from ponet.model import IGNORED_LABEL

# number of label classes of the sentence objective; "mlm" has none
OBJECTIVES = {"mlm+sso": 3, "mlm+nsp": 2, "mlm": 0}

_MASK_SHARE = 0.8
_RANDOM_SHARE = 0.1

# increment of splitmix64 (Steele, Lea, Flood 2014); `_scramble` is its finaliser
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


class _Draw(IntEnum):
    """Separate random streams of one example, one per decision."""

    SHORT = 1
    TARGET = 2
    SPLIT = 3
    LABEL = 4
    OTHER_DOCUMENT = 5
    OTHER_SENTENCE = 6
    MASKING = 7


class TokenCorpus(Protocol):
    """What example drawing reads of a corpus; every sentence and document is non-empty."""

    @property
    def tokens(self) -> np.ndarray:
        """Token ids of all text without special tokens, `uint16` or `uint32` `[num_tokens]`."""
        ...

    @property
    def sentence_offsets(self) -> np.ndarray:
        """First token of each sentence and the end, `int64` `[num_sentences + 1]`."""
        ...

    @property
    def document_offsets(self) -> np.ndarray:
        """First sentence of each document and the end, `int64` `[num_documents + 1]`."""
        ...


@dataclass(frozen=True, kw_only=True)
class ExampleSettings:
    """How examples are cut, paired and masked."""

    seq_len: int
    """Most tokens of an example, its special tokens included."""
    vocab_size: int
    cls_id: int
    sep_id: int
    mask_id: int
    special_ids: tuple[int, ...]
    """Ids that are never masked and never a random replacement; holds the three above."""
    objective: str = "mlm+sso"
    """Name in `OBJECTIVES`."""
    mask_probability: float = 0.15
    """Chance of each ordinary token to be selected for MLM."""
    short_sequence_probability: float = 0.1
    """Chance of each example to get a shorter target, so that position and pooling see lengths."""

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {list(OBJECTIVES)}, got {self.objective!r}")
        if self.seq_len < 5:
            raise ValueError(f"seq_len must be at least 5 ([CLS] a [SEP] b [SEP]): {self.seq_len}")
        if not 0 < self.mask_probability <= 1:
            raise ValueError(f"mask_probability must be in (0, 1], got {self.mask_probability}")
        if not 0 <= self.short_sequence_probability <= 1:
            raise ValueError(
                f"short_sequence_probability must be in [0, 1], "
                f"got {self.short_sequence_probability}"
            )
        named = (self.cls_id, self.sep_id, self.mask_id)
        if len(set(named)) != 3 or not set(named) <= set(self.special_ids):
            raise ValueError(
                f"cls_id, sep_id, mask_id {named} must differ and be among special_ids "
                f"{self.special_ids}"
            )
        outside = [i for i in self.special_ids if not 0 <= i < self.vocab_size]
        if outside:
            raise ValueError(f"special_ids {outside} are outside vocab_size {self.vocab_size}")
        if len(set(self.special_ids)) >= self.vocab_size:
            raise ValueError(f"vocab_size {self.vocab_size} leaves no ordinary token")

    @property
    def num_labels(self) -> int:
        """Classes of the sentence objective, 0 for "mlm"."""
        return OBJECTIVES[self.objective]

    @property
    def min_text_tokens(self) -> int:
        """Fewest tokens of text in an example: one for each of its parts."""
        return 2 if self.num_labels else 1

    @property
    def max_text_tokens(self) -> int:
        """Most tokens of text in an example: what its special tokens leave of `seq_len`."""
        return self.seq_len - self.num_special_tokens

    @property
    def num_special_tokens(self) -> int:
        """Special tokens of an example: [CLS] and one [SEP] per part."""
        return 3 if self.num_labels else 2


@dataclass(frozen=True, kw_only=True)
class ExamplePlan:
    """Where the examples of an epoch lie, one row each; offsets are into `corpus.tokens`."""

    key: np.ndarray
    """Hash of (seed, epoch, start): the state of the example's random streams, `uint64` `[E]`."""
    start: np.ndarray
    """First token of the text consumed from the document, `int64` `[E]`, increasing."""
    end: np.ndarray
    """End of the text consumed, `int64` `[E]`; the next example of the document starts here."""
    a_start: np.ndarray
    """First token of part A as it appears in the input, `int64` `[E]`."""
    a_end: np.ndarray
    """End of part A, `int64` `[E]`."""
    b_start: np.ndarray
    """First token of part B as it appears in the input, `int64` `[E]`."""
    b_end: np.ndarray
    """End of part B, `int64` `[E]`; equal to `b_start` for "mlm"."""
    label: np.ndarray
    """SSO: 0 B follows A, 1 swapped, 2 B of another document. NSP: 0, 1. `int64` `[E]`."""
    length: np.ndarray
    """Tokens of the example with its special tokens, `int64` `[E]`."""
    num_dropped_tokens: int = 0
    """Rests of documents too short for an example of their own (one token), in no example."""
    num_replaced_tokens: int = 0
    """Tokens consumed as part B but not shown, because another document's text replaced them."""

    def __len__(self) -> int:
        return len(self.key)

    def take(self, indices: np.ndarray) -> "ExamplePlan":
        """The rows at `indices`, few enough to send to a loader worker; the counts are 0."""
        columns: dict[str, Any] = vars(self)
        taken: dict[str, Any] = {
            n: x[indices] for n, x in columns.items() if isinstance(x, np.ndarray)
        }
        return ExamplePlan(**taken)


def split_documents(num_documents: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Part the documents for training and validation.

    The draw is a hash of the document's index: the same corpus is always parted alike.

    Args:
        num_documents: of the corpus.
        fraction: share of the documents to validate on, between 0 and 1.

    Returns:
        `int64` indices of the training and of the validation documents, each in ascending order,
        at least one in each.

    Raises:
        ValueError: there are fewer than 4 documents.
    """
    if num_documents < 4:
        raise ValueError(
            f"the corpus has {num_documents} documents; 4 are needed to set some apart for "
            "validation (blank lines part the documents of a text file over 1 MiB)"
        )
    counters = np.arange(1, num_documents + 1, dtype=np.uint64)
    order = np.argsort(_scramble(counters * _GOLDEN), kind="stable")
    size = min(max(round(fraction * num_documents), 1), num_documents - 1)
    return np.sort(order[size:]), np.sort(order[:size])


def plan_epoch(
    corpus: TokenCorpus, documents: np.ndarray, settings: ExampleSettings, seed: int, epoch: int
) -> ExamplePlan:
    """Decide where every example of an epoch lies and what its sentence label is.

    An example takes whole sentences of one document until the next would pass its target: the most
    that `seq_len` allows, or with `short_sequence_probability` a uniform smaller length. A first
    sentence longer than the target is taken whole if it fits into `seq_len`, otherwise in pieces:
    the next example goes on in the middle of the sentence, so no text is lost. A and B meet at a
    uniformly drawn sentence boundary, within a single sentence at a uniform token boundary.

    A B from another document is as many whole sentences as fit into the original B's length (at
    least one, cut only by `seq_len`): a ragged end alone would tell the label. The original B
    counts as consumed, as in the published builder; another epoch cuts and labels otherwise.

    Args:
        corpus: The flat token arrays.
        documents: Indices of the documents to use, `int64` `[num_used]`, in any order.
        settings: Lengths and objective.
        seed: Any integer.
        epoch: Number of the pass over the documents.

    Returns:
        All examples in the order of their text, equal for equal arguments.

    Raises:
        ValueError: If documents repeat, do not exist, or if there are fewer than two of them for
            an objective that needs text of another document.
    """
    documents = _checked_documents(corpus, documents, settings)
    owner, start, end, num_dropped = _cut_documents(corpus, documents, settings, seed, epoch)
    key = _example_key(seed, epoch, start)
    if settings.num_labels:
        split = _split_points(corpus, key, start, end)
        label = _choose(key, _Draw.LABEL, np.full(len(key), settings.num_labels))
    else:
        split = end
        label = np.full(len(key), IGNORED_LABEL)
    swapped = (label == 1) & (settings.objective == "mlm+sso")
    a_start, a_end = np.where(swapped, split, start), np.where(swapped, end, split)
    b_start, b_end = np.where(swapped, start, split), np.where(swapped, split, end)
    num_replaced = 0
    if settings.num_labels:
        foreign = np.flatnonzero(label == settings.num_labels - 1)
        wanted = (end - split)[foreign]
        room = (settings.max_text_tokens - (split - start))[foreign]
        num_replaced = int(wanted.sum())
        b_start[foreign], b_end[foreign] = _foreign_ranges(
            corpus, documents, owner[foreign], wanted, room, key[foreign]
        )
    return ExamplePlan(
        key=key,
        start=start,
        end=end,
        a_start=a_start,
        a_end=a_end,
        b_start=b_start,
        b_end=b_end,
        label=label,
        length=(a_end - a_start) + (b_end - b_start) + settings.num_special_tokens,
        num_dropped_tokens=num_dropped,
        num_replaced_tokens=num_replaced,
    )


def draw_batch(
    corpus: TokenCorpus, plan: ExamplePlan, settings: ExampleSettings
) -> dict[str, np.ndarray]:
    """Draw one packed batch: the examples of a (sub-)plan one after another, masked for MLM.

    MLM: each ordinary token is selected with `mask_probability`; of the selected 80 % become
    [MASK], 10 % a token drawn uniformly from all ordinary ids (the original among them), 10 % stay.
    Special ids that occur in the text, such as [UNK], are never selected.

    Args:
        corpus: The flat token arrays the plan was made for.
        plan: The `B` examples of the batch, from `ExamplePlan.take`; `T` is their total length.
        settings: The settings the plan was made with.

    Returns:
        `input_ids` `int64` `[T]`: `[CLS] A [SEP] B [SEP]` of all examples.
        `label_positions` `int64` `[M]`: offsets of the selected tokens, ascending.
        `labels` `int64` `[M]`: their original ids.
        `token_type_ids` `int64` `[T]`: 0 for `[CLS] A [SEP]`, 1 for `B [SEP]`.
        `segment_ids` `int32` `[T]`: within each example [CLS] is 0, then each sentence (or piece
        of one) and each [SEP] counts one up.
        `position_ids` `int64` `[T]`: position within the example.
        `cu_seqlens` `int32` `[B+1]`: offsets of the examples.
        `sso_labels` `int64` `[B]`: label of the sentence objective, -100 for "mlm".

    Raises:
        ValueError: If the plan is empty.
    """
    if len(plan) == 0:
        raise ValueError("a batch needs at least one example, got an empty plan")
    cu_seqlens = np.concatenate([[0], np.cumsum(plan.length)])
    num_tokens = int(cu_seqlens[-1])
    # the [SEP] that ends A; for "mlm" it is also the last token of the example
    separator = cu_seqlens[:-1] + 1 + (plan.a_end - plan.a_start)

    # two pieces per example: "[CLS] A" and "[SEP] B [SEP]". A source range that begins one token
    # early and ends one late makes room for the special tokens, which are then written over it
    offsets = np.arange(num_tokens)
    out_start = _interleave(cu_seqlens[:-1], separator)
    shift = _interleave(plan.a_start, plan.b_start) - 1 - out_start
    source = offsets + np.repeat(shift, np.diff(out_start, append=num_tokens))
    input_ids = np.asarray(corpus.tokens).take(source, mode="clip").astype(np.int64)
    input_ids[cu_seqlens[:-1]] = settings.cls_id
    input_ids[separator] = settings.sep_id
    input_ids[cu_seqlens[1:] - 1] = settings.sep_id

    part_lengths = np.diff(_interleave(cu_seqlens[:-1], separator + 1), append=num_tokens)
    position_ids = offsets - np.repeat(cu_seqlens[:-1], plan.length)
    selected, originals = _mask_tokens(input_ids, position_ids, plan, settings)
    return {
        "input_ids": input_ids,
        "label_positions": selected,
        "labels": originals,
        "token_type_ids": np.repeat(np.tile([0, 1], len(plan)), part_lengths),
        "segment_ids": _segment_ids(corpus, plan, shift, cu_seqlens, separator),
        "position_ids": position_ids,
        "cu_seqlens": cu_seqlens.astype(np.int32),
        "sso_labels": plan.label.copy(),
    }


def concatenate_ranges(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return `[starts[0], ..., ends[0] - 1, starts[1], ...]`, the indices of many ranges."""
    counts = ends - starts
    out_ends = np.cumsum(counts)
    total = int(out_ends[-1]) if len(out_ends) else 0
    return np.arange(total) + np.repeat(starts - (out_ends - counts), counts)


def _checked_documents(
    corpus: TokenCorpus, documents: np.ndarray, settings: ExampleSettings
) -> np.ndarray:
    """Return the documents in increasing order, since examples depend on the set alone."""
    unique = np.unique(np.asarray(documents, dtype=np.int64))
    if len(unique) != len(documents):
        raise ValueError(f"documents repeat: {len(documents)} given, {len(unique)} different")
    num_documents = len(corpus.document_offsets) - 1
    if len(unique) and (unique[0] < 0 or unique[-1] >= num_documents):
        raise ValueError(
            f"documents {unique[0]} to {unique[-1]} are outside a corpus of {num_documents}"
        )
    if settings.num_labels and len(unique) < 2:
        raise ValueError(
            f"{settings.objective} takes text from another document and needs at least two "
            f"documents, got {len(unique)}; give more text, a larger --validation-fraction where "
            "the held-out ones are too few, or use the objective mlm"
        )
    return unique


def _cut_documents(
    corpus: TokenCorpus, documents: np.ndarray, settings: ExampleSettings, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Cut documents into consecutive token ranges, round r cutting example r of all documents.

    Returns:
        Index into `documents`, start and end of each range (`int64` `[E]`, in order of start), and
        the number of tokens dropped.
    """
    sentences = np.asarray(corpus.sentence_offsets)
    document_offsets = np.asarray(corpus.document_offsets)
    position = sentences[document_offsets[documents]]
    stop = sentences[document_offsets[documents + 1]]
    owner = np.arange(len(documents))
    rounds = [(owner[:0], position[:0], stop[:0])]
    num_dropped = 0
    while len(position):
        left = stop - position
        alive = left >= settings.min_text_tokens
        if not alive.all():
            num_dropped += int(left[~alive].sum())
            position, stop, owner = position[alive], stop[alive], owner[alive]
        end = _example_ends(sentences, position, stop, settings, seed, epoch)
        rounds.append((owner, position, end))
        position = end
    owner, start, end = (np.concatenate(column) for column in zip(*rounds, strict=True))
    order = np.argsort(start)
    return owner[order], start[order], end[order], num_dropped


def _example_ends(
    sentences: np.ndarray,
    start: np.ndarray,
    stop: np.ndarray,
    settings: ExampleSettings,
    seed: int,
    epoch: int,
) -> np.ndarray:
    """Return where examples that begin at `start` in documents that end at `stop` end."""
    key = _example_key(seed, epoch, start)
    longest = settings.max_text_tokens
    is_short = _uniform(key, _Draw.SHORT) < settings.short_sequence_probability
    short = 2 + _choose(key, _Draw.TARGET, np.int64(longest - 1))
    limit = start + np.where(is_short, short, longest)
    # the last boundary within the limit; it may lie before the start or beyond the document
    whole = sentences[np.searchsorted(sentences, limit, side="right") - 1]
    # the first boundary that leaves text for every part, since a sentence may be one token
    needed = np.minimum(start + settings.min_text_tokens, stop)
    first = sentences[np.searchsorted(sentences, needed, side="left")]
    return np.minimum(np.maximum(whole, np.minimum(first, start + longest)), stop)


def _split_points(
    corpus: TokenCorpus, key: np.ndarray, start: np.ndarray, end: np.ndarray
) -> np.ndarray:
    """Return where A ends and B begins, `int64` `[E]`, strictly between start and end."""
    sentences = np.asarray(corpus.sentence_offsets)
    first, last = _inner_boundaries(sentences, start, end)
    count = last - first
    at_sentence = sentences[first + _choose(key, _Draw.SPLIT, np.maximum(count, 1))]
    at_token = start + 1 + _choose(key, _Draw.SPLIT, end - start - 1)
    return np.where(count > 0, at_sentence, at_token)


def _foreign_ranges(
    corpus: TokenCorpus,
    documents: np.ndarray,
    owner: np.ndarray,
    wanted: np.ndarray,
    room: np.ndarray,
    key: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw sentences of another document, a part of one only where even that leaves no room.

    Args:
        corpus: The flat token arrays.
        documents: Documents to draw from, `int64` `[num_used]`.
        owner: Index into `documents` of the own document of each example, `int64` `[N]`.
        wanted: Length of the B to replace, `int64` `[N]`. Text begins where at least as many
            tokens follow, in shorter documents at their beginning.
        room: Most tokens, `int64` `[N]`, for a first sentence that is longer than wanted.
        key: State of the examples' random streams, `uint64` `[N]`.

    Returns:
        Start and end of the ranges, `int64` `[N]` each.
    """
    sentences = np.asarray(corpus.sentence_offsets)
    document_offsets = np.asarray(corpus.document_offsets)
    other = _choose(key, _Draw.OTHER_DOCUMENT, np.int64(len(documents) - 1))
    # skipping the own document keeps the draw uniform over the others
    other = documents[other + (other >= owner)]
    first, last = document_offsets[other], document_offsets[other + 1]
    drawn = first + _choose(key, _Draw.OTHER_SENTENCE, last - first)
    stop = sentences[last]
    # too near the end of the document: move back to the last sentence with enough text after it
    enough = np.searchsorted(sentences, stop - wanted, side="right") - 1
    start = sentences[np.maximum(np.minimum(drawn, enough), first)]
    # whole sentences: text that stops in the middle of one would give the label away
    whole = sentences[np.searchsorted(sentences, np.minimum(start + wanted, stop), "right") - 1]
    first_end = sentences[np.searchsorted(sentences, start, side="right")]
    return start, np.where(whole > start, whole, np.minimum(first_end, start + room))


def _inner_boundaries(
    sentences: np.ndarray, start: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the range of sentences that begin strictly inside `(start, end)`."""
    first = np.searchsorted(sentences, start, side="right")
    last = np.searchsorted(sentences, end, side="left")
    return first, np.maximum(first, last)


def _segment_ids(
    corpus: TokenCorpus,
    plan: ExamplePlan,
    shift: np.ndarray,
    cu_seqlens: np.ndarray,
    separator: np.ndarray,
) -> np.ndarray:
    """Number special tokens and sentences within each example, `int32` `[T]`.

    Args:
        corpus: The flat token arrays.
        plan: The `B` examples of the batch.
        shift: Offset in the corpus minus offset in the batch of each part, `int64` `[2B]`.
        cu_seqlens: Offsets of the examples, `int64` `[B+1]`.
        separator: Offset of the [SEP] after A, `int64` `[B]`.
    """
    sentences = np.asarray(corpus.sentence_offsets)
    first, last = _inner_boundaries(
        sentences, _interleave(plan.a_start, plan.b_start), _interleave(plan.a_end, plan.b_end)
    )
    inner = sentences[concatenate_ranges(first, last)] - np.repeat(shift, last - first)
    # how far the id rises from one token to the next; one more slot than tokens, so that the
    # position after the last example needs no special case
    step = np.zeros(cu_seqlens[-1] + 1, dtype=np.int32)
    step[inner] = 1
    step[cu_seqlens[:-1] + 1] = 1
    step[separator] = 1
    step[separator + 1] = 1
    step[cu_seqlens[1:] - 1] = 1
    # every [CLS] falls back to 0, from the last id of the example before it
    step[cu_seqlens] = 0
    step[cu_seqlens[1:]] = -np.add.reduceat(step, cu_seqlens[:-1])
    return np.cumsum(step[:-1], dtype=np.int32)


def _mask_tokens(
    input_ids: np.ndarray, position_ids: np.ndarray, plan: ExamplePlan, settings: ExampleSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Mask `input_ids` `[T]` in place for MLM.

    Returns:
        The selected offsets, ascending, and the ids they held, `int64` `[M]` each.
    """
    is_ordinary, ordinary_ids = _ordinary_tokens(settings.vocab_size, settings.special_ids)
    stream = _draw_bits(plan.key, _Draw.MASKING)
    bits = position_ids.view(np.uint64) * _GOLDEN
    bits += np.repeat(stream, plan.length)
    _scramble(bits)
    # comparing integers saves a conversion of every token's bits to float
    selected = np.flatnonzero(bits < min(int(settings.mask_probability * 2.0**64), _WORD))
    selected = selected[is_ordinary[input_ids[selected]]]

    originals = input_ids[selected]
    # the bits above are small numbers where a token was selected: mix them anew
    action_bits = _scramble(bits[selected] + _GOLDEN)
    action = _to_uniform(action_bits)
    input_ids[selected[action < _MASK_SHARE]] = settings.mask_id
    is_random = (action >= _MASK_SHARE) & (action < _MASK_SHARE + _RANDOM_SHARE)
    draw = _to_uniform(_scramble(action_bits[is_random] + _GOLDEN))
    input_ids[selected[is_random]] = ordinary_ids[(draw * len(ordinary_ids)).astype(np.int64)]
    return selected, originals


@lru_cache(maxsize=8)
def _ordinary_tokens(vocab_size: int, special_ids: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Return whether each id is ordinary, `bool` `[vocab_size]`, and the list of these ids."""
    is_ordinary = np.ones(vocab_size, dtype=bool)
    is_ordinary[list(special_ids)] = False
    return is_ordinary, np.flatnonzero(is_ordinary)


def _interleave(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return `[first[0], second[0], first[1], ...]`."""
    return np.stack([first, second], axis=1).reshape(-1)


def _scramble(bits: np.ndarray) -> np.ndarray:
    """Apply the finaliser of splitmix64 to `uint64` words, in place to save memory traffic."""
    bits ^= bits >> 30
    bits *= 0xBF58476D1CE4E5B9
    bits ^= bits >> 27
    bits *= 0x94D049BB133111EB
    bits ^= bits >> 31
    return bits


def _example_key(seed: int, epoch: int, start: np.ndarray) -> np.ndarray:
    """Hash (seed, epoch, first token) to the state of an example's random streams."""
    run = np.array([seed & _WORD], dtype=np.uint64)
    run = _scramble(_scramble(run + _GOLDEN) + (epoch & _WORD))
    return _scramble(start.astype(np.uint64) * _GOLDEN + run)


def _draw_bits(key: np.ndarray, draw: _Draw) -> np.ndarray:
    """Return the random word of one decision, `uint64`, shaped like `key`."""
    return _scramble(key + (draw * _GOLDEN & _WORD))


def _to_uniform(bits: np.ndarray) -> np.ndarray:
    """Turn random `uint64` words into `float64` in [0, 1)."""
    return (bits >> 11) * 2.0**-53


def _uniform(key: np.ndarray, draw: _Draw) -> np.ndarray:
    """Draw from [0, 1), `float64`, shaped like `key`."""
    return _to_uniform(_draw_bits(key, draw))


def _choose(key: np.ndarray, draw: _Draw, count: np.ndarray | np.int64) -> np.ndarray:
    """Draw a uniform integer in [0, count), `int64`, shaped like `key`."""
    return (_uniform(key, draw) * count).astype(np.int64)
