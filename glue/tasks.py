"""The tasks: what their files hold, how they are scored, and how large they were published.

Row counts are those of the GLUE benchmark (arXiv 1804.07461) and of the PoNet paper's long texts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Segments = Literal["texts", "sentences", "paragraphs"]
"""What PoNet pools by segment: each text whole, its sentences, or its blank-line paragraphs."""

ColumnKey = str | int
"""By its name in the header, or by its place, from 0, in a file without one."""


@dataclass(frozen=True, kw_only=True)
class FileColumns:
    """A file of examples: where its columns are."""

    file: str
    """Name in the task's folder; `*` stands for anything. Its ending says the format."""
    texts: tuple[ColumnKey, ...]
    """One text, or the two of a pair."""
    label: ColumnKey | None = None
    """None: the file has no labels."""
    index: ColumnKey | None = None
    """What a submission calls the row; None: rows are counted from 0."""
    skips_incomplete: bool = False
    """Rows that lack a column or a text are left out and counted, not refused."""


@dataclass(frozen=True, kw_only=True)
class TaskFiles:
    """Files of one origin; those that are not there are done without, but for "train"."""

    splits: Mapping[str, FileColumns]
    difference: str | None = None
    """Why figures cannot stand beside published ones, if so."""
    rows: Mapping[str, int] | None = None
    """Rows that the files should have, by split; None: the published ones of the task, or with a
    difference any number."""


@dataclass(frozen=True, kw_only=True)
class HubData:
    """A data set of the Hugging Face hub, whose labels are numbers of classes."""

    name: str
    """With its owner."""
    splits: Mapping[str, str]
    """Split here -> split there."""
    texts: tuple[str, ...]
    config: str | None = None
    difference: str | None = None
    """As in `TaskFiles`."""


@dataclass(frozen=True, kw_only=True)
class TextTask:
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
    files: tuple[TaskFiles, ...] = ()
    """Layouts, in order of preference."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """Published rows by split."""
    folders: tuple[str, ...] = ()
    """Where the files may lie below the data folder; none: in that of the title."""
    hub: HubData | None = None
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
    """As published."""

    @property
    def is_regression(self) -> bool:
        """Labels are numbers."""
        return not self.labels

    @property
    def is_long(self) -> bool:
        """Texts are documents: positions beyond a checkpoint's 512."""
        return self.max_length > 512

    @property
    def all_folders(self) -> tuple[str, ...]:
        """Where files may lie below the data folder, in order of preference."""
        return tuple(p + n for n in self.folders or (self.title,) for p in ("", "glue/"))


_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")


def _labelled(
    texts: tuple[ColumnKey, ...], label: ColumnKey, *, skips_incomplete: bool = False, **files: str
) -> dict[str, FileColumns]:
    """Files to learn from and to score, by split."""
    return {
        split: FileColumns(file=file, texts=texts, label=label, skips_incomplete=skips_incomplete)
        for split, file in files.items()
    }


def _unlabelled(
    texts: tuple[ColumnKey, ...], index: ColumnKey | None, **files: str
) -> dict[str, FileColumns]:
    """Files to predict, by split."""
    return {
        split: FileColumns(file=file, texts=texts, index=index) for split, file in files.items()
    }


def _glue_task(
    name: str,
    title: str,
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
    rows: tuple[int, int, int],
    *,
    texts: tuple[str, ...],
    label: str = "label",
    hub_texts: tuple[str, ...] | None = None,
    headline: tuple[str, ...] | None = None,
    skips_incomplete: bool = False,
    files: tuple[TaskFiles, ...] | None = None,
    more_files: tuple[TaskFiles, ...] = (),
    bounds: tuple[float, float] | None = None,
) -> TextTask:
    """A task in the official layout of most: `train.tsv`, `dev.tsv`, `test.tsv` with headers."""
    official = TaskFiles(
        splits=_labelled(
            texts, label, skips_incomplete=skips_incomplete, train="train.tsv", dev="dev.tsv"
        )
        | _unlabelled(texts, 0, test="test.tsv")
    )
    return TextTask(
        name=name,
        title=title,
        labels=labels,
        metrics=metrics,
        headline=headline or metrics,
        files=files or (official, *more_files),
        rows=dict(zip(("train", "dev", "test"), rows, strict=True)),
        hub=HubData(
            name="nyu-mll/glue",
            config=name,
            splits={"train": "train", "dev": "validation", "test": "test"},
            texts=hub_texts or texts,
        ),
        submissions={title: "test"},
        bounds=bounds,
        writes_label_names=labels == _ENTAILMENT,
    )


