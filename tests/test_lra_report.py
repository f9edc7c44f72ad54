"""Reports of Long Range Arena runs: what is averaged, what is not, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lra.report import PUBLISHED, report
from lra.tasks import COMPARED
from ponet.run.report import ResultError


def save(root: Path, **changes: Any) -> Path:
    result = {"task": "text", "model": "ponet", "protocol": "published", "seed": 0}
    result |= {"pretrain_epochs": 0, "complete": True, "differences": [], "steps": 20000}
    result |= {"published_steps": 20000, "test_accuracy": 0.7, "step_ms": 4.0, "commit": "abc"}
    result |= {"majority_rate": 0.5, "device": "cpu", "data": {"digest": "d1"}, "more": 1}
    path = root / str(len([*root.rglob("result.json")])) / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result | changes))
    return path


def row(text: str, name: str) -> list[str]:
    """Cells of the first row with this name."""
    (line, *_) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def rows(text: str) -> list[str]:
    """Names of the rows of the first table."""
    _, table = text.split("---: |\n", 1)
    return [line.split(" | ")[0].strip("| ") for line in table.split("\n\n")[0].splitlines()]


def test_mean_and_spread_over_seeds(tmp_path: Path):
    for seed, accuracy in enumerate((0.69, 0.70, 0.74)):
        save(tmp_path, seed=seed, test_accuracy=accuracy, step_ms=4.0 + seed)
    save(tmp_path, model="attention", test_accuracy=0.65)
    save(tmp_path, model="own", test_accuracy=0.60)
    text = report(tmp_path)
    # standard deviation of 69, 70, 74 with two degrees of freedom
    assert row(text, "PoNet") == ["PoNet", "71.00 ± 2.65 (3)", ""]
    assert row(text, "Transformer (attention)")[1] == "65.00 (1)"
    assert row(text, "majority baseline")[1] == "50.00"
    assert row(text, "*PoNet, PoNet paper*")[1:] == ["*69.82*", "*61.05*"]
    # a mixer that no table has comes last, but for what was published in other settings
    others = [f"*Transformer, {source} paper, other setting*" for source in ("LRA", "FNet")]
    names = ["majority baseline", "PoNet", "*PoNet, PoNet paper*", "Transformer (attention)"]
    assert rows(text) == [*names, "*Transformer, Nystromformer paper*", "own", *others]
    speeds = text.split("Milliseconds per training step:")[1]
    assert row(speeds, "PoNet") == ["PoNet", "5"]
    assert (tmp_path / "report.md").read_text() == text


def test_average_needs_all_five_tasks(tmp_path: Path):
    accuracies = (0.38, 0.70, 0.80, 0.47, 0.70)
    for task, accuracy in zip(COMPARED, accuracies, strict=True):
        save(tmp_path, task=task, test_accuracy=accuracy)
        if task != "image":
            save(tmp_path, task=task, model="fnet", test_accuracy=accuracy)
    save(tmp_path, task="image", model="fnet", complete=False, steps=7)
    text = report(tmp_path)
    assert row(text, "PoNet")[1:] == [f"{100 * x:.2f} (1)" for x in accuracies] + ["61.00"]
    assert row(text, "FNet")[-3:] == ["", "70.00 (1)", ""]
    # the published one is over four tasks, because it failed on Pathfinder
    assert row(text, "*FNet, PoNet paper*")[-2:] == ["*fails*", "*53.10 (mean of 4)*"]


def test_incomplete_runs_are_listed_but_not_averaged(tmp_path: Path):
    save(tmp_path, seed=0, test_accuracy=0.70)
    changes = {"complete": False, "steps": 40, "data": {"digest": "tiny"}}
    save(tmp_path, seed=1, test_accuracy=0.10, differences=["steps", "dropout"], **changes)
    save(tmp_path, seed=2, **changes)
    without = ["use_local"]
    save(tmp_path, seed=2, ablation=without, differences=without, **changes)
    text = report(tmp_path)
    assert row(text, "PoNet")[1] == "70.00 (1)"
    assert "| Text | PoNet | 1 | 40 | 20000 | 10.00 | 50.00 | 4 | steps, dropout |" in text
    # all settings are the published ones, or the row says what is not
    for name in ("PoNet", "PoNet without local max-pooling"):
        assert f"| Text | {name} | 2 | 40 | 20000 | 70.00 | 50.00 | 4 | data |" in text


def test_protocols_and_pretrained_runs_stay_apart(tmp_path: Path):
    save(tmp_path, test_accuracy=0.60)
    save(tmp_path, test_accuracy=0.70, protocol="clean")
    save(tmp_path, test_accuracy=0.80, protocol="clean", pretrain_epochs=2)
    save(tmp_path, complete=False, protocol="clean", pretrain_epochs=2, model="fnet")
    _, *groups = report(tmp_path).split("## Protocol: ")
    names = ["published", "clean", "clean, self-pretrained"]
    assert [group.splitlines()[0] for group in groups] == names
    assert [row(group, "PoNet")[1] for group in groups] == ["60.00 (1)", "70.00 (1)", "80.00 (1)"]
    save(tmp_path / "b", complete=False)
    assert "No complete runs." in report(tmp_path / "b")


def test_every_published_row_stands_beside_its_model(tmp_path: Path):
    """All 14 of the paper's table, and the Linear Transformer's, which it lacks."""
    for name in ("ponet", "attention", "fnet", "fnet_linear", "linear", "linformer"):
        save(tmp_path, model=name)
    for name in ("nystromformer", "performer", "reformer", "longformer", "bigbird"):
        save(tmp_path, model=name)
    text = report(tmp_path)
    assert len([name for name in rows(text) if name.startswith("*")]) == 15
    assert row(text, "*Linear, FNet paper, other setting*")[1:] == ["*53.35*", "*54.16*"]
    found = row(text, "*Linear Transformer, LRA repository, other setting*")
    assert found[1:] == ["*65.90*", "*50.55*"]
    for published in PUBLISHED:
        figures = [value for value in published["accuracy"].values() if value is not None]
        assert published["average"] == pytest.approx(sum(figures) / len(figures), abs=0.0051)


def test_forms_and_ablations_are_rows_of_their_own(tmp_path: Path):
    save(tmp_path, test_accuracy=0.60)
    for seed in range(2):
        without = ["use_global_second_stage", "use_local"]
        save(tmp_path, seed=seed, test_accuracy=0.5, ablation=without, differences=without)
    save(tmp_path, model="performer", mixer="performer_published", test_accuracy=0.4)
    save(tmp_path, model="performer", mixer="performer", test_accuracy=0.3, seed=1)
    # results of earlier versions do not say it, but have the form of the paper
    save(tmp_path, model="performer", test_accuracy=0.3)
    text = report(tmp_path)
    names = ["PoNet", "PoNet without the second stage of global aggregation and local max-pooling"]
    names += ["*PoNet, PoNet paper*", "Performer, as in its paper"]
    names += ["Performer, as published", "*Performer, Nystromformer paper*"]
    assert rows(text)[1:7] == names
    figures = [row(text, name)[1] for name in (names[0], names[1], names[3], names[4])]
    assert figures == ["60.00 (1)", "50.00 ± 0.00 (2)", "30.00 ± 0.00 (2)", "40.00 (1)"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_accuracy": "high"}, "result.json: test_accuracy: Input should be a valid number"),
        ({"complete": 1}, "result.json: complete: Input should be a valid boolean, found 1"),
        ({"seed": True}, "result.json: seed: Input should be a valid integer, found True"),
        ({"data": {}}, "result.json: data.digest: Field required"),
        ({"task": "chess"}, "task: expected one of listops, "),
        ({"protocol": "published"}, "result.json: the same run as"),
        ({"seed": 1, "data": {"digest": "d2"}}, "published are on different data (d1, d2)"),
    ],
)
def test_unusable_results_are_named(tmp_path: Path, changes, message):
    save(tmp_path / "a")
    save(tmp_path / "b", **changes)
    with pytest.raises(ResultError, match=re.escape(message)):
        report(tmp_path)
    assert not (tmp_path / "report.md").exists()
    path = save(tmp_path / "damaged")
    path.write_text('{"task": "te')
    with pytest.raises(ResultError, match=re.escape(str(path))):
        report(tmp_path / "damaged")
