"""From a checkpoint to a classifier, its outputs, and the folder of a fine-tuned one."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from glue.encoding import EncodedExamples, batches_of_all, collect_examples
from glue.settings import FineTuningSettings
from glue.tasks import Segments
from ponet import CheckpointError, PoNetConfig, PoNetForSequenceClassification, PoolerConfig
from ponet.checkpoint import CONFIG, read_model, tile_positions
from ponet.files import write_json
from ponet.run.trainer import autocast
from ponet.tokenizer import SpecialTokens, load_tokenizer, save_tokenizer, tokenizer_fingerprint

# the head of another task is of no use
_HEADS = ("classifier.", "pooler.")
# runs keep their models in folders of this name
_MODEL = "model"
_LABELS = "labels.json"
_MAX_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class EncoderCheckpoint:
    """A model to start from, read."""

    folder: Path
    """As it was named: a folder, or a model of the hub."""
    config: PoNetConfig
    entries: dict[str, Tensor]
    """Weights by their names in the file."""
    tokenizer: Tokenizer
    digest: str
    """Hash of all that decides what is built from it: 16 hexadecimal digits."""

    @property
    def name(self) -> str:
        """For folders and tables: the folder's name, or its parent's where it says nothing."""
        folder = self.folder.resolve()
        return folder.parent.name if folder.name == _MODEL else folder.name


def _refuse_run(folder: Path) -> None:
    model = folder / _MODEL
    if (model / CONFIG).is_file():
        raise CheckpointError(f"{folder}: the folder of a run; its model is in {model}, give that")


def read_checkpoint(folder: Path) -> EncoderCheckpoint:
    """Read `config.json`, weights and tokenizer of a model folder or of a model of the hub.

    Raises:
        ConfigError, CheckpointError: one is missing or damaged, or they do not fit each other.
    """
    _refuse_run(folder)
    files, config, entries = read_model(folder)
    try:
        tokenizer = load_tokenizer(files)
        special = SpecialTokens.from_tokenizer(tokenizer)
    except ValueError as error:
        raise CheckpointError(f"{folder}: a checkpoint needs its tokenizer: {error}") from error
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.get_vocab_size()} tokens, {CONFIG} a "
            f"vocab_size of {config.vocab_size}"
        )
    if not config.mixer.startswith("ponet"):
        # to others special tokens are as any, and published configurations do not name them
        config = config.replace(cls_token_id=special.cls, sep_token_id=special.sep)
    if (special.cls, special.sep) != (config.cls_token_id, config.sep_token_id):
        raise CheckpointError(
            f"{folder}: [CLS] and [SEP] are {special.cls} and {special.sep} to the tokenizer, "
            f"{config.cls_token_id} and {config.sep_token_id} to {CONFIG}"
        )
    digest = hashlib.sha256(repr(config).encode() + tokenizer_fingerprint(tokenizer).encode())
    for name in sorted(entries):
        digest.update(name.encode())
        digest.update(entries[name].contiguous().flatten().view(dtype=torch.uint8).numpy().data)
    return EncoderCheckpoint(
        folder=folder,
        config=config,
        entries=entries,
        tokenizer=tokenizer,
        digest=digest.hexdigest()[:16],
    )


def check_pooler(config: PoNetConfig, pooler: PoolerConfig) -> None:
    """Raise a `ConfigError` if a pooler does not fit an encoder."""
    # sizes without memory
    with torch.device("meta"):
        PoNetForSequenceClassification(config.replace(pooler=pooler))


def build_classifier(
    checkpoint: EncoderCheckpoint, settings: FineTuningSettings, num_labels: int
) -> PoNetForSequenceClassification:
    """A classifier with new weights in its head, drawn with PyTorch's generator.

    `num_labels` is 1 for a regression. From scratch, the encoder's weights are new too.
    """
    positions = max(settings.max_length, checkpoint.config.max_position_embeddings)
    config = checkpoint.config.replace(
        num_labels=num_labels,
        max_position_embeddings=positions,
        hidden_dropout_prob=settings.dropout,
        pooler=settings.pooler,
    )
    model = PoNetForSequenceClassification(config)
    if settings.from_scratch:
        return model
    entries = tile_positions(checkpoint.entries, positions)
    new = {n: x for n, x in model.named_weights().items() if n.startswith(_HEADS)}
    model.load_weights(entries | new, str(checkpoint.folder))
    return model


@torch.inference_mode()
def outputs_of(
    model: PoNetForSequenceClassification,
    examples: EncodedExamples,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> np.ndarray:
    """Logits, or the numbers of a regression, `[N, num_labels]` float32; sets evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    batches = batches_of_all(examples.lengths, _MAX_TOKENS)
    logits = []
    for indices in batches:
        inputs = collect_examples(examples, indices, model.config).to(device)
        # no answer is in question here
        inputs.pop("labels", None)
        with autocast(precision, device):
            logits.append(model(**inputs).logits.float())
    # read at the end: it waits for the device
    return torch.cat(logits).cpu().numpy()[np.argsort(np.concatenate(batches))]


@dataclass(frozen=True, kw_only=True)
class LabelSpec:
    """What goes into a classifier and what comes out."""

    task: str
    labels: tuple[str, ...]
    """Names of the classes; none: the model gives a number."""
    text_columns: tuple[str | int, ...]
    """Columns of the one text or the two that it was trained on, as in `FileColumns`."""
    max_length: int
    segments: Segments


def save_classifier(
    folder: Path, model: PoNetForSequenceClassification, tokenizer: Tokenizer, spec: LabelSpec
) -> None:
    """Write a model folder, each file whole or not at all."""
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder, max_length=spec.max_length)
    write_json(folder / _LABELS, asdict(spec))


def load_classifier(
    folder: Path, device: torch.device
) -> tuple[PoNetForSequenceClassification, Tokenizer, LabelSpec]:
    """Read the model folder of a run.

    Raises:
        ValueError: a file is missing or damaged, or they do not fit each other.
    """
    _refuse_run(folder)
    path = folder / _LABELS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(content[name]) for name in ("labels", "text_columns")}
        spec = LabelSpec(**content | lists)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; expected the model folder of a glue/run.py run"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    model = PoNetForSequenceClassification.from_pretrained(folder).to(device)
    expected = len(spec.labels) or 1
    if model.config.num_labels != expected:
        raise CheckpointError(
            f"{folder}: the model has {model.config.num_labels} outputs, expected {expected} for "
            f"the labels {list(spec.labels)}"
        )
    return model, load_tokenizer(folder), spec