_COLA = _glue_task(
    "cola",
    "CoLA",
    _BINARY,
    ("matthews",),
    (8551, 1043, 1063),
    texts=("sentence",),
    files=(
        TaskFiles(
            splits=_labelled((3,), 1, train="train.tsv", dev="dev.tsv")
            | _unlabelled(("sentence",), "index", test="test.tsv")
        ),
    ),
)

_SST2 = _glue_task("sst2", "SST-2", _BINARY, ("accuracy",), (67349, 872, 1821), texts=("sentence",))

_MRPC_TEXTS = ("#1 String", "#2 String")
_MRPC = _glue_task(
    "mrpc",
    "MRPC",
    _BINARY,
    ("accuracy", "f1"),
    (3668, 408, 1725),
    texts=_MRPC_TEXTS,
    label="Quality",
    hub_texts=_PAIR,
    more_files=(
        # the corpus as its authors distribute it
        TaskFiles(
            splits=_labelled(_MRPC_TEXTS, "Quality", train="msr_paraphrase_train.txt")
            | _unlabelled(_MRPC_TEXTS, None, test="msr_paraphrase_test.txt"),
            difference="the paraphrase corpus is cut here, not as by GLUE",
            rows={"train": 4076, "test": 1725},
        ),
    ),
)

_STSB = _glue_task(
    "stsb",
    "STS-B",
    (),
    ("pearson", "spearman"),
    (5749, 1500, 1379),
    texts=_PAIR,
    label="score",
    headline=("spearman",),
    bounds=(0.0, 5.0),
    more_files=(
        # the benchmark as its authors distribute it
        TaskFiles(
            splits=_labelled((5, 6), 4, train="sts-train.tsv", dev="sts-dev.tsv")
            | _unlabelled((5, 6), None, test="sts-test.tsv")
        ),
    ),
)

_QQP = _glue_task(
    "qqp",
    "QQP",
    _BINARY,
    ("accuracy", "f1"),
    (363846, 40430, 390965),
    texts=("question1", "question2"),
    label="is_duplicate",
    # the official files have a few broken lines, which the published counts leave out
    skips_incomplete=True,
)

_MNLI_SPLITS = {
    "train": "train",
    "matched": "validation_matched",
    "mismatched": "validation_mismatched",
    "test_matched": "test_matched",
    "test_mismatched": "test_mismatched",
}
_MNLI = TextTask(
    name="mnli",
    title="MNLI",
    labels=_NLI,
    metrics=("accuracy",),
    headline=("matched_accuracy",),
    evaluation=("matched", "mismatched"),
    files=(
        TaskFiles(
            splits=_labelled(
                _PAIR,
                "gold_label",
                train="train.tsv",
                matched="dev_matched.tsv",
                mismatched="dev_mismatched.tsv",
            )
            | _unlabelled(
                _PAIR,
                "index",
                test_matched="test_matched.tsv",
                test_mismatched="test_mismatched.tsv",
            )
        ),
    ),
    hub=HubData(
        name="nyu-mll/glue", config="mnli", splits=_MNLI_SPLITS, texts=("premise", "hypothesis")
    ),
    rows=dict(zip(_MNLI_SPLITS, (392702, 9815, 9832, 9796, 9847), strict=True)),
    submissions={"MNLI-m": "test_matched", "MNLI-mm": "test_mismatched"},
    writes_label_names=True,
)

