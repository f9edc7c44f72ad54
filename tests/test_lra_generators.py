"""Generated examples: ListOps by the law of its trees, Pathfinder by the paths of its images."""

import itertools
import lzma
import random
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from lra.listops import draw_trees
from lra.pathfinder import SPECS, Scene, draw_images, draw_scenes
from lra.prepare import generate


def take(count: int, draw: Any, seed: int, workers: int = 1) -> list[tuple[int, Any]]:
    drawn = itertools.islice(generate(draw, seed=seed, workers=workers), count)
    return [(x, y if isinstance(y, str) else y.tobytes()) for x, y in drawn]


@pytest.mark.parametrize(
    "draw", [partial(draw_trees, 20), partial(draw_images, SPECS[32], 20)], ids=["trees", "images"]
)
def test_same_seed_gives_the_same_examples_for_any_number_of_workers(draw):
    first = take(70, draw, 5)
    assert first == take(70, draw, 5, workers=2)
    assert first[:30] == take(30, draw, 5)
    assert first[:30] != take(30, draw, 6)
    assert len({y for _, y in first}) == 70


@pytest.fixture(scope="module")
def trees() -> list[tuple[int, str]]:
    return take(20_000, partial(draw_trees, 100), 7, workers=2)


OPERATORS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda d: (sorted(d)[(len(d) - 1) // 2] + sorted(d)[len(d) // 2]) // 2,
    "[SM": lambda d: int(str(sum(d))[-1]),
    "[FIRST": lambda d: d[0],
    "[LAST": lambda d: d[-1],
}


def parsed(tokens: Iterator[str]) -> tuple[int, str] | None:
    """Value and text, nested as in the release, of an expression without parentheses."""
    token = next(tokens)
    if token == "]":
        return None
    if token.isdigit():
        return int(token), token
    values, texts = zip(*iter(lambda: parsed(tokens), None), strict=True)
    text = " ".join(["(", *"(" * len(texts), token, *(f"{text} )" for text in texts), "] )"])
    return OPERATORS[token](values), text


def is_right(label: int | str, text: str) -> bool:
    return parsed(x for x in text.split() if x not in "()") == (int(label), text)


def test_published_files_evaluate_to_their_labels(shared_data):
    for path in (shared_data / "listops").glob("*.tsv.xz"):
        with lzma.open(path, "rt", encoding="utf-8") as file:
            assert all(is_right(*line.rstrip("\n").split("\t")) for line in file), path


def test_lengths_and_labels_follow_the_law(trees):
    assert all(is_right(*tree) for tree in trees[:1500])
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
    text = " ".join(text for _, text in trees[:500])
    # an operator stands behind a parenthesis of its own and one for each argument
    operators = re.findall(r"((?:\( )+)(\[\w+)", text)
    counts = Counter(name for _, name in operators)
    shares = [counts[name] / len(operators) for name in ("[MIN", "[MAX", "[MED", "[SM")]
    assert shares == pytest.approx([0.25] * 4, abs=0.01)
    assert {opened.count("(") - 1 for opened, _ in operators} == set(range(2, 11))
    # digits stand one level below the deepest operator, at most on level 10
    steps = ((token[0] == "[") - (token == "]") for token in text.split())
    assert max(itertools.accumulate(steps)) == 9


@pytest.fixture(scope="module", params=[(32, 60), (128, 4)], ids=["32px", "128px"])
def scenes(request: pytest.FixtureRequest) -> list[Scene]:
    size, count = request.param
    return draw_scenes(SPECS[size], count, random.Random(11))


def paths_of(scene: Scene) -> list[np.ndarray]:
    return [*scene.targets, *scene.distractors]


def ends(scene: Scene, path: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Both ends of each paddle of a path, from its tail on, found in the paddles' ink."""
    found = []
    for step, (number, anchor) in enumerate(path):
        ink = scene.paddles.ink[number].astype(float)
        offsets = scene.pixels(anchor + scene.paddles.patch) - scene.pixels(anchor)
        # the anchor is one end, the centre of the ink lies half a paddle from it
        middle = (offsets * ink[:, None]).sum(0) / ink.sum()
        here = scene.pixels(anchor)
        pair = (here, here + 2 * middle)
        found.append(pair if step == 0 else pair[::-1])
    return found


def test_discs_and_paths_are_where_they_belong(scenes: list[Scene]):
    spec, turns = scenes[0].paddles.spec, []
    # twice the margin along the path; three steps from end to end are rounded to pixels
    low, high = 2 * min(spec.margins) - 2.6, 2 * max(spec.margins) + 2.6
    for scene in scenes:
        assert scene.targets.shape == (2, 14, 2)
        assert scene.distractors.shape[1:] == (4, 2)
        assert len(scene.distractors) <= spec.num_distractors
        paths = [ends(scene, path) for path in paths_of(scene)]
        for (_, head), (tail, _) in itertools.chain.from_iterable(map(pairwise, paths)):
            assert low < np.linalg.norm(tail - head) < high
        # each disc lies on one end of one target, in whole pixels
        tips = np.array([(path[0][0], path[-1][1]) for path in paths[:2]])
        hits = np.abs(tips - scene.discs).max(-1) < 0.1
        assert hits.sum(0).tolist() == [1, 1]
        assert scene.label == hits.all(1).any()
        for path in paths[:2]:
            ways = np.array([head - tail for tail, head in path])
            ways /= np.linalg.norm(ways, axis=1, keepdims=True)
            cosines = (ways[:-1] * ways[1:]).sum(1)
            turns.extend(np.degrees(np.arccos(np.clip(cosines, -1, 1))))
        tails, distance = tips[:, 0], spec.seed_distance
        assert np.linalg.norm(tails[0] - tails[1]) == pytest.approx(distance, abs=0.75)
        # the lookup that keeps the first target in the middle is a pixel off
        assert 2 * distance - 1 <= tails[0].min() <= tails[0].max() < spec.size - 2 * distance
    assert any(len(scene.distractors) for scene in scenes)
    # the ink of a paddle of two pixels gives its direction to some degrees only
    assert max(turns) < 90 / spec.continuity + (30 if spec.size == 32 else 5)
    assert np.median(turns) < 45 / spec.continuity


def masked(scene: Scene, paddle: np.ndarray) -> np.ndarray:
    """The mask of a paddle on the image, 0 to 1."""
    image = np.zeros((scene.paddles.spec.size,) * 2)
    places = scene.pixels(paddle[1] + scene.paddles.patch)
    there = ((places >= 0) & (places < len(image))).all(1)
    image[tuple(places[there].T)] = scene.paddles.mask[paddle[0]][there] / 255
    return image


def test_no_paddle_lies_on_an_earlier_one_that_it_could_see(scenes: list[Scene]):
    crossings = 0
    for scene in scenes:
        mask = np.pad(np.zeros((scene.paddles.spec.size - 2,) * 2), 1, constant_values=1)
        # the targets grow in turns
        steps = zip(*map(pairwise, scene.targets), strict=True)
        for newest, grown in itertools.chain.from_iterable(steps):
            assert (mask + masked(scene, grown)).max() < 1.8
            mask = np.maximum(mask, masked(scene, newest))
        head = masked(scene, scene.targets[0, -1])
        mask = np.maximum(mask, masked(scene, scene.targets[1, -1]))
        for path in scene.distractors:
            for newest, grown in pairwise(path):
                assert (mask + masked(scene, grown)).max() < 1.8
                mask = np.maximum(mask, masked(scene, newest))
            mask = np.maximum(mask, masked(scene, path[-1]))
        crossings += (mask + head).max() >= 1.8
    # distractors do not see the first target's head
    assert crossings > 0


def test_statistics_of_the_hard_set():
    """The published program, run with the image scaling of its day, has on 40 to 60 images: 1.05
    distractors placed, 66 % black pixels, 349 lit ones (median), and grey levels of 20.4 (mean).
    """
    scenes = [x for n in range(5) for x in draw_scenes(SPECS[32], 100, random.Random(n))]
    images = np.stack([scene.render() for scene in scenes])
    placed = [len(scene.distractors) for scene in scenes]
    assert np.mean(placed) == pytest.approx(1.15, abs=0.2)
    assert max(placed) <= 5
    assert (images == 0).mean() == pytest.approx(0.66, abs=0.01)
    assert np.median((images > 0).sum((1, 2))) == pytest.approx(346, abs=10)
    assert images.mean() == pytest.approx(20.3, abs=0.7)
    assert np.mean([scene.label for scene in scenes]) == pytest.approx(0.5, abs=0.08)
    # of the first target and of distractors the first paddle goes up and left
    for scene in scenes:
        for path in (scene.targets[0], *scene.distractors):
            tail, head = ends(scene, path)[0]
            assert (head < tail).all()


def test_images_show_paths_and_discs_from_black_to_white(scenes: list[Scene]):
    for scene in scenes:
        image, spec = scene.render(), scene.paddles.spec
        assert (image.shape, image.dtype) == ((spec.size,) * 2, np.uint8)
        assert (image.min(), image.max()) == (0, 255)
        drawn = scene.ink(np.concatenate(paths_of(scene))) >= 64
        assert image[drawn].min() > 40
        assert min(image[tuple(place)] for place in scene.discs) > 150
        # paddles and discs shade the pixels next to them
        far, reach = ~drawn, int(spec.disc_radius) + 3
        for places, near in ((np.argwhere(drawn), 2), (scene.discs, reach)):
            for y, x in places:
                far[max(y - near, 0) : y + near + 1, max(x - near, 0) : x + near + 1] = False
        assert image[far].max(initial=0) < 16
