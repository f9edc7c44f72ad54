"""Scores of predictions, by scikit-learn and SciPy; an undefined one is None, never a number."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of right classes."""
    return float(accuracy_score(labels, predictions))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float | None:
    """F1 of class 1; undefined where it is neither predicted nor true of any example."""
    if not (predictions == 1).any() and not (labels == 1).any():
        return None
    return float(f1_score(labels, predictions))


def _correlation(
    measure: Callable[[np.ndarray, np.ndarray], Any],
) -> Callable[[np.ndarray, np.ndarray], float | None]:
    """A measure that is undefined where the predictions or the labels are all the same."""

    def defined(predictions: np.ndarray, labels: np.ndarray) -> float | None:
        if _is_constant(predictions) or _is_constant(labels):
            return None
        return float(measure(predictions, labels))

    return defined


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float | None]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": _correlation(matthews_corrcoef),
    "pearson": _correlation(lambda *both: pearsonr(*both)[0]),
    # the mean rank among ties
    "spearman": _correlation(lambda *both: spearmanr(*both)[0]),
}
"""By name: (predictions `[N]`, labels `[N]`) -> value, classes as int64 or numbers as float64."""


def _is_constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())


def score(
    names: Sequence[str], predictions: np.ndarray, labels: np.ndarray, *, prefix: str = ""
) -> dict[str, float | None]:
    """Some metrics.

    Args:
        names: keys of `METRICS`.
        predictions: `[N]`, classes (int64) or numbers (float64), at least one.
        labels: `[N]`, likewise.
        prefix: stands before the names in the answer.

    Raises:
        ValueError: there is no example, or the two differ in length.
    """
    if not len(labels) or predictions.shape != labels.shape:
        raise ValueError(
            f"expected as many predictions as labels, at least one, found {predictions.shape} and "
            f"{labels.shape}"
        )
    return {prefix + name: METRICS[name](predictions, labels) for name in names}


def mean_of(values: dict[str, float | None], names: Sequence[str]) -> float | None:
    """Mean of some metrics, such as GLUE's of accuracy and F1; None if one is undefined or absent.

    Args:
        values: as from `score`.
        names: which.
    """
    chosen = [values.get(name) for name in names]
    defined = [value for value in chosen if value is not None]
    return sum(defined) / len(names) if len(defined) == len(names) else None


def constant_prediction(labels: np.ndarray, count: int) -> np.ndarray:
    """What a model that learned nothing but the labels says of every example.

    Args:
        labels: `[N]` of the training set: int64 classes, of which the most frequent is said (the
            lowest among equals), or float64 numbers, of which the mean is said.
        count: examples to answer for.

    Returns:
        `[count]`, of the labels' type.
    """
    if labels.dtype.kind == "f":
        return np.full(count, labels.mean())
    return np.full(count, np.bincount(labels).argmax())
