"""Model folders: `config.json` and `model.safetensors`, written whole or not at all.

Parameters in files bear the names that they have in modules. Published PoNet checkpoints, and
folders that this project wrote before, have other names; they are told by these and renamed when
they are read. `python -m ponet.convert` writes them.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ponet.config import PoNetConfig
from ponet.files import write_bytes, write_json

WEIGHTS = "model.safetensors"
PICKLED_WEIGHTS = "pytorch_model.bin"
CONFIG = "config.json"

# beginnings of names, N the number of a layer; names that none begins are the same in both
_PUBLISHED = {
    "ponet.embeddings.norm.": "ponet.embeddings.LayerNorm.",
    "ponet.embeddings.word.": "ponet.embeddings.word_embeddings.",
    "ponet.embeddings.position.": "ponet.embeddings.position_embeddings.",
    "ponet.embeddings.token_type.": "ponet.embeddings.token_type_embeddings.",
    "ponet.encoder.layers.N.mixer.query.": "ponet.encoder.layer.N.attention.self.dense_q.",
    "ponet.encoder.layers.N.mixer.key.": "ponet.encoder.layer.N.attention.self.dense_k.",
    "ponet.encoder.layers.N.mixer.output.": "ponet.encoder.layer.N.attention.self.dense_o.",
    "ponet.encoder.layers.N.mixer.segment.": "ponet.encoder.layer.N.attention.self.dense_segment.",
    "ponet.encoder.layers.N.mixer.local.": "ponet.encoder.layer.N.attention.self.dense_local.",
    "ponet.encoder.layers.N.mixer.dense.": "ponet.encoder.layer.N.attention.output.dense.",
    "ponet.encoder.layers.N.mixer_norm.": "ponet.encoder.layer.N.attention.output.LayerNorm.",
    "ponet.encoder.layers.N.feed_forward.up.": "ponet.encoder.layer.N.intermediate.dense.",
    "ponet.encoder.layers.N.feed_forward.down.": "ponet.encoder.layer.N.output.dense.",
    "ponet.encoder.layers.N.feed_forward_norm.": "ponet.encoder.layer.N.output.LayerNorm.",
    "ponet.encoder.final_norm.": "ponet.encoder.LayerNorm.",
    "ponet.pooler.": "ponet.pooler.dense.",
    "mlm_head.dense.": "cls.predictions.transform.dense.",
    "mlm_head.norm.": "cls.predictions.transform.LayerNorm.",
    "mlm_head.decoder.weight": "cls.predictions.decoder.weight",
    "mlm_head.decoder.bias": "cls.predictions.bias",
    "sso_head.": "cls.seq_relationship.",
}
_OURS = {published: ours for ours, published in _PUBLISHED.items()}
# entries of published files that say nothing new
_REPEATED = ("ponet.embeddings.position_ids", "cls.predictions.decoder.bias")
_DECODER, _WORDS = "mlm_head.decoder.weight", "ponet.embeddings.word.weight"

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete or of another architecture."""


def published_name(name: str) -> str:
    """The name in a published checkpoint of a whole model's parameter `name`."""
    return _renamed(name, _PUBLISHED)


def _renamed(name: str, names: Mapping[str, str]) -> str:
    number = re.search(r"\.\d+\.", name)
    pattern = name if number is None else name.replace(number[0], ".N.", 1)
    for old, new in names.items():
        if pattern.startswith(old):
            renamed = new + pattern.removeprefix(old)
            return renamed if number is None else renamed.replace(".N.", number[0], 1)
    return name


