"""The PoNet encoder and its heads.

All models take rows `[B, N]` with an `attention_mask`, or a packed stream `[T]` with `cu_seqlens`,
and return tensors of the same kind. Inside, everything is packed (`ponet.packing`). A stream may
come with the `layout` that `ponet.packing.layout_for` makes of it on the host: then a step on a GPU
reads nothing back from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ponet.checkpoint import PreTrainedModel
from ponet.config import ConfigError, PoNetConfig
from ponet.mixers import mixer_class
from ponet.mixers.projections import cast_for_projections, plain_parameters
from ponet.packing import (
    BatchLayout,
    TokenStream,
    layout_for,
    stream_of_layout,
    stream_of_packed,
    stream_of_rows,
)
from ponet.poolers import build_pooler, first_tokens

IGNORED_LABEL = -100
_HALF = (torch.float16, torch.bfloat16)


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
    """Mean cross-entropy of the sentence objective."""
    mlm_logits: Tensor
    """`[M, V]` at the M labelled positions in reading order; `[B, N, V]` without labels."""
    sso_logits: Tensor | None
    """`[B, num_sentence_labels]`; None for a model without that head."""
    hidden_states: tuple[Tensor, ...] | None
    """As in `EncoderOutput`."""


@dataclass(frozen=True, kw_only=True)
class MaskedLMOutput:
    """Loss and logits of the masked-LM head, as in `PreTrainingOutput`."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None


@dataclass(frozen=True, kw_only=True)
class ClassifierOutput:
    """Loss and logits of a sequence `[B, num_labels]` or token `[B, N, num_labels]` classifier."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None


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
        self.mixer = mixer_class(config.mixer)(config)
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


@dataclass(frozen=True, kw_only=True)
class EncodedStream:
    """What heads work on: packed states and the way back to rows."""

    states: list[Tensor]
    stream: TokenStream
    layout: BatchLayout

    @property
    def last(self) -> Tensor:
        """`[T, C]`."""
        return self.states[-1]

    def first_tokens(self) -> Tensor:
        """State of the first token of each sequence, zero for an empty one: `[B, C]`."""
        return first_tokens(self.last, self.layout.cu_seqlens)

    def hidden_states(self, wanted: bool) -> tuple[Tensor, ...] | None:
        """The states in the caller's layout."""
        return tuple(self.stream.unpack(s) for s in self.states) if wanted else None


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
    ) -> EncodedStream:
        """Encode to packed states, for heads; arguments as for `forward`."""
        if layout is None:
            stream = _stream(input_ids, attention_mask, cu_seqlens)
        else:
            _refuse_besides_layout(input_ids, layout, attention_mask, segment_ids, cu_seqlens)
            stream = stream_of_layout(layout)
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
        return EncodedStream(states=states, stream=stream, layout=layout)

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
            input_ids, attention_mask, token_type_ids, segment_ids, position_ids, cu_seqlens, layout
        )
        return EncoderOutput(
            last_hidden_state=encoded.stream.unpack(encoded.last),
            pooler_output=None if self.pooler is None else self.pool(encoded),
            hidden_states=encoded.hidden_states(output_hidden_states),
        )

    def pool(self, encoded: EncodedStream) -> Tensor:
        """BERT's pooler on the first tokens: `[B, C]`."""
        assert self.pooler is not None
        return torch.tanh(self.pooler(encoded.first_tokens()))

    def _check_ids(self, ids: Tensor, positions: Tensor, types: Tensor) -> None:
        # a device would answer with an assertion that names nothing; looking there costs a wait,
        # and a traced graph has no values to look at
        if ids.device.type != "cpu" or torch.compiler.is_compiling() or not len(ids):
            return
        config = self.config
        _check_range("input_ids", ids, "vocab_size", config.vocab_size)
        longest = config.max_position_embeddings
        if int(positions.max()) >= longest:
            raise ValueError(
                f"a sequence reaches position {int(positions.max())}, "
                f"max_position_embeddings is {longest}"
            )
        _check_range("position_ids", positions, "max_position_embeddings", longest)
        if config.type_vocab_size:
            _check_range("token_type_ids", types, "type_vocab_size", config.type_vocab_size)


