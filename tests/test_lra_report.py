"""Reports of Long Range Arena runs: what is averaged, what is not, and what is refused."""

import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lra.published import PUBLISHED
from lra.report import write_report
from lra.summary import make_groups, read_results
from lra.tasks import COMPARED
from ponet.mixers import MIXERS
from ponet.run.report import ResultError

ROOT = Path(__file__).resolve().parents[1]
MAJORITY = {"listops": 0.17, "text": 0.5, "retrieval": 0.5, "image": 0.1, "pathfinder": 0.5}


def save(root: Path, **changes: Any) -> Path:
    """Write one result as a run does."""
    result = {
        "task": "text",
        "model": "ponet",
        "protocol": "published",
        "seed": 0,
        "pretrain_epochs": 0,
        "complete": True,
        "departures": [],
        "steps": 20000,
        "planned_steps": 20000,
        "published_steps": 20000,
        "test_accuracy": 0.7,
        "dev_accuracy": 0.71,
        "best_step": 500,
        "num_parameters": 387202,
        "steps_per_s": 4.0,
        "seconds": 5000.0,
        "num_test_examples": 24992,
        "commit": "abc",
        "device": "cpu, 2 threads",
        "precision": "fp32",
        "data": {"digest": "d1", "source": "generated"},
        **changes,
    }
    result.setdefault("majority_rate", MAJORITY[result["task"]])
    name = f"{result['task']}-{result['model']}-seed{result['seed']}"
    group = result["protocol"] + ("-pretrained" if result["pretrain_epochs"] else "")
    path = root / group / name / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))
    return path


def row(text: str, name: str) -> list[str]:
    """Cells of the first row with this name."""
    (line, *_) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_mean_and_spread_over_seeds(tmp_path: Path):
    for seed, accuracy in enumerate((0.69, 0.70, 0.74)):
        save(tmp_path, seed=seed, test_accuracy=accuracy, steps_per_s=4.0 + seed)
    save(tmp_path, model="attention", test_accuracy=0.65)
    text = write_report(tmp_path)
    # standard deviation of 69, 70, 74 with two degrees of freedom
    assert row(text, "PoNet") == ["PoNet", "71.00 ± 2.65 (3)", ""]
    assert row(text, "Transformer (attention)")[1] == "65.00 (1)"
    assert row(text, "commonest class")[1] == "50.00"
    assert row(text, "*PoNet, PoNet paper*")[1:] == ["*69.82*", "*61.05*"]
    speeds = text.split("Training steps a second:")[1]
    assert row(speeds, "PoNet") == ["PoNet", "5"]


def test_average_needs_all_five_tasks(tmp_path: Path):
    accuracies = (0.38, 0.70, 0.80, 0.47, 0.70)
    for task, accuracy in zip(COMPARED, accuracies, strict=True):
        save(tmp_path, task=task, test_accuracy=accuracy)
        if task != "image":
            save(tmp_path, task=task, model="fnet", test_accuracy=accuracy)
    save(tmp_path, task="image", model="fnet", complete=False, steps=7)
    text = write_report(tmp_path)
    assert row(text, "PoNet")[-1] == "61.00"
    assert row(text, "FNet")[-1] == ""
    # its published row has no average either, because it failed on Pathfinder
    assert row(text, "*FNet, PoNet paper*")[-2:] == ["*fails*", ""]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report[0]["models"]["ponet"]["average"] == pytest.approx(61.0)
    assert report[0]["models"]["fnet"]["average"] is None


def test_incomplete_runs_are_listed_but_not_averaged(tmp_path: Path):
    save(tmp_path, seed=0, test_accuracy=0.70)
    changes = {"complete": False, "steps": 40, "data": {"digest": "tiny"}}
    save(tmp_path, seed=1, test_accuracy=0.10, departures=["steps", "dropout"], **changes)
    save(tmp_path, seed=2, **changes)
    text = write_report(tmp_path)
    assert row(text, "PoNet")[1] == "70.00 (1)"
    listed = text.split("### Incomplete runs")[1]
    first, second = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in listed.splitlines()[4:6]
    )
    assert first == ["Text", "PoNet", "1", "40", "20000", "10.00", "50.00", "4", "steps, dropout"]
    # all settings are the published ones
    assert second[-1] == "data"


