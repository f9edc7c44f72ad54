"""The tasks: what their files hold, how they are scored, and how large they were published.

Row counts are those of the GLUE benchmark (arXiv 1804.07461) and of the PoNet paper's long texts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Segments = Literal["texts", "sentences", "paragraphs"]
"""What PoNet pools by segment: each text whole, its sentences, or its blank-line paragraphs."""

Column = str | int
"""By its name in the header, or by its place, from 0, in a file without one."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A file: where its columns are."""

    file: str
    """Name in the task's folder; `*` stands for anything. Its ending says the format."""
    texts: tuple[Column, ...]
    """One text, or the two of a pair."""
    label: Column | None = None
    """None: the file has no labels."""
    index: Column | None = None
    """What a submission calls the row; None: rows are counted from 0."""
    labels: tuple[str, ...] | None = None
    """Labels as this file writes them, in the order of the classes; None: as the task does."""
    skips_incomplete: bool = False
    """Rows that lack a column or a text are left out and counted, not refused."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """Files of one origin; those that are not there are done without, but for "train"."""

    tables: Mapping[str, Table]
    """By split."""
    departure: str | None = None
    """Why figures cannot stand beside published ones, if so."""
    rows: Mapping[str, int] | None = None
    """Rows that the files should have, by split; None: with a departure any number, else the
    published one of the task."""


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A data set of the Hugging Face hub, whose labels are numbers of classes."""

    name: str
    """With its owner."""
    splits: Mapping[str, str]
    """Split here -> split there."""
    texts: tuple[str, ...]
    """Columns."""
    config: str | None = None
    """Configuration of the data set."""
    departure: str | None = None
    """As in `Files`."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task."""

    name: str
    """On the command line."""
    title: str
    """In tables, and its folder in the official layout."""
    labels: tuple[str, ...]
    """In the order of the classes; none: a regression."""
    metrics: tuple[str, ...]
    """Of an evaluation set, keys of `glue.metrics.METRICS`."""
    headline: tuple[str, ...]
    """Names in a result whose mean is the score."""
    files: tuple[Files, ...]
    """Layouts, in order of preference."""
    rows: Mapping[str, int]
    """Published rows by split."""
    folders: tuple[str, ...]
    """Where the files may lie below the data folder, in order of preference."""
    hub: Hub | None = None
    """Where else the data are."""
    evaluation: tuple[str, ...] = ("dev",)
    """Splits that are scored; with more than one, their names stand before those of metrics."""
    submissions: Mapping[str, str] = field(default_factory=dict)
    """Name of a submission file -> split without labels."""
    bounds: tuple[float, float] | None = None
    """Lowest and highest label of a regression, which submissions keep to."""
    writes_label_names: bool = False
    """Submissions hold names of labels; otherwise numbers of classes."""
    trained_on: str | None = None
    """The task whose model is scored, where this one has no training set."""
    max_length: int = 128
    """Tokens of an example at most, special ones included, as published."""
    segments: Segments = "texts"
    """As published."""
    epochs: int = 4
    """Passes over the training set, as published."""

    @property
    def is_regression(self) -> bool:
        """Labels are numbers."""
        return not self.labels

    @property
    def is_long(self) -> bool:
        """Texts are documents: positions beyond a checkpoint's 512."""
        return self.max_length > 512


_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")
_GLUE_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_LONG = 4096


def _glue_files(texts: tuple[str, ...], label: str, *, skips_incomplete: bool = False) -> Files:
    """The official layout of most tasks."""
    labelled = {
        split: Table(
            file=f"{split}.tsv", texts=texts, label=label, skips_incomplete=skips_incomplete
        )
        for split in ("train", "dev")
    }
    test = Table(file="test.tsv", texts=texts, index=0)
    return Files(tables=labelled | {"test": test})


def _glue_hub(config: str, texts: tuple[str, ...]) -> Hub:
    return Hub(name="nyu-mll/glue", config=config, splits=_GLUE_SPLITS, texts=texts)


def _folders(title: str) -> tuple[str, ...]:
    return (title, f"glue/{title}")


_COLA = Task(
    name="cola",
    title="CoLA",
    labels=_BINARY,
    metrics=("matthews",),
    headline=("matthews",),
    folders=_folders("CoLA"),
    files=(
        Files(
            tables={
                "train": Table(file="train.tsv", texts=(3,), label=1),
                "dev": Table(file="dev.tsv", texts=(3,), label=1),
                "test": Table(file="test.tsv", texts=("sentence",), index="index"),
            }
        ),
    ),
    hub=_glue_hub("cola", ("sentence",)),
    rows={"train": 8551, "dev": 1043, "test": 1063},
    submissions={"CoLA": "test"},
)

_SST2 = Task(
    name="sst2",
    title="SST-2",
    labels=_BINARY,
    metrics=("accuracy",),
    headline=("accuracy",),
    folders=_folders("SST-2"),
    files=(_glue_files(("sentence",), "label"),),
    hub=_glue_hub("sst2", ("sentence",)),
    rows={"train": 67349, "dev": 872, "test": 1821},
    submissions={"SST-2": "test"},
)