def _check_range(name: str, ids: Tensor, limit_name: str, limit: int) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= limit:
        raise ValueError(f"{name} hold {low} to {high}, {limit_name} is {limit}")


def _refuse_besides_layout(input_ids: Tensor, layout: BatchLayout, *others: Tensor | None) -> None:
    if input_ids.shape != (layout.num_tokens,) or any(other is not None for other in others):
        raise ValueError(
            f"with layout, input_ids must be [{layout.num_tokens}] and attention_mask, segment_ids "
            f"and cu_seqlens None, found input_ids {tuple(input_ids.shape)}"
        )


def _stream(
    input_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> TokenStream:
    if cu_seqlens is None:
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be [B, N] rows, found {tuple(input_ids.shape)}")
        return stream_of_rows(input_ids, attention_mask)
    if input_ids.ndim != 1 or attention_mask is not None:
        raise ValueError(
            "with cu_seqlens, input_ids must be [T] and attention_mask None, found "
            f"input_ids {tuple(input_ids.shape)}"
        )
    return stream_of_packed(input_ids, cu_seqlens)


class MaskedLMHead(nn.Module):
    """Linear, GELU, LayerNorm, then the decoder over the vocabulary."""

    def __init__(self, config: PoNetConfig, word: nn.Embedding) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        initialise(self, config)
        if config.tie_word_embeddings:
            self.decoder.weight = word.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """`[M, C]` -> `[M, V]`."""
        return self.padded(hidden)[:, : self.decoder.out_features]

    def padded(self, hidden: Tensor) -> Tensor:
        """`[M, C]` -> `[M, V']`: V filled up as `fast_width` says, with -inf."""
        hidden = self.norm(F.gelu(self.dense(hidden)))
        missing = fast_width(self.decoder.out_features, hidden.device) - self.decoder.out_features
        parameters = plain_parameters(self.decoder)
        if not missing or parameters is None:
            return self.decoder(hidden)
        weight, bias = parameters
        weight = F.pad(weight, (0, 0, 0, missing))
        return F.linear(hidden, weight, F.pad(bias, (0, missing), value=-torch.inf))


def fast_width(width: int, device: torch.device) -> int:
    """Width to compute a product in: on a GPU rows of a multiple of 128 bytes, which is faster."""
    return -(-width // 64) * 64 if device.type == "cuda" else width


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that are not ignored; zero, and not NaN, where all are."""
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL)
    return torch.where((labels != IGNORED_LABEL).any(), loss, 0.0)


def _masked_lm(
    head: MaskedLMHead,
    encoded: EncodedStream,
    labels: Tensor | None,
    label_positions: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Logits and loss; logits of the whole vocabulary only where there is a label."""
    if labels is None:
        if label_positions is not None:
            raise ValueError("label_positions given without labels")
        return encoded.stream.unpack(head(encoded.last)), None
    if label_positions is None:
        packed = encoded.stream.pack(labels)
        label_positions = (packed != IGNORED_LABEL).nonzero().squeeze(1)
        labels = packed.index_select(0, label_positions)
    elif labels.shape != label_positions.shape:
        raise ValueError(
            f"labels {tuple(labels.shape)} and label_positions {tuple(label_positions.shape)} "
            "must be as long as each other"
        )
    logits = head.padded(encoded.last.index_select(0, label_positions))
    precise = logits.float() if logits.dtype in _HALF else logits
    total = F.cross_entropy(precise, labels, reduction="sum")
    # an unlucky batch without a masked token must not turn the loss into NaN
    return logits[:, : head.decoder.out_features], total / max(labels.shape[0], 1)


class PoNetForPreTraining(PreTrainedModel):
    """Masked-LM head, and a classifier of sentence structure on the pooled first token."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config)
        has_sentences = config.num_sentence_labels > 0
        self.ponet = PoNetModel(config, add_pooler=has_sentences)
        self.mlm_head = MaskedLMHead(config, self.ponet.embeddings.word)
        self.sso_head = (
            nn.Linear(config.hidden_size, config.num_sentence_labels) if has_sentences else None
        )
        if self.sso_head is not None:
            initialise(self.sso_head, config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        sso_labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        layout: BatchLayout | None = None,
        label_positions: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> PreTrainingOutput:
        """MLM + SSO; arguments as for `PoNetModel.forward`, and:

        Args:
            labels: like `input_ids`, the original token at masked positions, -100 elsewhere.
            sso_labels: `[B]`, 0 order kept, 1 parts swapped, 2 second part replaced (SSO), or
                0 following, 1 random (NSP).
            label_positions: `[M]`, int64, masked places of a packed stream; `labels` is `[M]` then.
        """
        encoded = self.ponet.encode(
            input_ids, attention_mask, token_type_ids, segment_ids, position_ids, cu_seqlens, layout
        )
        mlm_logits, mlm_loss = _masked_lm(self.mlm_head, encoded, labels, label_positions)
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
            hidden_states=encoded.hidden_states(output_hidden_states),
        )


class PoNetForMaskedLM(PreTrainedModel):
    """Masked-LM head alone."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config)
        self.ponet = PoNetModel(config, add_pooler=False)
        self.mlm_head = MaskedLMHead(config, self.ponet.embeddings.word)

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        label_positions: Tensor | None = None,
        **inputs: Any,
    ) -> MaskedLMOutput:
        """Arguments as for `PoNetForPreTraining.forward` without `sso_labels`."""
        encoded, states = _encode(self.ponet, input_ids, inputs)
        logits, loss = _masked_lm(self.mlm_head, encoded, labels, label_positions)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=states)


