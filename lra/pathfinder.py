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
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import numpy as np

from lra.chunks import chunk_random, map_chunks
from lra.paddles import Paddles, disc, make_paddles
from lra.paths import Ground, Path

Difficulty = Literal["easy", "intermediate", "hard"]
TARGET_LENGTHS: dict[Difficulty, int] = {"easy": 6, "intermediate": 9, "hard": 14}
"""Paddles in a target path."""

_IMAGES_PER_CHUNK = 100


@dataclass(frozen=True, kw_only=True)
class PathfinderSpec:
    """Parameters of a set of images; lengths are in pixels unless stated."""

    size: int
    """Height and width of an image."""
    padding: int
    """Width of the edge that stays empty."""
    seed_distance: int
    """Between the tails of the targets; the first is twice as far from the edges."""
    target_length: int
    """Paddles in a target path."""
    distractor_length: int
    """Paddles in a distractor path."""
    num_distractors: int
    """Distractor paths that are tried."""
    paddle_length: int
    """Length of a paddle."""
    paddle_thickness: float
    """Thickness of a paddle."""
    margins: tuple[int, ...]
    """Half the gap between two paddles of a path; each image has one of these."""
    continuity: float
    """How straight paths are: `continuity * turn` is below a right angle."""
    marker_radius: float
    """Radius of a disc."""
    target_contrast: float
    """Brightness of targets; a disc has 1."""
    distractor_contrast: float
    """Brightness of distractors."""


_SIZES = {
    32: {
        "padding": 1,
        "seed_distance": 7,
        "paddle_length": 2,
        "paddle_thickness": 0.5,
        "margins": (1,),
        "continuity": 1.0,
        "marker_radius": 1.5,
        "target_contrast": 0.75 * 2,
        "distractor_contrast": 2.0,
    },
    64: {
        "padding": 1,
        "seed_distance": 12,
        "paddle_length": 5,
        "paddle_thickness": 1.0,
        "margins": (1,),
        "continuity": 1.8,
        "marker_radius": 2.5,
        "target_contrast": 0.8,
        "distractor_contrast": 0.8,
    },
    128: {
        "padding": 1,
        "seed_distance": 20,
        "paddle_length": 5,
        "paddle_thickness": 1.5,
        "margins": (2, 3),
        "continuity": 1.8,
        "marker_radius": 3.0,
        "target_contrast": 0.9,
        "distractor_contrast": 0.9,
    },
    256: {
        "padding": 22,
        "seed_distance": 27,
        "paddle_length": 5,
        "paddle_thickness": 2.0,
        "margins": (3,),
        "continuity": 1.8,
        "marker_radius": 5.0,
        "target_contrast": 1.0,
        "distractor_contrast": 1.0,
    },
}
# in all distractors together; as many as whole paths need are tried
_DISTRACTOR_PADDLES = {32: 20, 64: 22, 128: 35, 256: 30}


