"""Reports of fine-tuning runs: what is averaged and chosen, what is not, and what is refused."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from glue.report import report, summarise
from glue.scores import AVERAGES, PUBLISHED, average, read_scores
from glue.settings import parse, pooler_label
from glue.studies import by_layers, by_size, draw_layers, draw_sizes
from glue.tasks import NINE_COLUMNS, TASKS, TWELVE_COLUMNS
from ponet.poolers import POOLERS
from ponet.run.report import ResultError

(SETTINGS,) = parse(["--checkpoint", "small"]).runs_of(TASKS["sst2"], 67349, "cpu")
BASE = asdict(SETTINGS) | {
    "checkpoint": "small",
    "mixer": "ponet",
    "num_train": 67349,
    "num_eval": 872,
    "device": "cpu, 2 threads",
    "commit": "abc",
    "differences": [],
}


def save(root: Path, value: float | None, pooler: Any = "cls", **changes: Any) -> Path:
    """Write one result as a run does; `value` fills all metrics, `pooler` may be a name."""
    pooler = {"name": pooler} if isinstance(pooler, str) else pooler
    task = changes.get("task", "sst2")
    names = TASKS[task].metrics if task in TASKS else ("accuracy",)
    majority = None if value is None else 0.5
    result = {"name": f"{pooler}{changes}", "pooler": pooler, "score": value, "majority": majority}
    result["metrics"] = dict.fromkeys(names, value)
    result["majority_metrics"] = dict.fromkeys(names, majority)
    path = root / str(len(list(root.glob("*")))) / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(BASE | result | changes))
    return path


def tables(folder: Path) -> dict[str, str]:
    """Sections of the report by their title."""
    _, *sections = report(folder).split("\n## ")
    return {section.split("\n")[0]: section for section in sections}


def shows(text: str, *rows: str) -> None:
    """Each row begins one of the text, cell by cell."""
    lines = ["|".join(map(str.strip, line.strip("|").split("|"))) for line in text.splitlines()]
    for row in rows:
        assert any(f"{line}|".startswith(f"{row}|") for line in lines), (row, lines)


def test_mean_and_spread_over_seeds(tmp_path: Path):
    for seed, value in enumerate((0.69, 0.70, 0.74)):
        save(tmp_path, value, seed=seed)
    save(tmp_path, 0.65, checkpoint="base", mixer="fnet")
    save(tmp_path, 0.7, task="reviews")
    save(tmp_path, 0.75, task="mrpc", metrics={"accuracy": 0.7, "f1": 0.8})
    save(tmp_path, 0.75, task="mrpc", seed=1, metrics={"accuracy": 0.75, "f1": 0.85})
    for seed in range(2):
        save(tmp_path, 0.6, pooler="first", seed=seed)
    found = tables(tmp_path)
    shows(
        found["Scores"],
        # own tasks come last
        "model|SST-2|MRPC|reviews",
        # standard deviation of 69, 70, 74 with two degrees of freedom
        "small (ponet), cls|71.00 ± 2.65 (3)|77.50 ± 3.54 (2)|70.00 (1)",
        "base (fnet), cls|65.00 (1)||",
        "majority baseline|50.00|50.00|50.00",
        "*PoNet-Base (PoNet paper)*|*89.22*|*81.76*|",
        "*FNet-Base (its card)*|*95.00*|*76.00*|",
        f"*BERT, first (MaxPoolBERT)*|*92.55*|*{(82.43 + 87.49) / 2:.2f}*|",
    )
    assert "CS475" not in found["Scores"]
    shows(
        found["Spread over seeds"],
        "model|SST-2|MRPC",
        "small (ponet), cls|2.65 (3)|3.54 (2)",
        "small (ponet), first|0.00 (2)|",
        # fractions in the paper: .00199 and .0242
        "*BERT, first (MaxPoolBERT)*|*0.20*|*2.42*",
    )


def test_best_point_of_a_grid_by_its_mean(tmp_path: Path, caplog):
    """An undefined score is no number, and no part of a mean."""
    caplog.set_level("INFO")
    points = ((3e-5, (0.70, 0.90)), (1e-4, (0.81, 0.82)), (3e-4, (None, 0.99)), (5e-5, (0.98,)))
    for rate, values in points:
        for seed, value in enumerate(values):
            save(tmp_path, value, learning_rate=rate, seed=seed)
    for seed, value in ((0, None), (1, 0.3)):
        save(tmp_path, value, task="cola", seed=seed, majority_metrics={"matthews": None})
    row = "small (ponet), cls|81.50 ± 0.71 (2)|undefined in 1 of 2"
    shows(report(tmp_path), row, "majority baseline|50.00|undefined")
    (summary,) = summarise(tmp_path)
    assert summary["columns"] == {"SST-2": pytest.approx(81.5), "CoLA": None}
    assert summary["averages"] == {9: None, 12: None}
    assert "SST-2: 81.50 % (seeds: 2, batch size 32, learning rate 0.0001)" in caplog.text


def test_means_of_nine_and_twelve_columns(tmp_path: Path):
    """MNLI counts twice in both; in that of twelve accuracy and F1 of QQP and MRPC, and WNLI."""
    metrics = {"matched_accuracy": 0.9, "mismatched_accuracy": 0.8, "ax_matthews": 0.1}
    majority = dict.fromkeys(metrics, 0.5) | {"ax_matthews": None}
    mnli = save(tmp_path, 0.5, task="mnli", metrics=metrics, majority_metrics=majority)
    for task in {task for task, _ in NINE_COLUMNS.values()} - {"mnli", "qqp"}:
        save(tmp_path, 0.5, task=task)
    save(tmp_path, 0.5, task="qqp", metrics={"accuracy": 0.6, "f1": 0.8})
    half = "50.00 (1)|" * 6
    row = f"small (ponet), cls|90.00 (1)|80.00 (1)|70.00 (1)|{half}"
    # the diagnostic set has a column, but no part in a mean
    nine = f"{(6 * 50 + 90 + 80 + 70) / 9:.2f}"
    figures = PUBLISHED[0]["figures"]
    published = "|".join(f"*{figures[title]:.2f}*" for title in NINE_COLUMNS)
    shows(
        report(tmp_path),
        f"{row}10.00 (1)|{nine}",
        f"*PoNet-Base (PoNet paper)*|{published}||*76.80*",
    )
    wnli = save(tmp_path, 0.3, task="wnli")
    save(tmp_path, 0.1, pooler="first")
    twelve = f"{(90 + 80 + 60 + 80 + 5 * 50 + 2 * 50 + 30) / 12:.2f}"
    shows(
        report(tmp_path),
        f"{row}30.00 (1)|10.00 (1)|{nine}|{twelve}",
        f"small (ponet), first{'|' * 5}10.00 (1){'|' * 8}",
    )
    published = [line for line in report(tmp_path).splitlines() if "BERT, first" in line]
    # MaxPoolBERT prints the second, the first is of its figures
    assert published[0].endswith("| *81.31* | *79.63* |")
    save(tmp_path, 0.3, task="wnli", differences=["other data"], num_eval=80, num_train=2)
    wnli.unlink()
    shows(report(tmp_path), f"{row}30.00 (1)†|10.00 (1)|{nine}|{twelve}†")
    mnli.unlink()
    shows(report(tmp_path), f"small (ponet), cls|70.00 (1)|{half}30.00 (1)†")


def test_poolers_by_batch_size_beside_the_reading_that_was_published(tmp_path: Path):
    for pooler, values in (("cls", (0.80, 0.82, 0.81)), ("mswap", (0.70, 0.71, 0.72))):
        for size, value in zip((16, 32, 64), values, strict=True):
            save(tmp_path, value, pooler=pooler, batch_size=size)
    for reading, value in (("sound", 0.4), ("literal", 0.3)):
        save(tmp_path, value, pooler={"name": "meanmax", "reading": reading}, batch_size=16)
    save(tmp_path, 0.5, pooler={"name": "stochastic", "reading": "literal"}, batch_size=16)
    save(tmp_path, 0.6, pooler="max_cls", task="cola")
    save(tmp_path, 0.2, segments="sentences")
    found = tables(tmp_path)
    shows(
        found["Poolers by batch size"],
        "task|batch size|cls|meanmax|meanmax-literal|mswap|stochastic-literal|max_cls",
        "SST-2|16|80.00 (1)|40.00 (1)|30.00 (1)|70.00 (1)|50.00 (1)|",
        "*SST-2, BERT*|*16*|*93.30*||*93.10*|*93.60*|*93.00*|",
        "*SST-2, BERT*|*32*|*92.80*||*93.10*|*93.10*|*93.40*|*92.62*",
        "SST-2|64|81.00 (1)|||72.00 (1)|",
        "CoLA|32||||||60.00 (1)",
    )
    shows(
        found["Scores"],
        "small (ponet), meanmax-literal|30.00 (1)",
        "small (ponet), segments sentences, cls|20.00 (1)",
    )
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "layers.png").exists()


def test_poolers_by_number_of_layers(tmp_path: Path):
    for number, value in ((1, 0.4), (2, 0.5), (3, 0.6)):
        for seed in range(2):
            pooler = {"name": "maxseq_mha", "num_layers": number}
            save(tmp_path, value + 0.1 * seed, pooler=pooler, task="cola", seed=seed)
    save(tmp_path, 0.3, pooler={"name": "max_cls", "num_layers": 2}, task="cola")
    found = tables(tmp_path)
    shows(
        found["Poolers by number of layers"],
        "pooler|layers|CoLA",
        "maxseq_mha|1|45.00 ± 7.07 (2)",
        "*maxseq_mha, BERT*|*1*|*54.85*",
        "maxseq_mha|2|55.00 ± 7.07 (2)",
        "*maxseq_mha, BERT*|*3*|*55.35*",
    )
    assert "max_cls" not in found["Poolers by number of layers"]
    assert "k=2" not in found["Scores"]
    (axes,) = draw_layers(by_layers(read_scores(tmp_path))).axes
    measured, published = drawn(axes, "maxseq_mha"), drawn(axes, "maxseq_mha, BERT, published")
    # the spread of the seeds is not that of the differences
    assert measured == pytest.approx({1: 0, 2: 10, 3: 20})
    assert published == pytest.approx({1: 0, 2: 55.76 - 54.85, 3: 55.35 - 54.85})
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def drawn(axes: Any, label: str) -> dict[float, float]:
    """Points of a curve."""
    handles, labels = axes.get_legend_handles_labels()
    handle = handles[labels.index(label)]
    line = handle[0] if isinstance(handle, tuple) else handle
    return dict(zip(*line.get_data(), strict=True))


def test_gains_over_the_baseline_by_training_examples(tmp_path: Path):
    """Differences are those of runs with the same seed."""
    scores = {
        ("first", 100): (0.50, 0.60),
        ("first", 400): (0.70, 0.80),
        ("cls", 400): (0.71, 0.80),
        ("maxseq_mha", 100): (0.54, 0.62),
        ("maxseq_mha", 400): (0.69, 0.79, 0.95),
    }
    for (pooler, size), values in scores.items():
        for seed, value in enumerate(values):
            cut = {"num_train": size, "differences": [f"trained on {size} of 67,349 rows"]}
            save(tmp_path, value, pooler=pooler, seed=seed, **cut)
    found = tables(tmp_path)
    shows(
        found["Learning curves"],
        # a model with one size has no curve
        "task|examples|first|maxseq_mha|gain of maxseq_mha",
        "SST-2|100|55.00 ± 7.07 (2)|58.00 ± 5.66 (2)|+3.00 ± 1.41 (2)",
        "SST-2|400|75.00 ± 7.07 (2)|81.00 ± 13.11 (3)|-1.00 ± 0.00 (2)",
    )
    shows(found["Scores"], "small (ponet), first|75.00 ± 7.07 (2)†")
    listed = found["Runs on other data than the published"]
    assert "- sst2: trained on 100, 400 of 67,349 rows (runs: 11)" in listed
    above, below = draw_sizes(by_size(read_scores(tmp_path))).axes
    assert drawn(above, "first") == pytest.approx({100: 55, 400: 75})
    assert drawn(below, "maxseq_mha") == pytest.approx({100: 3, 400: -1})
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG")


def test_test_sets_of_long_texts_have_columns_of_their_own(tmp_path: Path):
    both = {"accuracy": 0.9, "f1": 0.8, "test_accuracy": 0.7, "test_f1": 0.6}
    usual = {"task": "hnd", "segments": "sentences"}
    save(tmp_path, 0.8, metrics=both, majority_metrics=dict.fromkeys(both, 0.1), **usual)
    save(tmp_path, 0.7, pooler="mean", **usual)
    save(tmp_path, 0.5, **usual | {"task": "imdb"})
    text = report(tmp_path)
    shows(
        text,
        "model|HND|HND test|IMDb",
        "majority baseline|10.00|10.00|50.00",
        "small (ponet), cls|80.00 (1)|60.00 (1)|50.00 (1)",
        "small (ponet), mean|70.00 (1)|no test set|",
        "*PoNet-Base (PoNet paper)*|*96.20*||*93.00*",
    )
    assert "could not be read" in text
    assert [x["columns"] for x in summarise(tmp_path)][1] == {"HND": pytest.approx(70.0)}


def test_other_data_and_unfinished_runs_are_marked_and_never_mixed_in(tmp_path: Path):
    cut = {"num_train": 500, "differences": ["trained on 500 of 67,349 rows"]}
    (save(tmp_path, 0.9).parent / "tensorboard").mkdir()
    save(tmp_path, 0.1, seed=1, **cut)
    save(tmp_path, 0.2, pooler="mean", **cut)
    (tmp_path / "small" / "rte-cls-b32-lr5e-05-seed0" / "tensorboard").mkdir(parents=True)
    found = tables(tmp_path)
    shows(found["Scores"], "small (ponet), cls|90.00 (1)", "small (ponet), mean|20.00 (1)†")
    listed = found["Runs on other data than the published"]
    assert "- sst2: trained on 500 of 67,349 rows (runs: 2)" in listed
    listed = found["Unfinished runs, in no figure"].splitlines()
    items = [line for line in listed if line.startswith("- ")]
    assert items == ["- small/rte-cls-b32-lr5e-05-seed0"]


def test_results_that_cannot_be_used(tmp_path: Path):
    with pytest.raises(ResultError, match=r"holds no result\.json, python glue/run\.py makes them"):
        read_scores(tmp_path)
    save(tmp_path, 0.8)
    for changes, message in (
        ({}, "the same run as"),
        ({"score": float("nan")}, "score: .*finite"),
        ({"metrics": {"accuracy": "x"}}, r"metrics\.accuracy: .*'x'"),
        ({"pooler": {"name": "cls", "num_layers": 0}}, "pooler: .*num_layers must be at least 1"),
    ):
        path = save(tmp_path, 0.8, **changes)
        with pytest.raises(ResultError, match=message) as caught:
            read_scores(tmp_path)
        assert str(path) in str(caught.value)
        path.unlink()


def test_published_rows():
    """Every column and pooler is one of ours; means are those that the papers print."""
    names = {(row["name"], row.get("batch_size")) for row in PUBLISHED}
    assert len(names) == len(PUBLISHED)
    titles = {*TWELVE_COLUMNS, *(task.title for task in TASKS.values())}
    config = parse(
        ["--checkpoint", "x", "--pooler", *POOLERS, "--pooler-layers", *"1 2 3 4 6 12".split()]
    )
    literal = replace(config, reading="literal")
    labels = {pooler_label(p) for c in (config, literal) for p in c.poolers()}
    printed = []
    for row in PUBLISHED:
        assert row.get("spreads", {}).keys() <= row["figures"].keys() <= titles
        assert {*row["poolers"]} <= labels
        for count, value in row.get("averages", {}).items():
            found = average(row["figures"], count)
            printed += [found]
            assert found is None or value == pytest.approx(found, abs=0.006), row["name"]
    # the others lack WNLI
    assert sum(mean is not None for mean in printed) == 3
    assert {count: sum(weights.values()) for count, weights in AVERAGES.items()} == {9: 9, 12: 12}