def _encode(
    ponet: PoNetModel, input_ids: Tensor, inputs: Mapping[str, Any]
) -> tuple[EncodedStream, tuple[Tensor, ...] | None]:
    arguments = dict(inputs)
    wanted = arguments.pop("output_hidden_states", False)
    encoded = ponet.encode(input_ids, **arguments)
    return encoded, encoded.hidden_states(wanted)


class PoNetForSequenceClassification(PreTrainedModel):
    """Dropout and a linear layer on the vector of the pooler that the configuration names.

    The pooler `cls` is the encoder's own and comes with a checkpoint; others start afresh.

    Raises:
        ConfigError: the pooler does not fit the encoder.
    """

    new_weights = ("classifier.", "pooler.")

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

    def forward(
        self, input_ids: Tensor, *, labels: Tensor | None = None, **inputs: Any
    ) -> ClassifierOutput:
        """Arguments as for `PoNetModel.forward`, and:

        Args:
            labels: `[B]`, int64 classes, or floats when `num_labels` is 1 (mean squared error).
        """
        encoded, states = _encode(self.ponet, input_ids, inputs)
        pooled = self.pooler(encoded.states, encoded.layout)
        if self.ponet.pooler is not None:
            pooled = torch.tanh(self.ponet.pooler(pooled))
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None and self.config.num_labels == 1:
            loss = F.mse_loss(logits.squeeze(1), labels.to(logits.dtype))
        elif labels is not None:
            loss = _cross_entropy(logits, labels)
        return ClassifierOutput(loss=loss, logits=logits, hidden_states=states)


class PoNetForTokenClassification(PreTrainedModel):
    """Dropout and a linear layer on every token."""

    new_weights = ("classifier.",)

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__(config)
        self.ponet = PoNetModel(config, add_pooler=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        initialise(self.classifier, config)

    def forward(
        self, input_ids: Tensor, *, labels: Tensor | None = None, **inputs: Any
    ) -> ClassifierOutput:
        """Arguments as for `PoNetModel.forward`, and:

        Args:
            labels: like `input_ids`, int64 classes, -100 where there is none.
        """
        encoded, states = _encode(self.ponet, input_ids, inputs)
        logits = self.classifier(self.dropout(encoded.last))
        loss = None
        if labels is not None:
            loss = _cross_entropy(logits, encoded.stream.pack(labels))
        return ClassifierOutput(
            loss=loss, logits=encoded.stream.unpack(logits), hidden_states=states
        )
