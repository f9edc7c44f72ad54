"""Small encoders, and a checkpoint of one with its tokenizer."""

from pathlib import Path
from typing import Any

import torch

from ponet import PoNetConfig, PoNetForPreTraining
from ponet.tokenizer import SPECIAL_TOKENS, bert_tokenizer, save_tokenizer

SMALL = PoNetConfig(
    vocab_size=120,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=64,
    hidden_dropout_prob=0.0,
)
GOOD, BAD = "good fine great", "bad poor sad"
FILLERS = "the a film is it was very and so then ."
WORDS = [*SPECIAL_TOKENS, *f"{GOOD} {BAD} {FILLERS} one two three four".split()]
IDS = {word: number for number, word in enumerate(WORDS)}
TINY = PoNetConfig(
    vocab_size=len(WORDS),
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
    cls_token_id=IDS["[CLS]"],
    sep_token_id=IDS["[SEP]"],
)


def checkpoint_at(folder: Path, **changes: Any) -> Path:
    """Save a pre-trained encoder of sentences of `WORDS`."""
    torch.manual_seed(0)
    PoNetForPreTraining(TINY.replace(**changes)).save_pretrained(folder)
    save_tokenizer(bert_tokenizer(IDS), folder)
    return folder
