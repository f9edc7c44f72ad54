"""Pathfinder images: do the two discs lie on the ends of the same dashed path?

The law is that of the program behind Long Range Arena (Linsley et al. 2018, arXiv 1805.08315; Kim
et al. 2020) with LRA's parameters and SciPy's scaling of its day. Two target paths begin a fixed
distance apart and grow in turns; when one is stuck both begin anew. Then short distractor paths are
tried. One disc lies on the tail of a random target, the other on the head of the same one (label 1)
or of the other one (label 0). In detail:

- Places are rounded up, ends of the circle around a pivot down.
- An end weighs `cos^2` of the turn, and less the more of it is masked. Whether the whole paddle has
  room is seen after the draw; three that have none end the path.
- The newest paddles are not masked yet: targets may cross. The first target's head never is.
- Where a path may begin is looked up a pixel too far down and right, and a direction in which a
  corner of the image would see nothing fails. At 32 pixels 330 of 360 do: paths begin up and left.

Many paths grow at once, each in a frame so wide that nothing that is looked at lies outside. Frames
lie end to end: a place is one number, and so is the shift to another.
"""

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from random import Random

import numpy as np
from numpy.random import Generator, default_rng
from PIL import Image, ImageDraw
from scipy.ndimage import binary_dilation

PADDING = 1
"""Pixels at the edge that stay empty."""
TARGET_LENGTH, DISTRACTOR_LENGTH = 14, 4
"""Paddles in a path."""

# shapes are drawn this much larger, then scaled down
_ANTIALIAS = 2
# the first trial and as many more as published
_PADDLE_TRIALS, _DISTRACTOR_TRIALS = 3, 5
_DIRECTIONS = np.arange(-180, 180) * np.pi / 180
# masks are 0 to 255: two clash whose sum is this, and no path begins on this
_CLASH, _TAKEN = 459, 77
# pairs of targets that grow at once
_PAIRS = 256


@dataclass(frozen=True, kw_only=True)
class PathfinderSpec:
    """Parameters of a set of images, LRA's hard one of 32 pixels; lengths are in pixels."""

    size: int = 32
    seed_distance: int = 7
    """Between the tails of the targets; the first is twice as far from the edges."""
    num_distractors: int = 5
    """Paths that are tried."""
    paddle_length: int = 2
    paddle_thickness: float = 0.5
    margins: tuple[int, ...] = (1,)
    """Half the gap between two paddles of a path; each image has one of these."""
    continuity: float = 1.0
    """How straight paths are: `continuity * turn` is below a right angle."""
    disc_radius: float = 1.5
    target_contrast: float = 0.75 * 2
    """Brightness of targets; a disc has 1."""
    distractor_contrast: float = 2.0


