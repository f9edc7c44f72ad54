"""Scores of predictions, by scikit-learn and SciPy; an undefined one is None, never a number."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float | None:
    """F1 of class 1; undefined where it is neither predicted nor true of any example."""
    if not (predictions == 1).any() and not (labels == 1).any():
        return None
    return float(f1_score(labels, predictions))


def _correlation(
    measure: Callable[[np.ndarray, np.ndarray], Any],
) -> Callable[[np.ndarray, np.ndarray], float | None]:
    """A measure that is undefined where the predictions or the labels are all the same."""

    def defined(predictions: np.ndarray, labels: np.ndarray) -> float | None:
        if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
            return None
        return float(measure(predictions, labels))

    return defined


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float | None]] = {
    "accuracy": lambda predictions, labels: float(accuracy_score(labels, predictions)),
    "f1": _f1,
    "matthews": _correlation(matthews_corrcoef),
    "pearson": _correlation(lambda *both: pearsonr(*both)[0]),
    # the mean rank among ties
    "spearman": _correlation(lambda *both: spearmanr(*both)[0]),
}
"""By name: (predictions `[N]`, labels `[N]`) -> value, classes as int64 or numbers as float64."""


def score(
    names: Sequence[str], predictions: np.ndarray, labels: np.ndarray, *, prefix: str = ""
) -> dict[str, float | None]:
    """Metrics by name; `prefix` stands before the names in the answer."""
    return {prefix + name: METRICS[name](predictions, labels) for name in names}


def mean_of(values: dict[str, float | None], names: Sequence[str]) -> float | None:
    """Mean of metrics, such as GLUE's of accuracy and F1; None if one is undefined or absent."""
    defined = [value for name in names if (value := values.get(name)) is not None]
    return sum(defined) / len(names) if len(defined) == len(names) else None


def constant_prediction(labels: np.ndarray, count: int) -> np.ndarray:
    """What a model that learned nothing but the labels says of every one of `count` examples.

    That is the most frequent class in training, the lowest among equals, or the mean number.
    """
    if labels.dtype.kind == "f":
        return np.full(count, labels.mean())
    return np.full(count, np.bincount(labels).argmax())
