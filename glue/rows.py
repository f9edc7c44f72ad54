"""Examples of a task as they were read, before any tokenizer."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from glue.tasks import Task


class DataError(ValueError):
    """Data that are absent, damaged or not what a task needs, in words for whoever named them."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A split."""

    texts: tuple[list[str], ...]
    """One list of N texts, or two for pairs."""
    labels: np.ndarray | None
    """`[N]`, int64 classes or float64 numbers; None: there are none."""
    indices: list[str]
    """What a submission calls each row."""
    origin: str
    """Where they were read, for messages."""
    skipped: int = 0
    """Rows that were left out because they were incomplete."""

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, places: Sequence[int] | np.ndarray) -> "Rows":
        """Some rows, in the order given."""
        chosen = [int(place) for place in places]
        return Rows(
            texts=tuple([column[place] for place in chosen] for column in self.texts),
            labels=None if self.labels is None else self.labels[chosen],
            indices=[self.indices[place] for place in chosen],
            origin=self.origin,
        )

    def update_digest(self, digest: "hashlib._Hash") -> None:
        """Add all that decides a figure to a hash."""
        for column in self.texts:
            for text in column:
                digest.update(text.encode())
                digest.update(b"\0")
        if self.labels is not None:
            digest.update(self.labels.tobytes())


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """All rows of a task."""

    task: Task
    """Whose."""
    train: Rows
    """To learn from."""
    evaluation: Mapping[str, Rows]
    """Labelled splits to score, by name."""
    submissions: Mapping[str, Rows]
    """Splits without labels, by name of their submission file."""
    departures: tuple[str, ...]
    """Why figures cannot stand beside published ones; none: they can."""

    @cached_property
    def digest(self) -> str:
        """Hash of the rows that decide figures: 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for rows in (self.train, *self.evaluation.values()):
            rows.update_digest(digest)
        return digest.hexdigest()
