"""Predictions in the format of GLUE's test server."""

from pathlib import Path

import numpy as np

from glue.rows import Rows
from glue.tasks import Task
from ponet.checkpoint import write_text


def write_submission(path: Path, task: Task, rows: Rows, predictions: np.ndarray) -> None:
    """Write a header and a line for each row: what the row is called, and its prediction.

    Args:
        path: of the file.
        task: decides whether names of labels or numbers of classes are written, and the range
            that numbers are cut to.
        rows: predicted, N.
        predictions: `[N]`, int64 classes or float64 numbers.
    """
    lines = ["index\tprediction"]
    for index, prediction in zip(rows.indices, predictions.tolist(), strict=True):
        lines.append(f"{index}\t{_written(task, prediction)}")
    write_text(path, "\n".join(lines) + "\n")


def _written(task: Task, prediction: float) -> str:
    if task.is_regression:
        lowest, highest = task.bounds or (prediction, prediction)
        return f"{min(max(prediction, lowest), highest):.3f}"
    return task.labels[int(prediction)] if task.writes_label_names else str(int(prediction))
