"""MLM + SSO examples: hand-written ids, invariants on random corpora, measured rates."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.examples import (
    ExamplePlan,
    ExampleSettings,
    concatenate_ranges,
    draw_batch,
    plan_epoch,
    split_documents,
)

CLS, SEP, MASK = 1, 2, 3
FIRST_ID = 10


def make_corpus(documents: list[list[int]]) -> Any:
    """Corpus of given sentence lengths in which token `i` has the id `FIRST_ID + i`."""
    lengths = [length for document in documents for length in document]
    return SimpleNamespace(
        tokens=np.arange(sum(lengths), dtype=np.uint32) + FIRST_ID,
        sentence_offsets=np.cumsum([0, *lengths]),
        document_offsets=np.cumsum([0, *map(len, documents)]),
    )


def realistic_corpus(num_documents: int, sentences: int) -> Any:
    rng = np.random.default_rng(0)
    lengths = 1 + rng.gamma(3.0, 25 / 3, size=(num_documents, sentences)).astype(int)
    return make_corpus(lengths.tolist())


def make_settings(corpus: Any, seq_len: int = 16, **changes) -> ExampleSettings:
    values = {"seq_len": seq_len, "vocab_size": FIRST_ID + len(corpus.tokens)}
    values |= {"cls_id": CLS, "sep_id": SEP, "mask_id": MASK, "short_sequence_probability": 0.0}
    return ExampleSettings(**{**values, "special_ids": (0, CLS, SEP, MASK, 4), **changes})


def plan_of(corpus: Any, config: ExampleSettings, seed: int = 1, epoch: int = 0) -> ExamplePlan:
    """Plan of all documents."""
    return plan_epoch(corpus, np.arange(len(corpus.document_offsets) - 1), config, seed, epoch)


def make_plan(a: tuple[int, int], b: tuple[int, int], label: int) -> ExamplePlan:
    """Plan of one example; `draw_batch` does not read where its text was consumed."""
    length = a[1] - a[0] + b[1] - b[0] + (3 if label >= 0 else 2)
    columns = {"start": 0, "end": 0, "a_start": a[0], "a_end": a[1], "b_start": b[0], "b_end": b[1]}
    columns |= {"key": 7, "label": label, "length": length}
    arrays: dict[str, Any] = {name: np.array([value]) for name, value in columns.items()}
    return ExamplePlan(**arrays | {"key": arrays["key"].astype(np.uint64)})


def labels_of(batch: dict[str, np.ndarray]) -> np.ndarray:
    """Labels of all tokens, -100 where none is to predict."""
    labels = np.full(len(batch["input_ids"]), -100)
    labels[batch["label_positions"]] = batch["labels"]
    return labels


# sentences 0..6 begin at tokens 0 3 5 9 | 10 14 16, the corpus ends at 22
TINY = [[3, 2, 4, 1], [4, 2, 6]]
NEVER = 1e-15


@pytest.mark.parametrize(
    ("a", "b", "label", "ids", "segments"),
    [
        # kept, swapped, replaced, pieces of one sentence, MLM alone
        ((0, 5), (5, 10), 0, "C 10 11 12 13 14 S 15 16 17 18 19 S", "0111223444456"),
        ((5, 10), (0, 5), 1, "C 15 16 17 18 19 S 10 11 12 13 14 S", "0111123444556"),
        ((0, 5), (10, 15), 2, "C 10 11 12 13 14 S 20 21 22 23 24 S", "0111223444456"),
        ((17, 19), (19, 22), 0, "C 27 28 S 29 30 31 S", "01123334"),
        ((9, 16), (16, 16), -100, "C 19 20 21 22 23 24 25 S", "012222334"),
    ],
)
def test_batch_is_what_a_hand_writes(a, b, label, ids, segments) -> None:
    corpus = make_corpus(TINY)
    config = make_settings(
        corpus, objective="mlm+sso" if label >= 0 else "mlm", mask_probability=NEVER
    )
    batch = draw_batch(corpus, make_plan(a, b, label), config)
    named = {"C": CLS, "S": SEP}
    assert batch["input_ids"].tolist() == [named.get(i) or int(i) for i in ids.split()]
    assert batch["segment_ids"].tolist() == [int(digit) for digit in segments]
    num_a = a[1] - a[0] + 2
    assert batch["token_type_ids"].tolist() == [0] * num_a + [1] * (len(segments) - num_a)
    assert batch["position_ids"].tolist() == list(range(len(segments)))
    assert batch["cu_seqlens"].tolist() == [0, len(segments)]
    assert batch["sso_labels"].tolist() == [label]
    assert batch["labels"].tolist() == batch["label_positions"].tolist() == []
    for name, array in batch.items():
        assert array.dtype == (np.int32 if name in ("segment_ids", "cu_seqlens") else np.int64)


@pytest.mark.parametrize(
    ("documents", "spans", "dropped"),
    [
        # 7 tokens of text fit: whole sentences; 4 + 2 + 6 passes it
        (TINY, [(0, 5), (5, 10), (10, 16), (16, 22)], 0),
        # a sentence of 16 in pieces, the rest of the last piece joined by the next sentence
        ([[16, 3], [7]], [(0, 7), (7, 14), (14, 19), (19, 26)], 0),
        # a one-token sentence cannot fill two parts, so the next sentence is cut into
        ([[1, 9], [2, 2]], [(0, 7), (7, 10), (10, 14)], 0),
        ([[8], [1], [3]], [(0, 7), (9, 12)], 2),
    ],
)
def test_plan_cuts_documents_as_a_hand_does(documents, spans, dropped) -> None:
    corpus = make_corpus(documents)
    plan = plan_of(corpus, make_settings(corpus, 10), seed=5, epoch=1)
    assert list(zip(plan.start.tolist(), plan.end.tolist(), strict=True)) == spans
    assert plan.num_dropped_tokens == dropped


corpora = st.lists(
    st.lists(st.one_of(st.just(1), st.integers(1, 9), st.integers(10, 70)), min_size=1, max_size=8),
    min_size=2,
    max_size=6,
).map(make_corpus)


arguments = {
    "corpus": corpora,
    "seq_len": st.integers(5, 40),
    "objective": st.sampled_from(["mlm+sso", "mlm+nsp", "mlm"]),
    "seed": st.integers(0, 2**40),
}


@settings(max_examples=150, deadline=None)
@given(short=st.sampled_from([0.0, 0.1, 1.0]), **arguments)
def test_plan_invariants(corpus, seq_len, short, objective, seed) -> None:
    config = make_settings(corpus, seq_len, short_sequence_probability=short, objective=objective)
    plan = plan_of(corpus, config, seed, epoch=2)
    assert (plan.length <= seq_len).all()
    assert (np.diff(plan.start) > 0).all()
    text = (plan.a_end - plan.a_start) + (plan.b_end - plan.b_start)
    assert (plan.length == text + config.num_special_tokens).all()
    assert (plan.a_start < plan.a_end).all()

    # each token once, except the reported rests
    covered = concatenate_ranges(plan.start, plan.end)
    assert len(np.unique(covered)) == len(covered)
    assert len(covered) + plan.num_dropped_tokens == len(corpus.tokens)

    owner = document_of(corpus, plan.start)
    assert (owner == document_of(corpus, plan.end - 1)).all()
    check_cuts(corpus, plan, config)
    if objective == "mlm":
        assert (plan.label == -100).all()
        for one, other in (("b_start", "b_end"), ("a_start", "start"), ("a_end", "end")):
            assert (getattr(plan, one) == getattr(plan, other)).all()
    else:
        check_pairs(corpus, plan, config, owner)


def document_of(corpus: Any, token: np.ndarray) -> np.ndarray:
    starts = corpus.sentence_offsets[corpus.document_offsets]
    return np.searchsorted(starts, token, side="right") - 1


def check_cuts(corpus: Any, plan: ExamplePlan, config: ExampleSettings) -> None:
    """An example ends at a sentence, or is as long as it may be without one fitting."""
    boundaries = set(corpus.sentence_offsets.tolist())
    document_ends = set(corpus.sentence_offsets[corpus.document_offsets].tolist())
    for start, end in zip(plan.start.tolist(), plan.end.tolist(), strict=True):
        if end not in boundaries:
            assert end - start == config.max_text_tokens
            inner = [b for b in range(start + config.min_text_tokens, end) if b in boundaries]
            assert not inner
        elif end not in document_ends and config.short_sequence_probability == 0:
            following = min(b for b in boundaries if b > end)
            assert following - start > config.max_text_tokens


def check_pairs(corpus: Any, plan: ExamplePlan, config: ExampleSettings, owner: np.ndarray) -> None:
    boundaries = corpus.sentence_offsets
    replaced_label = config.num_labels - 1
    num_replaced = 0
    for i in range(len(plan)):
        a, b = (plan.a_start[i], plan.a_end[i]), (plan.b_start[i], plan.b_end[i])
        start, end, label = plan.start[i], plan.end[i], plan.label[i]
        assert b[0] < b[1]
        if label == 0:
            assert (a[0], a[1], b[1]) == (start, b[0], end)
            split = a[1]
        elif label == replaced_label:
            assert a[0] == start < a[1] < end
            split = a[1]
            other = int(document_of(corpus, b[0]))
            assert other != owner[i]
            assert document_of(corpus, b[1] - 1) == other
            assert b[0] in boundaries
            room = config.max_text_tokens - (split - start)
            check_foreign(corpus, b, end - split, room, other)
            num_replaced += end - split
        else:
            assert (b[0], b[1], a[1]) == (start, a[0], end)
            split = a[0]
        inner = boundaries[(boundaries > start) & (boundaries < end)]
        assert len(inner) == 0 or split in inner
    assert plan.num_replaced_tokens == num_replaced


def check_foreign(corpus: Any, b: tuple[int, int], wanted: int, room: int, document: int) -> None:
    """As many whole sentences as fit, from where the document still has enough text."""
    first, last = corpus.sentence_offsets[corpus.document_offsets[document : document + 2]]
    assert last - b[0] >= min(wanted, last - first)
    inner = corpus.sentence_offsets[corpus.sentence_offsets > b[0]]
    fitting = inner[inner <= min(b[0] + wanted, last)]
    assert b[1] == (fitting[-1] if len(fitting) else min(inner[0], b[0] + room))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), **arguments)
def test_batch_invariants(corpus, seq_len, objective, seed, data) -> None:
    config = make_settings(corpus, seq_len, objective=objective, mask_probability=0.3)
    plan = plan_of(corpus, config, seed)
    if len(plan) == 0:
        return
    rows = data.draw(st.lists(st.integers(0, len(plan) - 1), min_size=1, max_size=6))
    plan = plan.take(np.array(rows))
    batch = draw_batch(corpus, plan, config)
    ids, labels = batch["input_ids"], labels_of(batch)
    assert (np.diff(batch["label_positions"]) > 0).all()
    assert batch["cu_seqlens"].tolist() == [0, *np.cumsum(plan.length)]
    assert batch["sso_labels"].tolist() == plan.label.tolist()
    original = np.where(labels == -100, ids, labels)
    assert set(ids.tolist()) <= set(range(config.vocab_size))
    for i in range(len(plan)):
        part = slice(batch["cu_seqlens"][i], batch["cu_seqlens"][i + 1])
        a = list(range(plan.a_start[i] + FIRST_ID, plan.a_end[i] + FIRST_ID))
        b = list(range(plan.b_start[i] + FIRST_ID, plan.b_end[i] + FIRST_ID))
        expected = [CLS, *a, SEP, *b, SEP] if objective != "mlm" else [CLS, *a, SEP]
        assert original[part].tolist() == expected
        assert batch["position_ids"][part].tolist() == list(range(len(expected)))
        assert batch["token_type_ids"][part].sum() == (len(b) + 1 if b else 0)
        assert (np.diff(batch["token_type_ids"][part]) >= 0).all()
        segments = expected_segments(corpus, expected)
        assert batch["segment_ids"][part].tolist() == segments
    assert (labels[np.isin(original, [CLS, SEP])] == -100).all()


def expected_segments(corpus: Any, ids: list[int]) -> list[int]:
    """Count up at every special token and after it, and at every sentence."""
    starts = set((corpus.sentence_offsets + FIRST_ID).tolist())
    segments = [0]
    for before, current in pairwise(ids):
        special = before in (CLS, SEP) or current in (CLS, SEP)
        segments.append(segments[-1] + int(special or current in starts))
    return segments


SMALL = realistic_corpus(8, 30)
SMALL_SETTINGS = make_settings(SMALL, 64)


def test_example_is_the_same_in_any_batch_and_among_other_documents() -> None:
    plan = plan_of(SMALL, SMALL_SETTINGS, seed=3, epoch=1)
    together = draw_batch(SMALL, plan, SMALL_SETTINGS)
    for i in np.random.default_rng(0).permutation(len(plan))[:20]:
        alone = draw_batch(SMALL, plan.take(np.array([i])), SMALL_SETTINGS)
        part = slice(together["cu_seqlens"][i], together["cu_seqlens"][i + 1])
        np.testing.assert_array_equal(labels_of(alone), labels_of(together)[part])
        for name in ("input_ids", "segment_ids", "token_type_ids", "position_ids"):
            np.testing.assert_array_equal(alone[name], together[name][part], err_msg=name)
    # what it shows of another document does depend on which there are
    some = plan_epoch(SMALL, np.array([6, 2, 4]), SMALL_SETTINGS, seed=3, epoch=1)
    rows = np.searchsorted(plan.start, some.start)
    for name in ("key", "start", "end", "a_start", "label"):
        np.testing.assert_array_equal(getattr(some, name), getattr(plan, name)[rows])


def test_memory_mapped_arrays_give_the_same(tmp_path) -> None:
    mapped: Any = SimpleNamespace()
    for name, array in vars(SMALL).items():
        np.save(tmp_path / f"{name}.npy", array)
        setattr(mapped, name, np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    one, other = (
        draw_batch(source, plan_of(source, SMALL_SETTINGS), SMALL_SETTINGS)
        for source in (SMALL, mapped)
    )
    for name, array in one.items():
        assert type(other[name]) is np.ndarray
        np.testing.assert_array_equal(array, other[name])


def within_binomial(count: int, trials: int, probability: float) -> bool:
    """Whether a count is within 4.5 standard deviations; the seeds are fixed."""
    sigma = (trials * probability * (1 - probability)) ** 0.5
    return abs(count - trials * probability) < 4.5 * sigma


LARGE = realistic_corpus(100, 200)


@pytest.mark.parametrize(("objective", "num_labels"), [("mlm+sso", 3), ("mlm+nsp", 2)])
def test_labels_are_equally_frequent(objective, num_labels) -> None:
    plan = plan_of(LARGE, make_settings(LARGE, 64, objective=objective))
    counts = np.bincount(plan.label, minlength=num_labels)
    assert len(counts) == num_labels
    assert all(within_binomial(count, len(plan), 1 / num_labels) for count in counts)


@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_masking_rates(probability) -> None:
    config = make_settings(LARGE, 128, mask_probability=probability)
    plan = plan_of(LARGE, config)
    batch = draw_batch(LARGE, plan, config)
    ids, labels = batch["input_ids"], labels_of(batch)
    num_text = int(plan.length.sum()) - 3 * len(plan)
    selected = labels != -100
    num_selected = int(selected.sum())
    assert within_binomial(num_selected, num_text, probability)
    masked = int((ids[selected] == MASK).sum())
    kept = int((ids[selected] == labels[selected]).sum())
    assert within_binomial(masked, num_selected, 0.8)
    assert within_binomial(kept, num_selected, 0.1)
    assert within_binomial(num_selected - masked - kept, num_selected, 0.1)
    # neighbours and epochs are independent
    pairs = int((selected[1:] & selected[:-1]).sum())
    assert pairs == pytest.approx(probability**2 * num_text, rel=0.05)
    again = labels_of(draw_batch(LARGE, plan_of(LARGE, config, epoch=1), config)) != -100
    size = min(len(again), len(selected))
    both = int((selected[:size] & again[:size]).sum())
    assert both == pytest.approx(probability**2 * num_text, rel=0.05)


def test_replacements_are_uniform_over_ordinary_ids_only() -> None:
    corpus = make_corpus([[20] * 400, [20] * 400])
    corpus.tokens = np.full(16000, 9, dtype=np.uint16)
    config = make_settings(
        corpus, 64, vocab_size=12, special_ids=(0, CLS, SEP, MASK, 7), mask_probability=1.0
    )
    batch = draw_batch(corpus, plan_of(corpus, config), config)
    text = ~np.isin(batch["input_ids"], [CLS, SEP])
    counts = np.bincount(batch["input_ids"][text & (batch["input_ids"] != MASK)], minlength=12)
    assert counts[0] == counts[7] == 0
    assert all(within_binomial(counts[i], text.sum(), 0.1 / 7) for i in (4, 5, 6, 8, 10, 11))


def test_special_ids_in_text_are_not_selected() -> None:
    corpus = make_corpus([[20] * 10, [20] * 10])
    corpus.tokens[::2] = 4
    config = make_settings(corpus, 64, mask_probability=1.0)
    plan = plan_of(corpus, config)
    batch = draw_batch(corpus, plan, config)
    assert 4 not in batch["labels"]
    # the other half of the text, each token of it
    ordinary = len(batch["labels"])
    assert ordinary + (batch["input_ids"] == 4).sum() == plan.length.sum() - 3 * len(plan)


def test_short_targets_are_uniform_and_drawn_per_example() -> None:
    corpus = make_corpus([[1] * 30000, [1] * 30000])
    config = make_settings(corpus, 67, short_sequence_probability=1.0)
    plan = plan_of(corpus, config)
    sizes = plan.end - plan.start
    assert (sizes.min(), sizes.max()) == (2, 64)
    assert sizes.mean() == pytest.approx(33, rel=0.04)
    some = plan_of(corpus, make_settings(corpus, 67))
    assert set((some.end - some.start)[:-1].tolist()) <= {64, 30000 % 64}


def test_epochs_and_seeds_differ() -> None:
    config = make_settings(SMALL, 64, short_sequence_probability=0.1)
    ids = [
        labels_of(draw_batch(SMALL, plan_of(SMALL, config, seed, epoch), config)).tolist()
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (-1, 0), (0, 0)]
    ]
    assert all(ids[i] != ids[j] for i in range(4) for j in range(i))
    assert ids[4] == ids[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 4}, "seq_len"),
        ({"objective": "clm"}, "objective"),
        ({"mask_probability": 0.0}, "mask_probability"),
        ({"short_sequence_probability": 1.5}, "short_sequence_probability"),
        ({"mask_id": CLS}, "must differ"),
        ({"special_ids": (0, CLS, SEP)}, "among special_ids"),
        ({"special_ids": (CLS, SEP, MASK, 999)}, "outside vocab_size"),
        ({"vocab_size": 4, "special_ids": (0, 1, 2, 3)}, "no ordinary token"),
    ],
)
def test_contradictory_settings_are_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_settings(make_corpus(TINY), **changes)


def test_unusable_documents_and_empty_batches_are_refused() -> None:
    corpus = make_corpus(TINY)
    config = make_settings(corpus)
    for documents, message in [
        ([0], "at least two documents"),
        ([0, 0], "repeat"),
        ([0, 2], "outside a corpus of 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            plan_epoch(corpus, np.array(documents), config, seed=0, epoch=0)
    with pytest.raises(ValueError, match="empty plan"):
        draw_batch(corpus, plan_of(corpus, config).take(np.array([], dtype=int)), config)
    # one document is enough without a sentence objective
    alone = make_settings(corpus, objective="mlm")
    assert len(plan_epoch(corpus, np.array([0]), alone, seed=0, epoch=0)) == 1


@given(st.integers(4, 500), st.floats(0.001, 0.999))
def test_split_is_whole_disjoint_and_never_empty(size: int, fraction: float) -> None:
    train, validation = split_documents(size, fraction)
    assert train.dtype == validation.dtype == np.int64
    assert sorted([*train, *validation]) == list(range(size))
    assert len(validation) == min(max(round(fraction * size), 1), size - 1)


def splitmix64(seed: int) -> int:
    """The published generator's first output, in plain integers."""
    mask = 2**64 - 1
    mixed = (seed + 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return mixed ^ (mixed >> 31)


def test_split_is_a_scattered_draw_that_never_changes() -> None:
    _, validation = split_documents(1000, 0.1)
    # ten per hundred on average
    by_hundred = np.bincount(validation // 100, minlength=10)
    assert 3 <= by_hundred.min() <= by_hundred.max() <= 18
    # splitmix64 is a stream: its i-th output is that of the state i steps on
    published = [splitmix64(1234567 + i * 0x9E3779B97F4A7C15) for i in range(2)]
    assert published == [6457827717110365317, 3203168211198807973]
    outputs = [splitmix64(i * 0x9E3779B97F4A7C15) for i in range(20)]
    expected = sorted(sorted(range(20), key=lambda i: outputs[i])[:5])
    assert split_documents(20, 0.25)[1].tolist() == expected
    with pytest.raises(ValueError, match="3 documents"):
        split_documents(3, 0.5)
