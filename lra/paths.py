"""Paths of paddles that grow over an image and keep their distance."""

import math
import random

import numpy as np

from lra.paddles import NUM_FIRST_DIRECTIONS, Paddles

# the first trial and as many more as published
_SEED_TRIALS = 3
_DISTRACTOR_TRIALS = 5


class Path:
    """A path; its newest paddle is kept apart, because the next one may come near it."""

    def __init__(self, paddles: Paddles, tail: int, direction: int) -> None:
        """Begin a path.

        Args:
            paddles: what it is made of.
            tail: place of its first end.
            direction: of its first paddle, below 360.
        """
        self._paddles = paddles
        self.placed: list[tuple[int, int]] = []
        """Anchor and direction of each paddle."""
        self.add(tail, direction)

    def add(self, anchor: int, direction: int) -> None:
        """Add a paddle."""
        self.placed.append((anchor, direction))
        self.core = self._paddles.templates[direction].core << anchor
        """Pixels of the newest paddle."""
        self.pivot = anchor + self._paddles.to_pivot[direction]
        """Place that the next paddle is laid out from."""

    @property
    def tail(self) -> int:
        """Place of the first end."""
        return self.placed[0][0]

    @property
    def head(self) -> int:
        """Place of the last end, given two or more paddles."""
        return self.placed[-1][0]


class Ground:
    """The pixels of an image, as far as paths have taken them."""

    def __init__(self, paddles: Paddles, rng: random.Random) -> None:
        """Begin with empty ground."""
        self._paddles = paddles
        self._rng = rng
        self._taken = paddles.border

    def grow_targets(self, length: int, seed_distance: int) -> tuple[Path, Path]:
        """Two paths whose tails lie a distance apart; what was on the ground is removed.

        Args:
            length: paddles in each, at least 2.
            seed_distance: between the tails; the first is twice as far from the edges.
        """
        while True:
            self._taken = self._paddles.border
            pair = self._begin_targets(seed_distance)
            if pair is not None and self._extend_both(*pair, length - 1):
                return pair

    def grow_distractor(self, length: int) -> Path | None:
        """A path of `length` paddles anywhere; None when none found room."""
        before = self._taken
        for _ in range(_DISTRACTOR_TRIALS):
            path = self._begin_anywhere()
            if path is not None and all(self._extend(path, 0) for _ in range(length - 1)):
                self._taken |= path.core
                return path
            self._taken = before
        return None

    def _begin_targets(self, seed_distance: int) -> tuple[Path, Path] | None:
        rng, size = self._rng, self._paddles.size
        y, x = (rng.randrange(2 * seed_distance, size - 2 * seed_distance) for _ in range(2))
        first = self._begin(y, x, 0)
        if first is None:
            return None
        for _ in range(_SEED_TRIALS):
            angle = rng.uniform(0, 2 * math.pi)
            down, right = seed_distance * math.sin(angle), seed_distance * math.cos(angle)
            second = self._begin(y + round(down), x + round(right), first.core)
            if second is not None:
                return first, second
        return None

    def _extend_both(self, first: Path, second: Path, count: int) -> bool:
        """Add paddles in turns; False when one of the two is stuck."""
        for _ in range(count):
            if not (self._extend(first, second.core) and self._extend(second, first.core)):
                return False
        self._taken |= first.core | second.core
        return True

    def _begin(self, y: int, x: int, others: int) -> Path | None:
        """A path of one paddle in a random direction; None when it has no room."""
        tail, direction = self._paddles.place(y, x), self._rng.randrange(NUM_FIRST_DIRECTIONS)
        if self._paddles.templates[direction].claimed << tail & (self._taken | others):
            return None
        return Path(self._paddles, tail, direction)

    def _begin_anywhere(self) -> Path | None:
        """A path of one paddle in a random direction, on any place where it has room."""
        direction = self._rng.randrange(NUM_FIRST_DIRECTIONS)
        blocked = 0
        for bit in self._paddles.templates[direction].bits:
            blocked |= self._taken >> bit
        places = _bits(self._paddles.inside & ~blocked)
        if not len(places):
            return None
        return Path(self._paddles, int(self._rng.choice(places)), direction)

    def _extend(self, path: Path, others: int) -> bool:
        """Add a paddle where there is room.

        Args:
            path: what to extend.
            others: pixels of paddles that are not on the ground yet, `path`'s aside.

        Returns:
            False when the path is stuck.
        """
        around = (self._taken | others) >> path.pivot
        following = self._paddles.steps[path.placed[-1][1]]
        steps = [step for step in following if not around & step.claimed]
        if not steps:
            return False
        (step,) = self._rng.choices(steps, [step.weight for step in steps])
        self._taken |= path.core
        path.add(path.pivot + self._paddles.to_anchor[step.direction], step.direction)
        return True


def _bits(pixels: int) -> np.ndarray:
    """Numbers of the bits that are set, in order."""
    content = np.frombuffer(pixels.to_bytes((pixels.bit_length() + 7) // 8, "little"), np.uint8)
    return np.flatnonzero(np.unpackbits(content, bitorder="little"))
