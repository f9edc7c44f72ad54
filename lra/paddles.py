"""What a Pathfinder image is drawn with: paddles and discs, as ink and as sets of pixels.

An image lies in a frame so wide that no paddle on it crosses the frame's edge. A set of pixels of
the frame is one integer: bit `row * stride + column`. A place `(y, x)` of the image is one number
too, `y * stride + x`: the shift that moves a template from the frame's first corner there.
"""

import math
from dataclasses import dataclass
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


class Step(NamedTuple):
    """A paddle that may follow."""

    direction: int
    """Its direction."""
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
    """Height and width of the image."""
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
    steps: tuple[tuple[Step, ...], ...]
    """By direction: what may follow."""

    @property
    def stride(self) -> int:
        """Pixels in a row of the frame."""
        return self.size + 2 * self.radius

    @property
    def centre(self) -> int:
        """Bit of a template's centre."""
        return self.radius * (self.stride + 1)

    def place(self, y: int, x: int) -> int:
        """The place of a pixel."""
        return y * self.stride + x

    def pixel(self, place: int) -> tuple[int, int]:
        """Row and column of a place."""
        return divmod(place, self.stride)


def make_paddles(
    *, size: int, padding: int, length: int, thickness: float, margin: int, continuity: float
) -> Paddles:
    """Draw all paddles.

    Args:
        size: height and width of the image in pixels.
        padding: pixels along its edges that stay empty.
        length: of a paddle in pixels.
        thickness: of a paddle in pixels.
        margin: pixels around a paddle; half the gap between two of one path.
        continuity: turns weigh `cos(continuity * turn) ** 2`, and nothing from `pi / 2` on.
    """
    radius = length + math.ceil(thickness) + 2 * margin
    stride = size + 2 * radius
    circle = _circle(length + margin)
    first = np.deg2rad(np.arange(NUM_FIRST_DIRECTIONS))
    onward = np.arctan2(circle[:, 0], circle[:, 1])
    # paddles on the circle are anchored at the far end, their strokes go back towards the pivot
    strokes = np.concatenate([first, onward + np.pi])
    templates = [_template(angle, length, thickness, margin, radius, stride) for angle in strokes]
    to_anchor = [0] * len(first) + [int(y * stride + x) for y, x in circle]
    claims = [
        _moved(templates[number].claimed, to_anchor[number])
        for number in range(len(first), len(strokes))
    ]
    angles = np.concatenate([first, onward])
    beyond = [length + margin] * len(first) + [margin] * len(circle)
    return Paddles(
        size=size,
        radius=radius,
        inside=_pixels(np.ones((size, size), bool), stride),
        border=_border(size, radius, padding, stride),
        templates=tuple(templates),
        to_anchor=tuple(to_anchor),
        to_pivot=tuple(
            round(far * math.sin(angle)) * stride + round(far * math.cos(angle))
            for far, angle in zip(beyond, angles, strict=True)
        ),
        steps=tuple(_steps(angle, onward, claims, continuity) for angle in angles),
    )


def disc(radius: float) -> np.ndarray:
    """A disc in the centre of its pixels.

    Returns:
        Coverage, 0 to 1: `[side, side]`, float32, with an odd side.
    """
    reach = math.ceil(radius) + 1
    across = np.arange(-reach * _ANTIALIAS, reach * _ANTIALIAS + 1) ** 2
    return _shrink(across[:, None] + across <= (radius * _ANTIALIAS) ** 2, 2 * reach + 1)


def _circle(radius: int) -> np.ndarray:
    """Pixels `(y, x)` at a distance, one for each pixel of arc, as `[pixels, 2]`."""
    arcs = np.arange(0, 2 * np.pi, 1 / radius)
    points = np.rint(radius * np.stack([np.sin(arcs), np.cos(arcs)], axis=1)).astype(int)
    return np.unique(points, axis=0)


def _moved(pixels: int, shift: int) -> int:
    return pixels << shift if shift >= 0 else pixels >> -shift


def _steps(
    angle: float, onward: np.ndarray, claims: list[int], continuity: float
) -> tuple[Step, ...]:
    turns = np.abs((onward - angle + np.pi) % (2 * np.pi) - np.pi)
    weights = np.cos(np.minimum(continuity * turns, np.pi / 2)) ** 2
    return tuple(
        Step(NUM_FIRST_DIRECTIONS + number, float(weight), claims[number])
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


def _border(size: int, radius: int, width: int, stride: int) -> int:
    filled = np.ones((stride, stride), bool)
    edge = radius + width
    filled[edge : stride - edge, edge : stride - edge] = False
    return _pixels(filled, stride)


def _pixels(mask: np.ndarray, stride: int) -> int:
    """The set of a mask's pixels, its first corner in the frame's."""
    rows = np.zeros((len(mask), stride), bool)
    rows[:, : mask.shape[1]] = mask
    return int.from_bytes(np.packbits(rows, bitorder="little").tobytes(), "little")
