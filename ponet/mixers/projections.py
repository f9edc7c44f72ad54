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


def is_plain(module: nn.Module) -> bool:
    """Whether a projection is a plain linear layer, whose weight may be used in its place.

    Adapters, quantised layers and layers with hooks are not: their `forward` is what counts.
    """
    if type(module) is not nn.Linear:
        return False
    weight = module.weight
    return (
        (type(weight) is nn.Parameter or not is_traceable_wrapper_subclass(weight))
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
    )


def project_together(hidden: Tensor, projections: Sequence[nn.Linear]) -> Tensor:
    """Projections `[T, C]` -> `[T, E_1 + E_2 + ...]`; where all are plain, by one product."""
    if not all(map(is_plain, projections)):
        return torch.cat([projection(hidden) for projection in projections], dim=1)
    weight = torch.cat([projection.weight for projection in projections])
    return F.linear(hidden, weight, torch.cat([projection.bias for projection in projections]))


def pad_tokens(values: Tensor, length: int) -> Tensor:
    """`[..., N, C]` -> `[..., length, C]`, zeros behind; no copy where nothing is missing."""
    missing = length - values.shape[-2]
    return F.pad(values, (0, 0, 0, missing)) if missing else values
