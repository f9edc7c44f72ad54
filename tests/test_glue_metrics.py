"""Metrics against their definitions, with ties, constant predictions, one class."""

import math

import numpy as np
import pytest

from glue.metrics import constant_prediction, mean_of, score

pytestmark = pytest.mark.filterwarnings("error")


def classes(text: str) -> np.ndarray:
    return np.array([*map(int, text)])


@pytest.mark.parametrize(
    ("said", "true", "accuracy", "f1", "matthews"),
    [
        # 3 true positives, 1 false one, 1 missed, 1 true negative
        ("111010", "111100", 4 / 6, 2 * 3 / (2 * 3 + 1 + 1), (3 * 1 - 1 * 1) / math.sqrt(64)),
        ("1100", "1100", 1.0, 1.0, 1.0),
        # always the commoner class: F1 is defined, the correlation is not
        ("1111", "1110", 3 / 4, 6 / 7, None),
        ("0000", "1110", 1 / 4, 0.0, None),
        # one class only
        ("0000", "0000", 1.0, None, None),
        ("0100", "0000", 3 / 4, 0.0, None),
        ("1", "1", 1.0, 1.0, None),
    ],
)
def test_classes(said, true, accuracy, f1, matthews):
    found = score(["accuracy", "f1", "matthews"], classes(said), classes(true))
    expected = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
    for name, value in expected.items():
        assert found[name] is None if value is None else found[name] == pytest.approx(value), name


def test_numbers_with_ties_and_constant_ones():
    said, true = np.array([1.0, 2.0, 2.0, 4.0]), np.array([0.0, 1.0, 5.0, 5.0])
    found = score(["pearson", "spearman"], said, true)
    x, y = said - 2.25, true - 2.75
    assert found["pearson"] == pytest.approx(x @ y / math.sqrt((x @ x) * (y @ y)))
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3.5, 3.5; both have the mean 2.5
    x, y = np.array([1, 2.5, 2.5, 4]) - 2.5, np.array([1, 2, 3.5, 3.5]) - 2.5
    assert found["spearman"] == pytest.approx(x @ y / math.sqrt((x @ x) * (y @ y)))
    # constant numbers have no correlation
    for numbers in ((np.full(4, 2.5), true), (said, np.full(4, 2.5))):
        assert score(["pearson", "spearman"], *numbers) == {"pearson": None, "spearman": None}


def test_means_and_constant_predictions():
    assert mean_of({"accuracy": 0.8, "f1": 0.9}, ("accuracy", "f1")) == pytest.approx(0.85)
    assert mean_of({"accuracy": 0.8, "f1": None}, ("accuracy", "f1")) is None
    assert mean_of({"accuracy": 0.8}, ("accuracy", "f1")) is None
    assert constant_prediction(classes("01112"), 3).tolist() == [1, 1, 1]
    assert constant_prediction(classes("0110"), 1).tolist() == [0]
    assert constant_prediction(np.array([1.0, 2.0, 4.5]), 2).tolist() == [2.5, 2.5]
