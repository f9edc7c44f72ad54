"""The models that whole-model benchmarks time, with their inputs: one training step, one inference.

    lra             text classifier of Long Range Arena in the published setting: 2 layers of width
                    64, FFN 128, 2 heads, pre-LN, dropout 0.1, mean pooling, Linear(64, 128), ReLU,
                    Linear(128, 2), AdamW; bytes as tokens, PoNet segments of 2 tokens
    base            the pre-training encoder, 12 layers of width 768, masked-LM head on 15 % of the
                    tokens, AdamW; segments of 10 to 40 tokens
    pretraining     the same with the loss of sentence order and clipping, as in `pretrain/run.py`

All models share embeddings, LayerNorm, feed-forward network, heads and optimizer; the token mixer
alone differs. Ids are random and sequences full.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ponet.config import PoNetConfig
from ponet.mixers import MIXERS
from ponet.model import IGNORED_LABEL, PoNetForPreTraining, PoNetModel

MODELS = ("lra", "base", "pretraining")
MASKED_SHARE = 0.15
"""Tokens that the masked-LM loss is taken at."""

SDPA = "attention"
"""The Transformer on PyTorch's fused attention, by the kernel that PyTorch picks."""
FORCED = {
    f"{SDPA}:flash": SDPBackend.FLASH_ATTENTION,
    f"{SDPA}:cudnn": SDPBackend.CUDNN_ATTENTION,
}
"""The same by one kernel alone: where that cannot run, nothing else does in its place."""

# ids of BERT's vocabulary below this are special or unused
_FIRST_WORD = 1000
_BYTES = 257
# rows of the published embedding
_BYTE_ROWS = 512
_MAX_GRAD_NORM = 1.0
_NUM_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one process measures."""

    model: str
    """A name of `MODELS`."""
    mixer: str
    """A name of `ponet.mixers.MIXERS` or of `FORCED`."""
    seq_len: int
    """Tokens of a sequence."""
    batch_size: int
    """Sequences of a batch."""
    device: str
    """cpu or cuda."""
    dtype: str
    """float32, or bfloat16 by autocast."""
    layers: int | None = None
    """Layers instead of the model's own number."""
    compile: bool = False
    """Run the model through `torch.compile`."""
    inference: bool = True
    """Time inference, too."""
    threads: int | None = None
    """Threads of the CPU; None: PyTorch's choice."""
    memory_limit_mib: float | None = None
    """MiB that the case may take beyond the imported libraries; None: what the machine has."""
    seed: int = 0
    """Of weights and inputs."""

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch_size * self.seq_len

    @property
    def registered_mixer(self) -> str:
        """A name of `ponet.mixers.MIXERS`."""
        return SDPA if self.mixer in FORCED else self.mixer


def num_masked(seq_len: int) -> int:
    """Masked tokens of a sequence."""
    return max(1, round(MASKED_SHARE * seq_len))


def known_mixers() -> list[str]:
    """Names of all token mixers, ours first and the Transformers last."""
    last = ("attention", "attention_checkpointed", "attention_naive")
    first = [name for name in MIXERS if name not in last]
    return first + [name for name in last if name in MIXERS]


def config_of(case: Case) -> PoNetConfig:
    """The architecture of a case."""
    if case.model == "lra":
        return PoNetConfig(
            vocab_size=_BYTE_ROWS,
            hidden_size=64,
            num_hidden_layers=case.layers or 2,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=case.seq_len,
            type_vocab_size=0,
            embedding_norm=False,
            layer_norm_eps=1e-5,
            mixer=case.registered_mixer,
            norm_position="pre",
            separate_special_tokens=False,
            # more segments than half the tokens make the published rule cut 2-token chunks
            num_segments=case.seq_len // 2 + 1,
            # as published, but SDPA's fused kernel on a CPU knows no dropout; without it the
            # baseline is at its best
            attention_probs_dropout_prob=0.0 if case.registered_mixer == SDPA else 0.1,
            num_sentence_labels=0,
        )
    return PoNetConfig(
        num_hidden_layers=case.layers or 12,
        max_position_embeddings=case.seq_len,
        mixer=case.registered_mixer,
        num_sentence_labels=3 if case.model == "pretraining" else 0,
    )


class TextClassifier(nn.Module):
    """Encoder, mean over the tokens, two linear layers, as published for Long Range Arena."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        self.ponet = PoNetModel(config, add_pooler=False)
        self.classifier = nn.Sequential(
            nn.Linear(config.hidden_size, 128), nn.ReLU(), nn.Linear(128, config.num_labels)
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[B, N]` ids -> `[B, num_labels]` logits."""
        return self.classifier(self.ponet(input_ids).last_hidden_state.mean(dim=1))


