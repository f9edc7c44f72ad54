"""The tasks: what their files hold, how they are scored, and how large they were published.

Row counts are those of the GLUE benchmark (arXiv 1804.07461) and of the PoNet paper's long texts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Segments = Literal["texts", "sentences", "paragraphs"]
"""What PoNet pools by segment: each text whole, its sentences, or its blank-line paragraphs."""

ColumnKey = str | int
"""By its name in the header, or by its place, from 0, in a file without one."""


@dataclass(frozen=True, kw_only=True)
class FileColumns:
    """Where the columns of a file of examples are."""

    texts: tuple[ColumnKey, ...]
    """One text, or the two of a pair."""
    label: ColumnKey | None = None
    """None: the file has no labels."""
    index: ColumnKey | None = None
    """What a submission calls the row; None: rows are counted from 0."""
    skips_incomplete: bool = False
    """Rows that lack a column or a text are left out and counted, not refused."""
    from_flags: bool = False
    """The user named them, by --text-column and --label-column."""


@dataclass(frozen=True, kw_only=True)
class TaskFiles:
    """Files of one origin; those that are not there are done without, but for the first."""

    names: Mapping[str, str]
    """Split -> file in the task's folder; `*` stands for anything, the ending says the format."""
    labelled: FileColumns
    unlabelled: FileColumns | None = None
    """Of the splits to predict, whose names begin with "test"."""
    difference: str | None = None
    """Why figures cannot stand beside published ones, if so."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """Rows by split that the files should have where they are not the published ones."""

    def columns(self, split: str) -> FileColumns:
        """Of the file of a split."""
        if self.unlabelled is not None and split.startswith("test"):
            return self.unlabelled
        return self.labelled


@dataclass(frozen=True, kw_only=True)
class HubData:
    """A data set of the Hugging Face hub, whose labels are numbers of classes."""

    name: str
    splits: Mapping[str, str]
    """Split here -> split there."""
    texts: tuple[str, ...]
    config: str | None = None
    difference: str | None = None


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """One task; the defaults of its settings are the published ones."""

    name: str
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
    parts_of_train: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Splits that are parts of the file or hub's training set: its shares where they begin, end."""
    evaluation: tuple[str, ...] = ("dev",)
    """Splits that are scored; their names, but for "dev", stand before those of metrics."""
    tests: tuple[str, ...] = ()
    """Labelled splits that are scored at the end alone, as `evaluation` is."""
    submissions: Mapping[str, str] = field(default_factory=dict)
    """Name of a submission file -> split without labels."""
    bounds: tuple[float, float] | None = None
    """Lowest and highest label of a regression, which submissions keep to."""
    writes_label_names: bool = False
    """Submissions hold names of labels; otherwise numbers of classes."""
    trained_on: str | None = None
    """The task whose model is scored, where this one has no training set."""
    max_length: int = 128
    """Tokens of an example at most, special ones included."""
    segments: Segments = "texts"
    epochs: int = 4

    @property
    def is_regression(self) -> bool:
        """Labels are numbers."""
        return not self.labels

    @property
    def all_folders(self) -> tuple[str, ...]:
        """Where files may lie below the data folder, in order of preference."""
        return tuple(p + n for n in self.folders or (self.title,) for p in ("", "glue/"))


_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")
_HUB_PAIR = ("premise", "hypothesis")
_SPLITS = ("train", "dev", "test")
_OFFICIAL_NAMES = {split: f"{split}.tsv" for split in _SPLITS}


def _official(*texts: str, label: str = "label", skips_incomplete: bool = False) -> TaskFiles:
    """The layout of most: files with headers, the rows to predict numbered in the first column."""
    return TaskFiles(
        names=_OFFICIAL_NAMES,
        labelled=FileColumns(texts=texts, label=label, skips_incomplete=skips_incomplete),
        unlabelled=FileColumns(texts=texts, index=0),
    )


def _glue_task(
    name: str,
    title: str,
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
    rows: tuple[int, int, int],
    texts: tuple[str, ...],
    *files: TaskFiles,
) -> TextTask:
    """A task of three splits, whose `texts` are named so on the hub and, by default, in files."""
    return TextTask(
        name=name,
        title=title,
        labels=labels,
        metrics=metrics,
        headline=metrics,
        files=files or (_official(*texts),),
        rows=dict(zip(_SPLITS, rows, strict=True)),
        hub=HubData(
            name="nyu-mll/glue",
            config=name,
            splits={"train": "train", "dev": "validation", "test": "test"},
            texts=texts,
        ),
        submissions={title: "test"},
        writes_label_names=labels == _ENTAILMENT,
    )


