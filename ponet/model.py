"""The PoNet encoder and its heads.

All models take rows `[B, N]` with an `attention_mask`, or a packed stream `[T]` with `cu_seqlens`,
and return tensors of the same kind. Inside, everything is packed (`ponet.packing`). A stream may
come with the `layout` that `ponet.packing.layout_for` makes of it on the host: then a step on a GPU
reads nothing back from it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ponet.checkpoint import PreTrainedModel
from ponet.config import ConfigError, PoNetConfig
from ponet.mixers import mixer_class
from ponet.mixers.projections import cast_for_projections, plain_parameters
from ponet.packing import BatchLayout, TokenStream, layout_for, stream_of
from ponet.poolers import build_pooler, tokens_at

IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class EncoderOutput:
    """States of the encoder."""

    last_hidden_state: Tensor
    """`[B, N, C]`, zero at padding, or `[T, C]` for packed input."""
    pooler_output: Tensor | None
    """`[B, C]`, tanh of a projection of the first token; None without a pooler."""
    hidden_states: tuple[Tensor, ...] | None
    """After the embedding and each layer, when asked for."""


@dataclass(frozen=True, kw_only=True)
class PreTrainingOutput:
    """Losses and logits of the pre-training heads."""

    loss: Tensor | None
    """Sum of the losses whose labels were given; None without labels."""
    mlm_loss: Tensor | None
    """Mean cross-entropy at the labelled positions; zero when none is labelled."""
    sso_loss: Tensor | None
    mlm_logits: Tensor
    """`[M, V]` at the M labelled positions in reading order; `[B, N, V]` without labels."""
    sso_logits: Tensor | None
    """`[B, num_sentence_labels]`; None for a model without that head."""
    hidden_states: tuple[Tensor, ...] | None


@dataclass(frozen=True, kw_only=True)
class HeadOutput:
    """Loss and logits of one head: as `mlm_logits`, `[B, num_labels]` or `[B, N, num_labels]`."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None


class _Norm(nn.LayerNorm):
    """LayerNorm that returns the type it is given, in autocast too; statistics are in float32.

    Autocast would make float32 of a residual stream in half precision.
    """

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == self.weight.dtype:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


def activation(config: PoNetConfig) -> nn.GELU:
    """GELU as the configuration says: exact, or 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    return nn.GELU(approximate="tanh" if config.hidden_act == "gelu_new" else "none")


class Embeddings(nn.Module):
    """Word, position and token type, summed and normalised: `[T]` ids -> `[T, C]`.

    Then a projection, where the configuration has one, and dropout.
    """

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        types = config.type_vocab_size
        self.token_type = nn.Embedding(types, config.hidden_size) if types else None
        self.norm = _Norm(config) if config.embedding_norm else nn.Identity()
        width = config.hidden_size
        self.projection = nn.Linear(width, width) if config.embedding_projection else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        total = self.word(input_ids) + self.position(position_ids)
        if self.token_type is not None:
            total = total + self.token_type(token_type_ids)
        return self.dropout(self.projection(self.norm(total)))


class FeedForward(nn.Module):
    """Linear, GELU, dropout, linear: `[T, C]` -> `[T, C]`."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = activation(config)
        self.dropout = nn.Dropout(config.intermediate_dropout_prob)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.dropout(self.activation(self.up(hidden))))


class EncoderLayer(nn.Module):
    """Token mixer and feed-forward network, each with dropout, residual sum and LayerNorm."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        self.mixer = mixer_class(config.mixer)(config)
        self.mixer_norm = _Norm(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = _Norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm_first = config.norm_position == "pre"

    def forward(self, hidden: Tensor, layout: BatchLayout) -> Tensor:
        if self.norm_first:
            hidden = hidden + self.dropout(self.mixer(self.mixer_norm(hidden), layout))
            return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))
        hidden = self.mixer_norm(hidden + self.dropout(self.mixer(hidden, layout)))
        return self.feed_forward_norm(hidden + self.dropout(self.feed_forward(hidden)))


class Encoder(nn.Module):
    """The layers, and a last LayerNorm when the layers normalise first."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.final_norm = _Norm(config) if config.norm_position == "pre" else nn.Identity()
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
                layer = partial(checkpoint, layer, use_reentrant=False)
            states.append(layer(states[-1], layout))
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


