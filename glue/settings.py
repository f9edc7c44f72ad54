"""What a command is told, and what each of its runs is: recipe < YAML < flags."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, ValidationError

from glue.data import OwnFiles
from glue.tasks import NINE_COLUMNS, TASKS, Segments, TextTask
from ponet import PoolerConfig
from ponet.poolers import POOLERS
from ponet.run.cli import UsageError, parse_arguments, preset_path, read_yaml

PRESETS = Path(__file__).with_name("configs")

NINE_TASKS = tuple(dict.fromkeys(name for name, _ in NINE_COLUMNS.values()))
"""The tasks of the published average, which `all` stands for."""

Count = Annotated[int, Field(ge=1)]
OptionalCount = Annotated[int | None, Field(ge=1)]
OptionalShare = Annotated[float | None, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Values that a run takes where no flag says otherwise; each batch size meets each rate."""

    batch_sizes: tuple[int, ...] = (32,)
    learning_rates: tuple[float, ...] = (5e-5,)
    epochs: int | None = None
    """None: the task's."""
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01


RECIPES = {
    "single": Recipe(),
    "published": Recipe(
        batch_sizes=(8, 16, 32, 64, 128),
        learning_rates=(3e-5, 5e-5, 1e-4, 3e-4),
        warmup_fraction=0.0,
        weight_decay=0.0,
    ),
    "poolers": Recipe(batch_sizes=(16, 32, 64), learning_rates=(2e-5,), epochs=3),
}
"""By the name of the grid."""

# settings that a recipe has an opinion on
_OF_RECIPE = ("epochs", "warmup_fraction", "weight_decay")
# what departs from the usual is part of the name of a run
_MARKS = {
    "epochs": "e",
    "warmup_fraction": "w",
    "weight_decay": "wd",
    "dropout": "d",
    "max_length": "n",
    "segments": "",
    "max_train_examples": "t",
    "precision": "",
}
_LONG_PUBLISHED = dataclasses.replace(
    RECIPES["published"], batch_sizes=(32,), learning_rates=(3e-5, 5e-5)
)


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class GlueConfig:
    """Settings of a command; where the default is None, the grid or the task decides."""

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
    pooler_layers: Count = 3
    """Last layers that poolers of several layers read."""
    pooler_heads: Count = 4
    """Heads of poolers with attention."""
    grid: Literal["single", "published", "poolers"] = "single"
    """single: one batch size and learning rate; published: PoNet's 20 runs per task; poolers: the
    three batch sizes of the pooler study. A flag for either takes the place of its values, each
    batch size meets each rate."""
    seeds: Count = 1
    """Runs per point of the grid, with seeds from 0: of new weights, order of examples, dropout."""
    batch_size: tuple[Count, ...] | None = None
    """Examples per step, one size or several."""
    learning_rate: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Peak learning rates, one or several."""
    epochs: OptionalCount = None
    """Passes over the training set."""
    warmup_fraction: OptionalShare = None
    """Share of the steps in which the learning rate rises, before it falls to zero."""
    weight_decay: Annotated[float | None, Field(ge=0)] = None
    """AdamW's decay of weight matrices."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout, whatever pre-training used."""
    # room for the special tokens of a pair and a token of each text
    max_length: Annotated[int | None, Field(ge=5)] = None
    """Tokens per example, longer ones are cut; beyond the checkpoint's positions its position
    table is repeated, beyond 512 tokens layers are computed again in the backward pass."""
    segments: Literal["published", "texts", "sentences", "paragraphs"] = "published"
    """What PoNet pools by segment: texts whole, their sentences, or their paragraphs."""
    max_train_examples: OptionalCount = None
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
    jobs: Count = 1
    """Runs at a time, each in a process of its own."""
    threads: OptionalCount = None
    """CPU threads per run; None: all cores, divided among the jobs."""
    save_models: bool = True
    """Keep the model of every run."""
    data_dir: str = "data"
    """Folder of the tasks' folders, as in the official archive; the hub is asked for what is not
    there."""
    output_dir: str = "runs/glue"
    """Folder of all runs."""
    log_every: Count = 50
    """Steps between lines of the log."""
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 5.0
    """Minutes between the checkpoints that an interrupted run continues from."""

    def __post_init__(self) -> None:
        if self.checkpoint is None:
            raise UsageError("--checkpoint is missing: the folder of a pre-trained model")
        _require_known("pooler", self.pooler, tuple(POOLERS))
        if self.train_file is None:
            advice = "; or give --train-file for one of your own"
            _require_known("task", self.task, (*TASKS, "all"), advice)
            if self.dev_file is not None or self.test_file is not None:
                raise UsageError("--dev-file and --test-file belong to a --train-file")
            return
        if len(self.task) != 1 or self.task[0] in (*TASKS, "all"):
            raise UsageError(
                f"--train-file: give your task one new name by --task, found {' '.join(self.task)}"
            )
        if not re.fullmatch(r"[\w.-]*\w", self.task[0]):
            raise UsageError(
                f"--task names the folders of the runs: letters, digits, '.', '-' and '_', found "
                f"{self.task[0]!r}"
            )
        if len(self.text_column) not in (1, 2):
            found = " ".join(self.text_column)
            raise UsageError(f"--text-column: expected one or two columns, found {found}")

    @property
    def tasks(self) -> list[TextTask]:
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
            )
            for name in dict.fromkeys(self.pooler)
        ]

    def runs_of(self, task: TextTask, device: str) -> "list[FineTuningSettings]":
        """All runs of a task, seeds innermost.

        Args:
            task: to be run.
            device: "cpu" or "cuda".
        """
        recipe = RECIPES[self.grid]
        if self.grid == "published" and task.is_long:
            recipe = _LONG_PUBLISHED
        usual: dict[str, Any] = {
            "epochs": task.epochs,
            "warmup_fraction": Recipe.warmup_fraction,
            "weight_decay": Recipe.weight_decay,
            "dropout": GlueConfig.dropout,
            "max_length": task.max_length,
            "segments": task.segments,
            "max_train_examples": None,
            "precision": "bf16" if device == "cuda" else "fp32",
        }
        chosen = usual | _said(recipe, _OF_RECIPE) | _said(self, usual)
        changes = [
            f"{mark}{chosen[name]}".removesuffix(".0")
            for name, mark in _MARKS.items()
            if chosen[name] != usual[name]
        ]
        return [
            FineTuningSettings(
                **chosen,
                name="-".join([*point, *changes, f"seed{seed}"]),
                task=task.name,
                from_scratch=self.from_scratch,
                pooler=pooler,
                batch_size=size,
                learning_rate=rate,
                seed=seed,
            )
            for pooler in self.poolers()
            for size in dict.fromkeys(self.batch_size or recipe.batch_sizes)
            for rate in dict.fromkeys(self.learning_rate or recipe.learning_rates)
            for point in [(task.name, pooler_label(pooler), f"b{size}", f"lr{rate:g}")]
            for seed in range(self.seeds)
        ]