_MRPC_TEXTS = ("#1 String", "#2 String")
_MRPC = Task(
    name="mrpc",
    title="MRPC",
    labels=_BINARY,
    metrics=("accuracy", "f1"),
    headline=("accuracy", "f1"),
    folders=_folders("MRPC"),
    files=(
        _glue_files(_MRPC_TEXTS, "Quality"),
        Files(
            tables={
                "train": Table(file="msr_paraphrase_train.txt", texts=_MRPC_TEXTS, label="Quality"),
                "test": Table(file="msr_paraphrase_test.txt", texts=_MRPC_TEXTS),
            },
            departure="the paraphrase corpus is cut here, not as by GLUE",
            rows={"train": 4076, "test": 1725},
        ),
    ),
    hub=_glue_hub("mrpc", _PAIR),
    rows={"train": 3668, "dev": 408, "test": 1725},
    submissions={"MRPC": "test"},
)

_STSB = Task(
    name="stsb",
    title="STS-B",
    labels=(),
    metrics=("pearson", "spearman"),
    headline=("spearman",),
    folders=_folders("STS-B"),
    files=(
        _glue_files(_PAIR, "score"),
        Files(
            tables={
                "train": Table(file="sts-train.tsv", texts=(5, 6), label=4),
                "dev": Table(file="sts-dev.tsv", texts=(5, 6), label=4),
                "test": Table(file="sts-test.tsv", texts=(5, 6)),
            }
        ),
    ),
    hub=_glue_hub("stsb", _PAIR),
    rows={"train": 5749, "dev": 1500, "test": 1379},
    submissions={"STS-B": "test"},
    bounds=(0.0, 5.0),
)

_QQP_TEXTS = ("question1", "question2")
_QQP = Task(
    name="qqp",
    title="QQP",
    labels=_BINARY,
    metrics=("accuracy", "f1"),
    headline=("accuracy", "f1"),
    folders=_folders("QQP"),
    files=(
        # the official files have a few broken lines, which the published counts leave out
        _glue_files(_QQP_TEXTS, "is_duplicate", skips_incomplete=True),
        Files(
            tables={"train": Table(file="dev_subset.tsv", texts=_QQP_TEXTS, label="is_duplicate")},
            departure="trained and scored on a part of the development set",
        ),
    ),
    hub=_glue_hub("qqp", _QQP_TEXTS),
    rows={"train": 363846, "dev": 40430, "test": 390965},
    submissions={"QQP": "test"},
)

_MNLI = Task(
    name="mnli",
    title="MNLI",
    labels=_NLI,
    metrics=("accuracy",),
    headline=("matched_accuracy",),
    folders=_folders("MNLI"),
    evaluation=("matched", "mismatched"),
    files=(
        Files(
            tables={
                "train": Table(file="train.tsv", texts=_PAIR, label="gold_label"),
                "matched": Table(file="dev_matched.tsv", texts=_PAIR, label="gold_label"),
                "mismatched": Table(file="dev_mismatched.tsv", texts=_PAIR, label="gold_label"),
                "test_matched": Table(file="test_matched.tsv", texts=_PAIR, index="index"),
                "test_mismatched": Table(file="test_mismatched.tsv", texts=_PAIR, index="index"),
            }
        ),
        Files(
            tables={
                "train": Table(file="mnli_train_20k.tsv", texts=_PAIR, label="label"),
                "matched": Table(file="mnli_val_3k.tsv", texts=_PAIR, label="label"),
            },
            departure="a subset of 20,000 pairs, tokenised",
        ),
    ),
    hub=Hub(
        name="nyu-mll/glue",
        config="mnli",
        splits={
            "train": "train",
            "matched": "validation_matched",
            "mismatched": "validation_mismatched",
            "test_matched": "test_matched",
            "test_mismatched": "test_mismatched",
        },
        texts=("premise", "hypothesis"),
    ),
    rows={
        "train": 392702,
        "matched": 9815,
        "mismatched": 9832,
        "test_matched": 9796,
        "test_mismatched": 9847,
    },
    submissions={"MNLI-m": "test_matched", "MNLI-mm": "test_mismatched"},
    writes_label_names=True,
)

_AX = Task(
    name="ax",
    title="AX",
    labels=_NLI,
    metrics=("matthews",),
    headline=("ax_matthews",),
    trained_on="mnli",
    folders=("AX", "glue/AX", "diagnostic", "glue/diagnostic"),
    evaluation=("ax",),
    files=(
        Files(
            tables={
                "ax": Table(
                    file="diagnostic-full.tsv", texts=("Premise", "Hypothesis"), label="Label"
                ),
                "test": Table(file="diagnostic.tsv", texts=_PAIR, index="index"),
            }
        ),
    ),
    hub=Hub(
        name="nyu-mll/glue",
        config="ax",
        splits={"test": "test"},
        texts=("premise", "hypothesis"),
    ),
    rows={"ax": 1104, "test": 1104},
    submissions={"AX": "test"},
    writes_label_names=True,
)