_COLA = _glue_task(
    "cola",
    "CoLA",
    _BINARY,
    ("matthews",),
    (8551, 1043, 1063),
    ("sentence",),
    TaskFiles(
        names=_OFFICIAL_NAMES,
        labelled=FileColumns(texts=(3,), label=1),
        unlabelled=FileColumns(texts=("sentence",), index="index"),
    ),
)
_SST2 = _glue_task("sst2", "SST-2", _BINARY, ("accuracy",), (67349, 872, 1821), ("sentence",))
_MRPC = _glue_task(
    "mrpc",
    "MRPC",
    _BINARY,
    ("accuracy", "f1"),
    (3668, 408, 1725),
    _PAIR,
    _official("#1 String", "#2 String", label="Quality"),
    # the corpus as its authors distribute it
    TaskFiles(
        names={"train": "msr_paraphrase_train.txt", "test": "msr_paraphrase_test.txt"},
        labelled=FileColumns(texts=("#1 String", "#2 String"), label="Quality"),
        unlabelled=FileColumns(texts=("#1 String", "#2 String")),
        difference="the paraphrase corpus is cut here, not as by GLUE",
        rows={"train": 4076, "test": 1725},
    ),
)
_STSB = replace(
    _glue_task(
        "stsb",
        "STS-B",
        (),
        ("pearson", "spearman"),
        (5749, 1500, 1379),
        _PAIR,
        _official(*_PAIR, label="score"),
        # the benchmark as its authors distribute it
        TaskFiles(
            names={split: f"sts-{split}.tsv" for split in _SPLITS},
            labelled=FileColumns(texts=(5, 6), label=4),
            unlabelled=FileColumns(texts=(5, 6)),
        ),
    ),
    headline=("spearman",),
    bounds=(0.0, 5.0),
)
_QQP = _glue_task(
    "qqp",
    "QQP",
    _BINARY,
    ("accuracy", "f1"),
    (363846, 40430, 390965),
    ("question1", "question2"),
    # the official files have a few broken lines, which the published counts leave out
    _official("question1", "question2", label="is_duplicate", skips_incomplete=True),
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
            names={
                split: f"{name.replace('validation', 'dev')}.tsv"
                for split, name in _MNLI_SPLITS.items()
            },
            labelled=FileColumns(texts=_PAIR, label="gold_label"),
            unlabelled=FileColumns(texts=_PAIR, index="index"),
        ),
    ),
    hub=HubData(name="nyu-mll/glue", config="mnli", splits=_MNLI_SPLITS, texts=_HUB_PAIR),
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
            names={"ax": "diagnostic-full.tsv", "test": "diagnostic.tsv"},
            labelled=FileColumns(texts=("Premise", "Hypothesis"), label="Label"),
            unlabelled=FileColumns(texts=_PAIR, index="index"),
        ),
    ),
    hub=HubData(name="nyu-mll/glue", config="ax", splits={"test": "test"}, texts=_HUB_PAIR),
    rows={"ax": 1104, "test": 1104},
    submissions={"AX": "test"},
    writes_label_names=True,
)
_QUESTION = ("question", "sentence")
_QNLI = _glue_task("qnli", "QNLI", _ENTAILMENT, ("accuracy",), (104743, 5463, 5463), _QUESTION)
_RTE = _glue_task("rte", "RTE", _ENTAILMENT, ("accuracy",), (2490, 277, 3000), _PAIR)
_WNLI = _glue_task("wnli", "WNLI", _BINARY, ("accuracy",), (635, 71, 146), _PAIR)

_LONG: dict[str, Any] = {"max_length": 4096, "segments": "sentences", "epochs": 10}
_BY_NAME = FileColumns(texts=("text",), label="label")
_JSONL = TaskFiles(names={split: f"{split}.jsonl*" for split in _SPLITS}, labelled=_BY_NAME)

_HND = TextTask(
    name="hnd",
    title="HND",
    labels=("false", "true"),
    metrics=("accuracy", "f1"),
    headline=("f1",),
    folders=("hyperpartisan", "hyperpartisan_news_detection"),
    files=(_JSONL,),
    tests=("test",),
    rows={"train": 516, "dev": 64, "test": 65},
    **_LONG,
)
_IMDB = TextTask(
    name="imdb",
    title="IMDb",
    labels=_BINARY,
    metrics=("accuracy", "f1"),
    headline=("f1",),
    folders=("imdb",),
    # as published, the test set is the development set
    files=(TaskFiles(names={"train": "train.jsonl*", "dev": "test*.jsonl*"}, labelled=_BY_NAME),),
    hub=HubData(name="stanfordnlp/imdb", splits={"train": "train", "dev": "test"}, texts=("text",)),
    rows={"train": 25000, "dev": 25000},
    **_LONG,
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
            names={"train": "train.csv*", "test": "test.csv*"},
            labelled=FileColumns(texts=(1,), label=0),
        ),
    ),
    hub=HubData(
        name="Yelp/yelp_review_full",
        splits={"train": "train", "test": "test"},
        texts=("text",),
    ),
    # a tenth is in neither part, as published
    parts_of_train={"train": (0.2, 1.0), "dev": (0.0, 0.1)},
    tests=("test",),
    rows={"train": 520000, "dev": 65000, "test": 50000},
    **dict(_LONG, epochs=2),
)
_ARXIV11 = TextTask(
    name="arxiv11",
    title="Arxiv-11",
    labels=tuple("cs.AI cs.CE cs.CV cs.DS cs.IT cs.NE cs.PL cs.SY math.AC math.GR math.ST".split()),
    metrics=("accuracy",),
    headline=("accuracy",),
    folders=("arxiv11",),
    files=(_JSONL,),
    tests=("test",),
    hub=HubData(
        name="ccdv/arxiv-classification",
        splits={"train": "train", "dev": "validation", "test": "test"},
        texts=("text",),
        difference="split as on the hub, not as published",
    ),
    **dict(_LONG, segments="paragraphs"),
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
"""Columns of PoNet's published average: title -> task, and names of metrics to take the mean of."""

TWELVE_COLUMNS = NINE_COLUMNS | {"WNLI": ("wnli", _WNLI.headline)}
"""Columns of MaxPoolBERT's average, where each metric of QQP and MRPC counts as one."""
