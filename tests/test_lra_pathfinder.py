"""Pathfinder images: labels, distances and grey levels on the paths that they were drawn from."""

import dataclasses
import random
import re
from itertools import combinations, pairwise

import numpy as np
import pytest

from lra.paddles import disc
from lra.pathfinder import Scene, draw_scene, generate_chunks, pathfinder_spec
from lra.pathfinder_sheet import draw_sheet
from lra.paths import Path

SIZES = (32, 128, 256)


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size}px")
def scenes(request: pytest.FixtureRequest) -> list[Scene]:
    rng = random.Random(11)
    count = 60 if request.param == 32 else 8
    return [draw_scene(pathfinder_spec(request.param, "hard"), rng) for _ in range(count)]


def ends(scene: Scene, path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Both ends of each paddle of a path, from its tail on, found in the paddles' ink."""
    found = []
    for number, (anchor, direction) in enumerate(path.placed):
        ink = scene.paddles.templates[direction].ink
        offsets = np.moveaxis(np.indices(ink.shape), 0, -1) - scene.paddles.radius
        # the anchor is one end, the centre of the ink lies half a paddle from it
        middle = (offsets * ink[..., None]).sum((0, 1)) / ink.sum()
        here = np.array(scene.paddles.pixel(anchor), float)
        pair = (here, here + 2 * middle)
        found.append(pair if number == 0 else pair[::-1])
    return found


def covered(scene: Scene, paths: tuple[Path, ...]) -> np.ndarray:
    """Pixels of some paths: `[size, size]`, bool."""
    bright = dataclasses.replace(scene, targets=paths, distractors=())
    return bright._ink(paths) >= 0.25


def test_label_is_one_iff_both_discs_are_ends_of_one_path(scenes: list[Scene]):
    for scene in scenes:
        places = [scene.paddles.pixel(place) for place in scene.discs]
        hits = []
        for path in scene.targets:
            first, last = ends(scene, path)[0][0], ends(scene, path)[-1][1]
            near = [np.abs(first - places[0]).max() < 0.1, np.abs(last - places[1]).max() < 0.1]
            hits.append(near)
        # each disc lies on one end of one target
        assert np.sum(hits, axis=0).tolist() == [1, 1]
        assert scene.label == int(any(all(near) for near in hits))


def test_paths_have_their_lengths_and_gaps(scenes: list[Scene]):
    spec = scenes[0].spec
    for scene in scenes:
        assert [len(path.placed) for path in scene.targets] == [14, 14]
        assert {len(path.placed) for path in scene.distractors} <= {4}
        assert len(scene.distractors) <= spec.num_distractors
        for path in (*scene.targets, *scene.distractors):
            for (_, head), (tail, _) in pairwise(ends(scene, path)):
                # twice the margin along the path; places are whole pixels, ends those of the ink
                gap = np.linalg.norm(tail - head)
                assert 2 * min(spec.margins) - 2 < gap < 2 * max(spec.margins) + 2.5
    assert any(scene.distractors for scene in scenes)


def test_turns_stay_below_the_limit_of_the_continuity(scenes: list[Scene]):
    spec = scenes[0].spec
    turns = []
    for scene in scenes:
        for path in scene.targets:
            ways = [head - tail for tail, head in ends(scene, path)]
            for way, following in pairwise(ways):
                cosine = way @ following / np.linalg.norm(way) / np.linalg.norm(following)
                turns.append(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    # the ink of a paddle of two pixels gives its direction to some degrees only
    assert max(turns) < 90 / spec.continuity + (30 if spec.size == 32 else 5)
    assert np.median(turns) < 45 / spec.continuity


def test_tails_of_targets_are_the_seed_distance_apart(scenes: list[Scene]):
    spec = scenes[0].spec
    for scene in scenes:
        first, second = (np.array(scene.paddles.pixel(path.tail)) for path in scene.targets)
        assert np.linalg.norm(first - second) == pytest.approx(spec.seed_distance, abs=0.75)
        assert (first >= 2 * spec.seed_distance).all()
        assert (first < spec.size - 2 * spec.seed_distance).all()


def test_paths_do_not_touch_each_other_or_the_edge(scenes: list[Scene]):
    for scene in scenes:
        spec, margin = scene.spec, min(scene.spec.margins)
        filled = [covered(scene, (path,)) for path in (*scene.targets, *scene.distractors)]
        for one, other in combinations(filled, 2):
            apart = np.argwhere(one)[:, None] - np.argwhere(other)
            assert np.sqrt((apart**2).sum(-1)).min() > margin
        edge = spec.padding + margin
        inner = np.zeros((spec.size, spec.size), bool)
        inner[edge:-edge, edge:-edge] = True
        assert not (np.any(filled, axis=0) & ~inner).any()


def test_images_show_paths_and_discs_from_black_to_white(scenes: list[Scene]):
    for scene in scenes:
        image = scene.render()
        assert image.shape == (scene.spec.size,) * 2
        assert image.dtype == np.uint8
        assert (image.min(), image.max()) == (0, 255)
        drawn = covered(scene, (*scene.targets, *scene.distractors))
        assert image[drawn].min() > 40
        for place in scene.discs:
            assert image[scene.paddles.pixel(place)] > 150
        far = ~drawn
        # paddles and discs shade the pixels next to them
        for y, x in np.argwhere(drawn):
            far[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3] = False
        for place in scene.discs:
            y, x = scene.paddles.pixel(place)
            reach = int(scene.spec.marker_radius) + 3
            far[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1] = False
        assert image[far].max(initial=0) < 12


def test_distractors_of_32_pixels_are_brighter_than_targets_as_published():
    scene = draw_scene(pathfinder_spec(32, "hard"), random.Random(2))
    image = scene.render().astype(float)
    targets = image[covered(scene, scene.targets)].max()
    plain = dataclasses.replace(scene, distractors=()).render()
    assert scene.distractors
    assert image[covered(scene, scene.distractors)].max() >= targets
    assert not np.array_equal(plain, image)


def test_labels_are_balanced():
    labels = np.concatenate(
        [labels for _, labels in generate_chunks(pathfinder_spec(32, "easy"), 3000, seed=4)]
    )
    assert labels.dtype == np.uint8
    # three standard deviations of 3,000 throws
    assert labels.mean() == pytest.approx(0.5, abs=0.028)


def test_same_seed_gives_the_same_images_for_any_number_of_workers():
    spec = pathfinder_spec(32, "hard")

    def made(num: int, seed: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
        chunks = list(generate_chunks(spec, num, seed=seed, workers=workers))
        images, labels = (np.concatenate(part) for part in zip(*chunks, strict=True))
        return images, labels

    images, labels = made(230, 5, 1)
    assert images.shape == (230, 32, 32)
    assert labels.shape == (230,)
    for other, num in (made(230, 5, 2), 230), (made(120, 5, 1), 120):
        assert np.array_equal(images[:num], other[0])
        assert np.array_equal(labels[:num], other[1])
    assert not np.array_equal(images[:120], made(120, 6, 1)[0])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


@pytest.mark.parametrize(
    ("difficulty", "target", "distractor", "count"),
    [("easy", 6, 2, 10), ("intermediate", 9, 3, 6), ("hard", 14, 4, 5)],
)
def test_published_numbers(difficulty, target, distractor, count):
    spec = pathfinder_spec(32, difficulty)
    found = (spec.target_length, spec.distractor_length, spec.num_distractors)
    assert found == (target, distractor, count)


@pytest.mark.parametrize(("size", "difficulty"), [(48, "hard"), (32, "heavy")])
def test_unknown_sets_are_refused(size, difficulty):
    with pytest.raises(ValueError, match=re.escape(f"found {size} and {difficulty!r}")):
        pathfinder_spec(size, difficulty)


def test_disc_covers_its_pixels_and_is_symmetric():
    for radius in (1.5, 2.5, 5.0):
        shape = disc(radius)
        # drawn on whole sub-pixels, which adds up to a quarter of a pixel to the radius
        assert np.pi * radius**2 < shape.sum() < np.pi * (radius + 0.25) ** 2
        assert np.allclose(shape, shape[::-1], atol=0.02)
        # Pillow scales rows, rounds, then scales columns
        assert np.allclose(shape, shape.T, atol=0.1)


def test_sheet_is_a_small_image(tmp_path):
    path = tmp_path / "sheet.png"
    draw_sheet(path, size=32, difficulty="easy", seed=1)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert path.stat().st_size < 200_000
