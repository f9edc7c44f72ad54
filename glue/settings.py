"""What a command is told, and what each of its runs is: recipe < YAML < flags."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glue.sources import OwnFiles
from glue.tasks import NINE_COLUMNS, TASKS, Segments, Task
from ponet import PoolerConfig
from ponet.poolers import POOLERS
from ponet.run.cli import UsageError, parse_arguments, preset_path, read_yaml

PRESETS = Path(__file__).with_name("configs")

NINE_TASKS = tuple(dict.fromkeys(name for name, _ in NINE_COLUMNS.values()))
"""The tasks of the published average, which `all` stands for."""

_DEFAULT_POOLER = PoolerConfig()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Values that a run takes where no flag says otherwise; each batch size meets each rate."""

    batch_sizes: tuple[int, ...]
    """Examples in a step."""
    learning_rates: tuple[float, ...]
    """Peaks."""
    epochs: int | None
    """Passes over the training set; None: the task's."""
    warmup_fraction: float
    """Share of the steps in which the rate rises."""
    weight_decay: float
    """Of AdamW, for matrices."""


RECIPES = {
    "single": Recipe(
        batch_sizes=(32,),
        learning_rates=(5e-5,),
        epochs=None,
        warmup_fraction=0.1,
        weight_decay=0.01,
    ),
    "published": Recipe(
        batch_sizes=(8, 16, 32, 64, 128),
        learning_rates=(3e-5, 5e-5, 1e-4, 3e-4),
        epochs=None,
        warmup_fraction=0.0,
        weight_decay=0.0,
    ),
    "poolers": Recipe(
        batch_sizes=(16, 32, 64),
        learning_rates=(2e-5,),
        epochs=3,
        warmup_fraction=0.1,
        weight_decay=0.01,
    ),
}
"""By the name of the grid."""

_LONG_PUBLISHED = Recipe(
    batch_sizes=(32,),
    learning_rates=(3e-5, 5e-5),
    epochs=None,
    warmup_fraction=0.0,
    weight_decay=0.0,
)


