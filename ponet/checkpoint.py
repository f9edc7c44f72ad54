"""Model folders: `config.json` and weights, written whole or not at all.

Parameters in files bear the names that they have in modules. Published checkpoints of PoNet, BERT
and FNet, and folders that this project wrote before, have other names, which are renamed when they
are read. `python -m ponet.convert` writes them.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ponet.config import PoNetConfig
from ponet.files import write_bytes, write_json

WEIGHTS = "model.safetensors"
PICKLED_WEIGHTS = "pytorch_model.bin"
CONFIG = "config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "spiece.model",
)

# beginnings of names, N the number of a layer; names that none begins are the same in both
_COMMON = {
    "ponet.embeddings.norm.": "ponet.embeddings.LayerNorm.",
    "ponet.embeddings.word.": "ponet.embeddings.word_embeddings.",
    "ponet.embeddings.position.": "ponet.embeddings.position_embeddings.",
    "ponet.embeddings.token_type.": "ponet.embeddings.token_type_embeddings.",
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
# by model type, which in names stands in place of the first "ponet"
_SPECIAL = {
    "ponet": {
        "ponet.encoder.layers.N.mixer.query.": "ponet.encoder.layer.N.attention.self.dense_q.",
        "ponet.encoder.layers.N.mixer.key.": "ponet.encoder.layer.N.attention.self.dense_k.",
        "ponet.encoder.layers.N.mixer.output.": "ponet.encoder.layer.N.attention.self.dense_o.",
        "ponet.encoder.layers.N.mixer.segment.": (
            "ponet.encoder.layer.N.attention.self.dense_segment."
        ),
        "ponet.encoder.layers.N.mixer.local.": "ponet.encoder.layer.N.attention.self.dense_local.",
    },
    "bert": {
        "ponet.encoder.layers.N.mixer.query.": "ponet.encoder.layer.N.attention.self.query.",
        "ponet.encoder.layers.N.mixer.key.": "ponet.encoder.layer.N.attention.self.key.",
        "ponet.encoder.layers.N.mixer.value.": "ponet.encoder.layer.N.attention.self.value.",
    },
    "fnet": {
        "ponet.encoder.layers.N.mixer_norm.": "ponet.encoder.layer.N.fourier.output.LayerNorm.",
    },
}
# the decoder's bias has two names in published files, of which the second counts
DECODER_BIAS = "cls.predictions.decoder.bias"
_OURS = {
    published: ours for table in (_COMMON, *_SPECIAL.values()) for ours, published in table.items()
} | {DECODER_BIAS: "mlm_head.decoder.bias"}
_OLD_ENDS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# beginnings of what is not the encoder's and a checkpoint need not hold
_HEADS = ("classifier.", "pooler.", "mlm_head.", "sso_head.", "ponet.pooler.")
_DECODER, _WORDS = "mlm_head.decoder.weight", "ponet.embeddings.word.weight"
_POSITIONS = "ponet.embeddings.position.weight"

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete or of another architecture."""


def published_name(name: str, model_type: str = "ponet") -> str:
    """The name in a published checkpoint of a whole model's parameter `name`."""
    published = _renamed(name, _COMMON | _SPECIAL[model_type])
    return re.sub(r"^ponet\b", model_type, published)


def _renamed(name: str, names: Mapping[str, str]) -> str:
    number = re.search(r"\.\d+\.", name)
    layer = number[0] if number else ".N."
    for old, new in names.items():
        start = old.replace(".N.", layer)
        if name.startswith(start):
            return new.replace(".N.", layer) + name.removeprefix(start)
    return name


