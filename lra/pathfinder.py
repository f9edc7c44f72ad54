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
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

NUM_FIRST_DIRECTIONS = 360
"""A path sets out in one of as many directions."""

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
    """Parameters of a set of images, LRA's hard one; lengths are in pixels unless stated."""

    size: int
    padding: int = 1
    """Width of the edge that stays empty."""
    seed_distance: int
    """Between the tails of the targets; the first is twice as far from the edges."""
    target_length: int = 14
    """Paddles in a target path."""
    distractor_length: int = 4
    """Paddles in a distractor path."""
    num_distractors: int
    """Distractor paths that are tried."""
    paddle_length: int
    paddle_thickness: float
    margins: tuple[int, ...]
    """Half the gap between two paddles of a path; each image has one of these."""
    continuity: float
    """How straight paths are: `continuity * turn` is below a right angle."""
    marker_radius: float
    """Radius of a disc."""
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
        marker_radius=1.5,
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
        marker_radius=3.0,
        target_contrast=0.9,
        distractor_contrast=0.9,
    ),
}
"""The published sets of the tasks Pathfinder and Path-X, by the size of their images."""


class Template(NamedTuple):
    """A paddle in one direction; its anchor, one of its ends, is in the centre."""

    ink: np.ndarray
    """Coverage of the pixels, 0 to 1: `[2 * radius + 1, 2 * radius + 1]`, float32."""
    core: int
    """Set of the paddle's pixels."""
    claimed: int
    """Set of `core` and the pixels within a margin of it, where no other paddle has its core."""
    bits: tuple[int, ...]
    """Numbers of the bits of `claimed`."""


class NextPaddle(NamedTuple):
    """A paddle that may follow."""

    direction: int
    weight: float
    """How likely the turn is, not normalised."""
    claimed: int
    """Set of the pixels it claims, seen from the pivot."""


@dataclass(frozen=True, kw_only=True)
class Paddles:
    """Paddles of one length, thickness and margin, and how one follows another.

    A path's first paddle is anchored at its tail and has one of 360 directions, a degree apart.
    Behind each paddle is a pivot, in the middle of the gap to the next one, whose far end, also its
    anchor, is a pixel of the circle around the pivot: the directions from 360 on.
    """

    size: int
    radius: int
    """Pixels from the frame to the image, and from a template's centre to its edge."""
    inside: int
    """Set of the places of the image, one bit each, for a template to be moved to."""
    border: int
    """Set of the pixels outside of the image and in its padding."""
    templates: tuple[Template, ...]
    """By direction."""
    to_anchor: tuple[int, ...]
    """By direction: the shift from the pivot to the anchor, 0 for first paddles."""
    to_pivot: tuple[int, ...]
    """By direction: the shift from the anchor to the pivot behind the paddle."""
    steps: tuple[tuple[NextPaddle, ...], ...]
    """By direction: what may follow."""

    @property
    def stride(self) -> int:
        """Pixels in a row of the frame."""
        return self.size + 2 * self.radius

    def place(self, y: int, x: int) -> int:
        """The place of a pixel."""
        return y * self.stride + x

    def pixel(self, place: int) -> tuple[int, int]:
        """Row and column of a place."""
        return divmod(place, self.stride)


@cache
def make_paddles(spec: PathfinderSpec, margin: int) -> Paddles:
    """Draw all paddles of a set for one of its margins."""
    size, length, thickness = spec.size, spec.paddle_length, spec.paddle_thickness
    radius = length + math.ceil(thickness) + 2 * margin
    stride = size + 2 * radius
    circle = _circle(length + margin)
    first = np.deg2rad(np.arange(NUM_FIRST_DIRECTIONS))
    onward = np.arctan2(circle[:, 0], circle[:, 1])
    # paddles on the circle are anchored at the far end, their strokes go back towards the pivot
    strokes = np.concatenate([first, onward + np.pi])
    border = np.ones((stride, stride), bool)
    edge = radius + spec.padding
    border[edge : stride - edge, edge : stride - edge] = False
    templates = [_template(angle, length, thickness, margin, radius, stride) for angle in strokes]
    to_anchor = [0] * len(first) + [int(y * stride + x) for y, x in circle]
    onward_paddles = zip(templates[len(first) :], to_anchor[len(first) :], strict=True)
    claims = [t.claimed << to if to >= 0 else t.claimed >> -to for t, to in onward_paddles]
    angles = np.concatenate([first, onward])
    beyond = [length + margin] * len(first) + [margin] * len(circle)
    return Paddles(
        size=size,
        radius=radius,
        inside=_pixels(np.ones((size, size), bool), stride),
        border=_pixels(border, stride),
        templates=tuple(templates),
        to_anchor=tuple(to_anchor),
        to_pivot=tuple(
            round(far * math.sin(angle)) * stride + round(far * math.cos(angle))
            for far, angle in zip(beyond, angles, strict=True)
        ),
        steps=tuple(_steps(angle, onward, claims, spec.continuity) for angle in angles),
    )


