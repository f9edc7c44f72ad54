"""Token mixers under one contract: `mixer(hidden [T, C], layout) -> [T, C]`.

A mixer holds every projection of its sub-layer, the last one included; dropout, the residual sum
and LayerNorm belong to the encoder layer.
"""

from torch import nn

from ponet.mixers.pooling import PoNetMixer
from ponet.mixers.pooling_eager import EagerPoNetMixer

MIXERS: dict[str, type[nn.Module]] = {
    "ponet": PoNetMixer,
    "ponet_eager": EagerPoNetMixer,
}
