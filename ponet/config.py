"""The architecture of an encoder."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# what a published config.json calls `separate_special_tokens`
_SEPARATE = "clsgsepg"
# what a published config.json leaves unsaid, by its model type
_UNSAID: dict[str, dict[str, Any]] = {
    "ponet": {},
    "bert": {
        "mixer": "attention",
        "num_sentence_labels": 2,
        "attention_probs_dropout_prob": 0.1,
    },
    "fnet": {
        "mixer": "fnet",
        "num_sentence_labels": 2,
        "num_attention_heads": 1,
        "embedding_projection": True,
        "hidden_act": "gelu_new",
        "vocab_size": 32000,
        "type_vocab_size": 4,
        "pad_token_id": 3,
    },
}
# published settings with one value here; anything else is an architecture we do not build
_FIXED = {
    "model_type": tuple(_UNSAID),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
}
# names of one function
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_new"}
_POSITIVE = (
    *("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"),
    *("max_position_embeddings", "num_labels"),
)


class ConfigError(ValueError):
    """A configuration that contradicts itself or describes another architecture."""


def _require_at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, found {value}")


def _require_choice(name: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be {' or '.join(choices)}, found {value!r}")


@dataclass(frozen=True, kw_only=True)
class PoolerConfig:
    """How the states of a sequence become one vector; see `ponet.poolers`."""

    name: str = "cls"
    """Key of `ponet.poolers.POOLERS`."""
    reading: Literal["literal", "sound"] = "sound"
    """sound: padding, scale and chance change nothing; literal: as the pooler's source has it."""
    num_layers: int = 3
    """Last layers that the poolers of several layers read."""
    num_heads: int = 4
    """Heads of the poolers with attention; divides the hidden size."""
    layer_choice: Literal["own", "norm"] = "own"
    """norm: for each token, of the last `num_layers` layers the one with the longest vector."""
    window: int = 2
    """Neighbouring features in a softmax of mswap; divides the hidden size."""
    num_draws: int = 1
    """Tokens that stochastic draws for a feature."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "window", "num_draws"):
            _require_at_least(1, f"pooler {name}", getattr(self, name))
        _require_choice("pooler reading", self.reading, "literal", "sound")
        _require_choice("pooler layer_choice", self.layer_choice, "own", "norm")


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """What PoNet's block pools, and how: by default as published. Other mixers read none of it."""

    use_global: bool = True
    """PoNet's global aggregation (GA)."""
    use_global_second_stage: bool = True
    """Second stage of GA, attention of the mean query over the keys; without it the mean alone."""
    use_segment: bool = True
    """Segment max-pooling (SMP)."""
    use_local: bool = True
    """Local max-pooling (LMP)."""
    segment_pooling: Literal["max", "average"] = "max"
    """What PoNet takes of a segment; see docs/pooling.md."""
    local_pooling: Literal["max", "average"] = "max"
    """What it takes of the window around a token."""
    local_window: int = 3
    """Tokens that this window spans, odd; it has fewer where its run of tokens ends."""


@dataclass(frozen=True, kw_only=True)
class PoNetConfig(BlockSettings):
    """Sizes and switches of an encoder; the defaults are the published base model of PoNet."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    """Heads of global aggregation; divides `hidden_size`."""
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.1
    """Dropout after the embedding and each sub-layer; there is none inside the mixing block."""
    intermediate_dropout_prob: float = 0.0
    """Dropout inside the feed-forward sub-layer; Long Range Arena's models have it."""
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    """Token types: sentence A and sentence B; 0: the model knows none."""
    embedding_norm: bool = True
    """LayerNorm after the sum of the embeddings; Long Range Arena's models have none."""
    embedding_projection: bool = False
    """Linear layer after that; the published FNet has it."""
    hidden_act: Literal["gelu", "gelu_new"] = "gelu"
    """GELU, exact or by a tanh, in the feed-forward sub-layer and the masked-LM head."""
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0
    cls_token_id: int = 101
    sep_token_id: int = 102
    mixer: str = "ponet"
    """Token mixer, a key of `ponet.mixers.MIXERS`."""
    norm_position: Literal["post", "pre"] = "post"
    """LayerNorm after each residual sum (text) or before each sub-layer (Long Range Arena)."""
    separate_special_tokens: bool = True
    """[CLS] and [SEP] receive global aggregation only and are seen by no window or segment."""
    num_segments: int | None = None
    """Cut rows into this many equal chunks when no segments are given; None: at special tokens."""
    attention_probs_dropout_prob: float = 0.0
    """Dropout on the attention probabilities of the baselines; PoNet has none inside the block."""
    linformer_size: int = 256
    """Rows that Linformer projects the keys and values of a sequence to."""
    num_random_features: int = 256
    """Random features per head of Performer."""
    num_landmarks: int = 64
    """Landmarks per head of Nystromformer."""
    landmark_conv_size: int | None = 35
    """Tokens that Nystromformer's depth-wise convolution over the values spans; None: without."""
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

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            _require_at_least(1, name, getattr(self, name))
        _require_at_least(0, "type_vocab_size", self.type_vocab_size)
        if self.num_segments is not None:
            _require_at_least(1, "num_segments", self.num_segments)
        _require_choice("norm_position", self.norm_position, "post", "pre")
        for name in ("segment_pooling", "local_pooling"):
            _require_choice(name, getattr(self, name), "max", "average")
        if self.local_window < 1 or self.local_window % 2 == 0:
            raise ConfigError(f"local_window must be odd and at least 1, found {self.local_window}")
        _require_choice("hidden_act", self.hidden_act, "gelu", "gelu_new")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if not (self.use_global or self.use_segment or self.use_local):
            raise ConfigError("use_global, use_segment and use_local are all off: nothing mixes")

    def replace(self, **changes: Any) -> "PoNetConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self, model_type: str = "ponet") -> dict[str, Any]:
        """The content of `config.json`, with the names that published code of that type reads."""
        fields = dataclasses.asdict(self)
        separate = fields.pop("separate_special_tokens")
        if model_type == "ponet":
            fields[_SEPARATE] = separate
        return {"model_type": model_type, **fields}

    @classmethod
    def from_file(cls, path: Path) -> "PoNetConfig":
        """Read a `config.json` of ours, PoNet, BERT or FNet; what does not matter is passed over.

        Raises:
            ConfigError: it is missing or damaged, or describes another architecture.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file, expected a model folder") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not a JSON document: {error}") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}: expected a JSON object, found {type(fields).__name__}")
        for key, allowed in _FIXED.items():
            if fields.get(key, allowed[0]) not in allowed:
                raise ConfigError(
                    f"{path}: {key} is {fields[key]!r}, expected {' or '.join(map(str, allowed))}"
                )
        # the first published PoNet calls itself BERT
        is_ponet = _SEPARATE in fields
        fields = _UNSAID["ponet" if is_ponet else fields.get("model_type", "ponet")] | fields
        if is_ponet:
            fields["separate_special_tokens"] = fields[_SEPARATE]
        if fields.get("id2label"):
            fields.setdefault("num_labels", len(fields["id2label"]))
        try:
            if "hidden_act" in fields:
                fields["hidden_act"] = _ACTIVATIONS.get(fields["hidden_act"], fields["hidden_act"])
            if "pooler" in fields:
                fields["pooler"] = PoolerConfig(**fields["pooler"])
            names = {field.name for field in dataclasses.fields(cls)}
            return cls(**{key: value for key, value in fields.items() if key in names})
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"{path}: {error}") from error
