"""Floating-point operations of a training step, by formula from the configuration."""

from ponet.run import device as measure
from ponet.config import PoNetConfig

COUNTED = ("ponet", "attention", "attention_naive", "fnet")
"""Mixers with a formula."""


def training_flops(config: PoNetConfig, tokens: int, labelled: int, seq_len: int) -> float:
    """Operations of a masked-LM training step, two per multiply-add, backward twice forward.

    Per token and layer, with C the width, F the feed-forward width and N the length: feed-forward
    2 C F in every model; the Transformer 4 C^2 for its projections and 2 N C for scores and mixing;
    PoNet as `ponet.run.device.training_flops` says; FNet nothing more, transforms are not counted.
    What fused attention computes a second time in the backward pass is not counted either.

    Args:
        config: the model.
        tokens: tokens in the step.
        labelled: masked tokens in the step.
        seq_len: tokens of a sequence.

    Raises:
        ValueError: there is no formula for the mixer.
    """
    if config.mixer not in COUNTED:
        raise ValueError(f"no formula for mixer {config.mixer!r}, expected one of {COUNTED}")
    if config.mixer == "ponet":
        return measure.training_flops(config, tokens, labelled)
    c, f = config.hidden_size, config.intermediate_size
    mixing = 0 if config.mixer == "fnet" else 4 * c * c + 2 * seq_len * c
    head = c * c + c * config.vocab_size
    layers = config.num_hidden_layers * (mixing + 2 * c * f)
    return 6.0 * (tokens * layers + labelled * head)
