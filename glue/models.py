"""From a checkpoint to a classifier that is ready to be fine-tuned."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ponet import CheckpointError, PoNetConfig, PoNetForSequenceClassification, PoolerConfig
from ponet.checkpoint import CONFIG, read_weights
from ponet.tokenizer import SpecialTokens, load_tokenizer, tokenizer_fingerprint

_POSITIONS = "ponet.embeddings.position_embeddings.weight"
_POOLER = "ponet.pooler."
# a pre-training run keeps its model in a folder of this name
_UNTELLING_NAME = "model"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model folder, read."""

    folder: Path
    """Where it is."""
    config: PoNetConfig
    """Of the encoder."""
    entries: dict[str, Tensor]
    """Weights by their published names."""
    tokenizer: Tokenizer
    """Of the model."""
    digest: str
    """Hash of all that decides what is built from it: 64 hexadecimal digits."""

    @property
    def name(self) -> str:
        """For folders and tables: the folder's name, or its parent's where it says nothing."""
        folder = self.folder.resolve()
        return folder.parent.name if folder.name == _UNTELLING_NAME else folder.name


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read `config.json`, weights and tokenizer of a model folder.

    Raises:
        ConfigError: `config.json` is missing or describes another architecture.
        CheckpointError: weights or tokenizer are missing, damaged, or do not fit the configuration.
    """
    config = PoNetConfig.from_file(folder / CONFIG)
    entries = read_weights(folder)
    try:
        tokenizer = load_tokenizer(folder)
        special = SpecialTokens.from_tokenizer(tokenizer)
    except ValueError as error:
        raise CheckpointError(f"{folder}: a checkpoint needs its tokenizer: {error}") from error
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.get_vocab_size()} tokens, {CONFIG} a "
            f"vocab_size of {config.vocab_size}"
        )
    if (special.cls, special.sep) != (config.cls_token_id, config.sep_token_id):
        raise CheckpointError(
            f"{folder}: [CLS] and [SEP] are {special.cls} and {special.sep} to the tokenizer, "
            f"{config.cls_token_id} and {config.sep_token_id} to {CONFIG}"
        )
    digest = hashlib.sha256(repr(config).encode() + tokenizer_fingerprint(tokenizer).encode())
    for name in sorted(entries):
        digest.update(name.encode())
        digest.update(entries[name].contiguous().flatten().view(dtype=torch.uint8).numpy().data)
    return Checkpoint(
        folder=folder,
        config=config,
        entries=entries,
        tokenizer=tokenizer,
        digest=digest.hexdigest(),
    )


def check_pooler(config: PoNetConfig, pooler: PoolerConfig) -> None:
    """See whether a pooler fits an encoder.

    Raises:
        ConfigError: it does not.
    """
    # sizes without memory
    with torch.device("meta"):
        PoNetForSequenceClassification(config.replace(pooler=pooler))


def tile_positions(table: Tensor, length: int) -> Tensor:
    """Repeat a position table, as published for long texts: position p is like p modulo P.

    Args:
        table: `[P, C]`.
        length: rows wanted.

    Returns:
        `[length, C]`, or the table itself where it is long enough.
    """
    if length <= len(table):
        return table
    return table.repeat(-(-length // len(table)), 1)[:length]


def build_classifier(
    checkpoint: Checkpoint,
    *,
    num_labels: int,
    max_length: int,
    pooler: PoolerConfig,
    dropout: float,
    from_scratch: bool,
) -> PoNetForSequenceClassification:
    """A classifier with new weights in its head, drawn with PyTorch's generator.

    Args:
        checkpoint: gives the encoder.
        num_labels: classes; 1 for a regression.
        max_length: tokens of the longest example.
        pooler: what the classifier reads.
        dropout: probability.
        from_scratch: the encoder's weights are new too.

    Raises:
        CheckpointError: the weights do not fit the configuration.
        ConfigError: the pooler does not fit the encoder.
    """
    positions = max(max_length, checkpoint.config.max_position_embeddings)
    config = checkpoint.config.replace(
        num_labels=num_labels,
        max_position_embeddings=positions,
        hidden_dropout_prob=dropout,
        pooler=pooler,
    )
    model = PoNetForSequenceClassification(config)
    if from_scratch:
        return model
    entries = dict(checkpoint.entries)
    if _POSITIONS in entries:
        entries[_POSITIONS] = tile_positions(entries[_POSITIONS], positions)
    # the head of another task is of no use; where there is no pooler, pre-training needed none
    fresh = PoNetForSequenceClassification.new_weights
    if not any(name.startswith(_POOLER) for name in entries):
        fresh = (*fresh, _POOLER)
    new = {n: x for n, x in model.published_parameters().items() if n.startswith(fresh)}
    model.load_published(entries | new, str(checkpoint.folder))
    return model