def pathfinder_spec(size: int, difficulty: Difficulty) -> PathfinderSpec:
    """Published parameters.

    Args:
        size: 32 (the Pathfinder task), 64, 128 (Path-X) or 256 pixels.
        difficulty: LRA takes hard. At 64 pixels nearly all hard pairs get stuck, an image takes
            a second.

    Raises:
        ValueError: there is no such set.
    """
    if size not in _SIZES or difficulty not in TARGET_LENGTHS:
        raise ValueError(
            f"expected a size of {', '.join(map(str, _SIZES))} and a difficulty of "
            f"{', '.join(TARGET_LENGTHS)}, found {size} and {difficulty!r}"
        )
    target_length = TARGET_LENGTHS[difficulty]
    distractor_length = target_length // 3
    return PathfinderSpec(
        size=size,
        target_length=target_length,
        distractor_length=distractor_length,
        num_distractors=_DISTRACTOR_PADDLES[size] // distractor_length,
        **_SIZES[size],
    )


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One image before it is rendered."""

    spec: PathfinderSpec
    """What it is one of."""
    paddles: Paddles
    """What its paths are made of."""
    targets: tuple[Path, Path]
    """The long paths."""
    distractors: tuple[Path, ...]
    """The short paths."""
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
        return self.targets[self.tail_of].tail, self.targets[self.head_of].head

    def render(self) -> np.ndarray:
        """The image, its darkest pixel 0 and its brightest 255: `[size, size]`, uint8."""
        targets = self.spec.target_contrast * self._ink(self.targets)
        distractors = self.spec.distractor_contrast * self._ink(self.distractors)
        light = np.maximum(np.maximum(targets, distractors), self._discs())
        low, high = light.min(), light.max()
        return ((light - low) * (255 / (high - low)) + 0.5).astype(np.uint8)

    def _ink(self, paths: tuple[Path, ...]) -> np.ndarray:
        side, radius = 2 * self.paddles.radius + 1, self.paddles.radius
        frame = np.zeros((self.paddles.stride, self.paddles.stride), np.float32)
        for path in paths:
            for anchor, direction in path.placed:
                y, x = self.paddles.pixel(anchor)
                window = frame[y : y + side, x : x + side]
                np.maximum(window, self.paddles.templates[direction].ink, out=window)
        return frame[radius:-radius, radius:-radius]

    def _discs(self) -> np.ndarray:
        shape = disc(self.spec.marker_radius)
        side, radius = len(shape), len(shape) // 2
        frame = np.zeros((self.spec.size + 2 * radius, self.spec.size + 2 * radius), np.float32)
        for place in self.discs:
            y, x = self.paddles.pixel(place)
            window = frame[y : y + side, x : x + side]
            np.maximum(window, shape, out=window)
        return frame[radius:-radius, radius:-radius]


@cache
def _paddles(spec: PathfinderSpec, margin: int) -> Paddles:
    return make_paddles(
        size=spec.size,
        padding=spec.padding,
        length=spec.paddle_length,
        thickness=spec.paddle_thickness,
        margin=margin,
        continuity=spec.continuity,
    )


def draw_scene(spec: PathfinderSpec, rng: random.Random) -> Scene:
    """Draw the paths and discs of one image."""
    paddles = _paddles(spec, rng.choice(spec.margins))
    ground = Ground(paddles, rng)
    targets = ground.grow_targets(spec.target_length, spec.seed_distance)
    tried = [ground.grow_distractor(spec.distractor_length) for _ in range(spec.num_distractors)]
    return Scene(
        spec=spec,
        paddles=paddles,
        targets=targets,
        distractors=tuple(path for path in tried if path is not None),
        tail_of=rng.randrange(2),
        head_of=rng.randrange(2),
    )


def _make_chunk(
    spec: PathfinderSpec, num: int, seed: int, chunk: int
) -> tuple[np.ndarray, np.ndarray]:
    rng = chunk_random(seed, chunk)
    count = min(_IMAGES_PER_CHUNK, num - chunk * _IMAGES_PER_CHUNK)
    scenes = [draw_scene(spec, rng) for _ in range(count)]
    labels = np.array([scene.label for scene in scenes], np.uint8)
    return np.stack([scene.render() for scene in scenes]), labels


def generate_chunks(
    spec: PathfinderSpec, num: int, *, seed: int, workers: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random images, a fair coin deciding on each label.

    Args:
        spec: as `pathfinder_spec` returns it.
        num: images in all; a smaller number gives the first ones of a larger.
        seed: at least 0; the images depend on it and on `spec` alone.
        workers: processes.

    Returns:
        Images `[n, size, size]` and labels `[n]`, both uint8, for up to 100 images at a time.
    """
    chunks = range(-(-num // _IMAGES_PER_CHUNK))
    return map_chunks(partial(_make_chunk, spec, num, seed), chunks, workers=workers)
