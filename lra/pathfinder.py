"""Pathfinder images: do the two discs lie on the ends of the same dashed path?

The law is that of the generator behind Long Range Arena (Linsley et al. 2018, arXiv 1805.08315; Kim
et al. 2020) with LRA's parameters. Two target paths set out a fixed distance apart near the middle
of the image and grow in turns, paddle by paddle; a paddle turns away from the one before by an
angle that weighs `cos^2` and keeps its margin. When one is stuck both begin anew. Short distractor
paths fill the rest as far as they find room. One disc lies on the tail of a random target, the
other on the head of the same one (label 1) or of the other one (label 0).

Three things differ. The margin holds between any two paths: the published program overlooks the
newest paddle of the other target, so that paths may cross there, which makes labels ambiguous. A
paddle is drawn among those that have room, where the published program gives up after three that
have none. And places round to the nearest, not up in one step and down in the next.

An image lies in a frame so wide that no paddle on it crosses the frame's edge. A set of pixels of
the frame is one integer: bit `row * stride + column`. A place `(y, x)` of the image is one number
too, `y * stride + x`: the shift that moves a template from the frame's first corner there.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import binary_dilation

PADDING = 1
"""Pixels at the edge that stay empty."""
TARGET_LENGTH, DISTRACTOR_LENGTH = 14, 4
"""Paddles in a path."""

# shapes are drawn this much larger, then scaled down
_ANTIALIAS = 2
# a pixel belongs to a paddle when it is covered by a quarter or at one of its ends; thin strokes
# cover none by much more than half
_COVERED = 0.25
# the first trial and as many more as published
_SEED_TRIALS = 3
_DISTRACTOR_TRIALS = 5


@dataclass(frozen=True, kw_only=True)
class PathfinderSpec:
    """Parameters of a set of images, LRA's hard one; lengths are in pixels."""

    size: int
    seed_distance: int
    """Between the tails of the targets; the first is twice as far from the edges."""
    num_distractors: int
    """Paths that are tried."""
    paddle_length: int
    paddle_thickness: float
    margins: tuple[int, ...]
    """Half the gap between two paddles of a path; each image has one of these."""
    continuity: float
    """How straight paths are: `continuity * turn` is below a right angle."""
    disc_radius: float
    target_contrast: float
    """Brightness of targets; a disc has 1."""
    distractor_contrast: float


SPECS = {
    32: PathfinderSpec(
        size=32,
        seed_distance=7,
        num_distractors=5,
        paddle_length=2,
        paddle_thickness=0.5,
        margins=(1,),
        continuity=1.0,
        disc_radius=1.5,
        target_contrast=0.75 * 2,
        distractor_contrast=2.0,
    ),
    128: PathfinderSpec(
        size=128,
        seed_distance=20,
        num_distractors=8,
        paddle_length=5,
        paddle_thickness=1.5,
        margins=(2, 3),
        continuity=1.8,
        disc_radius=3.0,
        target_contrast=0.9,
        distractor_contrast=0.9,
    ),
}
"""The published sets of the tasks Pathfinder and Path-X, by the size of their images."""


class Paddle(NamedTuple):
    """A paddle in one direction, laid out from a place; its anchor is one of its ends."""

    ink: np.ndarray
    """Coverage of the pixels, 0 to 1, with the anchor in the centre: `[side, side]`."""
    core: int
    """Set of the paddle's pixels, seen from the anchor."""
    claimed: int
    """Set of the pixels within a margin, where no other has its core, seen from the place."""
    to_anchor: int
    """Shift from the place to the anchor."""
    to_pivot: int
    """Shift from the anchor to the pivot behind the paddle, the place of the next one."""
    turns: dict[int, float]
    """What may follow: number in `Paddles.onward`, and how likely that is, not normalised."""


@dataclass(frozen=True, kw_only=True)
class Paddles:
    """Paddles of one length, thickness and margin, and the frame that they are drawn in."""

    radius: int
    """Pixels from the frame to the image, and from a paddle's anchor to the edge of its ink."""
    stride: int
    """Pixels in a row of the frame."""
    inside: int
    """Set of the places of the image."""
    border: int
    """Set of the pixels outside of the image and in its padding."""
    first: tuple[Paddle, ...]
    """A path's first paddle is anchored at its tail: 360 directions, a degree apart."""
    onward: tuple[Paddle, ...]
    """The others go on from a pivot, in the middle of the gap; the far end, also the anchor, is a
    pixel of the circle around the pivot."""


