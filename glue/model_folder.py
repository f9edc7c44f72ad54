"""A fine-tuned model's folder: what `from_pretrained` loads, and what the outputs mean."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer

from glue.tasks import Segments
from ponet import CheckpointError, PoNetForSequenceClassification
from ponet.checkpoint import write_json
from ponet.tokenizer import save_tokenizer

_MEANING = "meaning.json"


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What goes into a classifier and what comes out."""

    task: str
    """It was fine-tuned on."""
    labels: tuple[str, ...]
    """Names of the classes; none: the model gives a number."""
    num_texts: int
    """1, or 2 for pairs."""
    max_length: int
    """Tokens of an example."""
    segments: Segments
    """What is pooled together."""


def save_model(
    folder: Path, model: PoNetForSequenceClassification, tokenizer: Tokenizer, meaning: Meaning
) -> None:
    """Write a model folder, each file whole or not at all."""
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder, max_length=meaning.max_length)
    write_json(folder / _MEANING, asdict(meaning))


def read_meaning(folder: Path) -> Meaning:
    """What the outputs of a saved model mean.

    Raises:
        CheckpointError: the folder does not say, so it was not written by `save_model`.
    """
    path = folder / _MEANING
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Meaning(**content | {"labels": tuple(content["labels"])})
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; expected the model folder of a glue/run.py run"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
