"""PoNet: a long-sequence encoder that mixes tokens by pooling (arXiv 2110.02442)."""

from ponet.checkpoint import CheckpointError
from ponet.config import ConfigError, PoNetConfig, PoolerConfig
from ponet.mixers import register_mixer
from ponet.model import (
    PoNetForMaskedLM,
    PoNetForPreTraining,
    PoNetForSequenceClassification,
    PoNetForTokenClassification,
    PoNetModel,
)

__version__ = "0.2.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "PoNetConfig",
    "PoNetForMaskedLM",
    "PoNetForPreTraining",
    "PoNetForSequenceClassification",
    "PoNetForTokenClassification",
    "PoNetModel",
    "PoolerConfig",
    "__version__",
    "register_mixer",
]