@dataclass(frozen=True, kw_only=True)
class FineTuningSettings:
    """All that decides the figures of one run, besides its data and checkpoint."""

    name: str
    """Of its folder: task, pooler, point of the grid, what departs from the usual, seed."""
    task: str
    pooler: PoolerConfig
    from_scratch: bool
    seed: int
    batch_size: int
    learning_rate: float
    """At its peak."""
    epochs: int
    warmup_fraction: float
    weight_decay: float
    dropout: float
    max_length: int
    segments: Segments
    max_train_examples: int | None
    """None: all."""
    precision: Literal["fp32", "bf16"]


def _said(source: Any, names: Iterable[str]) -> dict[str, Any]:
    """Those of some values that the grid or the command line says."""
    values = {name: getattr(source, name) for name in names}
    return {name: x for name, x in values.items() if x not in (None, "published", "auto")}


def pooler_label(pooler: PoolerConfig) -> str:
    """A pooler's name and what distinguishes it from its published form."""
    usual, parts = PoolerConfig(name=pooler.name), [pooler.name]
    for name, mark in (("reading", ""), ("num_layers", "k"), ("num_heads", "h")):
        if getattr(pooler, name) != getattr(usual, name):
            parts.append(f"{mark}{getattr(pooler, name)}")
    return "-".join(parts)


def _require_known(
    name: str, values: Sequence[str], known: Sequence[str], advice: str = ""
) -> None:
    for value in values:
        if value not in known:
            raise UsageError(f"--{name}: expected one of {', '.join(known)}{advice}, found {value}")


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
        presets=PRESETS,
    )
    values = read_yaml(preset_path(preset, PRESETS), GlueConfig) | flags
    try:
        return GlueConfig(**values)
    except ValidationError as error:
        raise _as_usage_error(error) from error


def _as_usage_error(error: ValidationError) -> UsageError:
    """The first of the errors in words for whoever wrote the command."""
    first = error.errors()[0]
    if not first["loc"]:
        # a contradiction between fields, in our words already
        return UsageError(str(first.get("ctx", {}).get("error", first["msg"])))
    flag = str(first["loc"][0]).replace("_", "-")
    expected = first["msg"].removeprefix("Input should be ")
    return UsageError(f"--{flag}: expected a value {expected}, found {first['input']!r}")