_AX = TextTask(
    name="ax",
    title="AX",
    labels=_NLI,
    metrics=("matthews",),
    headline=("ax_matthews",),
    trained_on="mnli",
    folders=("AX", "diagnostic"),
    evaluation=("ax",),
    files=(
        TaskFiles(
            splits=_labelled(("Premise", "Hypothesis"), "Label", ax="diagnostic-full.tsv")
            | _unlabelled(_PAIR, "index", test="diagnostic.tsv")
        ),
    ),
    hub=HubData(
        name="nyu-mll/glue", config="ax", splits={"test": "test"}, texts=("premise", "hypothesis")
    ),
    rows={"ax": 1104, "test": 1104},
    submissions={"AX": "test"},
    writes_label_names=True,
)

_QNLI = _glue_task(
    "qnli",
    "QNLI",
    _ENTAILMENT,
    ("accuracy",),
    (104743, 5463, 5463),
    texts=("question", "sentence"),
)
_RTE = _glue_task("rte", "RTE", _ENTAILMENT, ("accuracy",), (2490, 277, 3000), texts=_PAIR)
_WNLI = _glue_task("wnli", "WNLI", _BINARY, ("accuracy",), (635, 71, 146), texts=_PAIR)


_LONG = 4096
_HND = TextTask(
    name="hnd",
    title="HND",
    labels=("false", "true"),
    metrics=("accuracy", "f1"),
    headline=("f1",),
    folders=("hyperpartisan", "hyperpartisan_news_detection"),
    files=(TaskFiles(splits=_labelled(("text",), "label", train="train.jsonl", dev="dev.jsonl")),),
    rows={"train": 516, "dev": 64},
    max_length=_LONG,
    segments="sentences",
    epochs=10,
)

_IMDB = TextTask(
    name="imdb",
    title="IMDb",
    labels=_BINARY,
    metrics=("accuracy", "f1"),
    headline=("f1",),
    folders=("imdb",),
    # as published, the test set is what is scored
    files=(
        TaskFiles(splits=_labelled(("text",), "label", train="train.jsonl*", dev="test*.jsonl*")),
    ),
    hub=HubData(name="stanfordnlp/imdb", splits={"train": "train", "dev": "test"}, texts=("text",)),
    rows={"train": 25000, "dev": 25000},
    max_length=_LONG,
    segments="sentences",
    epochs=10,
)

_YELP5 = TextTask(
    name="yelp5",
    title="Yelp-5",
    labels=("1", "2", "3", "4", "5"),
    metrics=("accuracy",),
    headline=("accuracy",),
    folders=("yelp5", "yelp_review_full_csv"),
    files=(
        TaskFiles(
            splits=_labelled((1,), 0, train="train.csv*", dev="test.csv*"),
            difference="scored on the test set, published on a part of the training set",
            rows={"train": 650000, "dev": 50000},
        ),
    ),
    hub=HubData(
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

_ARXIV11 = TextTask(
    name="arxiv11",
    title="Arxiv-11",
    labels=tuple("cs.AI cs.CE cs.CV cs.DS cs.IT cs.NE cs.PL cs.SY math.AC math.GR math.ST".split()),
    metrics=("accuracy",),
    headline=("accuracy",),
    folders=("arxiv11",),
    files=(
        TaskFiles(splits=_labelled(("text",), "label", train="train.jsonl*", dev="dev.jsonl*")),
    ),
    hub=HubData(
        name="ccdv/arxiv-classification",
        splits={"train": "train", "dev": "validation"},
        texts=("text",),
        difference="split as on the hub, not as published",
    ),
    max_length=_LONG,
    segments="paragraphs",
    epochs=10,
)

TASKS: dict[str, TextTask] = {
    task.name: task
    for task in (
        *(_COLA, _SST2, _MRPC, _STSB, _QQP, _MNLI, _QNLI, _RTE, _WNLI, _AX),
        *(_HND, _IMDB, _YELP5, _ARXIV11),
    )
}

NINE_COLUMNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "MNLI-m": ("mnli", ("matched_accuracy",)),
    "MNLI-mm": ("mnli", ("mismatched_accuracy",)),
    **{
        TASKS[name].title: (name, TASKS[name].headline)
        for name in ("qqp", "qnli", "sst2", "cola", "stsb", "mrpc", "rte")
    },
}
"""Columns of the published average: title -> task, and names of metrics to take the mean of."""
