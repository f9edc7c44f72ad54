"""Speed of the pre-training input pipeline on one core, from text to batches.

    python benchmarks/input_pipeline.py                      # documentation that is installed
    python benchmarks/input_pipeline.py --data FILE --vocab VOCAB

Rates are tokens of examples (above the corpus: of text) per second of CPU time of this process, all
its threads together, so that other programs on the machine disturb little.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from benchmarks import common
from benchmarks.common import NUMBER, Row, percentiles
from ponet.tokenizer import load_tokenizer, split_sentences
from pretrain.batches import MicroBatchSampler, make_loader, pack_bins
from pretrain.corpus import Corpus, build_corpus
from pretrain.examples import ExampleSettings, draw_batch, plan_epoch
from pretrain.sources import iter_documents
from pretrain.tokenise import train_tokenizer

# values of BERT's vocabulary; other ids cost the same time
_CLS, _SEP, _MASK = 101, 102, 103

# work by name, which returns its number of tokens
Stages = dict[str, Callable[[], int]]


def text_stages(documents: list[str], tokenizer: Tokenizer) -> Stages:
    """Sentence splitting, the bare tokenizer, and both with writing."""
    bare = Tokenizer.from_str(tokenizer.to_str())
    sentences = list(chain.from_iterable(split_sentences(document) for document in documents))

    def encode() -> int:
        found = bare.encode_batch(sentences, add_special_tokens=False)
        return sum(len(encoding.ids) for encoding in found)

    def split() -> int:
        for document in documents:
            split_sentences(document)
        return num_tokens

    def build() -> int:
        with tempfile.TemporaryDirectory() as folder:
            return len(build_corpus(documents, tokenizer, cache_dir=folder, key_parts={}).tokens)

    num_tokens = encode()
    return {"split_sentences": split, "raw encode_batch": encode, "build_corpus": build}


def batch_stages(corpus: Corpus, options: argparse.Namespace) -> tuple[Stages, float]:
    """Planning, packing, drawing and the whole loader, and the packing efficiency."""
    special: Row = {"cls_id": _CLS, "sep_id": _SEP, "mask_id": _MASK}
    special |= {"special_ids": (0, 100, _CLS, _SEP, _MASK), "seq_len": options.seq_len}
    settings = ExampleSettings(vocab_size=corpus.metadata["vocab_size"], **special)
    documents = np.arange(corpus.num_documents)
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
        return sum(batch.tokens for batch in islice(make_loader(sampler), epoch.num_steps))

    stages = {"plan_epoch": plan, "pack_bins": pack, "draw_batch": draw, "whole loader": load}
    return stages, epoch.packing_efficiency


def measure_stage(name: str, work: Callable[[], int], repeats: int) -> Row:
    """Time a stage after a run that warms up: million tokens per CPU second."""
    tokens, rates = work(), []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        rates.append(tokens / (time.process_time() - begin) / 1e6)
    median, low, high = percentiles(rates)
    return {"stage": name, "tokens": tokens, "median": median, "p20": low, "p80": high}


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="speed of the pre-training input pipeline")
    add = parser.add_argument
    add("--data", nargs="+", default=["builtin"], help="text, as pretrain/run.py --data [builtin]")
    add("--max-characters", default=4_000_000, **NUMBER, help="of the text [4,000,000]")
    add("--vocab", type=Path, help="tokenizer [one is trained]")
    add("--seq-len", default=512, **NUMBER, help="tokens of an example [512]")
    add("--micro-batch-tokens", default=16384, **NUMBER)
    add("--repeats", default=5, **NUMBER)
    return common.parse_flags(parser)


def main() -> None:
    """Run the benchmark."""
    options = parse_options()
    # one thread, so that CPU time is work and not waiting
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    card = common.machine_card("cpu")
    common.print_card(card)
    documents = list(iter_documents(options.data, max_characters=options.max_characters))
    tokenizer = load_tokenizer(options.vocab) if options.vocab else None
    tokenizer = tokenizer or train_tokenizer(documents, vocab_size=8192)
    with tempfile.TemporaryDirectory() as folder:
        corpus = build_corpus(documents, tokenizer, cache_dir=folder, key_parts={})
        stages, efficiency = batch_stages(corpus, options)
        stages = text_stages(documents, tokenizer) | stages
        rows = [measure_stage(name, work, options.repeats) for name, work in stages.items()]
    print(f"\n{'stage':24} {'tokens':>12} {'M tok/s':>9} {'p20':>9} {'p80':>9}")
    for row in rows:
        figures = " ".join(f"{row[key]:9.2f}" for key in ("median", "p20", "p80"))
        print(f"{row['stage']:24} {row['tokens']:12,} {figures}")
    print(f"\npacking efficiency {efficiency:.4f}; M tok/s: million per CPU second of one core")
    record = {"benchmark": "input_pipeline", "card": card, "rows": rows, "efficiency": efficiency}
    for name in ("seq_len", "micro_batch_tokens", "seed"):
        record[name] = getattr(options, name)
    record |= {"corpus": " ".join(options.data), "corpus_tokens": len(corpus.tokens)}
    record["unit"] = "million tokens per CPU second of one process"
    common.save_record(record, options.output)


if __name__ == "__main__":
    main()
