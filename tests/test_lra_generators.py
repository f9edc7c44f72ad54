"""Generated examples: ListOps by the law of its trees, Pathfinder by the paths of its images."""

import dataclasses
import itertools
import lzma
import random
from collections import Counter
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lra.listops import distinct_trees, draw_trees
from lra.pathfinder import SPECS, PaddlePath, Scene, draw_images, draw_scene
from lra.prepare import generate

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def take(count: int, draw: Any, *, seed: int, workers: int = 1) -> list[tuple[int, Any]]:
    return list(itertools.islice(generate(draw, seed=seed, workers=workers), count))


@pytest.mark.parametrize(
    "draw", [partial(draw_trees, 20), partial(draw_images, SPECS[32], 20)], ids=["trees", "images"]
)
def test_same_seed_gives_the_same_examples_for_any_number_of_workers(draw):
    def made(count: int, seed: int, workers: int = 1) -> list[tuple[int, Any]]:
        drawn = take(count, draw, seed=seed, workers=workers)
        return [(x, y if isinstance(y, str) else y.tobytes()) for x, y in drawn]

    first = made(70, 5)
    assert first == made(70, 5, workers=2)
    assert first[:30] == made(30, 5)
    assert first[:30] != made(30, 6)
    assert len({y for _, y in first}) == 70


ROWS_OF_NANGIA_AND_BOWMAN = {"d20s_8k": 8_000, "test_d10c": 10_000, "test_d20a": 10_000}


@pytest.fixture(scope="module")
def trees() -> list[tuple[int, str]]:
    return take(20_000, partial(draw_trees, 100), seed=7, workers=2)


def by_pairs(text: str) -> int:
    """Value of an expression by its parentheses: each pair applies a function to an argument."""
    stack: list[list] = [[]]
    for token in text.split():
        if token == "(":
            stack.append([])
        elif token == ")":
            function, argument = stack.pop()
            stack[-1].append(_apply(function, argument))
        else:
            stack[-1].append(int(token) if token.isdigit() else token)
    ((value,),) = stack
    return value