@dataclass(frozen=True, kw_only=True)
class EncodedStream:
    """What heads work on: packed states `[T, C]` of all layers, and the way back to rows."""

    states: list[Tensor]
    stream: TokenStream
    layout: BatchLayout
    hidden_states: tuple[Tensor, ...] | None
    """The states in the caller's form, when asked for."""

    @property
    def last(self) -> Tensor:
        return self.states[-1]


class PoNetModel(PreTrainedModel):
    """The encoder, with BERT's pooler unless `add_pooler` is off."""

    def __init__(self, config: PoNetConfig, *, add_pooler: bool = True) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if add_pooler else None
        initialise(self, config)

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        layout: BatchLayout | None = None,
        output_hidden_states: bool = False,
    ) -> EncodedStream:
        """Encode to packed states, for heads; arguments as for `forward`."""
        stream = stream_of(input_ids, attention_mask, segment_ids, cu_seqlens, layout)
        ids = stream.pack(input_ids)
        positions = stream.positions if position_ids is None else stream.pack(position_ids)
        if token_type_ids is not None and not self.config.type_vocab_size:
            raise ValueError("token_type_ids given to a model with type_vocab_size 0")
        types = torch.zeros_like(ids) if token_type_ids is None else stream.pack(token_type_ids)
        self._check_ids(ids, positions, types)
        if layout is None:
            given = None if segment_ids is None else stream.pack(segment_ids)
            layout = layout_for(self.config, stream, ids, given)
        states = self.encoder(self.embeddings(ids, positions, types), layout)
        shown = tuple(map(stream.unpack, states)) if output_hidden_states else None
        return EncodedStream(states=states, stream=stream, layout=layout, hidden_states=shown)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        layout: BatchLayout | None = None,
        output_hidden_states: bool = False,
    ) -> EncoderOutput:
        """Encode a batch.

        Args:
            input_ids: `[B, N]`, integer; `[T]` with `cu_seqlens` or `layout`.
            attention_mask: `[B, N]`, non-zero at real tokens; None: all are real.
            token_type_ids: like `input_ids`; None: all 0, or none where the model knows no types.
            segment_ids: like `input_ids`, not decreasing in a sequence; None: as the config says.
            position_ids: like `input_ids`; None: counted from the first real token of each row.
            cu_seqlens: `[B + 1]`, int32, offsets of packed sequences; None: rows.
            layout: of packed sequences, in place of `cu_seqlens` and `segment_ids`; it is trusted.
            output_hidden_states: return the states of all layers.

        Raises:
            ValueError: shapes, ids or positions do not fit the configuration.
        """
        encoded = self.encode(
            input_ids,
            attention_mask,
            token_type_ids,
            segment_ids,
            position_ids,
            cu_seqlens,
            layout,
            output_hidden_states,
        )
        return EncoderOutput(
            last_hidden_state=encoded.stream.unpack(encoded.last),
            pooler_output=None if self.pooler is None else self.pool(encoded),
            hidden_states=encoded.hidden_states,
        )

    def pool(self, encoded: EncodedStream) -> Tensor:
        """BERT's pooler on the first tokens: `[B, C]`."""
        assert self.pooler is not None
        return torch.tanh(self.pooler(tokens_at(encoded.last, encoded.layout.cu_seqlens, 0)))

    def _check_ids(self, ids: Tensor, positions: Tensor, types: Tensor) -> None:
        # a device would answer with an assertion that names nothing; looking there costs a wait,
        # and a traced graph has no values to look at
        if ids.device.type != "cpu" or torch.compiler.is_compiling() or not len(ids):
            return
        for name, values, limit_name in (
            ("input_ids", ids, "vocab_size"),
            ("position_ids", positions, "max_position_embeddings"),
            ("token_type_ids", types, "type_vocab_size"),
        ):
            low, high = int(values.min()), int(values.max())
            limit = getattr(self.config, limit_name)
            # a model without token types reads none
            if low < 0 or high >= max(limit, 1):
                raise ValueError(f"{name} hold {low} to {high}, {limit_name} is {limit}")


