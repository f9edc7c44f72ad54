"""ListOps of the length of Long Range Arena: nested operators on lists of digits.

The law is that of the published generator (Long Range Arena, arXiv 2011.04006): a node above depth
10 is an operator with probability 0.25 and a digit otherwise, the root has depth 1, an operator is
one of MIN, MAX, MED and SM (sum modulo 10) and has 2 to 10 arguments, all uniform. Trees of 500 to
2000 tokens, both excluded, are kept, where an operator, its bracket and a digit count one each;
repeated trees are dropped.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from statistics import median

MAX_DEPTH = 10
"""Depth of the deepest digits; the root has depth 1."""
MAX_ARGUMENTS = 10
"""Most arguments of an operator."""
OPERATOR_PROBABILITY = 0.25
"""Of a node above the deepest level."""
MIN_LENGTH, MAX_LENGTH = 500, 2000
"""Tokens of a tree, parentheses aside, lie between these and are equal to neither."""

_OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    # of an even number of digits the mean of the middle two, its integer part
    "[MED": lambda digits: int(median(digits)),
    "[SM": lambda digits: sum(digits) % 10,
}
_DRAWN = tuple(_OPERATORS)


class _TooLongError(Exception):
    """The tree has reached the length at which it is rejected."""


class _Tree:
    """One random tree, drawn as it is written."""

    def __init__(self, rng: random.Random) -> None:
        """Draw a tree; raises `_TooLongError` if it is too long to be kept."""
        self._random = rng.random
        self.text: list[str] = []
        self.length = 0
        self.value = self._node(1)

    def _node(self, depth: int) -> int:
        """Write a node and what is below it; returns its value."""
        draw = self._random
        if depth == MAX_DEPTH or draw() >= OPERATOR_PROBABILITY:
            digit = int(10 * draw())
            self.text.append(str(digit))
            self.length += 1
            return digit
        self.length += 2
        if self.length >= MAX_LENGTH:
            raise _TooLongError
        count = 2 + int((MAX_ARGUMENTS - 1) * draw())
        operator = _DRAWN[int(len(_DRAWN) * draw())]
        # the release nests in pairs: ( ( ( [MIN 4 ) 5 ) ] )
        self.text.append("( " * (count + 1) + operator)
        digits = []
        for _ in range(count):
            digits.append(self._node(depth + 1))
            self.text.append(")")
        self.text.append("] )")
        return _OPERATORS[operator](digits)


def _draw_tree(rng: random.Random) -> tuple[int, str]:
    """Draw until a tree has an accepted length."""
    while True:
        try:
            tree = _Tree(rng)
        except _TooLongError:
            continue
        if MIN_LENGTH < tree.length < MAX_LENGTH:
            return tree.value, " ".join(tree.text)


def draw_trees(count: int, rng: random.Random) -> list[tuple[int, str]]:
    """Random trees: labels, 0 to 9, and expressions in the form of the published files."""
    return [_draw_tree(rng) for _ in range(count)]


def distinct_trees(trees: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Trees without those that were there before."""
    # digests, because the expressions of the published numbers are half a gigabyte
    seen: set[bytes] = set()
    for label, source in trees:
        digest = hashlib.blake2b(source.encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield label, source