def _apply(function, argument):
    name, *digits = function if isinstance(function, tuple) else (function,)
    if argument != "]":
        return (name, *digits, argument)
    ranked = sorted(digits)
    middle = ranked[(len(digits) - 1) // 2 : len(digits) // 2 + 1]
    values = {"[MIN": ranked[0], "[MAX": ranked[-1], "[MED": sum(middle) // len(middle)}
    values |= {"[SM": int(str(sum(digits))[-1]), "[FIRST": digits[0], "[LAST": digits[-1]}
    return values[name]


@pytest.mark.parametrize("name", ROWS_OF_NANGIA_AND_BOWMAN)
def test_published_files_evaluate_to_their_labels(name):
    path = SHARED / "listops" / f"{name}.tsv.xz"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside this checkout")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    assert len(rows) == ROWS_OF_NANGIA_AND_BOWMAN[name]
    wrong = [row for row in rows if by_pairs(row[1]) != int(row[0])]
    assert not wrong


def test_lengths_and_labels_follow_the_law(trees):
    assert all(by_pairs(text) == label for label, text in trees[:1500])
    lengths = [len(text.replace("(", "").replace(")", "").split()) for _, text in trees]
    assert 500 < min(lengths) <= max(lengths) < 2000
    # an independent simulation of the law: mean 1035, quantiles 579, 704, 955, 1309, 1642
    assert np.mean(lengths) == pytest.approx(1035, abs=12)
    quantiles = np.quantile(lengths, (0.1, 0.25, 0.5, 0.75, 0.9))
    assert quantiles == pytest.approx([579, 704, 955, 1309, 1642], abs=25)
    shares = np.bincount([label for label, _ in trees], minlength=10) / len(trees)
    assert shares[[0, 9]] == pytest.approx([0.168, 0.169], abs=0.01)
    assert all((shares[1:9] > 0.07) & (shares[1:9] < 0.095))


def test_operators_arguments_and_depth_are_as_published(trees):
    operators, arguments, depths = Counter(), Counter(), set()
    for _, text in trees[:500]:
        levels = []
        for token in text.split():
            if token.startswith("["):
                operators[token] += 1
                levels.append(0)
                depths.add(len(levels))
            elif token == "]":
                arguments[levels.pop()] += 1
            if token.isdigit() or (token == "]" and levels):
                levels[-1] += 1
    assert set(operators) == {"[MIN", "[MAX", "[MED", "[SM"}
    shares = np.array(list(operators.values())) / operators.total()
    assert shares == pytest.approx([0.25] * 4, abs=0.01)
    assert set(arguments) == set(range(2, 11))
    # digits stand one level below the deepest operator, at most on level 10
    assert max(depths) == 9


def test_repeated_trees_are_dropped():
    trees = [(1, "a"), (2, "b"), (2, "b"), (3, "c"), (1, "a"), (4, "d")]
    assert list(distinct_trees(trees)) == [(1, "a"), (2, "b"), (3, "c"), (4, "d")]


@pytest.fixture(scope="module", params=SPECS, ids=lambda size: f"{size}px")
def scenes(request: pytest.FixtureRequest) -> list[Scene]:
    rng = random.Random(11)
    count = 60 if request.param == 32 else 8
    return [draw_scene(SPECS[request.param], rng) for _ in range(count)]


def ends(scene: Scene, path: PaddlePath) -> list[tuple[np.ndarray, np.ndarray]]:
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


def covered(scene: Scene, paths: tuple[PaddlePath, ...]) -> np.ndarray:
    """Pixels of some paths: `[size, size]`, bool."""
    bright = dataclasses.replace(scene, targets=paths, distractors=())
    return bright._ink(paths) >= 0.25


def test_label_is_one_iff_both_discs_are_ends_of_one_path(scenes: list[Scene]):
    for scene in scenes:
        places = [scene.paddles.pixel(place) for place in scene.discs]
        tips = [(ends(scene, path)[0][0], ends(scene, path)[-1][1]) for path in scene.targets]
        hits = np.abs(np.array(tips) - places).max(-1) < 0.1
        # each disc lies on one end of one target
        assert hits.sum(0).tolist() == [1, 1]
        assert scene.label == hits.all(1).any()


def test_paths_have_their_lengths_gaps_turns_and_distances(scenes: list[Scene]):
    spec, turns = scenes[0].spec, []
    # twice the margin along the path; places are whole pixels, ends those of the ink
    low, high = 2 * min(spec.margins) - 2, 2 * max(spec.margins) + 2.5
    for scene in scenes:
        assert [len(path.placed) for path in scene.targets] == [14, 14]
        assert {len(path.placed) for path in scene.distractors} <= {4}
        assert len(scene.distractors) <= spec.num_distractors
        for path in (*scene.targets, *scene.distractors):
            for (_, head), (tail, _) in pairwise(ends(scene, path)):
                assert low < np.linalg.norm(tail - head) < high
        for path in scene.targets:
            ways = [head - tail for tail, head in ends(scene, path)]
            for way, following in pairwise(ways):
                cosine = way @ following / np.linalg.norm(way) / np.linalg.norm(following)
                turns.append(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
        # tails of targets
        tails = np.array([scene.paddles.pixel(path.ends[0]) for path in scene.targets])
        assert np.linalg.norm(tails[0] - tails[1]) == pytest.approx(spec.seed_distance, abs=0.75)
        assert tails[0].min() >= 2 * spec.seed_distance
        assert tails[0].max() < spec.size - 2 * spec.seed_distance
    assert any(scene.distractors for scene in scenes)
    # the ink of a paddle of two pixels gives its direction to some degrees only
    assert max(turns) < 90 / spec.continuity + (30 if spec.size == 32 else 5)
    assert np.median(turns) < 45 / spec.continuity


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
        assert (image.shape, image.dtype) == ((scene.spec.size,) * 2, np.uint8)
        assert (image.min(), image.max()) == (0, 255)
        drawn = covered(scene, (*scene.targets, *scene.distractors))
        assert image[drawn].min() > 40
        for place in scene.discs:
            assert image[scene.paddles.pixel(place)] > 150
        far = ~drawn
        # paddles and discs shade the pixels next to them
        shaded = [(place, 2) for place in np.argwhere(drawn)]
        reach = int(scene.spec.marker_radius) + 3
        shaded += [(scene.paddles.pixel(place), reach) for place in scene.discs]
        for (y, x), near in shaded:
            far[max(y - near, 0) : y + near + 1, max(x - near, 0) : x + near + 1] = False
        assert image[far].max(initial=0) < 12


def test_labels_are_balanced():
    labels = [draw_scene(SPECS[32], rng).label for rng in [random.Random(4)] for _ in range(1500)]
    # three standard deviations of 1,500 throws
    assert np.mean(labels) == pytest.approx(0.5, abs=0.039)