def disc(radius: float) -> np.ndarray:
    """Coverage, 0 to 1, of pixels with a disc in their centre: `[side, side]`, an odd side."""
    reach = math.ceil(radius) + 1
    across = np.arange(-reach * _ANTIALIAS, reach * _ANTIALIAS + 1) ** 2
    return _shrink(across[:, None] + across <= (radius * _ANTIALIAS) ** 2, 2 * reach + 1)


def _circle(radius: int) -> np.ndarray:
    """Pixels `(y, x)` at a distance, one for each pixel of arc, as `[pixels, 2]`."""
    arcs = np.arange(0, 2 * np.pi, 1 / radius)
    points = np.rint(radius * np.stack([np.sin(arcs), np.cos(arcs)], axis=1)).astype(int)
    return np.unique(points, axis=0)


def _steps(
    angle: float, onward: np.ndarray, claims: list[int], continuity: float
) -> tuple[NextPaddle, ...]:
    turns = np.abs((onward - angle + np.pi) % (2 * np.pi) - np.pi)
    weights = np.cos(np.minimum(continuity * turns, np.pi / 2)) ** 2
    return tuple(
        NextPaddle(NUM_FIRST_DIRECTIONS + number, float(weight), claims[number])
        for number, weight in enumerate(weights)
        # the cosine of pi / 2 is not quite 0
        if weight > 1e-9
    )


def _template(
    angle: float, length: int, thickness: float, margin: int, radius: int, stride: int
) -> Template:
    side, centre = 2 * radius + 1, radius * _ANTIALIAS
    canvas = Image.new("L", (2 * centre + 1, 2 * centre + 1))
    reach = length * _ANTIALIAS
    end = (round(centre + reach * math.cos(angle)), round(centre + reach * math.sin(angle)))
    width = round(thickness * _ANTIALIAS)
    ImageDraw.Draw(canvas).line([(centre, centre), end], fill=1, width=width)
    stroke = np.asarray(canvas) > 0
    ink = _shrink(stroke, side)
    core = ink >= _COVERED
    core[radius, radius] = True
    core[radius + round(length * math.sin(angle)), radius + round(length * math.cos(angle))] = True
    claimed = _pixels(_widen(core, margin), stride)
    return Template(
        ink=ink,
        core=_pixels(core, stride),
        claimed=claimed,
        bits=tuple(bit for bit in range(claimed.bit_length()) if claimed >> bit & 1),
    )


def _shrink(shape: np.ndarray, side: int) -> np.ndarray:
    picture = Image.fromarray(shape.astype(np.uint8) * 255)
    small = picture.resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small, dtype=np.float32) / 255


def _widen(shape: np.ndarray, radius: int) -> np.ndarray:
    """All within `radius` of the shape, which must be as far from the edges."""
    reach = range(-radius, radius + 1)
    near = [(y, x) for y in reach for x in reach if x * x + y * y <= radius * radius]
    return np.logical_or.reduce([np.roll(shape, shift, axis=(0, 1)) for shift in near])


def _pixels(mask: np.ndarray, stride: int) -> int:
    """The set of a mask's pixels, its first corner in the frame's."""
    rows = np.zeros((len(mask), stride), bool)
    rows[:, : mask.shape[1]] = mask
    return int.from_bytes(np.packbits(rows, bitorder="little").tobytes(), "little")


class PaddlePath:
    """A path; its newest paddle is kept apart, because the next one may come near it."""

    def __init__(self, paddles: Paddles, tail: int, direction: int) -> None:
        """Begin a path with its tail at a place, in a direction below 360."""
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
    def ends(self) -> tuple[int, int]:
        """Places of tail and head, given two or more paddles."""
        return self.placed[0][0], self.placed[-1][0]