class MaskedLMHead(nn.Module):
    """Linear, GELU, LayerNorm, then the decoder over the vocabulary: `[M, C]` -> `[M, V]`."""

    def __init__(self, config: PoNetConfig, word: nn.Embedding) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = activation(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        initialise(self, config)
        if config.tie_word_embeddings:
            self.decoder.weight = word.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.padded(hidden)[:, : self.decoder.out_features]

    def padded(self, hidden: Tensor) -> Tensor:
        """`[M, C]` -> `[M, V']`: V filled up as `fast_width` says, with -inf."""
        hidden = self.norm(self.activation(self.dense(hidden)))
        missing = fast_width(self.decoder.out_features, hidden.device) - self.decoder.out_features
        parameters = plain_parameters(self.decoder)
        if not missing or parameters is None:
            return self.decoder(hidden)
        weight, bias = parameters
        weight = F.pad(weight, (0, 0, 0, missing))
        return F.linear(hidden, weight, F.pad(bias, (0, missing), value=-torch.inf))

    def loss_at(
        self, encoded: EncodedStream, labels: Tensor | None, label_positions: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits and loss; logits of the whole vocabulary only where there is a label."""
        if labels is None:
            if label_positions is not None:
                raise ValueError("label_positions given without labels")
            return encoded.stream.unpack(self(encoded.last)), None
        if label_positions is None:
            packed = encoded.stream.pack(labels)
            label_positions = (packed != IGNORED_LABEL).nonzero().squeeze(1)
            labels = packed.index_select(0, label_positions)
        elif labels.shape != label_positions.shape:
            raise ValueError(
                f"labels {tuple(labels.shape)} and label_positions {tuple(label_positions.shape)} "
                "must be as long as each other"
            )
        logits = self.padded(encoded.last.index_select(0, label_positions))
        precise = logits.float() if logits.dtype.itemsize == 2 else logits
        total = F.cross_entropy(precise, labels, reduction="sum")
        # an unlucky batch without a masked token must not turn the loss into NaN
        return logits[:, : self.decoder.out_features], total / max(labels.shape[0], 1)


def fast_width(width: int, device: torch.device) -> int:
    """Width to compute a product in: on a GPU rows of a multiple of 128 bytes, which is faster."""
    return -(-width // 64) * 64 if device.type == "cuda" else width


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that are not ignored; zero, and not NaN, where all are."""
    if labels.is_floating_point():
        raise ValueError(f"labels are {labels.dtype}, expected classes as integers")
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL)
    return torch.where((labels != IGNORED_LABEL).any(), loss, 0.0)


class PoNetForPreTraining(PreTrainedModel):
    """Masked-LM head, and a classifier of sentence structure on the pooled first token."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config)
        num_classes = config.num_sentence_labels
        self.ponet = PoNetModel(config, add_pooler=num_classes > 0)
        self.mlm_head = MaskedLMHead(config, self.ponet.embeddings.word)
        self.sso_head = nn.Linear(config.hidden_size, num_classes) if num_classes else None
        if self.sso_head is not None:
            initialise(self.sso_head, config)

    def forward(
        self,
        *inputs: Any,
        labels: Tensor | None = None,
        sso_labels: Tensor | None = None,
        label_positions: Tensor | None = None,
        **named: Any,
    ) -> PreTrainingOutput:
        """MLM + SSO; arguments as for `PoNetModel.forward`, and:

        Args:
            labels: like `input_ids`, the original token at masked positions, -100 elsewhere.
            sso_labels: `[B]`, 0 order kept, 1 parts swapped, 2 second part replaced (SSO), or
                0 following, 1 random (NSP).
            label_positions: `[M]`, int64, masked places of a packed stream; `labels` is `[M]` then.
        """
        encoded = self.ponet.encode(*inputs, **named)
        mlm_logits, mlm_loss = self.mlm_head.loss_at(encoded, labels, label_positions)
        sso_logits, sso_loss = None, None
        if self.sso_head is not None:
            sso_logits = self.sso_head(self.ponet.pool(encoded))
            if sso_labels is not None:
                sso_loss = _cross_entropy(sso_logits, sso_labels)
        losses = [loss for loss in (mlm_loss, sso_loss) if loss is not None]
        return PreTrainingOutput(
            loss=sum(losses[1:], losses[0]) if losses else None,
            mlm_loss=mlm_loss,
            sso_loss=sso_loss,
            mlm_logits=mlm_logits,
            sso_logits=sso_logits,
            hidden_states=encoded.hidden_states,
        )


class PoNetForMaskedLM(PreTrainedModel):
    """Masked-LM head alone."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config)
        self.ponet = PoNetModel(config, add_pooler=False)
        self.mlm_head = MaskedLMHead(config, self.ponet.embeddings.word)

    def forward(
        self,
        *inputs: Any,
        labels: Tensor | None = None,
        label_positions: Tensor | None = None,
        **named: Any,
    ) -> HeadOutput:
        """As for `PoNetForPreTraining.forward`, without `sso_labels`."""
        encoded = self.ponet.encode(*inputs, **named)
        logits, loss = self.mlm_head.loss_at(encoded, labels, label_positions)
        return HeadOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)


