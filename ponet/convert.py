"""Write a model folder as published code reads it: of PoNet, BERT or FNet, by its token mixer.

    python -m ponet.convert runs/small/model published/

Loading needs no conversion: `from_pretrained` takes either form.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import torch

from ponet.checkpoint import (
    CONFIG,
    DECODER_BIAS,
    TOKENIZER_FILES,
    CheckpointError,
    StoredModel,
    published_name,
    read_model,
    write_weights,
)
from ponet.config import ConfigError, PoNetConfig
from ponet.files import write_json

_MODEL_TYPES = {
    "ponet": "ponet",
    "ponet_published": "ponet",
    "attention": "bert",
    "attention_naive": "bert",
    "attention_checkpointed": "bert",
    "fnet": "fnet",
}
_CLASSES = {"ponet": "PoNet", "bert": "Bert", "fnet": "FNet"}


def write_published(source: str | Path, target: Path) -> None:
    """Write any model folder in its published form, with its configuration and tokenizer.

    Raises:
        CheckpointError, ConfigError: the model cannot be read, or has no published form.
    """
    model = read_model(source)
    if model.folder.resolve() == target.resolve():
        raise CheckpointError(f"{target}: expected another folder than the one that is read")
    model_type = _MODEL_TYPES.get(model.config.mixer)
    if model_type is None:
        mixers = ", ".join(_MODEL_TYPES)
        raise ConfigError(
            f"{source}: mixer {model.config.mixer} has no published form, expected one of {mixers}"
        )
    name = _published_class(model, model_type)
    if model_type != "ponet":
        _require_published_form(model.config, model_type, name, str(source))
    if model_type == "fnet":
        model = _with_projection(model)
    entries = {published_name(n, model_type): tensor for n, tensor in model.entries.items()}
    if model.config.tie_word_embeddings:
        entries.pop("cls.predictions.decoder.weight", None)
    elif "cls.predictions.bias" in entries:
        entries[DECODER_BIAS] = entries["cls.predictions.bias"].clone()
    write_weights(target, entries)
    architectures = {"architectures": [name]} if name else {}
    write_json(target / CONFIG, architectures | model.config.to_dict(model_type))
    for file in TOKENIZER_FILES:
        if (model.folder / file).is_file():
            shutil.copyfile(model.folder / file, target / file)


def _published_class(model: StoredModel, model_type: str) -> str | None:
    """The published class for the one in `config.json`; None where it names none."""
    content = json.loads((model.folder / CONFIG).read_text(encoding="utf-8"))
    for own in content.get("architectures") or ():
        name = re.sub("^(PoNet|Bert|FNet)", _CLASSES[model_type], own)
        labels = model.config.num_sentence_labels
        if model_type != "ponet" and name.endswith("ForPreTraining") and labels != 2:
            # the published ones know the next sentence alone
            return name.replace("ForPreTraining", "ForMaskedLM")
        return name
    return None


def _require_published_form(
    config: PoNetConfig, model_type: str, name: str | None, source: str
) -> None:
    """Raise a `ConfigError` for what the published class would compute otherwise."""
    expected: dict[str, object] = {"norm_position": "post", "embedding_norm": True}
    if model_type == "bert":
        expected["embedding_projection"] = False
    for field, value in expected.items():
        found = getattr(config, field)
        if found != value:
            raise ConfigError(f"{source}: {model_type} has {field} {value}, found {found}")
    if not config.type_vocab_size:
        raise ConfigError(f"{source}: {model_type} has token types, found type_vocab_size 0")
    if name and name.endswith("ForSequenceClassification") and config.pooler.name != "cls":
        raise ConfigError(f"{source}: {name} has the pooler cls, found {config.pooler.name}")


def _with_projection(model: StoredModel) -> StoredModel:
    """The same function with the projection of the published FNet: where there is none, 1."""
    if model.config.embedding_projection:
        return model
    identity = torch.eye(model.config.hidden_size)
    projection = {
        "ponet.embeddings.projection.weight": identity,
        "ponet.embeddings.projection.bias": torch.zeros(model.config.hidden_size),
    }
    config = model.config.replace(embedding_projection=True)
    return StoredModel(model.folder, config, model.entries | projection)


def main() -> None:
    """Convert the folder that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m ponet.convert",
        description="Write a model folder as published code of PoNet, BERT or FNet reads it.",
    )
    parser.add_argument("source", help="model folder or name on the hub to read")
    parser.add_argument("target", type=Path, help="folder to write")
    chosen = parser.parse_args()
    try:
        if chosen.target.is_dir() and any(chosen.target.iterdir()):
            raise FileExistsError(f"{chosen.target}: not empty, expected a new folder")
        write_published(chosen.source, chosen.target)
        print(f"written: {chosen.target}")
    except (ValueError, OSError) as error:
        sys.exit(f"ponet.convert: {error}")


if __name__ == "__main__":
    main()