@cache
def make_paddles(spec: PathfinderSpec, margin: int) -> Paddles:
    """Draw all paddles of a set for one of its margins."""
    size, reach = spec.size, spec.paddle_length + margin
    radius = reach + math.ceil(spec.paddle_thickness) + margin
    stride = size + 2 * radius
    # one pixel for each pixel of arc
    arcs = np.arange(0, 2 * np.pi, 1 / reach)
    circle = np.rint(reach * np.stack([np.sin(arcs), np.cos(arcs)], axis=1)).astype(int)
    circle = np.unique(circle, axis=0)
    angles = np.arctan2(circle[:, 0], circle[:, 1])
    across = np.arange(-margin, margin + 1) ** 2
    near = across[:, None] + across <= margin**2

    def paddle(angle: float, stroke: float, to_anchor: int, beyond: int) -> Paddle:
        ink, core = _draw(spec, stroke, radius)
        claimed = _pixels(binary_dilation(core, near), stride)
        turns = np.abs((angles - angle + np.pi) % (2 * np.pi) - np.pi)
        weights = np.cos(np.minimum(spec.continuity * turns, np.pi / 2)) ** 2
        return Paddle(
            ink=ink,
            core=_pixels(core, stride),
            claimed=claimed << to_anchor if to_anchor >= 0 else claimed >> -to_anchor,
            to_anchor=to_anchor,
            to_pivot=round(beyond * math.sin(angle)) * stride + round(beyond * math.cos(angle)),
            # the cosine of pi / 2 is not quite 0
            turns={int(n): float(weights[n]) for n in np.flatnonzero(weights > 1e-9)},
        )

    edge = np.pad(np.zeros((size - 2 * PADDING,) * 2, bool), radius + PADDING, constant_values=True)
    return Paddles(
        radius=radius,
        stride=stride,
        inside=_pixels(np.ones((size, size), bool), stride),
        border=_pixels(edge, stride),
        first=tuple(paddle(angle, angle, 0, reach) for angle in np.deg2rad(np.arange(360))),
        # the stroke goes back towards the pivot
        onward=tuple(
            paddle(angle, angle + np.pi, int(y * stride + x), margin)
            for angle, (y, x) in zip(angles, circle, strict=True)
        ),
    )


