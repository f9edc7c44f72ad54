"""Published figures on GLUE's validation sets and long texts, in percent.

PoNet        arXiv 2110.02442, Tables 3 and 4; cells as on the card of the published model, which
             calls those of long texts accuracy, the paper F1
FNet         the card of google/fnet-base. It does not say by which metric it scores CoLA, so that
             figure and the average are left out
MaxPoolBERT  arXiv 2505.15696, BERT, batch size 32, mean of three seeds; its first row has a linear
             layer on the first token's state, where `cls` here has BERT's pooler between the two
CS475        a course's report on poolers for BERT, one run each

QQP and MRPC are the mean of accuracy and F1, taken here where a source prints the two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ponet import PoolerConfig

RATIOS = {"attention": 95.7, "fnet": 104.5}
"""Average of PoNet over that of another mixer, pre-trained alike, in percent (PoNet paper)."""


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """Figures of one model."""

    name: str
    """In print."""
    mixer: str
    """Token mixer of its encoder."""
    pooler: PoolerConfig
    """The pooler that it is compared with."""
    figures: Mapping[str, float]
    """By title of a column."""
    spreads: Mapping[str, float] = field(default_factory=dict)
    """Standard deviation over seeds, where it is known."""
    average: float | None = None
    """Of the nine columns, where it is published."""
    batch_size: int | None = None
    """In a study of batch sizes, where several rows have one name."""


def _mean(accuracy: float, f1: float) -> float:
    return (accuracy + f1) / 2


_CLS = PoolerConfig()

PONET = PublishedRow(
    name="PoNet-Base (PoNet paper)",
    mixer="ponet",
    pooler=_CLS,
    figures={
        "MNLI-m": 76.99,
        "MNLI-mm": 77.21,
        "QQP": 87.55,
        "QNLI": 84.33,
        "SST-2": 89.22,
        "CoLA": 45.36,
        "STS-B": 84.57,
        "MRPC": 81.76,
        "RTE": 64.26,
        "HND": 96.2,
        "IMDb": 93.0,
        "Yelp-5": 69.13,
        "Arxiv-11": 86.11,
    },
    average=76.80,
)
"""The published PoNet."""

_FNET = PublishedRow(
    name="FNet-Base (its card)",
    mixer="fnet",
    pooler=_CLS,
    figures={
        "MNLI-m": 72,
        "MNLI-mm": 73,
        "QQP": 83,
        "QNLI": 80,
        "SST-2": 95,
        "STS-B": 79,
        "MRPC": 76,
        "RTE": 63,
    },
)

_MAXPOOL_COLUMNS = (
    "CoLA MRPC-acc MRPC-F1 QNLI MNLI-m MNLI-mm SST-2 STS-B RTE QQP-acc QQP-F1 WNLI".split()
)


def _maxpool_bert(
    pooler: PoolerConfig,
    *figures: float | None,
    columns: Sequence[str] = _MAXPOOL_COLUMNS,
    spreads: Mapping[str, float] | None = None,
) -> PublishedRow:
    cells = {c: x for c, x in zip(columns, figures, strict=True) if x is not None}
    for title in ("MRPC", "QQP"):
        if f"{title}-acc" in cells:
            cells[title] = _mean(cells.pop(f"{title}-acc"), cells.pop(f"{title}-F1"))
    depth = f" k={pooler.num_layers}" if pooler.num_layers != _CLS.num_layers else ""
    return PublishedRow(
        name=f"BERT, {pooler.name}{depth} (MaxPoolBERT)",
        mixer="attention",
        pooler=pooler,
        figures=cells,
        spreads=spreads or {},
    )


_MAXSEQ = PoolerConfig(name="maxseq_mha")
_MAXPOOL_BERT = (
    _maxpool_bert(
        _CLS,
        *(53.59, 82.43, 87.49, 90.96, 84.27, 84.57, 92.55, 88.47, 63.42, 90.65, 87.40, 49.77),
        spreads={
            "CoLA": 6.34,
            "QNLI": 0.208,
            "SST-2": 0.199,
            "STS-B": 0.32,
            "RTE": 1.78,
            "WNLI": 5.86,
        },
    ),
    _maxpool_bert(
        PoolerConfig(name="max_cls"),
        *(55.32, 83.66, 88.5, 91.15, 84.22, 84.55, 92.62, 88.97, 63.06, 90.59, 87.33, None),
    ),
    _maxpool_bert(
        PoolerConfig(name="mha"),
        *(55.88, 83.38, 89.51, 90.49, 84.37, 84.67, 92.32, 88.04, 64.98, 90.67, 87.45, None),
    ),
    _maxpool_bert(
        _MAXSEQ,
        *(55.35, 85.95, 89.78, 90.73, 83.82, 84.24, 92.74, 88.22, 66.06, 90.65, 87.59, 55.4),
        spreads={
            "CoLA": 4.22,
            "QNLI": 0.511,
            "SST-2": 0.364,
            "STS-B": 0.463,
            "RTE": 1.96,
            "WNLI": 4.31,
        },
    ),
    _maxpool_bert(
        PoolerConfig(name="meanseq_mha"),
        *(55.10, 85.62, 89.66, 90.86, 83.78, 84.2, 92.51, None, 66.67, 90.58, 87.54, 54.46),
    ),
)

# CoLA, accuracy and F1 of MRPC, RTE, by the number of layers
_DEPTHS = {
    1: (54.85, 83.58, 88.44, 63.18),
    2: (55.76, 85.21, 89.29, 65.34),
    4: (56.42, 85.29, 89.27, 65.34),
    6: (55.65, 85.13, 89.25, 65.7),
    12: (55.41, 85.21, 89.17, 65.46),
}
_BY_DEPTH = tuple(
    _maxpool_bert(
        PoolerConfig(name="maxseq_mha", num_layers=k),
        *figures,
        columns=["CoLA", "MRPC-acc", "MRPC-F1", "RTE"],
    )
    for k, figures in _DEPTHS.items()
)

# SST-2, CoLA, accuracy and F1 of MRPC, by batch size and pooler
_CS475 = {
    (16, "cls"): (93.3, 58.9, 86.7, 90.3),
    (16, "meanmax"): (93.1, 58.0, 82.8, 88.6),
    (16, "mswap"): (93.6, 59.9, 87.0, 90.9),
    (16, "stochastic"): (93.0, 56.8, 85.5, 89.8),
    (32, "cls"): (92.8, 56.5, 82.8, 87.8),
    (32, "meanmax"): (93.1, 56.7, 80.8, 86.1),
    (32, "mswap"): (93.1, 57.0, 84.6, 88.9),
    (32, "stochastic"): (93.4, 58.0, 84.0, 88.9),
    (64, "cls"): (92.3, 56.2, 82.1, 87.7),
    (64, "meanmax"): (93.0, 54.9, 76.8, 84.9),
    (64, "mswap"): (92.8, 56.3, 80.6, 86.9),
    (64, "stochastic"): (91.6, 56.0, 82.0, 87.7),
}
_BY_BATCH_SIZE = tuple(
    PublishedRow(
        name=f"BERT, {pooler} (CS475)",
        mixer="attention",
        pooler=PoolerConfig(name=pooler),
        batch_size=size,
        figures={"SST-2": sst2, "CoLA": cola, "MRPC": _mean(accuracy, f1)},
    )
    for (size, pooler), (sst2, cola, accuracy, f1) in _CS475.items()
)

PUBLISHED = (PONET, _FNET, *_MAXPOOL_BERT, *_BY_DEPTH, *_BY_BATCH_SIZE)
"""All rows, in the order of reports."""