@dataclass(frozen=True)
class Workload:
    """A model with its batches, ready to run."""

    train: Callable[[int], Tensor]
    """Forward, backward and optimizer step on the batch of a number; returns the loss."""
    infer: Callable[[int], Tensor]
    """Forward without a graph on the batch of a number."""
    infer_shape: tuple[int, ...]
    """Shape of what `infer` returns."""
    input_bytes: int
    """Bytes of all batches."""
    state_bytes: int
    """Bytes of parameters, gradients and AdamW's two moments."""
    num_parameters: int
    """Parameters of the model."""


def _text_segments(case: Case, generator: torch.Generator) -> Tensor:
    """Segments of 10 to 40 tokens: `[B, N]` ids."""
    starts = torch.zeros(case.batch_size, case.seq_len, dtype=torch.long)
    for row in starts:
        places = torch.randint(10, 41, (case.seq_len // 10 + 1,), generator=generator).cumsum(0)
        row[places[places < case.seq_len]] = 1
    return starts.cumsum(1)


def _text_batch(case: Case, config: PoNetConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Rows `[CLS] A [SEP] B [SEP]` with labels at 15 % of the tokens, the same number in each."""
    shape = (case.batch_size, case.seq_len)
    ids = torch.randint(_FIRST_WORD, config.vocab_size, shape, generator=generator)
    ids[:, 0] = config.cls_token_id
    ids[:, case.seq_len // 2] = config.sep_token_id
    ids[:, -1] = config.sep_token_id
    masked = num_masked(case.seq_len)
    order = torch.rand(ids.shape, generator=generator).argsort(dim=1)
    labels = torch.where(order < masked, ids, IGNORED_LABEL)
    batch = {"input_ids": ids, "segment_ids": _text_segments(case, generator), "labels": labels}
    if config.num_sentence_labels:
        sso = torch.randint(config.num_sentence_labels, (case.batch_size,), generator=generator)
        batch["sso_labels"] = sso
    return batch


def _batches(case: Case, config: PoNetConfig) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(case.seed)
    batches = []
    for _ in range(_NUM_BATCHES):
        if case.model == "lra":
            shape = (case.batch_size, case.seq_len)
            ids = torch.randint(_BYTES, shape, generator=generator)
            labels = torch.randint(config.num_labels, (case.batch_size,), generator=generator)
            batch = {"input_ids": ids, "labels": labels}
        else:
            batch = _text_batch(case, config, generator)
        batches.append({name: values.to(case.device) for name, values in batch.items()})
    return batches


def _precision(case: Case) -> AbstractContextManager[Any]:
    if case.dtype == "float32":
        return nullcontext()
    return torch.autocast(case.device, dtype=getattr(torch, case.dtype))


def _attention(case: Case) -> AbstractContextManager[Any]:
    return sdpa_kernel(FORCED[case.mixer]) if case.mixer in FORCED else nullcontext()


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # on a CPU, too, four times as fast as the default
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def _loss(model: Callable[..., Any], case: Case, batch: dict[str, Tensor]) -> Tensor:
    if case.model == "lra":
        return F.cross_entropy(model(batch["input_ids"]).float(), batch["labels"])
    return model(**batch).loss


def _inference(model: Callable[..., Any], case: Case, batch: dict[str, Tensor]) -> Tensor:
    if case.model == "lra":
        return model(batch["input_ids"])
    inputs = {name: batch[name] for name in ("input_ids", "segment_ids")}
    return model(**inputs).last_hidden_state


def build_workload(case: Case) -> Workload:
    """Make the model and the batches of a case.

    Args:
        case: what to build; its device must be there.

    Returns:
        Steps that change the model in place; inference of `base` is the encoder without the head.
    """
    torch.manual_seed(case.seed)
    config = config_of(case)
    model: nn.Module = (
        TextClassifier(config) if case.model == "lra" else PoNetForPreTraining(config)
    )
    model.to(case.device)
    encoder = model.ponet if isinstance(model, PoNetForPreTraining) else model
    batches = _batches(case, config)
    optimizer = _optimizer(model)
    trained, run = (torch.compile(m) if case.compile else m for m in (model, encoder))

    def train(number: int) -> Tensor:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        with _precision(case), _attention(case):
            loss = _loss(trained, case, batches[number % _NUM_BATCHES])
        loss.backward()
        if case.model == "pretraining":
            nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
        optimizer.step()
        return loss.detach()

    def infer(number: int) -> Tensor:
        model.eval()
        with torch.inference_mode(), _precision(case), _attention(case):
            return _inference(run, case, batches[number % _NUM_BATCHES])

    shape = (case.batch_size, config.num_labels)
    if case.model != "lra":
        shape = (case.batch_size, case.seq_len, config.hidden_size)
    parameters = sum(p.numel() for p in model.parameters())
    return Workload(
        train=train,
        infer=infer,
        infer_shape=shape,
        input_bytes=sum(x.nbytes for batch in batches for x in batch.values()),
        state_bytes=4 * sum(p.nbytes for p in model.parameters()),
        num_parameters=parameters,
    )
