"""Where segments begin: given ids, special tokens, or equal chunks -> starts of contiguous runs."""

import torch
from torch import Tensor


def _changes(ids: Tensor) -> Tensor:
    """`[T]` bool: the id differs from that of the token before; true for the first token."""
    changed = torch.ones_like(ids, dtype=torch.bool)
    changed[1:] = ids[1:] != ids[:-1]
    return changed


def starts_around(special: Tensor) -> Tensor:
    """Every special token is a segment of its own, and so is each stretch between them.

    Args:
        special: `[T]` bool, the token is [CLS] or [SEP].

    Returns:
        `[T]` bool, a segment starts at the token (sequence starts not considered).
    """
    return torch.cat([special[:1], special[1:] | special[:-1]])


def starts_of_given(segment_ids: Tensor, sequences: Tensor) -> Tensor:
    """A segment starts where the given id changes.

    Args:
        segment_ids: `[T]`, integer, ids as the caller numbers them, ascending in each sequence.
        sequences: `[T]`, integer, the sequence of each token.

    Returns:
        `[T]` bool, as for `starts_around`.

    Raises:
        ValueError: ids decrease inside a sequence, so that a segment would not be one stretch.
    """
    falls = (segment_ids[1:] < segment_ids[:-1]) & (sequences[1:] == sequences[:-1])
    # a traced graph has no values to look at
    if not torch.compiler.is_compiling() and falls.any():
        t = int(falls.nonzero()[0, 0])
        raise ValueError(
            f"segment_ids: sequence {int(sequences[t])} has id {int(segment_ids[t + 1])} after "
            f"{int(segment_ids[t])}; ids must not decrease, a segment is one stretch of tokens"
        )
    return _changes(segment_ids)


def starts_of_chunks(positions: Tensor, row_length: int, num_segments: int) -> Tensor:
    """Equal chunks of row_length // num_segments + 1 tokens, as published for Long Range Arena.

    Args:
        positions: `[T]`, integer, place of each token in its row.
        row_length: length of a row, padding included.
        num_segments: chunks asked for; the rule gives at most that many, the last one shorter.

    Returns:
        `[T]` bool, as for `starts_around`.
    """
    return _changes(positions // (row_length // num_segments + 1))
