"""Pre-training examples: masked language modelling with sentence structural objective (MLM + SSO).

An example is `[CLS] A [SEP] B [SEP]`, A and B being consecutive sentences of one document; SSO
(PoNet, arXiv 2110.02442, section 3.2) asks whether B follows A, precedes it, or comes from another
document. Neither the lengths of A and B nor where they begin and end tell the answer. `plan_epoch`
decides where every example of an epoch lies, and reads no token for it; `draw_batch` turns
any selection of these rows into one packed batch of masked tokens.

Every random decision is a counter-based hash of (seed, epoch, first token of the example), for
masking also of the position in the example. So an example is the same in whatever batch, process
or resumed run it is drawn.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np

from ponet.model import IGNORED_LABEL
from ponet.run.cli import require

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
    DIRECTION = 5
    MASKING = 6


@dataclass(frozen=True, kw_only=True)
class TokenCorpus:
    """A text as flat arrays; every sentence and document is non-empty."""

    tokens: np.ndarray
    """Token ids of all text without special tokens, `uint16` or `uint32` `[num_tokens]`."""
    sentence_offsets: np.ndarray
    """First token of each sentence and the end, `int64` `[num_sentences + 1]`."""
    document_offsets: np.ndarray
    """First sentence of each document and the end, `int64` `[num_documents + 1]`."""


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
        masked, short = self.mask_probability, self.short_sequence_probability
        require(self.seq_len >= 5, "seq_len", "at least 5: [CLS] a [SEP] b [SEP]", self.seq_len)
        require(0 < masked <= 1, "mask_probability", "above 0 and at most 1", masked)
        require(0 <= short <= 1, "short_sequence_probability", "between 0 and 1", short)

    @property
    def num_labels(self) -> int:
        """Classes of the sentence objective, 0 for "mlm"."""
        return OBJECTIVES[self.objective]

    @property
    def max_text_tokens(self) -> int:
        """Most tokens of text in an example: what [CLS] and every [SEP] leave of `seq_len`."""
        return self.seq_len - (3 if self.num_labels else 2)


@dataclass(frozen=True, kw_only=True)
class ExamplePlan:
    """Where examples lie: arrays `[E]`, offsets are into `corpus.tokens` and `int64`."""

    key: np.ndarray
    """Hash of (seed, epoch, start): the state of the example's random streams, `uint64`."""
    start: np.ndarray
    """First token of the text consumed from the document, increasing."""
    end: np.ndarray
    """End of the text consumed; the next example of the document starts here."""
    a_start: np.ndarray
    """First token of part A as it appears in the input."""
    a_end: np.ndarray
    b_start: np.ndarray
    b_end: np.ndarray
    """End of part B; equal to `b_start` where there is A alone, without a label."""
    label: np.ndarray
    """SSO: 0 B follows A, 1 swapped, 2 B of another document. NSP: 0, 1. None: -100. `int64`."""
    length: np.ndarray
    """Tokens of the example with its special tokens, `int64`."""

    def __len__(self) -> int:
        return len(self.key)

    def take(self, indices: np.ndarray) -> "ExamplePlan":
        """The rows at `indices`, few enough to send to a loader worker."""
        return ExamplePlan(**{name: column[indices] for name, column in vars(self).items()})


