"""MLM + SSO examples: hand-written ids, invariants on random corpora, measured rates."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import StratifiedKFold, cross_val_score

from ponet.run.cli import UsageError
from ponet.tokenizer import load_tokenizer
from pretrain.corpus import build_corpus
from pretrain.examples import (
    ExamplePlan,
    ExampleSettings,
    TokenCorpus,
    concatenate_ranges,
    draw_batch,
    length_baseline,
    plan_epoch,
    split_documents,
)
from pretrain.sources import iter_documents
from tests.corpora import CLS, FIRST_ID, MASK, SEP, make_corpus, make_settings, realistic_corpus


def plan_of(corpus: TokenCorpus, config: ExampleSettings, seed=1, epoch=0) -> ExamplePlan:
    return plan_epoch(corpus, np.arange(len(corpus.document_offsets) - 1), config, seed, epoch)


def labels_of(batch: dict[str, np.ndarray]) -> np.ndarray:
    """Labels of all tokens, -100 where none is to predict."""
    labels = np.full(len(batch["input_ids"]), -100)
    labels[batch["label_positions"]] = batch["labels"]
    return labels


# sentences begin at tokens 0 3 5 9 | 10 14 16, the corpus ends at 22
TINY = [[3, 2, 4, 1], [4, 2, 6]]


def test_batch_is_what_a_hand_writes() -> None:
    corpus = make_corpus(TINY)
    # swapped, replaced, pieces of one sentence; where their text was consumed is not read
    spans = {"a_start": [5, 0, 17], "a_end": [10, 5, 19], "b_start": [0, 10, 19]}
    spans |= {"b_end": [5, 15, 22], "label": [1, 2, 0], "length": [13, 13, 8]}
    columns: dict[str, Any] = {name: np.array(column) for name, column in spans.items()}
    key, unread = np.zeros(3, np.uint64), np.zeros(3, int)
    plan = ExamplePlan(key=key, start=unread, end=unread, **columns)
    batch = draw_batch(corpus, plan, make_settings(corpus, mask_probability=1e-15))
    named = {"C": CLS, "S": SEP}
    ids = "C 15 16 17 18 19 S 10 11 12 13 14 S C 10 11 12 13 14 S 20 21 22 23 24 S"
    ids += " C 27 28 S 29 30 31 S"
    assert batch["input_ids"].tolist() == [named.get(i) or int(i) for i in ids.split()]
    digits = {name: "".join(map(str, array.tolist())) for name, array in batch.items()}
    assert digits["segment_ids"] == "0111123444556011122344445601123334"
    assert digits["token_type_ids"] == "0000000111111000000011111100001111"
    assert digits["sso_labels"] == "120"
    assert digits["labels"] == digits["label_positions"] == ""
    for name, array in batch.items():
        assert array.dtype == (np.int32 if name in ("segment_ids", "cu_seqlens") else np.int64)


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
    has_b = plan.b_end > plan.b_start
    text = (plan.a_end - plan.a_start) + (plan.b_end - plan.b_start)
    assert (plan.length == text + 2 + has_b).all()
    assert (plan.length <= seq_len).all()
    assert (plan.a_start < plan.a_end).all()
    assert (has_b == (plan.label >= 0)).all()
    # in order, each token once
    covered = concatenate_ranges(plan.start, plan.end)
    assert covered.tolist() == list(range(len(corpus.tokens)))
    assert (document_of(corpus, plan.start) == document_of(corpus, plan.end - 1)).all()
    if short == 0:
        check_cuts(corpus, plan, config)
    assert not has_b.any() if objective == "mlm" else True
    check_pairs(corpus, plan, config)


def document_of(corpus: TokenCorpus, token: np.ndarray) -> np.ndarray:
    starts = corpus.sentence_offsets[corpus.document_offsets]
    return np.searchsorted(starts, token, side="right") - 1


def check_cuts(corpus: TokenCorpus, plan: ExamplePlan, config: ExampleSettings) -> None:
    """A document is cut as a hand cuts it, from its beginning or from its end."""
    sizes, owner = np.diff(corpus.sentence_offsets), document_of(corpus, plan.start)
    for document, (first, last) in enumerate(pairwise(corpus.document_offsets)):
        found = (plan.end - plan.start)[owner == document].tolist()
        backward = cut_by_hand(sizes[first:last][::-1].tolist(), config.max_text_tokens)[::-1]
        assert found in (cut_by_hand(sizes[first:last].tolist(), config.max_text_tokens), backward)


def cut_by_hand(sentences: list[int], longest: int) -> list[int]:
    """Sizes of examples of as many whole sentences as fit; pieces of one that is too long."""
    examples, room = [], 0
    for size in sentences:
        if size <= room:
            examples[-1] += size
        else:
            # a new example, pieces first
            pieces = [longest] * ((size - 1) // longest)
            examples += [*pieces, size - sum(pieces)]
        room = longest - examples[-1]
    return examples


def check_pairs(corpus: TokenCorpus, plan: ExamplePlan, config: ExampleSettings) -> None:
    boundaries = set(corpus.sentence_offsets.tolist())
    owner, foreign = document_of(corpus, plan.start), config.num_labels - 1
    for i in range(len(plan)):
        a, b = (plan.a_start[i], plan.a_end[i]), (plan.b_start[i], plan.b_end[i])
        start, end, label = plan.start[i], plan.end[i], plan.label[i]
        inner = boundaries & set(range(start + 1, end))
        if label < 0:
            assert (a, b) == ((start, end), (end, end))
            continue
        # whole sentences, whatever the label
        assert {start, end, *a, *b} <= boundaries
        first, second = (b, a) if label == 1 and foreign == 2 else (a, b)
        split = first[1]
        assert first[0] == start
        assert split in inner
        if label != foreign:
            assert second == (split, end)
            continue
        # the second part of another document, the nearest in size of those that fit
        assert document_of(corpus, b[0]) != owner[i]
        assert b[1] in plan.end[owner != owner[i]]
        others = (plan.label == foreign) & (owner != owner[i])
        sizes = (plan.end - plan.a_end)[others]
        gaps = np.abs(sizes[sizes <= config.max_text_tokens - (split - start)] - (end - split))
        assert (np.abs((b[1] - b[0]) - (end - split)) <= gaps).all()


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
    assert 0 <= ids.min() <= ids.max() < config.vocab_size
    for i, (start, end) in enumerate(pairwise(batch["cu_seqlens"])):
        a = list(range(plan.a_start[i] + FIRST_ID, plan.a_end[i] + FIRST_ID))
        b = list(range(plan.b_start[i] + FIRST_ID, plan.b_end[i] + FIRST_ID))
        expected = [CLS, *a, SEP, *b, SEP] if b else [CLS, *a, SEP]
        assert original[start:end].tolist() == expected
        assert batch["position_ids"][start:end].tolist() == list(range(len(expected)))
        types = [0] * (len(a) + 2) + [1] * (len(expected) - len(a) - 2)
        assert batch["token_type_ids"][start:end].tolist() == types
        assert batch["segment_ids"][start:end].tolist() == expected_segments(corpus, expected)
    assert (labels[np.isin(original, [CLS, SEP])] == -100).all()


def expected_segments(corpus: TokenCorpus, ids: list[int]) -> list[int]:
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
    for name in ("key", "start", "end", "a_start"):
        np.testing.assert_array_equal(getattr(some, name), getattr(plan, name)[rows])


def within_binomial(count: int, trials: int, probability: float) -> bool:
    """Whether a count is within 4.5 standard deviations; the seeds are fixed."""
    sigma = (trials * probability * (1 - probability)) ** 0.5
    return abs(count - trials * probability) < 4.5 * sigma


LARGE = realistic_corpus(100, 200)


@pytest.mark.parametrize(
    ("objective", "num_labels", "probability"), [("mlm+sso", 3, 0.15), ("mlm+nsp", 2, 0.4)]
)
def test_rates_of_labels_and_masks(objective, num_labels, probability) -> None:
    config = make_settings(LARGE, 128, objective=objective, mask_probability=probability)
    plan = plan_of(LARGE, config)
    counts = np.bincount(plan.label[plan.label >= 0])
    assert len(counts) == num_labels
    assert all(within_binomial(count, counts.sum(), 1 / num_labels) for count in counts)
    batch = draw_batch(LARGE, plan, config)
    ids, labels = batch["input_ids"], labels_of(batch)
    num_text = int(plan.length.sum()) - 2 * len(plan) - counts.sum()
    selected = labels != -100
    num_selected = int(selected.sum())
    assert within_binomial(num_selected, num_text, probability)
    masked = int((ids[selected] == MASK).sum())
    kept = int((ids[selected] == labels[selected]).sum())
    assert within_binomial(masked, num_selected, 0.8)
    assert within_binomial(kept, num_selected, 0.1)
    # neighbours and epochs are independent
    again = labels_of(draw_batch(LARGE, plan_of(LARGE, config, epoch=1), config)) != -100
    size = min(len(again), len(selected))
    for one, other in ((selected[1:], selected[:-1]), (selected[:size], again[:size])):
        assert (one & other).sum() == pytest.approx(probability**2 * num_text, rel=0.05)


@pytest.mark.parametrize("objective", ["mlm+sso", "mlm+nsp"])
@pytest.mark.parametrize("seq_len", [64, 128, 512])
def test_lengths_do_not_tell_the_label(seq_len, objective) -> None:
    config = make_settings(LARGE, seq_len, objective=objective, short_sequence_probability=0.1)
    plan = plan_of(LARGE, config)
    labelled = plan.take(np.flatnonzero(plan.label >= 0))
    commonest = np.bincount(labelled.label).max() / len(labelled)
    assert length_baseline(plan) < commonest + 0.02
    # nor, in particular, which part is the longer, or how much text there is
    a, b = labelled.a_end - labelled.a_start, labelled.b_end - labelled.b_start
    for told in (a > b, a + b > np.median(a + b)):
        for label in range(config.num_labels):
            ours = told[labelled.label == label]
            assert within_binomial(int(ours.sum()), len(ours), told.mean())
    # all but those of a single sentence or pieces of one are labelled
    inner = LARGE.sentence_offsets.searchsorted(plan.end) - LARGE.sentence_offsets.searchsorted(
        plan.start, side="right"
    )
    whole = np.isin(plan.start, LARGE.sentence_offsets) & np.isin(plan.end, LARGE.sentence_offsets)
    assert len(labelled) == ((inner > 0) & whole).sum()


def test_lengths_of_real_text_do_not_tell_a_classifier(shared_data, tmp_path) -> None:
    tokenizer = load_tokenizer(shared_data / "vocab" / "bert-base-uncased-vocab.txt")
    files = [str(shared_data / "wikipedia" / "part-00.jsonl.xz")]
    documents = iter_documents(files, "text", max_characters=3_000_000)
    corpus = build_corpus(documents, tokenizer, cache_dir=tmp_path, key_parts={})
    plan = plan_of(corpus, make_settings(corpus, 128, short_sequence_probability=0.1))
    plan = plan.take(np.flatnonzero(plan.label >= 0))
    sizes = np.stack([plan.a_end - plan.a_start, plan.b_end - plan.b_start], axis=1)
    classifier = HistGradientBoostingClassifier(max_iter=30, random_state=0)
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    told = cross_val_score(classifier, sizes, plan.label, cv=folds).mean()
    assert told < np.bincount(plan.label).max() / len(plan) + 0.02


def test_length_baseline_is_what_lengths_tell() -> None:
    plan = plan_of(LARGE, make_settings(LARGE, 128))
    longer = plan.a_end - plan.a_start > plan.b_end - plan.b_start
    told = replace(plan, label=np.where(plan.label < 0, plan.label, longer))
    assert length_baseline(told) > 0.85
    untold = replace(
        plan, label=np.where(plan.label < 0, plan.label, plan.key.astype(np.int64) & 1)
    )
    assert length_baseline(untold) == pytest.approx(0.5, abs=0.05)


def test_special_ids_are_neither_selected_nor_replacements() -> None:
    corpus = make_corpus([[20] * 800, [20] * 800])
    corpus = replace(corpus, tokens=np.tile(np.array([9, 7], np.uint16), 16000))
    special = {"special_ids": (0, CLS, SEP, MASK, 7), "mask_probability": 1.0}
    config = make_settings(corpus, 64, vocab_size=12, **special)
    plan = plan_of(corpus, config)
    batch = draw_batch(corpus, plan, config)
    ordinary = len(batch["labels"])
    assert (batch["labels"] == 9).all()
    counts = np.bincount(batch["input_ids"], minlength=12)
    assert counts[0] == 0
    assert ordinary + counts[7] == plan.length.sum() - 2 * len(plan) - (plan.label >= 0).sum()
    assert all(within_binomial(counts[i], ordinary, 0.1 / 7) for i in (4, 5, 6, 8, 10, 11))


def test_short_targets_are_uniform_and_drawn_per_example() -> None:
    corpus = make_corpus([[1] * 30000, [1] * 30000])
    plan = plan_of(corpus, make_settings(corpus, 67, short_sequence_probability=1.0))
    sizes = plan.end - plan.start
    assert (sizes.min(), sizes.max()) == (2, 64)
    assert sizes.mean() == pytest.approx(33, rel=0.04)


def test_epochs_and_seeds_differ() -> None:
    pairs = [(0, 0), (0, 1), (1, 0), (-1, 0)]
    keys = [plan_of(SMALL, SMALL_SETTINGS, *pair).key.tolist() for pair in pairs]
    assert len({key for column in keys for key in column}) == sum(map(len, keys))


def test_what_cannot_be_is_refused() -> None:
    for name, value in (("seq_len", 4), ("mask_probability", 0), ("short_sequence_probability", 2)):
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} must be"):
            make_settings(make_corpus(TINY), **{name: value})
    corpus = make_corpus([[3, 2]])
    assert len(plan_of(corpus, make_settings(corpus, objective="mlm"))) == 1
    with pytest.raises(ValueError, match="at least two documents"):
        plan_of(corpus, make_settings(corpus))
    with pytest.raises(ValueError, match="3 documents"):
        split_documents(3, 0.5)


@given(st.integers(4, 500), st.floats(0.001, 0.999))
def test_split_is_whole_disjoint_and_never_empty(size: int, fraction: float) -> None:
    train, validation = split_documents(size, fraction)
    assert train.dtype == validation.dtype == np.int64
    assert sorted([*train, *validation]) == list(range(size))
    assert len(validation) == min(max(round(fraction * size), 1), size - 1)
    # the same for ever
    assert split_documents(20, 0.25)[1].tolist() == [2, 4, 6, 8, 18]