SPECS = {
    32: PathfinderSpec(),
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


class Paddles:
    """All paddles of a set with one of its margins, as shifts in a frame.

    First those that go on from a pivot, to each pixel of the circle around it, then those that
    begin at a tail in 360 directions; the anchor is that pixel or the tail. A path is
    `[paddles, 3]`: numbers, anchors and the pivots ahead.
    """

    def __init__(self, spec: PathfinderSpec, margin: int) -> None:
        self.spec, length, step = spec, spec.paddle_length, spec.paddle_length + margin
        radius, wide = step + math.ceil(spec.paddle_thickness), 3 * length + 5 * margin + 2
        self.stride = stride = spec.size + 2 * wide
        """Pixels in a row of a frame."""
        image = np.pad(np.ones((spec.size,) * 2, bool), wide)
        inner = np.pad(np.ones((spec.size - 2 * PADDING,) * 2, bool), wide + PADDING)
        self.image, self.border = image.reshape(-1), (image & ~inner).reshape(-1) * np.uint8(255)
        """Whether a place is in the image, and the mask of its padding: `[frame]`."""
        reach = np.arange(-radius, radius + 1)
        self.patch = (reach[:, None] * stride + reach).reshape(-1)
        """From an anchor to all pixels that a paddle may reach."""
        self.near: np.ndarray = (np.argwhere(_ball(margin)) - margin) @ [stride, 1]
        """To the pixels within a margin."""
        ends = np.floor(_away(step, np.arange(0, 2 * np.pi, 1 / step))).astype(int)
        ends = np.unique(ends, axis=0)
        self.circle: np.ndarray = ends @ [stride, 1]
        """From a pivot to the anchors around it: `[onward]`."""
        onward, first = np.arctan2(ends[:, 0], ends[:, 1]), _DIRECTIONS
        angles = np.concatenate([onward, first])
        turns = np.abs((onward - angles[:, None] + np.pi) % (2 * np.pi) - np.pi)
        self.turns = np.cos(np.minimum(spec.continuity * turns, np.pi / 2)) ** 2
        """Weights of what may follow a paddle: `[paddles, onward]`."""
        moves = [_up(spec.size // 2, way, first) @ [stride, 1] for way in (length, -step)]
        self.inside = np.cumsum(moves, axis=0)
        """From a tail to the head and the pivot behind, which must be in the image: `[2, 360]`."""
        self.ahead = _up(spec.size // 2, length + 2 * margin, angles) @ [stride, 1]
        """From the pivot or tail behind a paddle to the pivot ahead: `[paddles]`."""
        self.ahead[len(onward) :] += self.inside[1]
        # the stroke of a paddle that goes on is drawn back towards the pivot
        strokes = [_stroke(spec, margin, radius, angle) for angle in (*(onward + np.pi), *first)]
        self.ink, self.mask = np.array(strokes).reshape(len(angles), 2, -1).swapaxes(0, 1).copy()
        """Coverage, up to 255, by paddles, and with their margin: `[paddles, patch]`, uint8."""
        self.free = []
        """For each direction, from a tail to what must not be taken; none: the direction fails."""
        corners = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)])[:, None]
        for _, mask in strokes[len(onward) :]:
            full = np.argwhere(mask[: radius + step, : radius + step] == 255) - radius + 1
            seen = (full * corners >= 0).all(-1).any(-1).all()
            self.free.append(full[: None if seen else 0] @ [stride, 1])

    def tails(self, taken: np.ndarray, direction: int) -> np.ndarray:
        """Places where a path may begin in a frame of what is taken, `[frame]`."""
        if not len(self.free[direction]):
            return self.patch[:0]
        low, high = np.flatnonzero(self.image)[[0, -1]] + [0, 1]
        blocked = ~self.image[low:high]
        for shift in self.free[direction]:
            blocked |= taken[low + shift : high + shift]
        for shift in self.inside[:, direction]:
            blocked |= ~self.image[low + shift : high + shift]
        return np.flatnonzero(~blocked) + low

    def begin(self, directions: np.ndarray, tails: np.ndarray) -> np.ndarray:
        """The first paddles of paths: `[paths, 3]`."""
        numbers = directions + len(self.circle)
        return np.stack([numbers, tails, tails + self.ahead[numbers]], axis=1)

    def extend(
        self, masks: np.ndarray, newest: np.ndarray, rng: Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw the next paddle after each of `[paths, 3]`: which paths go on, and theirs.

        Where a path goes on its newest paddle, not in `masks` until then, gets into it.
        """
        ends = newest[:, 2, None] + self.circle
        weights = self.turns[newest[:, 0]] * self.image[ends % len(self.image)]
        likely = weights > 1e-9
        weights[likely] *= 255 - masks[ends[likely][:, None] + self.near].max(-1)
        sums, drawn = weights.cumsum(1), np.full(len(newest), -1)
        waiting = np.flatnonzero(sums[:, -1] >= 255e-4)
        for _ in range(_PADDLE_TRIALS):
            points = rng.random(len(waiting)) * sums[waiting, -1]
            numbers = (sums[waiting] <= points[:, None]).sum(1)
            pixels = masks[ends[waiting, numbers, None] + self.patch].astype(np.uint16)
            fits = (pixels + self.mask[numbers]).max(-1) < _CLASH
            drawn[waiting[fits]] = numbers[fits]
            waiting = waiting[~fits]
        on = np.flatnonzero(drawn >= 0)
        self.stamp(masks, self.mask, newest[on])
        numbers, pivots = drawn[on], newest[on, 2]
        shifts = [self.circle[numbers], self.ahead[numbers]]
        return on, np.stack([numbers, *(pivots + shift for shift in shifts)], axis=1)

    def stamp(self, frames: np.ndarray, shapes: np.ndarray, paddles: np.ndarray) -> None:
        """Lay the ink or masks of paddles far from each other, `[paddles, 3]`, into frames."""
        pixels = paddles[:, 1, None] + self.patch
        frames[pixels] = np.maximum(frames[pixels], shapes[paddles[:, 0]])


make_paddles = cache(Paddles)


def _stroke(spec: PathfinderSpec, margin: int, radius: int, angle: float) -> list[np.ndarray]:
    """Ink and mask of a stroke from the centre: `[side, side]`."""
    centre = radius * _ANTIALIAS
    canvas = Image.new("L", (2 * centre + 1, 2 * centre + 1))
    y, x = centre + _up(centre, spec.paddle_length * _ANTIALIAS, np.array(angle))
    width = round(spec.paddle_thickness * _ANTIALIAS)
    ImageDraw.Draw(canvas).line([(centre, centre), (x, y)], fill=1, width=width)
    stroke = np.asarray(canvas) > 0
    mask = binary_dilation(stroke, _ball(margin * _ANTIALIAS))
    return [_shrink(shape, 2 * radius + 1) for shape in (stroke, mask)]


def _up(place: int, distance: int, angles: np.ndarray) -> np.ndarray:
    """Rows and columns, `[..., 2]`, to go from a place, which decides on the error of a sine."""
    return np.ceil(place + _away(distance, angles)).astype(int) - place


def _away(distance: int, angles: np.ndarray) -> np.ndarray:
    return distance * np.stack([np.sin(angles), np.cos(angles)], axis=-1)


def _ball(radius: int) -> np.ndarray:
    across = np.arange(-radius, radius + 1) ** 2
    return across[:, None] + across <= radius**2


def _shrink(shape: np.ndarray, side: int) -> np.ndarray:
    picture = Image.fromarray(shape.astype(np.uint8) * 255)
    return np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS))


@lru_cache(maxsize=1024)
def _disc(spec: PathfinderSpec, *place: int) -> np.ndarray:
    """Coverage of the pixels of an image by a disc, up to 255: `[size, size]`."""
    pixels = np.arange(spec.size * _ANTIALIAS)
    y, x = ((pixels - at * _ANTIALIAS) ** 2 for at in place)
    return _shrink(y[:, None] + x <= (spec.disc_radius * _ANTIALIAS) ** 2, spec.size)


def _grow_targets(paddles: Paddles, count: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pairs `[count, 2, TARGET_LENGTH, 3]`, and masks `[count, frame]` with them."""
    spec = paddles.spec
    outer = paddles.image.reshape(paddles.stride, -1).copy()
    edge = 2 * spec.seed_distance + (paddles.stride - spec.size) // 2
    outer[edge:-edge, edge:-edge] = False
    rooms = [paddles.tails(outer.reshape(-1), direction) for direction in range(360)]
    aside = np.rint(_away(spec.seed_distance, _DIRECTIONS)).astype(int) @ [paddles.stride, 1]
    masks = np.empty((_PAIRS, len(paddles.image)), np.uint8)
    flat, paths = masks.reshape(-1), np.zeros((_PAIRS, 2, TARGET_LENGTH, 3), int)
    fresh = pairs = np.arange(_PAIRS)
    lengths, found, missing = np.zeros(_PAIRS, int), [], count
    while missing > 0:
        starts = rng.choice(np.flatnonzero([len(room) for room in rooms]), len(fresh))
        tails = np.array([rng.choice(rooms[n]) for n in starts], int) + fresh * masks.shape[1]
        directions, sides = rng.integers(360, size=(2, len(fresh)))
        paths[fresh, 0, 0] = paddles.begin(starts, tails)
        paths[fresh, 1, 0] = paddles.begin(directions, tails + aside[sides])
        masks[fresh], lengths[fresh] = paddles.border, 2
        which, length = lengths % 2, lengths // 2
        on, newest = paddles.extend(flat, paths[pairs, which, length - 1], rng)
        paths[on, which[on], length[on]] = newest
        lengths[on] += 1
        whole = on[lengths[on] == 2 * TARGET_LENGTH][:missing]
        paddles.stamp(flat, paddles.mask, paths[whole, 1, -1])
        found.append((paths[whole], masks[whole]))
        missing -= len(whole)
        fresh = np.append(np.delete(pairs, on), whole)
    return np.concatenate([paths for paths, _ in found]), np.concatenate([x for _, x in found])


def _grow_distractors(paddles: Paddles, masks: np.ndarray, rng: Generator) -> list[np.ndarray]:
    """For each of `[count, frame]` masks, which get them, `[paths, DISTRACTOR_LENGTH, 3]`."""
    found: list[list[np.ndarray]] = [[] for _ in masks]
    for _ in range(paddles.spec.num_distractors):
        waiting = np.arange(len(masks))
        for _ in range(_DISTRACTOR_TRIALS):
            frames, directions = masks[waiting], rng.integers(360, size=len(waiting))
            rooms = list(map(paddles.tails, frames >= _TAKEN, directions))
            on = np.flatnonzero([len(room) for room in rooms])
            tails = np.array([rng.choice(rooms[n]) for n in on], int) + on * frames.shape[1]
            path = [paddles.begin(directions[on], tails)]
            for _ in range(DISTRACTOR_LENGTH - 1):
                went, newest = paddles.extend(frames.reshape(-1), path[-1], rng)
                on, path = on[went], [*(paddle[went] for paddle in path), newest]
            paddles.stamp(frames.reshape(-1), paddles.mask, path[-1])
            masks[waiting[on]] = frames[on]
            for n, each in zip(waiting[on], np.stack(path, axis=1), strict=True):
                found[n].append(each)
            waiting = np.delete(waiting, on)
    return [np.array(paths, int).reshape(-1, DISTRACTOR_LENGTH, 3) for paths in found]


@dataclass(frozen=True)
class Scene:
    """The paths of one image, from their tails on, and its discs."""

    paddles: Paddles
    targets: np.ndarray
    """Numbers and anchors of paddles: `[2, TARGET_LENGTH, 2]`."""
    distractors: np.ndarray
    """The same: `[paths, DISTRACTOR_LENGTH, 2]`."""
    disc_of: tuple[int, int]
    """The target that has one on its tail, and the target that has one on its head."""

    @property
    def label(self) -> int:
        """1 when both discs are on one path."""
        return int(self.disc_of[0] == self.disc_of[1])

    @property
    def discs(self) -> np.ndarray:
        """Their pixels: `[2, 2]`."""
        return self.pixels(self.targets[self.disc_of, (0, -1), 1])

    def pixels(self, places: np.ndarray) -> np.ndarray:
        """Rows and columns in the image: `[..., 2]`."""
        wide = (self.paddles.stride - self.paddles.spec.size) // 2
        return np.stack(np.divmod(places, self.paddles.stride), axis=-1) - wide

    def render(self) -> np.ndarray:
        """The image, its darkest pixel 0 and its brightest 255: `[size, size]`, uint8."""
        spec, discs = self.paddles.spec, self.discs.tolist()
        targets = spec.target_contrast * self.ink(self.targets)
        distractors = spec.distractor_contrast * self.ink(self.distractors)
        light = np.maximum.reduce([targets, distractors, *(_disc(spec, *at) for at in discs)])
        low, high = light.min(), light.max()
        return ((light - low) * (255 / (high - low)) + 0.5).astype(np.uint8)

    def ink(self, paths: np.ndarray) -> np.ndarray:
        """Coverage of pixels by paths, up to 255: `[size, size]`, uint8."""
        frame = np.zeros_like(self.paddles.border)
        for paddle in paths.reshape(-1, 1, 2):
            self.paddles.stamp(frame, self.paddles.ink, paddle)
        return frame[self.paddles.image].reshape(self.paddles.spec.size, -1)


def draw_scenes(spec: PathfinderSpec, count: int, rng: Random) -> list[Scene]:
    """Random scenes, a fair coin deciding on each label."""
    numbers, scenes = default_rng(rng.getrandbits(128)), []
    margins = rng.choices(spec.margins, k=count)
    for margin in sorted(set(margins)):
        paddles = make_paddles(spec, margin)
        pairs, masks = _grow_targets(paddles, margins.count(margin), numbers)
        # from many frames to one
        wrap = np.array([len(paddles.mask), masks.shape[1]])
        for targets, others in zip(pairs, _grow_distractors(paddles, masks, numbers), strict=True):
            disc_of = rng.randrange(2), rng.randrange(2)
            scenes.append(Scene(paddles, targets[..., :2] % wrap, others[..., :2] % wrap, disc_of))
    rng.shuffle(scenes)
    return scenes


def draw_images(spec: PathfinderSpec, count: int, rng: Random) -> list[tuple[int, np.ndarray]]:
    """Random images: labels, and `[size, size]` uint8 pixels."""
    return [(scene.label, scene.render()) for scene in draw_scenes(spec, count, rng)]