def split_documents(num_documents: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Part the documents by a hash of their index: the same corpus is always parted alike.

    Returns ascending indices for training and, a `fraction`, for validation; at least one in each.

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
    """Decide where every example of an epoch over some documents lies, and its sentence label.

    An example takes whole sentences of one document until the next would pass its target: the most
    that `seq_len` allows, or with `short_sequence_probability` a uniform smaller length. A first
    sentence longer than the target is taken whole if it fits into `seq_len`, otherwise in pieces.
    A sentence that did not fit opens the next example and is a long one, so half of the documents,
    drawn per epoch, are cut from their end to their beginning: either part may be the longer.

    Two sentences or more are parted at a uniformly drawn boundary. Other text, a sentence or pieces
    of one, is A alone and has no label: where a sentence breaks would tell the order.

    Examples with text of another document exchange their second parts, each for one of nearly its
    size (equal in a text of some size), so that they look like those in order and show all text. An
    example for whose part no other document has one gets no label.

    Raises:
        ValueError: If an objective needs text of another document and there is none.
    """
    if settings.num_labels and len(documents) < 2:
        raise ValueError(
            f"{settings.objective} takes text from another document and needs at least two "
            f"documents to train on and two to hold out, found {len(documents)} on one side; give "
            "more text, a larger --validation-fraction, or use the objective mlm"
        )
    documents = np.sort(documents)
    owner, key, start, end = _cut_documents(corpus, documents, settings, seed, epoch)
    split, label = end, np.full(len(key), IGNORED_LABEL)
    # whose second part an example shows
    source = np.arange(len(key))
    if settings.num_labels:
        split = _split_points(corpus.sentence_offsets, key, start, end)
        drawn = _choose(key, _Draw.LABEL, np.int64(settings.num_labels))
        label = np.where(split < end, drawn, IGNORED_LABEL)
        foreign = np.flatnonzero(label == settings.num_labels - 1)
        room = settings.max_text_tokens - (split - start)
        partner = _partners(owner[foreign], (end - split)[foreign], room[foreign], key[foreign])
        source[foreign] = foreign[partner]
        # no other document has a part that fits
        alone = foreign[source[foreign] == foreign]
        label[alone] = IGNORED_LABEL
    swapped = (label == 1) & (settings.objective == "mlm+sso")
    a_start, a_end = np.where(swapped, split, start), np.where(swapped, end, split)
    b_start, b_end = np.where(swapped, start, split[source]), np.where(swapped, split, end[source])
    unlabelled = label == IGNORED_LABEL
    a_end[unlabelled] = b_start[unlabelled] = b_end[unlabelled] = end[unlabelled]
    return ExamplePlan(
        key=key,
        start=start,
        end=end,
        a_start=a_start,
        a_end=a_end,
        b_start=b_start,
        b_end=b_end,
        label=label,
        length=(a_end - a_start) + (b_end - b_start) + np.where(unlabelled, 2, 3),
    )


def draw_batch(
    corpus: TokenCorpus, plan: ExamplePlan, settings: ExampleSettings
) -> dict[str, np.ndarray]:
    """Draw one packed batch: the examples of a (sub-)plan one after another, masked for MLM.

    MLM: each ordinary token is selected with `mask_probability`; of the selected 80 % become
    [MASK], 10 % a token drawn uniformly from all ordinary ids (the original among them), 10 % stay.
    Special ids that occur in the text, such as [UNK], are never selected.

    Returns:
        For a plan of `B` examples, at least one, with `T` tokens together:
        `input_ids` `int64` `[T]`: `[CLS] A [SEP] B [SEP]` of all examples.
        `label_positions` `int64` `[M]`: offsets of the selected tokens, ascending.
        `labels` `int64` `[M]`: their original ids.
        `token_type_ids` `int64` `[T]`: 0 for `[CLS] A [SEP]`, 1 for `B [SEP]`.
        `segment_ids` `int32` `[T]`: within each example [CLS] is 0, then each sentence (or piece
        of one) and each [SEP] counts one up.
        `position_ids` `int64` `[T]`: position within the example.
        `cu_seqlens` `int32` `[B+1]`: offsets of the examples.
        `sso_labels` `int64` `[B]`: label of the sentence objective, -100 for "mlm".
    """
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
    input_ids = corpus.tokens.take(source, mode="clip").astype(np.int64)
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
        "segment_ids": _segment_ids(corpus.sentence_offsets, plan, shift, cu_seqlens, separator),
        "position_ids": position_ids,
        "cu_seqlens": cu_seqlens.astype(np.int32),
        "sso_labels": plan.label,
    }


def length_baseline(plan: ExamplePlan) -> float:
    """Share of the sentence labels that the lengths of A and B tell: near that of the commonest.

    It guesses every other label: the commonest among the rest in the same of 8 x 8 quantile bins.
    Zero where there is none to guess.
    """
    labelled = plan.take(np.flatnonzero(plan.label != IGNORED_LABEL))
    if len(labelled) < 2:
        return 0.0
    bins = np.zeros(len(labelled), dtype=np.int64)
    for sizes in (labelled.a_end - labelled.a_start, labelled.b_end - labelled.b_start):
        edges = np.quantile(sizes, np.arange(1, 8) / 8)
        bins = 8 * bins + np.searchsorted(edges, sizes, side="right")
    counts = np.zeros((64, labelled.label.max() + 1))
    np.add.at(counts, (bins[::2], labelled.label[::2]), 1)
    return float(np.mean(counts.argmax(axis=1)[bins[1::2]] == labelled.label[1::2]))


def concatenate_ranges(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """`[starts[0], ..., ends[0] - 1, starts[1], ...]`, the indices of many ranges."""
    counts = ends - starts
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - before, counts)


def _cut_documents(
    corpus: TokenCorpus, documents: np.ndarray, settings: ExampleSettings, seed: int, epoch: int
) -> tuple[np.ndarray, ...]:
    """Index into `documents`, key, start and end of the examples' text, in order of start."""
    total, longest = corpus.sentence_offsets[-1], settings.max_text_tokens
    # what is cut backward lies mirrored beyond the end of the corpus
    sentences = corpus.sentence_offsets
    sentences = np.concatenate([sentences, 2 * total - sentences[-2::-1]])
    start = sentences[corpus.document_offsets[documents]]
    stop = sentences[corpus.document_offsets[documents + 1]]
    backward = _draw_bits(_example_key(seed, epoch, start), _Draw.DIRECTION) >> 63 == 1
    start[backward], stop[backward] = 2 * total - stop[backward], 2 * total - start[backward]
    owner = np.arange(len(documents))
    rounds = []
    # the next example of all documents that have one
    while len(start):
        key = _example_key(seed, epoch, start)
        is_short = _to_uniform(_draw_bits(key, _Draw.SHORT)) < settings.short_sequence_probability
        short = 2 + _choose(key, _Draw.TARGET, np.int64(longest - 1))
        limit = start + np.where(is_short, short, longest)
        # the last boundary within the limit; it may lie before the start or beyond the document
        whole = sentences[np.searchsorted(sentences, limit, side="right") - 1]
        first = sentences[np.searchsorted(sentences, start, side="right")]
        end = np.minimum(np.maximum(whole, np.minimum(first, start + longest)), stop)
        rounds.append((owner, start, end))
        alive = end < stop
        owner, start, stop = owner[alive], end[alive], stop[alive]
    owner, start, end = (np.concatenate(column) for column in zip(*rounds, strict=True))
    backward = start >= total
    start[backward], end[backward] = 2 * total - end[backward], 2 * total - start[backward]
    order = np.argsort(start)
    start = start[order]
    return owner[order], _example_key(seed, epoch, start), start, end[order]


