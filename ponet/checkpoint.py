"""Model folders: `config.json` and `model.safetensors`, written whole or not at all."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ponet.config import PoNetConfig
from ponet.convert import published_entries, published_name

WEIGHTS = "model.safetensors"
PICKLED_WEIGHTS = "pytorch_model.bin"
CONFIG = "config.json"
_DECODER, _WORDS = "cls.predictions.decoder.weight", "ponet.embeddings.word_embeddings.weight"

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete or of another architecture."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it.

    Raises:
        OSError: the file could not be written; `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private; a model folder is shared like any other file
        temporary.chmod(0o666 & ~current_umask())
        temporary.replace(path)
    except OSError as error:
        # errors of writing name no file
        free = shutil.disk_usage(path.parent).free // 2**20
        message = f"cannot be written ({free} MiB free): {error.strerror}"
        raise OSError(error.errno, message, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def current_umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically."""
    write_atomically(path, lambda temporary: _fill(temporary, content))


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write a JSON document atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def _fill(path: Path, content: bytes | memoryview) -> None:
    path.write_bytes(content)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Entries of a model folder in the published form.

    Args:
        folder: holds `model.safetensors`, or `pytorch_model.bin` (loaded without unpickling code).

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    safe, pickled = folder / WEIGHTS, folder / PICKLED_WEIGHTS
    try:
        if safe.is_file():
            return published_entries(load_file(safe))
        if pickled.is_file():
            return published_entries(torch.load(pickled, map_location="cpu", weights_only=True))
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError) as error:
        damaged = safe if safe.is_file() else pickled
        raise CheckpointError(f"{damaged}: damaged or not a checkpoint: {error}") from error
    raise CheckpointError(f"{folder}: expected {WEIGHTS} or {PICKLED_WEIGHTS}, found neither")


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
        model.load_published(entries, str(folder))
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` with the published parameter names.

        Args:
            folder: made when missing; each file appears whole or not at all.
        """
        parameters = self.published_parameters().items()
        entries = {name: p.detach().contiguous().cpu() for name, p in parameters}
        content = save(entries, metadata={"format": "pt"})
        folder = Path(folder)
        write_bytes(folder / WEIGHTS, content)
        config = {"architectures": [type(self).__name__], **self.config.to_dict()}
        write_json(folder / CONFIG, config)

    @torch.no_grad()
    def load_published(self, entries: dict[str, Tensor], origin: str) -> None:
        """Copy entries with published names into the parameters.

        Args:
            entries: as `read_weights` returns them.
            origin: what to name in errors.

        Raises:
            CheckpointError: entries are missing or have another shape, each named.
        """
        parameters = self.published_parameters()
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

    def published_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by their published names."""
        named = dict(self.named_parameters())
        prefix = "" if any(name.startswith("ponet.") for name in named) else "ponet."
        return {published_name(prefix + name): p for name, p in named.items()}