class Canvas:
    """The pixels of an image, as far as paths have taken them."""

    def __init__(self, paddles: Paddles, rng: random.Random) -> None:
        """Begin with an empty canvas."""
        self._paddles = paddles
        self._rng = rng
        self._taken = paddles.border

    def grow_targets(self, length: int, seed_distance: int) -> tuple[PaddlePath, PaddlePath]:
        """Two paths of paddles whose tails lie a distance apart, on an empty canvas."""
        while True:
            self._taken = self._paddles.border
            pair = self._begin_targets(seed_distance)
            if pair is not None and self._extend_both(*pair, length - 1):
                return pair

    def grow_distractor(self, length: int) -> PaddlePath | None:
        """A path of `length` paddles anywhere; None when none found room."""
        before = self._taken
        for _ in range(_DISTRACTOR_TRIALS):
            path = self._begin_anywhere()
            if path is not None and all(self._extend(path, 0) for _ in range(length - 1)):
                self._taken |= path.core
                return path
            self._taken = before
        return None

    def _begin_targets(self, seed_distance: int) -> tuple[PaddlePath, PaddlePath] | None:
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

    def _extend_both(self, first: PaddlePath, second: PaddlePath, count: int) -> bool:
        """Add paddles in turns; False when one of the two is stuck."""
        for _ in range(count):
            if not (self._extend(first, second.core) and self._extend(second, first.core)):
                return False
        self._taken |= first.core | second.core
        return True

    def _begin(self, y: int, x: int, others: int) -> PaddlePath | None:
        """A path of one paddle in a random direction; None when it has no room."""
        tail, direction = self._paddles.place(y, x), self._rng.randrange(NUM_FIRST_DIRECTIONS)
        if self._paddles.templates[direction].claimed << tail & (self._taken | others):
            return None
        return PaddlePath(self._paddles, tail, direction)

    def _begin_anywhere(self) -> PaddlePath | None:
        """A path of one paddle in a random direction, on any place where it has room."""
        direction = self._rng.randrange(NUM_FIRST_DIRECTIONS)
        blocked = 0
        for bit in self._paddles.templates[direction].bits:
            blocked |= self._taken >> bit
        places = _bits(self._paddles.inside & ~blocked)
        if not len(places):
            return None
        return PaddlePath(self._paddles, int(self._rng.choice(places)), direction)

    def _extend(self, path: PaddlePath, others: int) -> bool:
        """Add a paddle where there is room beside the canvas and `others`; False if stuck."""
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


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One image before it is rendered."""

    spec: PathfinderSpec
    paddles: Paddles
    targets: tuple[PaddlePath, PaddlePath]
    distractors: tuple[PaddlePath, ...]
    tail_of: int
    """The target, 0 or 1, with a disc on its tail."""
    head_of: int
    """The target with a disc on its head."""

    @property
    def label(self) -> int:
        """1 when both discs are on one path."""
        return int(self.tail_of == self.head_of)

    @property
    def discs(self) -> tuple[int, int]:
        """Places of the discs."""
        return self.targets[self.tail_of].ends[0], self.targets[self.head_of].ends[1]

    def render(self) -> np.ndarray:
        """The image, its darkest pixel 0 and its brightest 255: `[size, size]`, uint8."""
        targets = self.spec.target_contrast * self._ink(self.targets)
        distractors = self.spec.distractor_contrast * self._ink(self.distractors)
        light = np.maximum(np.maximum(targets, distractors), self._discs())
        low, high = light.min(), light.max()
        return ((light - low) * (255 / (high - low)) + 0.5).astype(np.uint8)

    def _ink(self, paths: tuple[PaddlePath, ...]) -> np.ndarray:
        templates = self.paddles.templates
        placed = [(anchor, templates[way].ink) for path in paths for anchor, way in path.placed]
        return self._stamped(placed, self.paddles.radius)

    def _discs(self) -> np.ndarray:
        shape = disc(self.spec.marker_radius)
        return self._stamped([(place, shape) for place in self.discs], len(shape) // 2)

    def _stamped(self, shapes: list[tuple[int, np.ndarray]], radius: int) -> np.ndarray:
        """Shapes around places, each of `2 * radius + 1` pixels: `[size, size]`."""
        side = self.spec.size + 2 * radius
        frame = np.zeros((side, side), np.float32)
        for place, shape in shapes:
            y, x = self.paddles.pixel(place)
            window = frame[y : y + len(shape), x : x + len(shape)]
            np.maximum(window, shape, out=window)
        return frame[radius:-radius, radius:-radius]


def draw_scene(spec: PathfinderSpec, rng: random.Random) -> Scene:
    """Draw the paths and discs of one image."""
    paddles = make_paddles(spec, rng.choice(spec.margins))
    canvas = Canvas(paddles, rng)
    targets = canvas.grow_targets(spec.target_length, spec.seed_distance)
    tried = [canvas.grow_distractor(spec.distractor_length) for _ in range(spec.num_distractors)]
    return Scene(
        spec=spec,
        paddles=paddles,
        targets=targets,
        distractors=tuple(path for path in tried if path is not None),
        tail_of=rng.randrange(2),
        head_of=rng.randrange(2),
    )


def draw_images(
    spec: PathfinderSpec, count: int, rng: random.Random
) -> list[tuple[int, np.ndarray]]:
    """Random images: labels, a fair coin deciding on each, and `[size, size]` uint8 pixels."""
    scenes = [draw_scene(spec, rng) for _ in range(count)]
    return [(scene.label, scene.render()) for scene in scenes]
