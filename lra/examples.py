"""What readers and generators hand to the cache."""

from typing import NamedTuple

import numpy as np


class DataError(ValueError):
    """Data that are absent, damaged or not what a task needs, in words for whoever named them."""


class Example(NamedTuple):
    """One encoded example."""

    split: str
    """`train`, `dev` or `test`."""
    label: int
    """Class, from 0."""
    inputs: tuple[np.ndarray, ...]
    """As many sequences of ids as the task has inputs: `[tokens]`, unsigned integers."""
