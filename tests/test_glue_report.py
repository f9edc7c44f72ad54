"""Reports of fine-tuning runs: what is averaged and chosen, what is not, and what is refused."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from glue.report import PUBLISHED, read_scores, report, summarise
from glue.settings import parse
from glue.tasks import NINE_COLUMNS, TASKS
from ponet.run.report import ResultError

(SETTINGS,) = parse(["--checkpoint", "small"]).runs_of(TASKS["sst2"], "cpu")
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
    shows(
        tables(tmp_path)["Scores"],
        # own tasks come last
        "model|SST-2|MRPC|reviews|average",
        # standard deviation of 69, 70, 74 with two degrees of freedom
        "small (ponet), cls|71.00 ± 2.65 (3)|75.00 (1)|70.00 (1)|",
        "base (fnet), cls|65.00 (1)|||",
        "majority baseline|50.00|50.00|50.00|",
        "*PoNet-Base (PoNet paper)*|*89.22*|*81.76*||*76.80*",
        "*FNet-Base (its card)*|*95.00*|*76.00*|",
        f"*BERT, cls (MaxPoolBERT)*|*92.55 ± 0.20*|*{(82.43 + 87.49) / 2:.2f}*",
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
    assert summary["average"] is None
    assert "SST-2: 81.50 % (seeds: 2, batch size 32, learning rate 0.0001)" in caplog.text


def test_nine_column_average_counts_mnli_twice(tmp_path: Path):
    metrics = {"matched_accuracy": 0.9, "mismatched_accuracy": 0.8, "ax_matthews": 0.1}
    majority = dict.fromkeys(metrics, 0.5) | {"ax_matthews": None}
    mnli = save(tmp_path, 0.5, task="mnli", metrics=metrics, majority_metrics=majority)
    for task in {task for task, _ in NINE_COLUMNS.values()} - {"mnli"}:
        save(tmp_path, 0.5, task=task)
    # the diagnostic set has a column, but no part in the average
    half, average = "50.00 (1)|" * 7, f"{(7 * 50 + 90 + 80) / 9:.2f}"
    row = f"small (ponet), cls|90.00 (1)|80.00 (1)|{half}10.00 (1)|"
    shows(report(tmp_path), row + average)
    mnli.unlink()
    shows(report(tmp_path), f"small (ponet), cls|{half}")


def test_poolers_by_batch_size_and_depth_beside_both_studies(tmp_path: Path):
    for pooler, values in (("cls", (0.80, 0.82, 0.81)), ("mswap", (0.70, 0.71, 0.72))):
        for size, value in zip((16, 32, 64), values, strict=True):
            save(tmp_path, value, pooler=pooler, batch_size=size)
    save(tmp_path, 0.6, pooler={"name": "maxseq_mha", "num_layers": 2}, task="cola")
    save(tmp_path, 0.4, pooler={"name": "mswap", "reading": "literal"}, batch_size=16)
    save(tmp_path, 0.2, segments="sentences")
    found = tables(tmp_path)
    shows(
        found["Poolers by batch size"],
        "task|batch size|cls|mswap|mswap-literal|maxseq_mha-k2",
        "SST-2|16|80.00 (1)|70.00 (1)|40.00 (1)|",
        "*SST-2, BERT*|*16*|*93.30*|*93.60*|",
        "*SST-2, BERT*|*32*|*92.55 / 92.80*|*93.10*|",
        "SST-2|64|81.00 (1)|72.00 (1)|",
        "CoLA|32||||60.00 (1)",
    )
    shows(
        found["Scores"],
        "small (ponet), maxseq_mha-k2||60.00 (1)",
        "small (ponet), mswap-literal|40.00 (1)",
        "small (ponet), segments sentences, cls|20.00 (1)",
        "*BERT, maxseq_mha k=2 (MaxPoolBERT)*||*55.76*",
    )
    assert "k=4" not in found["Scores"]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


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
    """Every column is one of a task; the average is the one that the paper prints."""
    assert len({(row["name"], row.get("batch_size")) for row in PUBLISHED}) == len(PUBLISHED)
    titles = {*NINE_COLUMNS, *(task.title for task in TASKS.values())}
    for row in PUBLISHED:
        assert row.get("spreads", {}).keys() <= row["figures"].keys() <= titles
    ponet = PUBLISHED[0]
    nine = [ponet["figures"][title] for title in NINE_COLUMNS]
    assert ponet["average"] == pytest.approx(sum(nine) / 9, abs=0.006)