_QNLI = Task(
    name="qnli",
    title="QNLI",
    labels=_ENTAILMENT,
    metrics=("accuracy",),
    headline=("accuracy",),
    folders=_folders("QNLI"),
    files=(
        _glue_files(("question", "sentence"), "label"),
        Files(
            tables={
                "train": Table(file="dev_part1.tsv", texts=("question", "sentence"), label="label")
            },
            departure="trained and scored on a part of the development set",
        ),
    ),
    hub=_glue_hub("qnli", ("question", "sentence")),
    rows={"train": 104743, "dev": 5463, "test": 5463},
    submissions={"QNLI": "test"},
    writes_label_names=True,
)

_RTE = Task(
    name="rte",
    title="RTE",
    labels=_ENTAILMENT,
    metrics=("accuracy",),
    headline=("accuracy",),
    folders=_folders("RTE"),
    files=(_glue_files(_PAIR, "label"),),
    hub=_glue_hub("rte", _PAIR),
    rows={"train": 2490, "dev": 277, "test": 3000},
    submissions={"RTE": "test"},
    writes_label_names=True,
)

_WNLI = Task(
    name="wnli",
    title="WNLI",
    labels=_BINARY,
    metrics=("accuracy",),
    headline=("accuracy",),
    folders=_folders("WNLI"),
    files=(_glue_files(_PAIR, "label"),),
    hub=_glue_hub("wnli", _PAIR),
    rows={"train": 635, "dev": 71, "test": 146},
    submissions={"WNLI": "test"},
)

_HND = Task(
    name="hnd",
    title="HND",
    labels=("false", "true"),
    metrics=("accuracy", "f1"),
    headline=("f1",),
    folders=("hyperpartisan", "hyperpartisan_news_detection"),
    files=(
        Files(
            tables={
                "train": Table(file="train.jsonl", texts=("text",), label="label"),
                "dev": Table(file="dev.jsonl", texts=("text",), label="label"),
            }
        ),
    ),
    rows={"train": 516, "dev": 64},
    max_length=_LONG,
    segments="sentences",
    epochs=10,
)

_IMDB = Task(
    name="imdb",
    title="IMDb",
    labels=_BINARY,
    metrics=("accuracy", "f1"),
    headline=("f1",),
    folders=("imdb",),
    files=(
        Files(
            tables={
                "train": Table(file="train.jsonl*", texts=("text",), label="label"),
                # as published, the test set is what is scored
                "dev": Table(file="test*.jsonl*", texts=("text",), label="label"),
            }
        ),
    ),
    hub=Hub(name="stanfordnlp/imdb", splits={"train": "train", "dev": "test"}, texts=("text",)),
    rows={"train": 25000, "dev": 25000},
    max_length=_LONG,
    segments="sentences",
    epochs=10,
)

_STARS = tuple(f"Review Stars: {stars}.0" for stars in range(1, 6))
_YELP5 = Task(
    name="yelp5",
    title="Yelp-5",
    labels=("1", "2", "3", "4", "5"),
    metrics=("accuracy",),
    headline=("accuracy",),
    folders=("yelp5",),
    files=(
        Files(
            tables={
                "train": Table(
                    file="dev_5000.csv*", texts=("text",), label="label2", labels=_STARS
                ),
                "dev": Table(file="test_4000.csv*", texts=("text",), label="label2", labels=_STARS),
            },
            departure="an unbalanced sample of reviews, not Yelp-5",
        ),
    ),
    hub=Hub(
        name="Yelp/yelp_review_full",
        # a tenth of the reviews is in neither part, as published
        splits={"train": "train[20%:]", "dev": "train[:10%]"},
        texts=("text",),
    ),
    rows={"train": 520000, "dev": 65000},
    max_length=_LONG,
    segments="sentences",
    epochs=2,
)

_ARXIV11 = Task(
    name="arxiv11",
    title="Arxiv-11",
    labels=tuple("cs.AI cs.CE cs.CV cs.DS cs.IT cs.NE cs.PL cs.SY math.AC math.GR math.ST".split()),
    metrics=("accuracy",),
    headline=("accuracy",),
    folders=("arxiv11",),
    files=(
        Files(
            tables={
                "train": Table(file="train.jsonl*", texts=("text",), label="label"),
                "dev": Table(file="dev.jsonl*", texts=("text",), label="label"),
            }
        ),
    ),
    hub=Hub(
        name="ccdv/arxiv-classification",
        splits={"train": "train", "dev": "validation"},
        texts=("text",),
        departure="split as on the hub, not as published",
    ),
    rows={},
    max_length=_LONG,
    segments="paragraphs",
    epochs=10,
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(_COLA, _SST2, _MRPC, _STSB, _QQP, _MNLI, _QNLI, _RTE, _WNLI, _AX),
        *(_HND, _IMDB, _YELP5, _ARXIV11),
    )
}
"""All tasks by name."""

NINE_COLUMNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "MNLI-m": ("mnli", ("matched_accuracy",)),
    "MNLI-mm": ("mnli", ("mismatched_accuracy",)),
    **{
        TASKS[name].title: (name, TASKS[name].headline)
        for name in ("qqp", "qnli", "sst2", "cola", "stsb", "mrpc", "rte")
    },
}
"""Columns of the published average: title -> task, and names of metrics to take the mean of."""
