"""Speed of the pre-training input pipeline on one core.

    python benchmarks/input_pipeline.py                      # synthetic corpus
    python benchmarks/input_pipeline.py --corpus FOLDER      # a folder made by build_corpus
    python benchmarks/input_pipeline.py --tokenize FILE --vocab VOCAB

Rates are tokens of examples (for tokenisation: of text) per second of CPU time of this process,
all its threads together, so that other programs on the machine disturb little.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from benchmarks import common
from benchmarks.common import NUMBER, Row, percentiles
from ponet.tokenizer import load_tokenizer, split_sentences
from pretrain.batches import MicroBatchSampler, make_loader, pack_bins
from pretrain.corpus import build_corpus, load_corpus
from pretrain.examples import ExampleSettings, TokenCorpus, draw_batch, plan_epoch
from pretrain.sources import iter_documents
from pretrain.tokenise import train_tokenizer

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


def measure(name: str, run: Callable[[], int], repeats: int) -> Row:
    """Time a stage, whose work returns its number of tokens, after a run that warms up."""
    tokens = run()
    rates = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        rates.append(tokens / (time.process_time() - begin) / 1e6)
    median, low, high = percentiles(rates)
    return {"stage": name, "tokens": tokens, "median": median, "p20": low, "p80": high}


def measure_pipeline(
    corpus: TokenCorpus, settings: ExampleSettings, options: argparse.Namespace
) -> tuple[list[Row], float]:
    """Rows of planning, packing, drawing and the whole loader, and the packing efficiency."""
    documents = np.arange(len(corpus.document_offsets) - 1)
    sizes = {"micro_batch_tokens": options.micro_batch_tokens, "micro_batches_per_step": 1}
    sampler = MicroBatchSampler(corpus, documents, settings, seed=options.seed, **sizes)
    epoch = sampler.first_epoch
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


def measure_tokenisation(options: argparse.Namespace) -> list[Row]:
    """Time `build_corpus`, sentence splitting and writing included, against the bare tokenizer."""
    sources = [str(path) for path in options.tokenize]
    documents = list(iter_documents(sources, max_characters=options.max_characters))
    trained = None if options.vocab else train_tokenizer(documents, vocab_size=8192)
    tokenizer = trained or load_tokenizer(options.vocab)
    bare = Tokenizer.from_str(tokenizer.to_str())
    sentences = list(chain.from_iterable(split_sentences(document) for document in documents))

    def split() -> int:
        for document in documents:
            split_sentences(document)
        return num_tokens

    def encode() -> int:
        found = bare.encode_batch(sentences, add_special_tokens=False)
        return sum(len(encoding.ids) for encoding in found)

    def build() -> int:
        with tempfile.TemporaryDirectory() as folder:
            where: Row = {"cache_dir": folder, "key_parts": {}, "progress": False}
            return len(build_corpus(documents, tokenizer, **where).tokens)

    num_tokens = encode()
    stages = {"split_sentences": split, "raw encode_batch": encode, "build_corpus": build}
    return [measure(name, run, min(options.repeats, 3)) for name, run in stages.items()]


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="speed of the pre-training input pipeline")
    add = parser.add_argument
    add("--corpus", type=Path, help="folder made by build_corpus [synthetic]")
    add("--synthetic-tokens", default=4_000_000, **NUMBER, help="without --corpus [4,000,000]")
    add("--seq-len", default=512, **NUMBER, help="tokens of an example [512]")
    add("--micro-batch-tokens", default=16384, **NUMBER)
    add("--tokenize", type=Path, nargs="+", help="files to time tokenisation on")
    add("--vocab", type=Path, help="tokenizer for --tokenize [one is trained]")
    add("--max-characters", default=5_000_000, **NUMBER, help="of --tokenize")
    add("--repeats", default=5, **NUMBER)
    return common.parse_flags(parser)


def main() -> None:
    """Run the benchmark."""
    options = parse_options()
    # one thread, so that CPU time is work and not waiting
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if options.corpus is None:
        corpus, vocab_size = synthetic_corpus(options.synthetic_tokens, options.seed), 0
    else:
        corpus = load_corpus(options.corpus)
        vocab_size = int(corpus.metadata["vocab_size"])
    special: Row = {"cls_id": CLS, "sep_id": SEP, "mask_id": MASK}
    special |= {"special_ids": (0, 100, CLS, SEP, MASK), "seq_len": options.seq_len}
    settings = ExampleSettings(vocab_size=max(vocab_size, BERT_VOCAB_SIZE), **special)
    card = common.machine_card("cpu", threads=1)
    common.print_card(card)
    rows, efficiency = measure_pipeline(corpus, settings, options)
    rows += measure_tokenisation(options) if options.tokenize else []
    print(f"\n{'stage':24} {'tokens':>12} {'M tok/s':>9} {'p20':>9} {'p80':>9}")
    for row in rows:
        figures = " ".join(f"{row[key]:9.2f}" for key in ("median", "p20", "p80"))
        print(f"{row['stage']:24} {row['tokens']:12,} {figures}")
    print(f"\npacking efficiency {efficiency:.4f}; M tok/s: million per CPU second of one core")
    names = ("seq_len", "micro_batch_tokens", "seed")
    record = {"benchmark": "input_pipeline", "card": card, "rows": rows, "efficiency": efficiency}
    record |= {name: getattr(options, name) for name in names}
    record |= {"corpus": str(options.corpus or "synthetic"), "corpus_tokens": len(corpus.tokens)}
    record["unit"] = "million tokens per CPU second of one process"
    common.save_record(record, options.output)
    print(f"\n{json.dumps(record)}")


if __name__ == "__main__":
    main()
