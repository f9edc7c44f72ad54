"""Generated examples: ListOps by the law of its trees, Pathfinder by the paths of its images."""

import itertools
import lzma
import random
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest

from lra.listops import draw_trees
from lra.pathfinder import PADDING, SPECS, PaddlePath, Scene, draw_images
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


@pytest.fixture(scope="module", params=[(32, 60), (128, 8)], ids=["32px", "128px"])
def scenes(request: pytest.FixtureRequest) -> list[Scene]:
    (size, count), rng = request.param, random.Random(11)
    return [Scene(SPECS[size], rng) for _ in range(count)]


def pixels(scene: Scene, *places: int) -> list[tuple[int, int]]:
    return [divmod(place, scene.paddles.stride) for place in places]


def ends(scene: Scene, path: PaddlePath) -> list[tuple[np.ndarray, np.ndarray]]:
    """Both ends of each paddle of a path, from its tail on, found in the paddles' ink."""
    found = []
    for number, (anchor, paddle) in enumerate(path):
        offsets = np.moveaxis(np.indices(paddle.ink.shape), 0, -1) - scene.paddles.radius
        # the anchor is one end, the centre of the ink lies half a paddle from it
        middle = (offsets * paddle.ink[..., None]).sum((0, 1)) / paddle.ink.sum()
        here = np.array(pixels(scene, anchor)[0], float)
        pair = (here, here + 2 * middle)
        found.append(pair if number == 0 else pair[::-1])
    return found


def test_discs_and_paths_are_where_they_belong(scenes: list[Scene]):
    spec, turns = scenes[0].spec, []
    # twice the margin along the path; places are whole pixels, ends those of the ink
    low, high = 2 * min(spec.margins) - 2, 2 * max(spec.margins) + 2.5
    for scene in scenes:
        assert [len(path) for path in scene.targets] == [14, 14]
        assert {len(path) for path in scene.distractors} <= {4}
        assert len(scene.distractors) <= spec.num_distractors
        paths = [ends(scene, path) for path in (*scene.targets, *scene.distractors)]
        for (_, head), (tail, _) in itertools.chain.from_iterable(map(pairwise, paths)):
            assert low < np.linalg.norm(tail - head) < high
        # each disc lies on one end of one target
        tips = np.array([(path[0][0], path[-1][1]) for path in paths[:2]])
        hits = np.abs(tips - pixels(scene, *scene.discs)).max(-1) < 0.1
        assert hits.sum(0).tolist() == [1, 1]
        assert scene.label == hits.all(1).any()
        for path in paths[:2]:
            ways = np.array([head - tail for tail, head in path])
            ways /= np.linalg.norm(ways, axis=1, keepdims=True)
            cosines = (ways[:-1] * ways[1:]).sum(1)
            turns.extend(np.degrees(np.arccos(np.clip(cosines, -1, 1))))
        tails, distance = tips[:, 0], spec.seed_distance
        assert np.linalg.norm(tails[0] - tails[1]) == pytest.approx(distance, abs=0.75)
        assert 2 * distance <= tails[0].min() <= tails[0].max() < spec.size - 2 * distance
    assert any(scene.distractors for scene in scenes)
    # the ink of a paddle of two pixels gives its direction to some degrees only
    assert max(turns) < 90 / spec.continuity + (30 if spec.size == 32 else 5)
    assert np.median(turns) < 45 / spec.continuity


def test_paths_do_not_touch_each_other_or_the_edge(scenes: list[Scene]):
    for scene in scenes:
        margin = min(scene.spec.margins)
        filled = [scene.ink([path]) >= 0.25 for path in (*scene.targets, *scene.distractors)]
        for one, other in combinations(filled, 2):
            apart = np.argwhere(one)[:, None] - np.argwhere(other)
            assert np.sqrt((apart**2).sum(-1)).min() > margin
        places = np.argwhere(np.any(filled, axis=0)) - PADDING - margin
        assert 0 <= places.min() <= places.max() < scene.spec.size - 2 * (PADDING + margin)


def test_images_show_paths_and_discs_from_black_to_white(scenes: list[Scene]):
    for scene in scenes:
        image = scene.render()
        assert (image.shape, image.dtype) == ((scene.spec.size,) * 2, np.uint8)
        assert (image.min(), image.max()) == (0, 255)
        drawn = scene.ink([*scene.targets, *scene.distractors]) >= 0.25
        assert image[drawn].min() > 40
        discs = pixels(scene, *scene.discs)
        assert min(image[place] for place in discs) > 150
        # paddles and discs shade the pixels next to them
        far, reach = ~drawn, int(scene.spec.disc_radius) + 3
        for places, near in ((np.argwhere(drawn), 2), (discs, reach)):
            for y, x in places:
                far[max(y - near, 0) : y + near + 1, max(x - near, 0) : x + near + 1] = False
        assert image[far].max(initial=0) < 12