def test_report_of_incomplete_runs_alone(tmp_path: Path):
    save(tmp_path, complete=False)
    assert "No complete runs." in write_report(tmp_path)
    assert (tmp_path / "report.png").stat().st_size > 5000


def test_protocols_and_pretrained_runs_stay_apart(tmp_path: Path):
    save(tmp_path, test_accuracy=0.60)
    save(tmp_path, test_accuracy=0.70, protocol="clean")
    save(tmp_path, test_accuracy=0.80, protocol="clean", pretrain_epochs=2)
    groups = make_groups(read_results(tmp_path))
    found = [(group.name, group.cells["ponet", "text"].mean) for group in groups]
    assert found == [
        ("published", pytest.approx(60.0)),
        ("clean", pytest.approx(70.0)),
        ("clean, self-pretrained", pytest.approx(80.0)),
    ]


def test_figure_has_a_panel_a_task_and_is_wide_enough(tmp_path: Path):
    for seed in range(2):
        for task in COMPARED:
            for model in ("ponet", "attention", "fnet"):
                save(tmp_path, task=task, model=model, seed=seed, test_accuracy=0.4 + 0.1 * seed)
    save(tmp_path, protocol="clean", complete=False)
    write_report(tmp_path)
    content = (tmp_path / "report.png").read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content[:4] == b"\x89PNG"
    assert width > 1200
    assert height > 500


def test_published_averages_are_those_of_the_table():
    assert set(PUBLISHED) <= set(MIXERS)
    # the averages that the table prints
    printed = {"attention": 58.77, "performer": 53.63, "reformer": 55.04, "linformer": 55.59}
    printed |= {"nystromformer": 58.95, "ponet": 61.05, "longformer": 53.46, "bigbird": 55.01}
    printed |= {"linear": 54.16}
    for model, average in printed.items():
        assert PUBLISHED[model].average == pytest.approx(average, abs=0.006)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_accuracy": "high"}, "result.json: test_accuracy: expected float, found 'high'"),
        ({"complete": 1}, "result.json: complete: expected bool, found 1"),
        ({"seed": True}, "result.json: seed: expected int, found True"),
        ({"data": None}, "result.json: expected an object with the field 'data'"),
    ],
)
def test_unusable_results_are_named(tmp_path: Path, changes, message):
    save(tmp_path, **changes)
    with pytest.raises(ResultError, match=re.escape(message)):
        write_report(tmp_path)
    assert not (tmp_path / "report.md").exists()


def test_damaged_and_unknown_results_are_named(tmp_path: Path):
    path = save(tmp_path)
    path.write_text('{"task": "te')
    with pytest.raises(ResultError, match=f"{re.escape(str(path))}: cannot be read"):
        read_results(tmp_path)
    other = save(tmp_path / "b", task="text", majority_rate=0.5)
    other.write_text(other.read_text().replace('"text"', '"chess"'))
    with pytest.raises(ResultError, match=r"task: expected one of listops, .*found 'chess'"):
        read_results(tmp_path / "b")


def test_one_run_must_not_count_twice(tmp_path: Path):
    save(tmp_path / "a")
    save(tmp_path / "b")
    with pytest.raises(ResultError, match="the same run as"):
        read_results(tmp_path)


def test_complete_runs_on_different_data_are_refused(tmp_path: Path):
    save(tmp_path)
    save(tmp_path, seed=1, data={"digest": "d2"})
    with pytest.raises(ResultError, match=r"text: .* different data \(d1, d2\)"):
        make_groups(read_results(tmp_path))


def test_command_line(tmp_path: Path):
    save(tmp_path / "runs" / "lra")
    command = [sys.executable, str(ROOT / "lra" / "report.py")]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "runs" / "lra" / "report.md").read_text()
    empty = [*command, str(tmp_path / "nothing")]
    done = subprocess.run(empty, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "nothing: holds no result.json" in done.stderr