def module_entries(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring entries to one form: our names in a model with heads, none repeated, no buffers.

    They may have published names, and be of a bare encoder: no "ponet." in front of the names.
    """
    is_bare = any(name.startswith("embeddings.") for name in entries)
    named = {}
    # in this order of the decoder's two biases
    for name in sorted(entries):
        whole = f"ponet.{name}" if is_bare else re.sub(r"^(bert|fnet)\.", "ponet.", name)
        for old, new in _OLD_ENDS.items():
            whole = re.sub(f"{re.escape(old)}$", new, whole)
        if entries[name].is_floating_point():
            named[_renamed(whole, _OURS)] = entries[name]
    return named


def _weight_files(folder: Path) -> list[Path]:
    """The one file with weights, or all that an index names."""
    for name in (WEIGHTS, PICKLED_WEIGHTS):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            try:
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index}: damaged or no index: {error!r}") from error
            return [folder / Path(shard).name for shard in sorted(shards)]
    names = f"{WEIGHTS} or {PICKLED_WEIGHTS}"
    raise CheckpointError(f"{folder}: expected {names}, whole or in parts, found neither")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Entries of `model.safetensors` or `pytorch_model.bin` as `module_entries` names them."""
    entries: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file, though the index beside it names it")
        try:
            if file.suffix == ".safetensors":
                part = load_file(file)
            else:
                part = torch.load(file, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            # what torch says advises to unpickle
            reason = "it has no form that holds tensors alone"
            raise CheckpointError(f"{file}: damaged or not a checkpoint: {reason}") from error
        except (SafetensorError, RuntimeError, EOFError, OSError) as error:
            raise CheckpointError(f"{file}: damaged or not a checkpoint: {error!r}") from error
        if not isinstance(part, dict) or not all(isinstance(x, Tensor) for x in part.values()):
            raise CheckpointError(f"{file}: damaged or not a checkpoint: no dictionary of tensors")
        entries |= part
    return module_entries(entries)


class StoredModel(NamedTuple):
    """A model folder, read."""

    folder: Path
    config: PoNetConfig
    entries: dict[str, Tensor]
    """Weights as `module_entries` names them."""


def read_model(source: str | Path, revision: str | None = None) -> StoredModel:
    """Read a model folder, or one of the hub; arguments and errors as for `from_pretrained`."""
    folder = model_folder(source, revision)
    config = PoNetConfig.from_file(folder / CONFIG)
    entries = read_weights(folder)
    if config.mixer == "attention" and any(".mixer.segment." in name for name in entries):
        # the first published PoNet calls itself BERT
        config = config.replace(mixer="ponet", num_sentence_labels=3)
    if _DECODER in entries:
        # early published files tie the decoder, later ones do not; the values tell which
        tied = _WORDS in entries and torch.equal(entries[_DECODER], entries[_WORDS])
        config = config.replace(tie_word_embeddings=tied)
    return StoredModel(folder, config, entries)


def model_folder(source: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or that of a model of the hub, which is downloaded once."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(source)) is None:
        raise CheckpointError(f"{source}: no such folder, expected a model folder")
    # a second to import, and folders need none of it
    from huggingface_hub import snapshot_download

    found = folder
    try:
        for name in (WEIGHTS, PICKLED_WEIGHTS):
            stem, ending = name.split(".")
            weights = [name, f"{stem}-*.{ending}", f"{name}.index.json"]
            wanted = [CONFIG, *TOKENIZER_FILES, *weights]
            found = Path(snapshot_download(str(source), revision=revision, allow_patterns=wanted))
            # the slower form is fetched where there is no other
            if any(found.glob(f"{stem}*.{ending}")):
                break
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{source}: no such folder, and the hub does not give it: {reason}"
        ) from error
    return found


def tile_positions(entries: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Repeat the position table to a length: position p is like p modulo the length of the table.

    As published for long texts.
    """
    table = entries.get(_POSITIONS)
    if table is None:
        return dict(entries)
    return {**entries, _POSITIONS: table.repeat(-(-length // len(table)), 1)[:length]}


def write_weights(folder: Path, entries: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors`, whole or not at all."""
    content = {name: x.detach().contiguous().cpu() for name, x in entries.items()}
    write_bytes(folder / WEIGHTS, save(content, metadata={"format": "pt"}))


class PreTrainedModel(nn.Module):
    """Loading and saving, shared by all models."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        ignore_mismatched_sizes: bool = False,
        **changes: Any,
    ) -> Self:
        """Load a model folder: of ours, or a published PoNet, BERT or FNet; nothing is unpickled.

        Heads that it does not hold start afresh, with one warning.

        Args:
            source: the folder, or the name of a model on the Hugging Face hub.
            revision: branch, tag or commit of the model on the hub.
            dtype: of the parameters, or its name; "auto": that of the file; None: float32.
            ignore_mismatched_sizes: heads of other sizes, such as a classifier with another number
                of labels, start afresh, too.
            **changes: fields of the configuration to replace, such as `num_labels`, or arguments
                of the class, such as `add_pooler`. Beyond its `max_position_embeddings` the
                checkpoint's table of positions is repeated.

        Raises:
            CheckpointError: the weights are damaged or do not fit the configuration.
            ConfigError: `config.json` is missing or describes another architecture.
        """
        _, config, entries = read_model(source, revision)
        names = {field.name for field in fields(PoNetConfig)}
        arguments = {name: changes.pop(name) for name in changes.keys() - names}
        model = cls(config.replace(**changes), **arguments)
        if dtype == "auto":
            dtype = entries[_WORDS].dtype if _WORDS in entries else None
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, dtype)
        if dtype is not None:
            if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise ValueError(f"dtype must be a floating type of torch, found {dtype!r}")
            model.to(dtype)
        if "max_position_embeddings" in changes:
            entries = tile_positions(entries, model.config.max_position_embeddings)
        model.load_weights(entries, str(source), ignore_mismatched_sizes=ignore_mismatched_sizes)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`; tied parameters are written once."""
        folder = Path(folder)
        write_weights(folder, dict(self.named_parameters()))
        config = {"architectures": [type(self).__name__], **self.config.to_dict()}
        write_json(folder / CONFIG, config)

    @torch.no_grad()
    def load_weights(
        self, entries: Mapping[str, Tensor], origin: str, *, ignore_mismatched_sizes: bool = False
    ) -> None:
        """Copy entries, as `read_weights` returns them, into the parameters; all must fit.

        A head of which there is no entry keeps its values, and so does one of another size, if
        that is asked for.
        """
        named = self.named_weights()
        unlike = {n for n, p in named.items() if n in entries and entries[n].shape != p.shape}
        absent = [h for h in _HEADS if not any(n.startswith(h) for n in entries)]
        misfits = [h for h in _HEADS if any(n.startswith(h) for n in unlike)]
        fresh = tuple(absent + misfits if ignore_mismatched_sizes else absent)
        loaded = {n: p for n, p in named.items() if not n.startswith(fresh)}
        wrong = []
        for name, parameter in loaded.items():
            if name not in entries:
                wrong.append(f"{name}: missing")
            elif name in unlike:
                shapes = tuple(parameter.shape), tuple(entries[name].shape)
                wrong.append("{}: expected {}, found {}".format(name, *shapes))
        if wrong:
            kind, first = type(self).__name__, "; ".join(wrong[:5])
            message = f"{origin}: {len(wrong)} weights do not fit {kind}: {first}"
            if all(name.startswith(_HEADS) for name in unlike) and unlike:
                message += "; ignore_mismatched_sizes=True lets such heads start afresh"
            raise CheckpointError(message)
        for name, parameter in loaded.items():
            parameter.copy_(entries[name])
        new = [h.rstrip(".") for h in fresh if any(n.startswith(h) for n in named)]
        if new:
            logger.warning("%s: initialised at random: %s", origin, ", ".join(new))
        unused = [n for n in entries if n.startswith("ponet.encoder.") and n not in named]
        if unused:
            logger.warning("%s: %d weights not used, such as %s", origin, len(unused), unused[0])

    def named_weights(self) -> dict[str, nn.Parameter]:
        """The parameters by the names that `read_weights` gives them."""
        named = dict(self.named_parameters())
        prefix = "" if any(name.startswith("ponet.") for name in named) else "ponet."
        return {prefix + name: parameter for name, parameter in named.items()}
