"""The mixing sub-layer with its projections, PoNet's in two forms and softmax attention's."""

from collections.abc import Callable

import torch
from layouts import Batch
from parts import Candidate, Values
from public_block import PublicSubLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ponet.config import PoNetConfig
from ponet.mixers.pooling import PoNetMixer

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

SCORE_TENSORS = 4
"""Tensors of the size of the attention scores that eager attention holds at once in training."""


def eager_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention that writes out its scores."""
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) @ v


def forced(backend: SDPBackend) -> Attend:
    """`scaled_dot_product_attention` by one backend alone."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


class AttentionSubLayer(nn.Module):
    """Multi-head softmax attention: four projections of every token."""

    def __init__(self, width: int, num_heads: int, attend: Attend) -> None:
        super().__init__()
        self.num_heads, self.attend = num_heads, attend
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.dense = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, N, C]` -> `[B, N, C]`."""
        q, k, v = (
            projection(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        return self.dense(self.attend(q, k, v).transpose(1, 2).flatten(2))


def attention_forms(batch: Batch) -> dict[str, Attend]:
    """Ways to compute attention by name; on a GPU each fast backend is forced in turn."""
    if batch.device.type == "cuda" and batch.dtype != torch.float32:
        return {
            "sdpa flash": forced(SDPBackend.FLASH_ATTENTION),
            "sdpa cudnn": forced(SDPBackend.CUDNN_ATTENTION),
            "eager attention": eager_attend,
        }
    return {"sdpa": F.scaled_dot_product_attention, "eager attention": eager_attend}


def eager_score_bytes(batch: Batch) -> int:
    """Memory that the scores of eager attention take in training."""
    scores = batch.batch_size * batch.num_heads * batch.seq_len**2
    return SCORE_TENSORS * scores * batch.dtype.itemsize


def _candidate(name: str, module: nn.Module, call: Callable, hidden: list[Tensor]) -> Candidate:
    parameters = dict(sorted(module.named_parameters()))
    sets: list[Values] = [{"h": h} for h in hidden]
    return Candidate(name, call, sets, list(parameters.values()))


def our_sublayer(batch: Batch, hidden: list[Tensor]) -> Candidate:
    """The library's mixer, freshly initialised from the global seed."""
    config = PoNetConfig(
        hidden_size=batch.width,
        num_attention_heads=batch.num_heads,
        max_position_embeddings=batch.seq_len,
    )
    module = PoNetMixer(config).to(batch.device, batch.dtype)
    return _candidate("ours", module, lambda v: module(v["h"], batch.layout), hidden)


def public_sublayer(
    batch: Batch, hidden: list[Tensor], weights: list[Tensor], dtype: torch.dtype
) -> Candidate:
    """The published form in a dtype, with the parameters of `our_sublayer`."""
    module = PublicSubLayer(batch.width, batch.num_heads).to(batch.device, dtype)
    with torch.no_grad():
        for (_, parameter), weight in zip(sorted(module.named_parameters()), weights, strict=True):
            parameter.copy_(weight)
    call = lambda v: module(batch.as_rows(v["h"]), batch.rows)  # noqa: E731
    return _candidate("public", module, call, hidden)


def attention_sublayer(name: str, attend: Attend, batch: Batch, hidden: list[Tensor]) -> Candidate:
    """Softmax attention in place of the mixing."""
    module = AttentionSubLayer(batch.width, batch.num_heads, attend)
    module = module.to(batch.device, batch.dtype)
    return _candidate(name, module, lambda v: module(batch.as_rows(v["h"])), hidden)