@dataclass(frozen=True, kw_only=True)
class GlueConfig:
    """Settings of a command; where the default is None, the grid or the task decides.

    Raises:
        UsageError: values contradict each other.
    """

    task: tuple[str, ...] = ("mrpc",)
    """Tasks: cola, sst2, mrpc, stsb, qqp, mnli (which scores ax, too), qnli, rte, wnli, hnd, imdb,
    yelp5, arxiv11, or all (the nine columns of the published average); or, with --train-file, a
    name for a task of your own."""
    checkpoint: str | None = None
    """Folder of the pre-trained model."""
    from_scratch: bool = False
    """Take nothing but sizes and tokenizer from the checkpoint: a randomly initialised encoder, to
    see what pre-training is worth."""
    pooler: tuple[str, ...] = ("cls",)
    """Sentence poolers: cls, meanmax, mswap, stochastic, max_cls, mha, maxseq_mha, meanseq_mha,
    mean, max."""
    reading: Literal["literal", "sound"] = "sound"
    """Poolers as their source has them, or untouched by padding and scale."""
    pooler_layers: int = 3
    """Last layers that poolers of several layers read."""
    pooler_heads: int = 4
    """Heads of poolers with attention."""
    pooler_window: int = 2
    """Neighbouring features in a softmax of mswap."""
    pooler_draws: int = 1
    """Tokens that stochastic draws for a feature."""
    layer_choice: Literal["own", "norm"] = "own"
    """norm: for each token the layer with the longest vector, in place of the pooler's own rule."""
    grid: Literal["single", "published", "poolers"] = "single"
    """single: one batch size and learning rate; published: PoNet's 20 runs a task; poolers: the
    three batch sizes of the pooler study. A flag for either takes the place of its values, each
    batch size meets each rate."""
    seeds: int = 1
    """Runs of each point of the grid, with consecutive seeds."""
    first_seed: int = 0
    """Seed of the first run: of new weights, order of examples and dropout."""
    batch_size: tuple[int, ...] | None = None
    """Examples in a step, one size or several."""
    learning_rate: tuple[float, ...] | None = None
    """Peak learning rates, one or several."""
    epochs: int | None = None
    """Passes over the training set."""
    warmup_fraction: float | None = None
    """Share of the steps in which the learning rate rises, before it falls to zero."""
    weight_decay: float | None = None
    """AdamW's decay of weight matrices."""
    dropout: float = 0.1
    """Dropout, whatever pre-training used."""
    max_length: int | None = None
    """Tokens of an example; position tables that are shorter are repeated."""
    segments: Literal["published", "texts", "sentences", "paragraphs"] = "published"
    """What PoNet pools by segment: texts whole, their sentences, or their paragraphs."""
    max_train_examples: int | None = None
    """Examples to learn from at most, the same for every seed."""
    train_file: str | None = None
    """A task of your own: .tsv (unquoted), .csv or .jsonl to learn from."""
    dev_file: str | None = None
    """The same to score; None: a tenth of --train-file."""
    test_file: str | None = None
    """The same without labels, to predict."""
    text_column: tuple[str, ...] = ("text",)
    """Column of the text, or the two columns of a pair."""
    label_column: str = "label"
    """Column of the label."""
    regression: bool = False
    """Labels of your own task are numbers."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic; auto: bf16 on a GPU, fp32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto: a GPU if there is one."""
    jobs: int = 1
    """Runs at a time, each in a process of its own."""
    threads: int | None = None
    """CPU threads of a run; None: all cores, divided among the jobs."""
    gradient_checkpointing: bool | None = None
    """Compute layers again in the backward pass to save memory; None: beyond 512 tokens."""
    save_models: bool = True
    """Keep the model of every run."""
    data_dir: str = "data"
    """Folder of the tasks' folders, as in the official archive; the hub is asked for what is not
    there."""
    output_dir: str = "runs/glue"
    """Folder of all runs."""
    log_every: int = 50
    """Steps between lines of the log."""
    checkpoint_minutes: float = 5.0
    """Minutes between the checkpoints that an interrupted run continues from."""

    def __post_init__(self) -> None:
        for name in self.pooler:
            _require(name in POOLERS, "pooler", name, f"one of {', '.join(POOLERS)}")
        counts = ("seeds", "pooler_layers", "pooler_heads", "pooler_window", "pooler_draws")
        for name in (*counts, "jobs", "log_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for size in self.batch_size or ():
            _require(size >= 1, "batch_size", size, "at least 1")
        for rate in self.learning_rate or ():
            _require(rate > 0, "learning_rate", rate, "above 0")
        for name in ("epochs", "max_train_examples", "threads"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        # room for the special tokens of a pair and a token of each text
        length = self.max_length
        _require(length is None or length >= 5, "max_length", length, "at least 5")
        warmup, decay = self.warmup_fraction, self.weight_decay
        _require(warmup is None or 0 <= warmup <= 1, "warmup_fraction", warmup, "from 0 to 1")
        _require(decay is None or decay >= 0, "weight_decay", decay, "at least 0")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and below 1")
        for name in ("first_seed", "checkpoint_minutes"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        if self.checkpoint is None:
            raise UsageError("--checkpoint is missing: the folder of a pre-trained model")
        self._check_task()

    def _check_task(self) -> None:
        if self.train_file is None:
            known = (*TASKS, "all")
            for name in self.task:
                expected = f"one of {', '.join(known)}; or give --train-file for one of your own"
                _require(name in known, "task", name, expected)
            if self.dev_file is not None or self.test_file is not None:
                raise UsageError("--dev-file and --test-file belong to a --train-file")
            return
        if len(self.task) != 1 or self.task[0] in (*TASKS, "all"):
            raise UsageError(
                f"--train-file: give your task one new name by --task, found {' '.join(self.task)}"
            )
        count = len(self.text_column)
        _require(count in (1, 2), "text_column", " ".join(self.text_column), "one or two columns")

    @property
    def tasks(self) -> list[Task]:
        """Those of `TASKS`, each once; the diagnostic set is scored with the task it needs."""
        names = [n for name in self.task for n in (NINE_TASKS if name == "all" else (name,))]
        return [TASKS[n] for n in dict.fromkeys(TASKS[name].trained_on or name for name in names)]

    @property
    def own_files(self) -> OwnFiles | None:
        """The user's own task, if there is one."""
        if self.train_file is None:
            return None
        return OwnFiles(
            train=Path(self.train_file),
            dev=Path(self.dev_file) if self.dev_file else None,
            test=Path(self.test_file) if self.test_file else None,
            texts=self.text_column,
            label=self.label_column,
            is_regression=self.regression,
        )

    def poolers(self) -> list[PoolerConfig]:
        """Each pooler that is asked for."""
        return [
            PoolerConfig(
                name=name,
                reading=self.reading,
                num_layers=self.pooler_layers,
                num_heads=self.pooler_heads,
                layer_choice=self.layer_choice,
                window=self.pooler_window,
                num_draws=self.pooler_draws,
            )
            for name in dict.fromkeys(self.pooler)
        ]

    def runs_of(self, task: Task, device: str) -> "list[RunSettings]":
        """All runs of a task, seeds innermost.

        Args:
            task: to be run.
            device: "cpu" or "cuda".
        """
        recipe = RECIPES[self.grid]
        if self.grid == "published" and task.is_long:
            recipe = _LONG_PUBLISHED
        names = {field.name for field in dataclasses.fields(RunSettings)}
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        shared = {name: value for name, value in fields.items() if name in names}
        shared |= {
            "task": task.name,
            "epochs": self.epochs or recipe.epochs or task.epochs,
            "max_length": self.max_length or task.max_length,
            "segments": task.segments if self.segments == "published" else self.segments,
        }
        for name in ("warmup_fraction", "weight_decay"):
            if shared[name] is None:
                shared[name] = getattr(recipe, name)
        if self.precision == "auto":
            shared["precision"] = "bf16" if device == "cuda" else "fp32"
        sizes = dict.fromkeys(self.batch_size or recipe.batch_sizes)
        rates = dict.fromkeys(self.learning_rate or recipe.learning_rates)
        return [
            RunSettings(
                **shared
                | {"pooler": pooler, "batch_size": size, "learning_rate": rate, "seed": seed}
            )
            for pooler in self.poolers()
            for size in sizes
            for rate in rates
            for seed in range(self.first_seed, self.first_seed + self.seeds)
        ]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """All that decides the figures of one run, besides its data and checkpoint."""

    task: str
    """Name."""
    pooler: PoolerConfig
    """What the classifier reads."""
    from_scratch: bool
    """The encoder is randomly initialised."""
    seed: int
    """Of the run."""
    batch_size: int
    """Examples in a step."""
    learning_rate: float
    """Peak."""
    epochs: int
    """Passes over the training set."""
    warmup_fraction: float
    """Share of the steps."""
    weight_decay: float
    """Of matrices."""
    dropout: float
    """Probability."""
    max_length: int
    """Tokens of an example."""
    segments: Segments
    """What is pooled together."""
    max_train_examples: int | None
    """At most so many; None: all."""
    precision: Literal["fp32", "bf16"]
    """Arithmetic."""

    @property
    def pooler_label(self) -> str:
        """The pooler's name and what distinguishes it from its published form."""
        pooler, parts = self.pooler, [self.pooler.name]
        for name, prefix in (
            ("reading", ""),
            ("num_layers", "k"),
            ("num_heads", "h"),
            ("layer_choice", ""),
            ("window", "w"),
            ("num_draws", "n"),
        ):
            value = getattr(pooler, name)
            if value != getattr(_DEFAULT_POOLER, name):
                parts.append(f"{prefix}{value}")
        return "-".join(parts)

    @property
    def name(self) -> str:
        """Folder of the run."""
        return (
            f"{self.task}-{self.pooler_label}-b{self.batch_size}-lr{self.learning_rate:g}-"
            f"seed{self.seed}"
        )


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise UsageError(f"--{name.replace('_', '-')} must be {expected}, found {value}")


def parse(argv: Sequence[str] | None = None) -> GlueConfig:
    """Settings of the command line.

    Raises:
        UsageError: a file, key, flag or value is wrong.
    """
    preset, flags = parse_arguments(
        GlueConfig,
        argv,
        description="Fine-tune a checkpoint on GLUE, long texts or your own examples.",
        default_preset="default",
    )
    return GlueConfig(**read_yaml(preset_path(preset, PRESETS), GlueConfig) | flags)
