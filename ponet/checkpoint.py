"""Model folders: `config.json` and `model.safetensors`, written whole or not at all.

Parameters in files bear the names that they have in modules. Published PoNet checkpoints, and
folders that this project wrote before, have other names, which are renamed when they are read.
`python -m ponet.convert` writes them.
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
    layer = number[0] if number else ".N."
    for old, new in names.items():
        start = old.replace(".N.", layer)
        if name.startswith(start):
            return new.replace(".N.", layer) + name.removeprefix(start)
    return name


def module_entries(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring entries to one form: our names in a model with heads, none repeated.

    They may have published names, and be of a bare encoder: no "ponet." in front of the names.
    """
    prefix = "ponet." if any(name.startswith("embeddings.") for name in entries) else ""
    whole = {prefix + name: tensor for name, tensor in entries.items()}
    return {_renamed(name, _OURS): x for name, x in whole.items() if name not in _REPEATED}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Entries of `model.safetensors` or `pytorch_model.bin` as `module_entries` names them."""
    file = next((f for f in (folder / WEIGHTS, folder / PICKLED_WEIGHTS) if f.is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder}: expected {WEIGHTS} or {PICKLED_WEIGHTS}, found neither")
    try:
        if file.name == WEIGHTS:
            return module_entries(load_file(file))
        return module_entries(torch.load(file, map_location="cpu", weights_only=True))
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or not a checkpoint: {error}") from error


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
        """Load a model folder of ours or a published one; nothing is unpickled.

        Args:
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
        """Write `config.json` and `model.safetensors`; tied parameters are written once."""
        folder = Path(folder)
        write_weights(folder, dict(self.named_parameters()))
        config = {"architectures": [type(self).__name__], **self.config.to_dict()}
        write_json(folder / CONFIG, config)

    @torch.no_grad()
    def load_weights(self, entries: Mapping[str, Tensor], origin: str) -> None:
        """Copy entries, as `read_weights` returns them, into the parameters; all must fit."""
        fresh, wrong = [], []
        for name, parameter in self.named_weights().items():
            entry = entries.get(name)
            if entry is None and name.startswith(self.new_weights):
                fresh.append(name)
            elif entry is None:
                wrong.append(f"{name}: missing")
            elif entry.shape != parameter.shape:
                shapes = f"expected {tuple(parameter.shape)}, found {tuple(entry.shape)}"
                wrong.append(f"{name}: {shapes}")
            else:
                parameter.copy_(entry)
        if wrong:
            kind, first = type(self).__name__, "; ".join(wrong[:5])
            raise CheckpointError(f"{origin}: {len(wrong)} weights do not fit {kind}: {first}")
        if fresh:
            logger.warning("%s holds no %s: initialised at random", origin, ", ".join(fresh))

    def named_weights(self) -> dict[str, nn.Parameter]:
        """The parameters by the names that `read_weights` gives them."""
        named = dict(self.named_parameters())
        prefix = "" if any(name.startswith("ponet.") for name in named) else "ponet."
        return {prefix + name: parameter for name, parameter in named.items()}
