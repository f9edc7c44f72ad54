"""Scores of finished runs: read from their results, chosen from grids, averaged, in print."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import FiniteFloat

from glue.metrics import mean_of
from glue.settings import FineTuningSettings, pooler_label
from glue.tasks import NINE_COLUMNS, TASKS, TWELVE_COLUMNS
from ponet.poolers import POOLERS
from ponet.run.report import read_published, read_results, scores_text

DAGGER = "\N{DAGGER}"
_NO_TEST_SET = "no test set"
# better data are greater; figures on other data do not compare
_DATA = ["complete", "num_eval", "num_train", "max_length"]
_POINT = "batch_size learning_rate epochs warmup_fraction weight_decay dropout precision".split()
# a run's name holds its settings
_IDENTITY = ["name", "checkpoint", "mixer", "from_scratch", "num_train", "num_eval"]

AVERAGES: dict[int, dict[str, int]] = {
    9: dict.fromkeys(NINE_COLUMNS, 1),
    # the column is the mean of two metrics, each of which counts
    12: dict.fromkeys(TWELVE_COLUMNS, 1) | {"QQP": 2, "MRPC": 2},
}
"""Averages that papers print: number of columns -> weight of each of ours."""

Table = Any
"""A pandas table, whose types checkers cannot follow."""

PUBLISHED: list[dict[str, Any]] = read_published(Path(__file__).with_name("published.yaml"))
"""Figures of one model each, in percent by title of a column, in the order of reports."""
for _row in PUBLISHED:
    # two figures are accuracy and F1
    _row["figures"] = {title: float(np.mean(x)) for title, x in _row["figures"].items()}


@dataclass(frozen=True, kw_only=True)
class FineTuningResult(FineTuningSettings):
    """What a report takes from one `result.json`."""

    checkpoint: str
    mixer: str
    num_train: int
    num_eval: int
    metrics: dict[str, FiniteFloat | None]
    """From 0 to 1; None: undefined."""
    majority_metrics: dict[str, FiniteFloat | None]
    score: FiniteFloat | None
    majority: FiniteFloat | None
    differences: list[str]
    """Why the data are not the published ones."""
    device: str
    commit: str


def _encoder_title(run: Any) -> str:
    title = f"{run.checkpoint} ({run.mixer})" + (", from scratch" if run.from_scratch else "")
    published = TASKS[run.task].segments if run.task in TASKS else "texts"
    return title + ("" if run.segments == published else f", segments {run.segments}")


def read_scores(folder: Path) -> Table:
    """The scores of all finished runs below a folder, in the order of a report's rows.

    There is one row per run and column that it was scored on: the fields of `FineTuningResult`;
    model, encoder and pooler in print; `complete`, whether the data are the published ones; the
    title of the column with `value` and `majority` in percent, not a number where undefined or
    where `scored` is false: there was no test set.
    """
    runs: Table = read_results(folder, FineTuningResult, _IDENTITY, "glue/run.py")
    poolers = {name: number for number, name in enumerate(POOLERS)}
    rows = []
    for run in runs.itertuples(index=False):
        encoder, pooler = _encoder_title(run), pooler_label(run.pooler)
        number = poolers.get(run.pooler.name, len(poolers))
        variant = run.pooler.reading == "literal", run.pooler.num_layers, pooler
        shared = run._asdict() | {
            "model": f"{encoder}, {pooler}",
            "encoder": encoder,
            "pooler": pooler,
            "pooler_config": run.pooler,
            "complete": not run.differences,
            "order": (run.from_scratch, encoder, number, *variant, run.seed),
        }
        rows += [shared | column for column in _columns_of(run)]
    scores = pd.DataFrame(rows).sort_values("order", kind="stable")
    percentages = ["value", "majority"]
    scores[percentages] = 100 * scores[percentages].astype(float)
    return scores


def _columns_of(run: Any) -> list[dict[str, Any]]:
    """What a run was or should have been scored on, with its scores and the majority's."""
    if run.task not in TASKS:
        values = {"value": run.score, "majority": run.majority}
        return [{"column": run.task, "scored": True, **values}]
    task = TASKS[run.task]
    names = {t: names for t, (name, names) in NINE_COLUMNS.items() if name == task.name}
    names = names or {task.title: task.headline}
    for split in task.tests:
        names[f"{task.title} {split}"] = tuple(f"{split}_{name}" for name in task.headline)
    for other in TASKS.values():
        # the diagnostic set is not always there
        if other.trained_on == task.name and run.metrics.keys() >= set(other.headline):
            names[other.title] = other.headline
    return [
        {
            "column": title,
            "scored": run.metrics.keys() >= set(of_column),
            "value": mean_of(run.metrics, of_column),
            "majority": mean_of(run.majority_metrics, of_column),
        }
        for title, of_column in names.items()
    ]


