"""The published Long Range Arena model, and how sequences of ids reach it, in two protocols.

The model is a small encoder under any token mixer and a classifier, of the sizes of the code behind
the Nystromformer (arXiv 2102.03902) and PoNet (arXiv 2110.02442) comparisons. The protocols differ
in what a row is and in what the mean of the classifier is taken over:

published   As in the code behind the published comparison. A row has the model's full length; id 0
            is absent, whether it is padding or a black pixel, so black pixels take no part in
            anything; the states of the other tokens are summed and divided by the full length.
clean       All that is in an example and nothing else: no padding, black pixels are tokens, and
            the mean is over the tokens. What a sequence becomes does not depend on its batch.

Tokens keep their column as position, and segments are chunks of the same number of columns, in
both. FNet and its *Linear* variant know no mask: in both protocols they mix rows of full length,
padding included, and what comes out at absent tokens is dropped, as published.

No other mixer sees an absent token. For PoNet and softmax attention this equals the published
masking. Linear attention, Performer, Linformer, Nystromformer and Reformer differ from their papers
in the published code: in the protocol published they are those of `lra.published_mixers`, which
count absent columns where that code does, in the clean one those of `ponet.mixers`. Longformer and
BigBird, which that code lacks, lay windows and blocks over what is left.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.published_mixers import PUBLISHED_FORMS, ColumnLayout, share_projection
from lra.tasks import ArenaTask, ProtocolName
from ponet import PoNetConfig, PoNetModel
from ponet.batch import HostBatch
from ponet.packing import BatchLayout, TokenStream, layout_of
from ponet_kernels import global_mean

MIXERS_WITHOUT_MASK = ("fnet", "fnet_linear")
"""They see whole rows."""

_HEAD_SIZE = 128


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """Sequences as the encoder takes them: a stream `[T]` with its layout."""

    input_ids: Tensor
    """`[T]` int64."""
    position_ids: Tensor
    """`[T]` int64, the column of each token."""
    layout: BatchLayout
    counted: Tensor | None
    """`[T]` bool, the tokens whose states count; None: all."""
    scale: Tensor
    """`[R]`, per sequence: the mean over what the encoder saw is multiplied by it."""

    def to(
        self, device: torch.device, others: Mapping[str, Tensor]
    ) -> "tuple[ModelInputs, dict[str, Tensor]]":
        """Move from the host, with others of the batch, by one copy that nothing waits for."""
        own = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        moved = HostBatch({**own, **others}, self.layout).to(device)
        moved_others = {name: moved.pop(name) for name in others}
        return replace(self, **moved), moved_others


def mixer_of(model: str, protocol: ProtocolName) -> str:
    """The mixer that a model has in a protocol, as a key of `ponet.mixers.MIXERS`."""
    return PUBLISHED_FORMS.get(model, model) if protocol == "published" else model


def keep_columns(layout: BatchLayout, mixer: str, places: Tensor, num_rows: int) -> BatchLayout:
    """The layout as a mixer takes it, by the places `[T]` of tokens among those of all rows."""
    if mixer not in PUBLISHED_FORMS.values():
        return layout
    return ColumnLayout.of(layout, places, num_rows)


def segment_columns(task: ArenaTask, num_segments: int) -> int:
    """Columns of a segment, the last of a row excepted."""
    return task.seq_len // num_segments + 1


def model_inputs(
    ids: Tensor,
    lengths: Tensor,
    *,
    protocol: ProtocolName,
    task: ArenaTask,
    mixer: str,
    num_segments: int,
) -> ModelInputs:
    """Bring sequences into the form of a protocol; on the host, sizes depend on the values.

    `ids` `[T]` int64 are all sequences end to end, `lengths` `[R]` int64 the tokens of each.
    """
    published, counted = protocol == "published", None
    divisor = task.seq_len if published else lengths
    if mixer in MIXERS_WITHOUT_MASK:
        filled = torch.arange(task.seq_len) < lengths.unsqueeze(1)
        rows = ids.new_zeros(filled.shape).masked_scatter(filled, ids)
        counted = (rows != 0 if published else filled).flatten()
        ids, lengths = rows.flatten(), torch.full_like(lengths, task.seq_len)
    sequences = torch.arange(len(lengths)).repeat_interleave(lengths, output_size=len(ids))
    columns = torch.arange(len(ids)) - (lengths.cumsum(0) - lengths).index_select(0, sequences)
    row_length = int(lengths.max())
    if published and counted is None:
        present = ids.nonzero().squeeze(1)
        ids, sequences, columns = (x.index_select(0, present) for x in (ids, sequences, columns))
        lengths, row_length = sequences.bincount(minlength=len(lengths)), task.seq_len
    stream = TokenStream(
        cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).int(),
        sequences=sequences,
        positions=columns,
        row_length=row_length,
    )
    segments = columns // segment_columns(task, num_segments)
    layout = layout_of(stream, torch.zeros_like(columns, dtype=torch.bool), segments)
    places = sequences * task.seq_len + columns
    layout = keep_columns(layout, mixer, places, len(lengths))
    return ModelInputs(
        input_ids=ids, position_ids=columns, layout=layout, counted=counted, scale=lengths / divisor
    )


def model_config(task: ArenaTask, mixer: str, **changes: Any) -> PoNetConfig:
    """The published architecture for a task under a key of `ponet.mixers.MIXERS`, with changes."""
    published = PoNetConfig(
        vocab_size=task.vocab_size,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=task.seq_len,
        type_vocab_size=0,
        embedding_norm=False,
        layer_norm_eps=1e-5,
        mixer=mixer,
        norm_position="pre",
        separate_special_tokens=False,
        num_segments=task.num_segments,
        intermediate_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        num_sentence_labels=0,
        num_labels=task.num_classes,
    )
    return published.replace(**changes)


@torch.no_grad()
def initialise_encoder(encoder: PoNetModel) -> None:
    """Give linear layers PyTorch's own initial weights, as published, in place of BERT's."""
    for part in encoder.modules():
        if isinstance(part, nn.Linear):
            part.reset_parameters()
    share_projection(encoder)


class LongRangeClassifier(nn.Module):
    """Encoder, mean over the tokens, two linear layers; two inputs share the encoder."""

    def __init__(self, config: PoNetConfig, num_inputs: int) -> None:
        super().__init__()
        self.num_inputs = num_inputs
        self.ponet = PoNetModel(config, add_pooler=False)
        initialise_encoder(self.ponet)
        features = config.hidden_size * (1 if num_inputs == 1 else 4)
        self.classifier = nn.Sequential(
            nn.Linear(features, _HEAD_SIZE), nn.ReLU(), nn.Linear(_HEAD_SIZE, config.num_labels)
        )

    def forward(self, inputs: ModelInputs) -> Tensor:
        """Logits `[B, num_labels]` of `num_inputs * B` sequences, all first inputs first."""
        vectors = self.pool(inputs)
        if self.num_inputs == 2:
            a, b = vectors.chunk(2)
            vectors = torch.cat([a, b, a * b, a - b], dim=1)
        return self.classifier(vectors)

    def pool(self, inputs: ModelInputs) -> Tensor:
        """Scaled sum of the real tokens' states per sequence: `[num_inputs * B, C]`."""
        states = self.ponet.encode(
            inputs.input_ids, position_ids=inputs.position_ids, layout=inputs.layout
        ).last
        if inputs.counted is not None:
            states = states * inputs.counted.unsqueeze(1)
        mean = global_mean(states, inputs.layout)
        return mean[: len(inputs.scale)] * inputs.scale.unsqueeze(1)
