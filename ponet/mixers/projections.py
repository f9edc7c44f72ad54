"""Projections of the same tokens: one copy in half precision, one product."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ponet.config import PoNetConfig


class QueryKeyValueProjections(nn.Module):
    """Base of the mixers by attention: a query, a key and a value per token, and the way out."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.dense = nn.Linear(width, width)

    @property
    def dropout_now(self) -> float:
        return self.dropout_prob if self.training else 0.0

    def heads(self, rows: Tensor) -> Tensor:
        """`[B, N, C]` -> `[B, H, N, D]`."""
        return rows.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def cast_for_projections(hidden: Tensor) -> Tensor:
    """The input in autocast's type; autocast alone would make and keep a copy per projection."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype == torch.float32:
        return hidden.to(torch.get_autocast_dtype(device))
    return hidden


def plain_parameters(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a plain linear layer, which may be used in place of its `forward`.

    None for adapters, quantised layers and layers with hooks: their `forward` is what counts.
    """
    if (
        type(module) is not nn.Linear
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return None
    # not `module.weight`, which takes a microsecond of the host to find
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or bias is None:
        return None
    if type(weight) is not nn.Parameter and is_traceable_wrapper_subclass(weight):
        return None
    return weight, bias


def all_plain(modules: Sequence[nn.Module]) -> list[tuple[Tensor, Tensor]] | None:
    """Weight and bias of each; None unless all are plain linear layers."""
    found = []
    for module in modules:
        parameters = plain_parameters(module)
        if parameters is None:
            return None
        found.append(parameters)
    return found


def project_together(hidden: Tensor, projections: Sequence[nn.Module]) -> Tensor:
    """Projections `[T, C]` -> `[T, E_1 + E_2 + ...]`; where all are plain, by one product."""
    parameters = all_plain(projections)
    if parameters is None:
        return torch.cat([projection(hidden) for projection in projections], dim=1)
    weights, biases = zip(*parameters, strict=True)
    return F.linear(hidden, torch.cat(weights), torch.cat(biases))


def pad_tokens(values: Tensor, length: int) -> Tensor:
    """`[..., N, C]` -> `[..., length, C]`, zeros behind; no copy where nothing is missing."""
    missing = length - values.shape[-2]
    return F.pad(values, (0, 0, 0, missing)) if missing else values
