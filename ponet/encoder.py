"""Embedding, encoder layer and encoder on a packed stream of tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ponet.config import ConfigError, PoNetConfig
from ponet.mixers import MIXERS
from ponet.mixers.projections import cast_for_projections
from ponet.packing import BatchLayout


class _Norm(nn.LayerNorm):
    """LayerNorm that returns the type it is given, in autocast too; statistics are in float32.

    Autocast would make float32 of a residual stream in half precision.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`[..., C]` -> `[..., C]`."""
        weight, bias, shape = self.weight, self.bias, self.normalized_shape
        if input.dtype == weight.dtype:
            return F.layer_norm(input, shape, weight, bias, self.eps)
        with torch.autocast(input.device.type, enabled=False):
            weight, bias = weight.to(input.dtype), bias.to(input.dtype)
            return F.layer_norm(input, shape, weight, bias, self.eps)


def _norm(config: PoNetConfig) -> nn.LayerNorm:
    return _Norm(config.hidden_size, eps=config.layer_norm_eps)


class Embeddings(nn.Module):
    """Word, position and token type, summed, normalised, dropped out: `[T]` -> `[T, C]`.

    Token types and LayerNorm are absent where the configuration says so.
    """

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        types = config.type_vocab_size
        self.token_type = nn.Embedding(types, config.hidden_size) if types else None
        self.norm = _norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """Embed `[T]` ids of each kind; token types that the model does not know are not read."""
        total = self.word(input_ids) + self.position(position_ids)
        if self.token_type is not None:
            total = total + self.token_type(token_type_ids)
        return self.dropout(self.norm(total))


class FeedForward(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[T, C]` -> `[T, C]`."""
        return self.down(F.gelu(self.up(hidden)))


class EncoderLayer(nn.Module):
    """Token mixer and feed-forward network, each with dropout, residual sum and LayerNorm."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        self.mixer = MIXERS[config.mixer](config)
        self.mixer_norm = _norm(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = _norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm_first = config.norm_position == "pre"

    def forward(self, hidden: Tensor, layout: BatchLayout) -> Tensor:
        """`[T, C]` -> `[T, C]`."""
        if self.norm_first:
            hidden = hidden + self.dropout(self.mixer(self.mixer_norm(hidden), layout))
            return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))
        hidden = self.mixer_norm(hidden + self.dropout(self.mixer(hidden, layout)))
        return self.feed_forward_norm(hidden + self.dropout(self.feed_forward(hidden)))


class Encoder(nn.Module):
    """The layers, and a last LayerNorm when the layers normalise first."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        if config.mixer not in MIXERS:
            raise ConfigError(f"mixer must be one of {sorted(MIXERS)}, found {config.mixer!r}")
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.final_norm = _norm(config) if config.norm_position == "pre" else nn.Identity()
        self._uses_rows = config.mixer != "ponet"
        self.recomputes = False
        """Layers keep nothing for the backward pass, which computes them again: less memory."""
        self.half_residual = False
        """Under autocast the residual stream is in half precision too: less to move."""

    def compile_layers(self) -> None:
        """Let torch.compile make one layer's code, which all share, for any lengths."""
        for layer in self.layers:
            layer.compile(dynamic=True)

    def forward(self, hidden: Tensor, layout: BatchLayout) -> list[Tensor]:
        """States after the embedding and after each layer, L + 1 tensors `[T, C]`."""
        if self._uses_rows:
            # here, where it is made once, and not in the code that compiled layers share
            _ = layout.rows
        states = [cast_for_projections(hidden) if self.half_residual else hidden]
        for layer in self.layers:
            if self.recomputes and torch.is_grad_enabled():
                state = checkpoint(layer, states[-1], layout, use_reentrant=False)
                assert isinstance(state, Tensor)
            else:
                state = layer(states[-1], layout)
            states.append(state)
        states[-1] = self.final_norm(states[-1])
        return states


@torch.no_grad()
def initialise(module: nn.Module, config: PoNetConfig) -> None:
    """BERT's initial weights: normal with `initializer_range`, biases zero, LayerNorm identity."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            part.weight.normal_(std=config.initializer_range)
        if isinstance(part, nn.Linear) and part.bias is not None:
            part.bias.zero_()
