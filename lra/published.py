"""Published test accuracies: PoNet, ICLR 2022, arXiv 2110.02442, Table 1.

The table joins figures of several papers. Those of the Nystromformer paper, PoNet and FNet's second
row come from one code base with one setting for all models, which the protocol `published` follows;
the others do not. The number of seeds is not stated anywhere.
"""

from dataclasses import dataclass

from lra.tasks import COMPARED


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """One row of the table."""

    model: str
    """Name in print."""
    source: str
    """Paper that the figures come from."""
    accuracies: tuple[float | None, ...]
    """Percent for each task of `COMPARED`; None: did not learn."""

    def accuracy(self, task: str) -> float | None:
        """In percent; None when the model did not learn the task or the table does not have it."""
        return dict(zip(COMPARED, self.accuracies, strict=True)).get(task)

    @property
    def average(self) -> float | None:
        """Over all tasks, in percent; None when one is missing."""
        known = [accuracy for accuracy in self.accuracies if accuracy is not None]
        return sum(known) / len(known) if len(known) == len(COMPARED) else None


def _row(model: str, source: str, *accuracies: float | None) -> PublishedRow:
    assert len(accuracies) == len(COMPARED)
    return PublishedRow(model=model, source=source, accuracies=accuracies)


_PONET, _NYSTROMFORMER = "PoNet paper", "Nystromformer paper"
_LRA, _FNET = "LRA paper, other setting", "FNet paper, other setting"
_TRANSFORMER = _row("Transformer", _NYSTROMFORMER, 37.10, 65.02, 79.35, 38.20, 74.16)
_OURS = _row("PoNet", _PONET, 37.80, 69.82, 80.35, 46.88, 70.39)

PUBLISHED = {
    "ponet": _OURS,
    "ponet_eager": _OURS,
    "attention": _TRANSFORMER,
    "attention_naive": _TRANSFORMER,
    "attention_checkpointed": _TRANSFORMER,
    "fnet": _row("FNet", _PONET, 37.40, 62.52, 76.94, 35.55, None),
    "linear": _row("Linear Transformer", _FNET, 33.75, 53.35, 58.95, 41.04, 83.69),
    "linformer": _row("Linformer", _NYSTROMFORMER, 37.25, 55.91, 79.37, 37.84, 67.60),
    "nystromformer": _row("Nystromformer", _NYSTROMFORMER, 37.15, 65.52, 79.56, 41.58, 70.94),
    "performer": _row("Performer", _NYSTROMFORMER, 18.80, 63.81, 78.62, 37.07, 69.87),
    "reformer": _row("Reformer", _NYSTROMFORMER, 19.05, 64.88, 78.64, 43.29, 69.36),
    "longformer": _row("Longformer", _LRA, 35.63, 62.85, 56.89, 42.22, 69.71),
    "bigbird": _row("BigBird", _LRA, 36.05, 64.02, 59.29, 40.83, 74.87),
}
"""By token mixer, in the order of reports."""
