"""ListOps of the length of Long Range Arena: nested operators on lists of digits.

The law is that of the published generator (Long Range Arena, arXiv 2011.04006): a node above depth
10 is an operator with probability 0.25 and a digit otherwise, the root has depth 1, an operator is
one of MIN, MAX, MED and SM (sum modulo 10) and has 2 to 10 arguments, all uniform. Trees of 500 to
2000 tokens, both excluded, are kept, where an operator, its bracket and a digit count one each.
No two of that size will ever be alike.
"""

import random
from collections.abc import Callable
from statistics import median

_MAX_DEPTH = 10
_MAX_ARGUMENTS = 10
_OPERATOR_PROBABILITY = 0.25
_MIN_LENGTH, _MAX_LENGTH = 500, 2000
_OPERATORS: tuple[tuple[str, Callable[[list[int]], int]], ...] = (
    ("[MIN", min),
    ("[MAX", max),
    # of an even number of digits the mean of the middle two, its integer part
    ("[MED", lambda digits: int(median(digits))),
    ("[SM", lambda digits: sum(digits) % 10),
)


class _Tree:
    """One random tree, drawn as it is written."""

    def __init__(self, rng: random.Random) -> None:
        """Draw a tree; raises `OverflowError` if it is too long to be kept."""
        self._random = rng.random
        self.text: list[str] = []
        self.length = 0
        self.value = self._node(1)

    def _node(self, depth: int) -> int:
        """Write a node and what is below it; returns its value."""
        draw = self._random
        if depth == _MAX_DEPTH or draw() >= _OPERATOR_PROBABILITY:
            digit = int(10 * draw())
            self.text.append(str(digit))
            self.length += 1
            return digit
        self.length += 2
        if self.length >= _MAX_LENGTH:
            raise OverflowError
        count = 2 + int((_MAX_ARGUMENTS - 1) * draw())
        operator, evaluate = _OPERATORS[int(len(_OPERATORS) * draw())]
        # the release nests in pairs: ( ( ( [MIN 4 ) 5 ) ] )
        self.text.append("( " * (count + 1) + operator)
        digits = []
        for _ in range(count):
            digits.append(self._node(depth + 1))
            self.text.append(")")
        self.text.append("] )")
        return evaluate(digits)


def draw_trees(count: int, rng: random.Random) -> list[tuple[int, str]]:
    """Random trees: labels, 0 to 9, and expressions in the form of the published files."""
    trees: list[tuple[int, str]] = []
    while len(trees) < count:
        try:
            tree = _Tree(rng)
        except OverflowError:
            continue
        if _MIN_LENGTH < tree.length < _MAX_LENGTH:
            trees.append((tree.value, " ".join(tree.text)))
    return trees