def titles_of(scores: Table) -> list[str]:
    """Columns with a score: the nine of the published average, other tasks, own ones."""
    known = [title for task in TASKS.values() for title in (task.title, f"{task.title} test")]
    order = dict.fromkeys([*TWELVE_COLUMNS, *known])
    found = set(scores["column"])
    return [title for title in [*order, *sorted(found - order.keys())] if title in found]


def on_best_data(scores: Table, of: list[str], data: list[str] = _DATA) -> Table:
    """The first score of each of some things on the best data there are runs on."""
    return scores.sort_values(data, ascending=False, kind="stable").drop_duplicates(of)


def best_points(scores: Table, *further: str) -> Table:
    """The scores at the best point of each model's grid per task, by the mean over seeds.

    Only runs on the best data count: the published, the most examples. Points with fewer seeds than
    another are not in the running: the luck of one run would beat the mean of several. Each value
    of `further` fields has a best point of its own; with "num_train" among them, less data to learn
    from are as good as more.
    """
    any_size = "num_train" in further
    fields = [name for name in _DATA if not any_size or name not in ("complete", "num_train")]
    data = on_best_data(scores, ["model", "task"], fields)
    scores = scores.merge(data[["model", "task", *fields]])
    headline = scores.assign(score=pd.to_numeric(scores["score"])).drop_duplicates("path")
    point = list(dict.fromkeys(["model", "task", *_POINT, *further]))
    points = headline.groupby(point, sort=False)["score"].agg(
        seeds="size", mean=lambda x: x.mean(skipna=False)
    )
    # a point with an undefined score comes last among those of as many seeds
    points = points.reset_index().sort_values(["seeds", "mean"], ascending=False, kind="stable")
    return scores.merge(points.drop_duplicates(["model", "task", *further])[point])


def cells_of(scores: Table, *by: str) -> dict[Any, str]:
    """Text of the scores of each group of runs."""
    return {key: _cell_text(runs) for key, runs in scores.groupby(list(by), sort=False)}


def _cell_text(runs: Table) -> str:
    scored = runs[runs["scored"]]
    if scored.empty:
        return _NO_TEST_SET
    missing = int(scored["value"].isna().sum())
    undefined = f"undefined in {missing} of {len(scored)}"
    text = undefined if missing else scores_text(list(scored["value"]))
    return text + ("" if scored["complete"].all() else DAGGER)


def means_of(scores: Table) -> dict[str, float | None]:
    """Mean by column of one model; None where the score of a seed is undefined."""
    scored = scores[scores["scored"]]
    means = scored.groupby("column", sort=False)["value"].agg(lambda x: x.mean(skipna=False))
    return {title: None if pd.isna(mean) else mean for title, mean in means.items()}


def average(means: dict[str, float | None], count: int) -> float | None:
    """Of the columns of one of `AVERAGES`; None if one is undefined or missing."""
    weights = AVERAGES[count]
    found = [weight * x for title, weight in weights.items() if (x := means.get(title)) is not None]
    return sum(found) / count if len(found) == len(weights) else None


def published_beside(scores: Table) -> list[dict[str, Any]]:
    """The published rows that measured ones stand beside: same pooler, or same mixer."""
    # BERT is what poolers were studied on; whatever the encoder here, its figures are the only ones
    mixers, poolers = {*scores["mixer"], "attention"}, set(scores["pooler"])
    return [row for row in PUBLISHED if poolers & {*row["poolers"]} and row["mixer"] in mixers]


def italic(texts: list[str]) -> list[str]:
    """Cells of a row of published figures."""
    return [f"*{text}*" if text else "" for text in texts]
