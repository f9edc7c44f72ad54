"""Speed of the pre-training input pipeline on one core, against a builder on Python lists.

    python benchmarks/input_pipeline.py                      # synthetic corpus
    python benchmarks/input_pipeline.py --corpus FOLDER      # a folder made by build_corpus
    python benchmarks/input_pipeline.py --tokenize FILE --vocab VOCAB

Rates are tokens of examples (for tokenisation: of text) per second of CPU time of this process,
all its threads together, so that other programs on the machine disturb little.
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from records import add_output_flags, append_record, machine_card, print_card
from tokenizers import Tokenizer

from ponet.model import IGNORED_LABEL
from ponet.sentences import split_sentences
from ponet.tokenizer import load_tokenizer
from pretrain.batches import EpochBatches, MicroBatchSampler, make_loader, pack_bins
from pretrain.corpus import build_corpus, load_corpus
from pretrain.objectives import (
    ExampleSettings,
    TokenCorpus,
    draw_batch,
    plan_epoch,
)
from pretrain.sources import iter_documents
from pretrain.vocabulary import train_tokenizer

# values of BERT's vocabulary; other ids cost the same time
CLS, SEP, MASK = 101, 102, 103
BERT_VOCAB_SIZE = 30522


def synthetic_corpus(num_tokens: int, seed: int) -> Any:
    """Random ids in sentences of 26 tokens and documents of 148 sentences on average.

    The mean sizes are those of English Wikipedia articles, the spread is gamma and geometric.
    """
    rng = np.random.default_rng(seed)
    num_sentences = num_tokens // 26
    sizes = 1 + rng.gamma(3.0, 25 / 3, size=num_sentences).astype(np.int64)
    documents = rng.geometric(1 / 148, size=num_sentences)
    ends = np.cumsum(documents)
    ends = ends[ends < num_sentences]
    sentence_offsets = np.concatenate([[0], np.cumsum(sizes)])
    tokens = rng.integers(1000, BERT_VOCAB_SIZE, size=sentence_offsets[-1])
    return SimpleNamespace(
        tokens=tokens.astype(np.uint16),
        sentence_offsets=sentence_offsets,
        document_offsets=np.concatenate([[0], ends, [num_sentences]]),
    )


def list_examples(
    documents: list[list[list[int]]], settings: ExampleSettings, rng: random.Random
) -> list[dict[str, Any]]:
    """Build SSO examples on Python lists, as the published script does.

    Sentences are appended one by one; the pair is truncated a token at a time.

    Args:
        documents: Tokens of the sentences of each document.
        settings: Lengths and ids.
        rng: Source of all choices.
    """
    examples = []
    chunks = [chunk for document in documents for chunk in list_chunks(document, settings, rng)]
    for number, chunk in enumerate(chunks):
        split = rng.randint(1, len(chunk) - 1) if len(chunk) > 1 else 1
        first, second = chunk[:split], chunk[split:]
        draw, label = rng.random(), 0
        if draw < 1 / 3:
            first, second, label = second, first, 1
        elif draw < 2 / 3 and len(chunks) > 1:
            other = (number + rng.randint(1, len(chunks) - 1)) % len(chunks)
            second, label = chunks[other], 2
        parts = [flatten(first), flatten(second)]
        truncate_pair(parts[0], parts[1], settings.max_text_tokens, rng)
        input_ids, segment_ids, token_type_ids = [settings.cls_id], [0], [0]
        for part, (tokens, numbers) in enumerate(parts):
            before = segment_ids[-1] + 1 - (numbers[0] if numbers else 0)
            input_ids += [*tokens, settings.sep_id]
            segment_ids += [before + number for number in numbers]
            segment_ids.append(segment_ids[-1] + 1)
            token_type_ids += [part] * (len(tokens) + 1)
        examples.append(
            {
                "input_ids": input_ids,
                "segment_ids": segment_ids,
                "token_type_ids": token_type_ids,
                "sso_label": label,
            }
        )
    return examples


def list_chunks(
    document: list[list[int]], settings: ExampleSettings, rng: random.Random
) -> list[list[list[int]]]:
    """Group the sentences of a document until each group reaches its target length."""
    chunks: list[list[list[int]]] = []
    chunk: list[list[int]] = []
    size, target = 0, settings.max_text_tokens
    for number, sentence in enumerate(document):
        chunk.append(sentence)
        size += len(sentence)
        if size >= target or number == len(document) - 1:
            chunks.append(chunk)
            chunk, size, target = [], 0, settings.max_text_tokens
            if rng.random() < settings.short_sequence_probability:
                target = rng.randint(2, settings.max_text_tokens)
    return chunks


def flatten(sentences: list[list[int]]) -> tuple[list[int], list[int]]:
    """Join sentences to one list of tokens and one of the numbers of their sentences."""
    tokens: list[int] = []
    numbers: list[int] = []
    for number, sentence in enumerate(sentences):
        tokens.extend(sentence)
        numbers.extend([number] * len(sentence))
    return tokens, numbers


def truncate_pair(
    first: tuple[list[int], list[int]],
    second: tuple[list[int], list[int]],
    limit: int,
    rng: random.Random,
) -> None:
    """Drop tokens from the front or back of the longer part until both fit, in place."""
    while len(first[0]) + len(second[0]) > limit:
        longer = second if len(second[0]) > len(first[0]) else first
        end = 0 if rng.random() < 0.5 else -1
        for column in longer:
            del column[end]


def collate_lists(
    examples: list[dict[str, Any]], settings: ExampleSettings
) -> dict[str, torch.Tensor]:
    """Pad lists to a rectangle and mask it as the collator of `transformers` does."""
    width = max(len(example["input_ids"]) for example in examples)
    batch = {
        name: torch.tensor([e[name] + [0] * (width - len(e[name])) for e in examples])
        for name in ("input_ids", "segment_ids", "token_type_ids")
    }
    ids = batch["input_ids"]
    # padding is id 0, one of the special ids
    special = torch.isin(ids, torch.tensor(settings.special_ids))
    labels = ids.clone()
    probability = torch.full(labels.shape, settings.mask_probability).masked_fill_(special, 0.0)
    selected = torch.bernoulli(probability).bool()
    labels[~selected] = IGNORED_LABEL
    replaced = torch.bernoulli(torch.full(labels.shape, 0.8)).bool() & selected
    ids[replaced] = settings.mask_id
    is_random = torch.bernoulli(torch.full(labels.shape, 0.5)).bool() & selected & ~replaced
    ids[is_random] = torch.randint(settings.vocab_size, labels.shape)[is_random]
    sso_labels = torch.tensor([example["sso_label"] for example in examples])
    return batch | {"labels": labels, "sso_labels": sso_labels}


def sentence_lists(corpus: TokenCorpus, max_tokens: int) -> list[list[list[int]]]:
    """Return the first documents of a corpus, about `max_tokens`, as lists of lists."""
    offsets = np.asarray(corpus.sentence_offsets)
    documents = []
    for first, last in zip(corpus.document_offsets[:-1], corpus.document_offsets[1:], strict=True):
        if offsets[first] >= max_tokens:
            break
        bounds = zip(offsets[first:last], offsets[first + 1 : last + 1], strict=True)
        documents.append([corpus.tokens[start:end].tolist() for start, end in bounds])
    return documents


def measure(name: str, run: Callable[[], int], repeats: int) -> dict[str, Any]:
    """Time a stage.

    Args:
        name: Row of the table.
        run: Does the work and returns its number of tokens.
        repeats: Timed runs, after one that warms up.

    Returns:
        `tokens`, and median, 20th and 80th percentile of `million_tokens_per_s`.
    """
    tokens = run()
    rates = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        rates.append(tokens / (time.process_time() - begin) / 1e6)
    low, median, high = np.percentile(rates, [20, 50, 80]).tolist()
    return {"stage": name, "tokens": tokens, "median": median, "p20": low, "p80": high}


def measure_pipeline(
    corpus: TokenCorpus, settings: ExampleSettings, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], float]:
    """Time planning, packing, drawing and the whole loader on one corpus.

    Returns:
        Rows of the table, and the packing efficiency.
    """
    documents = np.arange(len(corpus.document_offsets) - 1)
    sampler = MicroBatchSampler(
        corpus,
        documents,
        settings,
        seed=options.seed,
        micro_batch_tokens=options.micro_batch_tokens,
        micro_batches_per_step=1,
    )
    epoch: EpochBatches = sampler.first_epoch
    order = np.random.default_rng(options.seed).permutation(len(epoch.plan))
    items = [epoch.item(step, 0)[3] for step in range(min(epoch.num_steps, 500))]

    def plan() -> int:
        return int(plan_epoch(corpus, documents, settings, options.seed, 0).length.sum())

    def pack() -> int:
        pack_bins(epoch.plan.length, options.micro_batch_tokens, order)
        return int(epoch.plan.length.sum())

    def draw() -> int:
        return sum(len(draw_batch(corpus, item, settings)["input_ids"]) for item in items)

    def load() -> int:
        # plans the next epoch in the background, as every epoch of a run does
        batches = islice(make_loader(sampler), epoch.num_steps)
        return sum(batch.tokens for batch in batches)

    stages = {"plan_epoch": plan, "pack_bins": pack, "draw_batch": draw, "whole loader": load}
    rows = [measure(name, run, options.repeats) for name, run in stages.items()]
    return rows, epoch.packing_efficiency


def measure_lists(
    corpus: TokenCorpus, settings: ExampleSettings, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time the builder and the collator on Python lists, on at most a million tokens."""
    documents = sentence_lists(corpus, 1_000_000)
    built = list_examples(documents, settings, random.Random(options.seed))
    num_tokens = sum(len(example["input_ids"]) for example in built)
    batch_size = max(1, options.micro_batch_tokens // settings.seq_len)

    def build() -> int:
        examples = list_examples(documents, settings, random.Random(options.seed))
        return sum(len(example["input_ids"]) for example in examples)

    def collate() -> int:
        for begin in range(0, len(built), batch_size):
            collate_lists(built[begin : begin + batch_size], settings)
        return num_tokens

    repeats = min(options.repeats, 3)
    return [
        measure("lists: build examples", build, repeats),
        measure("lists: pad and mask", collate, repeats),
    ]


def measure_tokenisation(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time `build_corpus`, sentence splitting and writing included, against the bare tokenizer."""
    sources = [str(path) for path in options.tokenize]
    documents = list(iter_documents(sources, max_characters=options.max_characters))
    if options.vocab:
        tokenizer = load_tokenizer(options.vocab)
    else:
        tokenizer = train_tokenizer(documents, vocab_size=8192)
    bare = Tokenizer.from_str(tokenizer.to_str())
    sentences = list(chain.from_iterable(split_sentences(document) for document in documents))

    def split() -> int:
        for document in documents:
            split_sentences(document)
        return num_tokens

    def encode() -> int:
        encodings = bare.encode_batch(sentences, add_special_tokens=False)
        return sum(len(encoding.ids) for encoding in encodings)

    def build() -> int:
        with tempfile.TemporaryDirectory() as folder:
            corpus = build_corpus(
                documents, tokenizer, cache_dir=folder, key_parts={}, progress=False
            )
            return len(corpus.tokens)

    num_tokens = encode()
    repeats = min(options.repeats, 3)
    return [
        measure("split_sentences", split, repeats),
        measure("raw encode_batch", encode, repeats),
        measure("build_corpus", build, repeats),
    ]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="speed of the pre-training input pipeline on one core"
    )
    parser.add_argument("--corpus", type=Path, help="folder made by build_corpus")
    parser.add_argument(
        "--synthetic-tokens", type=int, default=4_000_000, help="size without --corpus"
    )
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of an example")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--tokenize", type=Path, nargs="+", help="files to time tokenisation on")
    parser.add_argument("--vocab", type=Path, help="tokenizer for --tokenize; default: train one")
    parser.add_argument("--max-characters", type=int, default=5_000_000, help="of --tokenize")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    add_output_flags(parser)
    return parser.parse_args()


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the figures the goals are stated in, each from the medians of this run."""
    rate = {row["stage"]: row["median"] for row in rows}
    # seconds add up over the stages, per million tokens
    ours = 1 / (1 / rate["plan_epoch"] + 1 / rate["draw_batch"])
    lists = 1 / (1 / rate["lists: build examples"] + 1 / rate["lists: pad and mask"])
    figures = {
        "plan and draw with masks / list builder without": ours / rate["lists: build examples"],
        "whole loader / list builder and collator": rate["whole loader"] / lists,
    }
    if "build_corpus" in rate:
        figures["build_corpus / raw encode_batch"] = rate["build_corpus"] / rate["raw encode_batch"]
    return figures


def main() -> None:
    options = parse_options()
    # one thread, so that CPU time is work and not waiting
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if options.corpus is None:
        corpus, vocab_size = synthetic_corpus(options.synthetic_tokens, options.seed), 0
    else:
        corpus = load_corpus(options.corpus)
        vocab_size = int(corpus.metadata["vocab_size"])
    settings = ExampleSettings(
        seq_len=options.seq_len,
        vocab_size=max(vocab_size, BERT_VOCAB_SIZE),
        cls_id=CLS,
        sep_id=SEP,
        mask_id=MASK,
        special_ids=(0, 100, CLS, SEP, MASK),
    )
    card = machine_card("cpu", threads=1)
    print_card(card)
    rows, efficiency = measure_pipeline(corpus, settings, options)
    rows += measure_lists(corpus, settings, options)
    if options.tokenize:
        rows += measure_tokenisation(options)

    print(f"\n{'stage':24} {'tokens':>12} {'M tok/s':>9} {'p20':>9} {'p80':>9}")
    for row in rows:
        figures = " ".join(f"{row[key]:9.2f}" for key in ("median", "p20", "p80"))
        print(f"{row['stage']:24} {row['tokens']:12,} {figures}")
    figures = ratios(rows)
    print()
    for name, value in figures.items():
        print(f"{name:50} {value:6.2f}x")
    print(f"{'packing efficiency':50} {efficiency:6.4f}\n")
    record = {
        "benchmark": "input_pipeline",
        "card": card,
        "seq_len": options.seq_len,
        "micro_batch_tokens": options.micro_batch_tokens,
        "corpus": str(options.corpus or "synthetic"),
        "corpus_tokens": len(corpus.tokens),
        "unit": "million tokens per CPU second of one process",
        "rows": rows,
        **figures,
        "efficiency": efficiency,
    }
    print(f"written: {append_record(record, options.output)}\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
