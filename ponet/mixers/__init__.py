"""Token mixers under one contract: `mixer(hidden [T, C], layout) -> [T, C]`.

A mixer holds every projection of its sub-layer, the last one included; dropout, the residual sum
and LayerNorm belong to the encoder layer. `register_mixer` adds one from outside.
"""

from torch import nn

from ponet.config import ConfigError
from ponet.mixers.attention import CheckpointedAttention, NaiveAttention, SoftmaxAttention
from ponet.mixers.bigbird import BigBirdAttention
from ponet.mixers.fnet import FNetMixer
from ponet.mixers.fnet_linear import FNetLinearMixer
from ponet.mixers.linear_attention import LinearAttention
from ponet.mixers.linformer import LinformerAttention
from ponet.mixers.longformer import SlidingWindowAttention
from ponet.mixers.nystromformer import NystromAttention
from ponet.mixers.performer import PerformerAttention
from ponet.mixers.pooling import PoNetMixer
from ponet.mixers.published import PublishedPoNetMixer
from ponet.mixers.reformer import LSHAttention

MIXERS: dict[str, type[nn.Module]] = {
    "ponet": PoNetMixer,
    "ponet_published": PublishedPoNetMixer,
    "attention": SoftmaxAttention,
    "attention_naive": NaiveAttention,
    "attention_checkpointed": CheckpointedAttention,
    "fnet": FNetMixer,
    "fnet_linear": FNetLinearMixer,
    "linear": LinearAttention,
    "linformer": LinformerAttention,
    "nystromformer": NystromAttention,
    "performer": PerformerAttention,
    "reformer": LSHAttention,
    "longformer": SlidingWindowAttention,
    "bigbird": BigBirdAttention,
}
"""The mixers by the name that `PoNetConfig.mixer` takes."""

# names in configurations that were stored before the mixer got its present one
_FORMER_NAMES = {"ponet_eager": "ponet_published"}


def mixer_class(name: str) -> type[nn.Module]:
    """The mixer that a configuration names; `ConfigError` where there is none of that name."""
    mixer = MIXERS.get(_FORMER_NAMES.get(name, name))
    if mixer is None:
        raise ConfigError(f"mixer must be one of {sorted(MIXERS)}, found {name!r}")
    return mixer


def register_mixer(name: str, mixer: type[nn.Module]) -> None:
    """Make a mixer of your own known, before a model that names it is built.

    `PoNetConfig.mixer` and the programs' `--mixer` take its name. It is built as `mixer(config)`,
    and called as above with a `ponet.packing.BatchLayout`, which says where sequences and segments
    lie and gives rows with padding.

    Raises:
        ValueError: the name is that of another mixer.
    """
    if MIXERS.get(name, mixer) is not mixer or name in _FORMER_NAMES:
        raise ValueError(f"register_mixer: {name!r} is the name of another mixer")
    MIXERS[name] = mixer