def _draw(spec: PathfinderSpec, angle: float, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Ink and core, a mask, of a stroke from the centre."""
    length = spec.paddle_length
    centre, reach = radius * _ANTIALIAS, length * _ANTIALIAS
    canvas = Image.new("L", (2 * centre + 1, 2 * centre + 1))
    end = (round(centre + reach * math.cos(angle)), round(centre + reach * math.sin(angle)))
    width = round(spec.paddle_thickness * _ANTIALIAS)
    ImageDraw.Draw(canvas).line([(centre, centre), end], fill=1, width=width)
    ink = _shrink(np.asarray(canvas) > 0, 2 * radius + 1)
    core = ink >= _COVERED
    core[radius, radius] = True
    core[radius + round(length * math.sin(angle)), radius + round(length * math.cos(angle))] = True
    return ink, core


def _disc(radius: float) -> np.ndarray:
    """Coverage, 0 to 1, of pixels with a disc in their centre: `[side, side]`, an odd side."""
    reach = math.ceil(radius) + 1
    across = np.arange(-reach * _ANTIALIAS, reach * _ANTIALIAS + 1) ** 2
    return _shrink(across[:, None] + across <= (radius * _ANTIALIAS) ** 2, 2 * reach + 1)


def _shrink(shape: np.ndarray, side: int) -> np.ndarray:
    picture = Image.fromarray(shape.astype(np.uint8) * 255)
    small = picture.resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small, dtype=np.float32) / 255


def _pixels(mask: np.ndarray, stride: int) -> int:
    """The set of a mask's pixels, its first corner in the frame's."""
    rows = np.zeros((len(mask), stride), bool)
    rows[:, : mask.shape[1]] = mask
    return int.from_bytes(np.packbits(rows, bitorder="little").tobytes(), "little")


def _bits(pixels: int) -> list[int]:
    """Numbers of the bits that are set, in order."""
    content = np.frombuffer(pixels.to_bytes((pixels.bit_length() + 7) // 8, "little"), np.uint8)
    return np.flatnonzero(np.unpackbits(content, bitorder="little")).tolist()


PaddlePath = list[tuple[int, Paddle]]
"""Anchor of each paddle of a path, and the paddle, from its tail on."""


def _newest(path: PaddlePath) -> int:
    """Pixels of the newest paddle, kept apart because the next one may come near it."""
    anchor, paddle = path[-1]
    return paddle.core << anchor


class Scene:
    """The paths and discs of one image."""

    def __init__(self, spec: PathfinderSpec, rng: random.Random) -> None:
        self.spec = spec
        self.paddles = make_paddles(spec, rng.choice(spec.margins))
        self._rng = rng
        self._claims = [paddle.claimed for paddle in self.paddles.onward]
        self.targets = self._grow_targets()
        tried = [self._grow_distractor() for _ in range(spec.num_distractors)]
        self.distractors = [path for path in tried if path is not None]
        tail_of, head_of = rng.randrange(2), rng.randrange(2)
        self.label = int(tail_of == head_of)
        """1 when both discs are on one path."""
        self.discs = self.targets[tail_of][0][0], self.targets[head_of][-1][0]
        """Places of the discs."""

    def _grow_targets(self) -> tuple[PaddlePath, PaddlePath]:
        """Two paths whose tails lie a distance apart."""
        while True:
            self._taken = self.paddles.border
            pair = self._begin_targets()
            if pair is None:
                continue
            turns = (pair, pair[::-1]) * (TARGET_LENGTH - 1)
            if all(self._extend(path, _newest(other)) for path, other in turns):
                self._taken |= _newest(pair[0]) | _newest(pair[1])
                return pair

    def _begin_targets(self) -> tuple[PaddlePath, PaddlePath] | None:
        rng, distance = self._rng, self.spec.seed_distance
        y, x = (rng.randrange(2 * distance, self.spec.size - 2 * distance) for _ in range(2))
        first = self._begin(y, x, 0)
        if first is None:
            return None
        for _ in range(_SEED_TRIALS):
            angle = rng.uniform(0, 2 * math.pi)
            down, right = round(distance * math.sin(angle)), round(distance * math.cos(angle))
            second = self._begin(y + down, x + right, _newest(first))
            if second is not None:
                return first, second
        return None

    def _begin(self, y: int, x: int, others: int) -> PaddlePath | None:
        """A path of one paddle in a random direction; None when it has no room."""
        tail, paddle = y * self.paddles.stride + x, self._rng.choice(self.paddles.first)
        blocked = paddle.claimed << tail & (self._taken | others)
        return None if blocked else [(tail, paddle)]

    def _extend(self, path: PaddlePath, others: int) -> bool:
        """Add a paddle where there is room beside what is taken and `others`; False if stuck."""
        (anchor, newest), claims = path[-1], self._claims
        pivot = anchor + newest.to_pivot
        around = (self._taken | others) >> pivot
        free = [number for number in newest.turns if not around & claims[number]]
        if not free:
            return False
        (number,) = self._rng.choices(free, [newest.turns[number] for number in free])
        self._taken |= newest.core << anchor
        paddle = self.paddles.onward[number]
        path.append((pivot + paddle.to_anchor, paddle))
        return True

    def _grow_distractor(self) -> PaddlePath | None:
        """A path anywhere; None when none found room."""
        before = self._taken
        for _ in range(_DISTRACTOR_TRIALS):
            path = self._begin_anywhere()
            if path and all(self._extend(path, 0) for _ in range(DISTRACTOR_LENGTH - 1)):
                self._taken |= _newest(path)
                return path
            self._taken = before
        return None

    def _begin_anywhere(self) -> PaddlePath | None:
        """A path of one paddle in a random direction, on any place where it has room."""
        paddle, blocked = self._rng.choice(self.paddles.first), 0
        for bit in _bits(paddle.claimed):
            blocked |= self._taken >> bit
        places = _bits(self.paddles.inside & ~blocked)
        return [(self._rng.choice(places), paddle)] if places else None

    def render(self) -> np.ndarray:
        """The image, its darkest pixel 0 and its brightest 255: `[size, size]`, uint8."""
        targets = self.spec.target_contrast * self.ink(self.targets)
        distractors = self.spec.distractor_contrast * self.ink(self.distractors)
        shape = _disc(self.spec.disc_radius)
        discs = self._stamped([(place, shape) for place in self.discs])
        light = np.maximum(np.maximum(targets, distractors), discs)
        low, high = light.min(), light.max()
        return ((light - low) * (255 / (high - low)) + 0.5).astype(np.uint8)

    def ink(self, paths: Sequence[PaddlePath]) -> np.ndarray:
        """Coverage of pixels by paths: `[size, size]`."""
        placed = [(anchor, paddle.ink) for path in paths for anchor, paddle in path]
        return self._stamped(placed)

    def _stamped(self, shapes: list[tuple[int, np.ndarray]]) -> np.ndarray:
        """Shapes around places: `[size, size]`."""
        radius, stride = self.paddles.radius, self.paddles.stride
        frame = np.zeros((stride, stride), np.float32)
        for place, shape in shapes:
            y, x = (at + radius - len(shape) // 2 for at in divmod(place, stride))
            window = frame[y : y + len(shape), x : x + len(shape)]
            np.maximum(window, shape, out=window)
        return frame[radius:-radius, radius:-radius]


def draw_images(
    spec: PathfinderSpec, count: int, rng: random.Random
) -> list[tuple[int, np.ndarray]]:
    """Random images: labels, a fair coin deciding on each, and `[size, size]` uint8 pixels."""
    scenes = [Scene(spec, rng) for _ in range(count)]
    return [(scene.label, scene.render()) for scene in scenes]