def module_entries(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring the entries of any file to one form: the names in a model with heads.

    Args:
        entries: of a whole model or of a bare encoder (no "ponet." in front of the names), with
            published names or with ours.

    Returns:
        Entries without those that repeat others.
    """
    prefix = "ponet." if any(name.startswith("embeddings.") for name in entries) else ""
    whole = {prefix + name: tensor for name, tensor in entries.items()}
    return {_renamed(name, _OURS): x for name, x in whole.items() if name not in _REPEATED}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Entries of a model folder as `module_entries` names them.

    Args:
        folder: holds `model.safetensors`, or `pytorch_model.bin` (loaded without unpickling code).

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    safe, pickled = folder / WEIGHTS, folder / PICKLED_WEIGHTS
    try:
        if safe.is_file():
            return module_entries(load_file(safe))
        if pickled.is_file():
            return module_entries(torch.load(pickled, map_location="cpu", weights_only=True))
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError) as error:
        damaged = safe if safe.is_file() else pickled
        raise CheckpointError(f"{damaged}: damaged or not a checkpoint: {error}") from error
    raise CheckpointError(f"{folder}: expected {WEIGHTS} or {PICKLED_WEIGHTS}, found neither")


def write_weights(folder: Path, entries: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors`, whole or not at all."""
    content = {name: x.detach().contiguous().cpu() for name, x in entries.items()}
    write_bytes(folder / WEIGHTS, save(content, metadata={"format": "pt"}))


class PreTrainedModel(nn.Module):
    """Loading and saving, shared by all models."""

    new_weights: tuple[str, ...] = ()
    """Name prefixes of a head that a pre-trained checkpoint need not hold."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(cls, folder: str | Path, **changes: Any) -> Self:
        """Load a model folder: `config.json` and `model.safetensors` or `pytorch_model.bin`.

        Both our folders and published PoNet checkpoints load. Nothing is unpickled.

        Args:
            folder: the model folder.
            **changes: fields of the configuration to replace, such as `num_labels`.

        Raises:
            CheckpointError: the weights are damaged or do not fit the configuration.
            ConfigError: `config.json` is missing or describes another architecture.
        """
        folder = Path(folder)
        config = PoNetConfig.from_file(folder / CONFIG)
        entries = read_weights(folder)
        if _DECODER in entries:
            # early published files tie the decoder, later ones do not; the values tell which
            tied = _WORDS in entries and torch.equal(entries[_DECODER], entries[_WORDS])
            config = config.replace(tie_word_embeddings=tied)
        model = cls(config.replace(**changes))
        model.load_weights(entries, str(folder))
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`; tied parameters are written once.

        Args:
            folder: made when missing; each file appears whole or not at all.
        """
        folder = Path(folder)
        write_weights(folder, dict(self.named_parameters()))
        config = {"architectures": [type(self).__name__], **self.config.to_dict()}
        write_json(folder / CONFIG, config)

    @torch.no_grad()
    def load_weights(self, entries: Mapping[str, Tensor], origin: str) -> None:
        """Copy entries into the parameters.

        Args:
            entries: as `read_weights` returns them.
            origin: what to name in errors.

        Raises:
            CheckpointError: entries are missing or have another shape, each named.
        """
        parameters = self.named_weights()
        missing = [name for name in parameters if name not in entries]
        fresh = [name for name in missing if self.new_weights and name.startswith(self.new_weights)]
        wrong = [
            f"{name}: expected {tuple(p.shape)}, found {tuple(entries[name].shape)}"
            for name, p in parameters.items()
            if name in entries and p.shape != entries[name].shape
        ]
        wrong += [f"{name}: missing" for name in missing if name not in fresh]
        if wrong:
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise CheckpointError(
                f"{origin}: weights do not fit {type(self).__name__}: {'; '.join(wrong[:5])}{more}"
            )
        if fresh:
            logger.warning("%s holds no %s: initialised at random", origin, ", ".join(fresh))
        for name in parameters.keys() - set(fresh):
            parameters[name].copy_(entries[name])

    def named_weights(self) -> dict[str, nn.Parameter]:
        """The parameters by the names that `read_weights` gives them."""
        named = dict(self.named_parameters())
        prefix = "" if any(name.startswith("ponet.") for name in named) else "ponet."
        return {prefix + name: parameter for name, parameter in named.items()}
