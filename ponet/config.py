"""The architecture of an encoder, and the sizes that have a name."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# the field names of a published config.json that differ from ours
_PUBLISHED_NAMES = {"clsgsepg": "separate_special_tokens"}

# published settings with one value here; anything else is an architecture we do not build
_FIXED = {
    "model_type": ("ponet", "bert"),
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
}


class ConfigError(ValueError):
    """A configuration that contradicts itself or describes another architecture."""


@dataclass(frozen=True, kw_only=True)
class PoolerConfig:
    """How the states of a sequence become one vector; see `ponet.poolers`.

    Raises:
        ConfigError: a value is out of range.
    """

    name: str = "cls"
    """Key of `ponet.poolers.POOLERS`."""
    reading: Literal["literal", "sound"] = "sound"
    """sound: padding, scale and chance change nothing; literal: as the pooler's source has it."""
    num_layers: int = 3
    """Last layers read by the poolers that read several; the published number."""
    num_heads: int = 4
    """Heads of the poolers with attention, which divide the hidden size; the published number."""
    layer_choice: Literal["own", "norm"] = "own"
    """own: layers as the pooler defines; norm: for each token, of the last `num_layers` layers the
    one with the longest vector."""
    window: int = 2
    """Neighbouring features in a softmax of mswap; divides the hidden size."""
    num_draws: int = 1
    """Tokens that stochastic draws for a feature."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "window", "num_draws"):
            if getattr(self, name) < 1:
                raise ConfigError(f"pooler {name} must be at least 1, found {getattr(self, name)}")
        for name, allowed in (("reading", ("literal", "sound")), ("layer_choice", ("own", "norm"))):
            if getattr(self, name) not in allowed:
                found = getattr(self, name)
                raise ConfigError(f"pooler {name} must be {' or '.join(allowed)}, found {found!r}")


@dataclass(frozen=True, kw_only=True)
class PoNetConfig:
    """Sizes and switches of a PoNet encoder; the defaults are the published base model.

    Raises:
        ConfigError: values contradict each other.
    """

    vocab_size: int = 30522
    """Rows of the word embedding."""
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    """Heads of global aggregation; divides `hidden_size`."""
    intermediate_size: int = 3072
    """Width inside the feed-forward sub-layer."""
    hidden_dropout_prob: float = 0.1
    """Dropout after the embedding and each sub-layer; there is none inside the mixing block."""
    max_position_embeddings: int = 512
    """Longest sequence."""
    type_vocab_size: int = 2
    """Token types: sentence A and sentence B; 0: the model knows none."""
    embedding_norm: bool = True
    """LayerNorm after the sum of the embeddings; Long Range Arena's models have none."""
    layer_norm_eps: float = 1e-12
    """Added to the variance in LayerNorm."""
    initializer_range: float = 0.02
    pad_token_id: int = 0
    cls_token_id: int = 101
    """[CLS], with [SEP] special in the sense of `separate_special_tokens`."""
    sep_token_id: int = 102
    mixer: str = "ponet"
    """Token mixer, a key of `ponet.mixers.MIXERS`."""
    norm_position: Literal["post", "pre"] = "post"
    """LayerNorm after each residual sum (text) or before each sub-layer (Long Range Arena)."""
    separate_special_tokens: bool = True
    """[CLS] and [SEP] receive global aggregation only and are seen by no window or segment."""
    num_segments: int | None = None
    """Cut rows into this many equal chunks when no segments are given; None: at special tokens."""
    use_global: bool = True
    """Global aggregation; False is the ablation "without GA"."""
    use_global_second_stage: bool = True
    """Attention of the mean query over the keys; False keeps the mean query alone."""
    use_segment: bool = True
    """Segment max-pooling; False is the ablation "without SMP"."""
    use_local: bool = True
    """Local max-pooling; False is the ablation "without LMP"."""
    attention_probs_dropout_prob: float = 0.0
    """Dropout on the attention probabilities of the baselines; PoNet has none inside the block."""
    linformer_size: int = 256
    """Rows that Linformer projects the keys and values of a sequence to."""
    num_random_features: int = 256
    """Random features per head of Performer."""
    num_landmarks: int = 64
    """Landmarks per head of Nystromformer."""
    landmark_conv_size: int | None = 35
    """Width of Nystromformer's depth-wise convolution over the values, in tokens; None: without."""
    num_hashes: int = 2
    """Rounds of hashing of Reformer."""
    lsh_chunk_size: int = 64
    """Tokens of the chunks that Reformer attends in."""
    attention_window: int = 128
    """Tokens that Longformer's window spans, half on each side."""
    block_size: int = 64
    """Tokens of a block of BigBird."""
    num_random_blocks: int = 3
    """Random blocks that a block of BigBird attends to."""
    tie_word_embeddings: bool = True
    """The decoder of the masked-LM head shares the word embedding."""
    num_sentence_labels: int = 3
    """Classes of the sentence objective: 3 for SSO, 2 for NSP, 0 for none."""
    num_labels: int = 2
    """Classes of a sequence or token classifier; 1 makes the sequence classifier a regression."""
    pooler: PoolerConfig = PoolerConfig()
    """What a sequence classifier reads."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.type_vocab_size < 0:
            raise ConfigError(f"type_vocab_size must be at least 0, found {self.type_vocab_size}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.norm_position not in ("post", "pre"):
            raise ConfigError(f"norm_position must be post or pre, found {self.norm_position!r}")
        if self.num_segments is not None and self.num_segments < 1:
            raise ConfigError(f"num_segments must be at least 1, found {self.num_segments}")
        if not (self.use_global or self.use_segment or self.use_local):
            raise ConfigError("use_global, use_segment and use_local are all off: nothing mixes")

    def replace(self, **changes: Any) -> "PoNetConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`, with the names that published PoNet code reads."""
        fields = dataclasses.asdict(self)
        for published, ours in _PUBLISHED_NAMES.items():
            fields[published] = fields.pop(ours)
        return {"model_type": "ponet", "hidden_act": "gelu", **fields}

    @classmethod
    def from_dict(cls, content: dict[str, Any], origin: str = "config") -> "PoNetConfig":
        """Read `config.json`; settings of other libraries that do not matter here are passed over.

        Args:
            content: the parsed document.
            origin: what to name in errors.

        Raises:
            ConfigError: it describes another architecture, or a value is wrong.
        """
        for key, allowed in _FIXED.items():
            if content.get(key, allowed[0]) not in allowed:
                raise ConfigError(
                    f"{origin}: {key} is {content[key]!r}, expected one of {list(allowed)}"
                )
        names = {field.name for field in dataclasses.fields(cls)}
        fields = {_PUBLISHED_NAMES.get(key, key): value for key, value in content.items()}
        try:
            if "pooler" in fields:
                fields["pooler"] = _pooler_from(fields["pooler"])
            return cls(**{key: value for key, value in fields.items() if key in names})
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"{origin}: {error}") from error

    @classmethod
    def from_file(cls, path: Path) -> "PoNetConfig":
        """Read a `config.json`.

        Raises:
            ConfigError: the file is missing, is no JSON object, or `from_dict` refuses it.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file, expected a model folder") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not a JSON document: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: expected a JSON object, found {type(content).__name__}")
        return cls.from_dict(content, str(path))


def _pooler_from(content: Any) -> PoolerConfig:
    if not isinstance(content, dict):
        raise ConfigError(f"pooler: expected a JSON object, found {content!r}")
    return PoolerConfig(**content)