class PoNetForSequenceClassification(PreTrainedModel):
    """Dropout and a linear layer on the vector of the pooler that the configuration names.

    The pooler `cls` is the encoder's own and comes with a checkpoint; others start afresh.
    """

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config)
        is_own = config.pooler.name == "cls"
        self.ponet = PoNetModel(config, add_pooler=is_own)
        self.pooler = build_pooler(
            config.pooler, config.hidden_size, config.initializer_range, with_dense=not is_own
        )
        if self.pooler.num_layers > config.num_hidden_layers:
            raise ConfigError(
                f"pooler {config.pooler.name} reads the last {self.pooler.num_layers} layers, "
                f"num_hidden_layers is {config.num_hidden_layers}"
            )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(self.pooler.output_size, config.num_labels)
        initialise(self.classifier, config)

    def forward(self, *inputs: Any, labels: Tensor | None = None, **named: Any) -> HeadOutput:
        """As for `PoNetModel.forward`, with labels `[B]`: classes, or numbers to be regressed."""
        encoded = self.ponet.encode(*inputs, **named)
        pooled = self.pooler(encoded.states, encoded.layout)
        if self.ponet.pooler is not None:
            pooled = torch.tanh(self.ponet.pooler(pooled))
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None and self.config.num_labels == 1:
            loss = F.mse_loss(logits.squeeze(1), labels.to(logits.dtype))
        elif labels is not None:
            loss = _cross_entropy(logits, labels)
        return HeadOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)


class PoNetForTokenClassification(PreTrainedModel):
    """Dropout and a linear layer on every token."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config)
        self.ponet = PoNetModel(config, add_pooler=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        initialise(self.classifier, config)

    def forward(self, *inputs: Any, labels: Tensor | None = None, **named: Any) -> HeadOutput:
        """As for `PoNetModel.forward`, with labels like `input_ids`: classes, -100 for none."""
        encoded = self.ponet.encode(*inputs, **named)
        packed = self.classifier(self.dropout(encoded.last))
        loss = None if labels is None else _cross_entropy(packed, encoded.stream.pack(labels))
        logits = encoded.stream.unpack(packed)
        return HeadOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