def _split_points(
    sentences: np.ndarray, key: np.ndarray, start: np.ndarray, end: np.ndarray
) -> np.ndarray:
    """Where A ends and B begins, `int64` `[E]`: `end` where there are not two whole sentences."""
    first, last = _inner_boundaries(sentences, start, end)
    whole = (sentences[first - 1] == start) & (sentences[last] == end) & (last > first)
    return np.where(whole, sentences[first + _choose(key, _Draw.SPLIT, last - first)], end)


def _partners(
    document: np.ndarray, size: np.ndarray, room: np.ndarray, key: np.ndarray
) -> np.ndarray:
    """For each part the one of another document that is nearest in size and fits into its `room`.

    Among equals chance decides; a part without a partner gets itself. Indices `int64` `[E]`.
    """
    order = np.lexsort((key, size))
    document, size, room = document[order], size[order], room[order]
    # runs of one document; partners are the neighbours of a run
    changes = np.flatnonzero(document[1:] != document[:-1]) + 1
    run = np.searchsorted(changes, np.arange(len(order)), side="right")
    before = np.concatenate([[0], changes])[run] - 1
    after = np.concatenate([changes, [-1]])[run]
    fits = (after >= 0) & (size[after] <= room)
    nearer = fits & ((before < 0) | (size[after] - size < size - size[before]))
    chosen = np.where(nearer, after, np.where(before < 0, np.arange(len(order)), before))
    partner = np.empty_like(order)
    partner[order] = order[chosen]
    return partner


def _inner_boundaries(
    sentences: np.ndarray, start: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The range of sentences that begin strictly inside `(start, end)`."""
    first = np.searchsorted(sentences, start, side="right")
    last = np.searchsorted(sentences, end, side="left")
    return first, np.maximum(first, last)


def _segment_ids(
    sentences: np.ndarray,
    plan: ExamplePlan,
    shift: np.ndarray,
    cu_seqlens: np.ndarray,
    separator: np.ndarray,
) -> np.ndarray:
    """Number special tokens and sentences within each example, `int32` `[T]`.

    `shift` is the offset in the corpus minus that in the batch, of each part.
    """
    starts, ends = _interleave(plan.a_start, plan.b_start), _interleave(plan.a_end, plan.b_end)
    first, last = _inner_boundaries(sentences, starts, ends)
    inner = sentences[concatenate_ranges(first, last)] - np.repeat(shift, last - first)
    # where the id rises; one more slot than tokens, since the [SEP] after A may be the last one
    rises = np.zeros(cu_seqlens[-1] + 1, dtype=np.int32)
    for places in (inner, cu_seqlens[:-1] + 1, separator, separator + 1, cu_seqlens[1:] - 1):
        rises[places] = 1
    ids = np.cumsum(rises[:-1], dtype=np.int32)
    return ids - np.repeat(ids[cu_seqlens[:-1]], plan.length)


def _mask_tokens(
    input_ids: np.ndarray, position_ids: np.ndarray, plan: ExamplePlan, settings: ExampleSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Mask `input_ids` in place; returns the selected offsets, ascending, and the ids they held."""
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
    """Whether each id is ordinary, `bool` `[vocab_size]`, and the list of these ids."""
    is_ordinary = np.ones(vocab_size, dtype=bool)
    is_ordinary[list(special_ids)] = False
    return is_ordinary, np.flatnonzero(is_ordinary)


def _interleave(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """`[first[0], second[0], first[1], ...]`."""
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
    """The random word of one decision, `uint64`, shaped like `key`."""
    return _scramble(key + (draw * _GOLDEN & _WORD))


def _to_uniform(bits: np.ndarray) -> np.ndarray:
    """Turn random `uint64` words into `float64` in [0, 1)."""
    return (bits >> 11) * 2.0**-53


def _choose(key: np.ndarray, draw: _Draw, count: np.ndarray | np.int64) -> np.ndarray:
    """Draw a uniform integer in [0, count), `int64`, shaped like `key`."""
    return (_to_uniform(_draw_bits(key, draw)) * count).astype(np.int64)
