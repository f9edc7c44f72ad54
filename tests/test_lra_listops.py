"""ListOps: the law of the generated trees, and labels against a second evaluator."""

import csv
import lzma
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from lra import listops
from lra.chunks import chunk_random
from lra.listops import evaluate, generate_chunks
from lra.listops_files import write_files

SHARED = Path(__file__).resolve().parents[2] / "shared"
ROWS_OF_NANGIA_AND_BOWMAN = {"d20s_8k": 8_000, "test_d10c": 10_000, "test_d20a": 10_000}


@pytest.fixture(scope="module")
def trees() -> list[tuple[int, str]]:
    return list(chain.from_iterable(generate_chunks(20_000, seed=7, workers=2)))


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
    digits = np.sort(digits) if name in ("[MIN", "[MAX", "[MED") else np.array(digits)
    middle = digits[(len(digits) - 1) // 2 : len(digits) // 2 + 1]
    return {
        "[MIN": lambda: int(digits[0]),
        "[MAX": lambda: int(digits[-1]),
        "[MED": lambda: int(np.floor(middle.mean())),
        "[SM": lambda: int(str(digits.sum())[-1]),
        "[FIRST": lambda: int(digits[0]),
        "[LAST": lambda: int(digits[-1]),
    }[name]()


def test_known_expressions():
    assert evaluate("[MAX 2 9 [MIN 4 7 ] 0 ]".split()) == 9
    assert evaluate("( ( ( [SM 7 ) ( ( ( [MED 3 ) 8 ) ] ) ) ] )".split()) == 2
    assert evaluate(["4"]) == 4
    assert by_pairs("( ( ( [SM 7 ) ( ( ( [MED 3 ) 8 ) ] ) ) ] )") == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[MIN 3 four ]", "token 2: expected a digit.*found 'four'"),
        ("[MIN 3 4", "1 open operators"),
        ("3 4", "expected one expression, found 2"),
        ("[MAX ]", "token 1: ']' closes no operator with arguments"),
        ("3 ]", "token 1: ']' closes no operator"),
        ("", "expected one expression, found 0"),
    ],
)
def test_what_is_no_expression_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        evaluate(text.split())


@pytest.mark.parametrize("name", ROWS_OF_NANGIA_AND_BOWMAN)
def test_published_files_evaluate_to_their_labels(name):
    path = SHARED / "data" / "listops" / f"{name}.tsv.xz"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside this checkout")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    assert len(rows) == ROWS_OF_NANGIA_AND_BOWMAN[name]
    wrong = [row for row in rows if evaluate(row[1].split()) != int(row[0])]
    assert not wrong


def test_labels_agree_with_a_second_evaluator(trees):
    assert all(by_pairs(text) == label == evaluate(text.split()) for label, text in trees[:1500])


def test_lengths_and_labels_follow_the_law(trees):
    lengths = [len(text.replace("(", "").replace(")", "").split()) for _, text in trees]
    assert min(lengths) > 500
    assert max(lengths) < 2000
    # an independent simulation of the law: mean 1035, quantiles 579, 704, 955, 1309, 1642
    assert np.mean(lengths) == pytest.approx(1035, abs=12)
    quantiles = np.quantile(lengths, (0.1, 0.25, 0.5, 0.75, 0.9))
    assert quantiles == pytest.approx([579, 704, 955, 1309, 1642], abs=25)
    counts = Counter(label for label, _ in trees)
    shares = np.array([counts[digit] / len(trees) for digit in range(10)])
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
    total = operators.total()
    assert all(count / total == pytest.approx(0.25, abs=0.01) for count in operators.values())
    assert set(arguments) == set(range(2, 11))
    # digits stand one level below the deepest operator, at most on level 10
    assert max(depths) == 9


def test_share_of_accepted_trees():
    rng, accepted, drawn = chunk_random(3, 0), 0, 6_000
    for _ in range(drawn):
        try:
            accepted += 500 < listops._Tree(rng).length < 2000
        except listops._TooLongError:
            continue
    assert accepted / drawn == pytest.approx(0.082, abs=0.012)


def test_repeated_trees_are_dropped(monkeypatch):
    rows = iter([[(1, "a"), (2, "b")], [(2, "b"), (3, "c")], [(1, "a"), (4, "d"), (5, "e")]])
    monkeypatch.setattr(listops, "map_chunks", lambda *_, **__: rows)
    assert list(generate_chunks(4, seed=0)) == [[(1, "a"), (2, "b")], [(3, "c")], [(4, "d")]]


def test_same_seed_gives_the_same_files(tmp_path: Path):
    splits = {"train": 250, "val": 30, "test": 20}
    folders = []
    for name, seed, workers in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        paths = write_files(tmp_path / name, seed=seed, workers=workers, splits=splits)
        assert [path.name for path in paths] == [f"basic_{split}.tsv" for split in splits]
        folders.append([path.read_bytes() for path in paths])
    assert folders[0] == folders[1]
    assert folders[0][0] != folders[2][0]


def test_files_have_the_columns_of_the_release(tmp_path: Path):
    (path,) = write_files(tmp_path, seed=0, splits={"test": 5})
    header, *rows = csv.reader(path.open(newline=""), delimiter="\t")
    assert header == ["Source", "Target"]
    assert len(rows) == 5
    for source, target in rows:
        assert evaluate(source.split()) == int(target)
    assert path.read_bytes().startswith(b"Source\tTarget\r\n( ")


def test_workers_must_be_positive():
    with pytest.raises(ValueError, match="workers must be at least 1, found 0"):
        next(generate_chunks(1, seed=0, workers=0))
