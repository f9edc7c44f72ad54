"""Token mixers under one contract: `mixer(hidden [T, C], layout) -> [T, C]`.

A mixer holds every projection of its sub-layer, the last one included; dropout, the residual sum
and LayerNorm belong to the encoder layer.
"""

from torch import nn

from ponet.mixers.attention import CheckpointedAttention, NaiveAttention, SoftmaxAttention
from ponet.mixers.bigbird import BigBirdAttention
from ponet.mixers.fnet import FNetMixer
from ponet.mixers.linear_attention import LinearAttention
from ponet.mixers.linformer import LinformerAttention
from ponet.mixers.longformer import SlidingWindowAttention
from ponet.mixers.nystromformer import NystromAttention
from ponet.mixers.performer import PerformerAttention
from ponet.mixers.pooling import PoNetMixer
from ponet.mixers.pooling_eager import EagerPoNetMixer
from ponet.mixers.reformer import LSHAttention

MIXERS: dict[str, type[nn.Module]] = {
    "ponet": PoNetMixer,
    "ponet_eager": EagerPoNetMixer,
    "attention": SoftmaxAttention,
    "attention_naive": NaiveAttention,
    "attention_checkpointed": CheckpointedAttention,
    "fnet": FNetMixer,
    "linear": LinearAttention,
    "linformer": LinformerAttention,
    "nystromformer": NystromAttention,
    "performer": PerformerAttention,
    "reformer": LSHAttention,
    "longformer": SlidingWindowAttention,
    "bigbird": BigBirdAttention,
}
