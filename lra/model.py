"""The published Long Range Arena model: a small encoder under any token mixer, and its classifier.

The sizes are those of the code behind the Nystromformer (arXiv 2102.03902) and PoNet (arXiv
2110.02442) comparisons: the token mixer alone differs between the models of a task.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lra.protocol import ModelInputs
from lra.tasks import Task
from ponet import PoNetConfig, PoNetModel
from ponet_kernels import global_mean

_HEAD_SIZE = 128


def model_config(task: Task, mixer: str, **changes: Any) -> PoNetConfig:
    """The published architecture for a task.

    Args:
        task: decides vocabulary, length, classes and segments.
        mixer: key of `ponet.mixers.MIXERS`.
        **changes: fields to replace.

    Raises:
        ConfigError: the changes contradict each other.
    """
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
        attention_probs_dropout_prob=0.1,
        num_sentence_labels=0,
        num_labels=task.num_classes,
    )
    return published.replace(**changes)


@torch.no_grad()
def initialise_linear_layers(module: nn.Module) -> None:
    """Give linear layers PyTorch's own initial weights, as published, in place of BERT's."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.reset_parameters()


class LongRangeClassifier(nn.Module):
    """Encoder, mean over the tokens, two linear layers; two inputs share the encoder."""

    def __init__(self, config: PoNetConfig, num_inputs: int) -> None:
        super().__init__()
        self.num_inputs = num_inputs
        self.ponet = PoNetModel(config, add_pooler=False)
        initialise_linear_layers(self.ponet)
        features = config.hidden_size * (1 if num_inputs == 1 else 4)
        self.classifier = nn.Sequential(
            nn.Linear(features, _HEAD_SIZE), nn.ReLU(), nn.Linear(_HEAD_SIZE, config.num_labels)
        )

    def forward(self, inputs: ModelInputs) -> Tensor:
        """Classify a batch.

        Args:
            inputs: `num_inputs * B` sequences, all first inputs before all second ones.

        Returns:
            `[B, num_labels]` logits.
        """
        vectors = self.pool(inputs)
        if self.num_inputs == 2:
            a, b = vectors.chunk(2)
            vectors = torch.cat([a, b, a * b, a - b], dim=1)
        return self.classifier(vectors)

    def pool(self, inputs: ModelInputs) -> Tensor:
        """Scaled sum of the real tokens' states, a vector a sequence: `[num_inputs * B, C]`."""
        states = self.ponet.encode(
            inputs.input_ids, position_ids=inputs.position_ids, layout=inputs.layout
        ).last
        if inputs.counted is not None:
            states = states * inputs.counted.unsqueeze(1)
        mean = global_mean(states, inputs.layout)
        return mean[: len(inputs.scale)] * inputs.scale.unsqueeze(1)
