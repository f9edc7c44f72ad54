"""What a command is told, and what each of its runs is: recipe < YAML < flags."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from glue.tasks import TASKS, TWELVE_COLUMNS, Segments, TextTask
from ponet import PoolerConfig
from ponet.poolers import POOLERS, essential
from ponet.run.cli import UsageError, parse_arguments, require, require_at_least

PRESETS = Path(__file__).with_name("configs")

_USUAL: dict[str, Any] = {
    "batch_size": (32,),
    "learning_rate": (5e-5,),
    "warmup_fraction": 0.1,
    "weight_decay": 0.01,
    "seeds": 1,
}
# what a grid has instead; CS475 states neither learning rate nor decay
_GRIDS: dict[str, dict[str, Any]] = {
    "single": {},
    "published": {
        "batch_size": (8, 16, 32, 64, 128),
        "learning_rate": (3e-5, 5e-5, 1e-4, 3e-4),
        "warmup_fraction": 0.0,
        "weight_decay": 0.0,
    },
    "maxpoolbert": {"learning_rate": (2e-5,), "epochs": 4, "seeds": 3},
    "cs475": {"batch_size": (16, 32, 64), "learning_rate": (2e-5,), "epochs": 3},
}
# for documents, longer than the positions of a published checkpoint
_PUBLISHED_FOR_LONG = {"batch_size": (32,), "learning_rate": (3e-5, 5e-5)}
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
_AT_LEAST = {
    **dict.fromkeys(("pooler_heads", "seeds", "epochs", "jobs", "threads", "log_every"), 1),
    **dict.fromkeys(("warmup_fraction", "weight_decay", "dropout", "checkpoint_minutes"), 0),
    # room for the special tokens of a pair and a token of each text
    "max_length": 5,
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GlueConfig:
    """Settings of a command; where the default is None, the grid or the task decides."""

    task: tuple[str, ...] = ("mrpc",)
    """Tasks: cola, sst2, mrpc, stsb, qqp, mnli (which scores ax, too), qnli, rte, wnli, hnd, imdb,
    yelp5, arxiv11, or all (the columns of the published averages: GLUE); or, with --train-file, a
    name for a task of your own."""
    checkpoint: str = ""
    """Pre-trained PoNet, BERT or FNet: a folder, or a name on the Hugging Face hub."""
    from_scratch: bool = False
    """Take nothing but sizes and tokenizer from the checkpoint: a randomly initialised encoder, to
    see what pre-training is worth."""
    pooler: tuple[str, ...] = ("cls",)
    """Sentence poolers: cls, first, meanmax, mswap, stochastic, max_cls, mha, maxseq_mha,
    meanseq_mha, mean, max."""
    reading: Literal["literal", "sound"] = "sound"
    """Poolers as their source has them, or untouched by padding and scale."""
    pooler_layers: tuple[int, ...] = (3,)
    """Last layers that poolers of several layers read, one number or several."""
    pooler_heads: int = 4
    """Heads of poolers with attention."""
    grid: Literal["single", "published", "maxpoolbert", "cs475"] = "single"
    """Recipe. single: one batch size and learning rate; published: PoNet's 20 runs per task;
    maxpoolbert, cs475: those of the two studies of poolers. Flags take the place of its values,
    each batch size meets each rate."""
    seeds: int | None = None
    """Runs per point of the grid, with seeds from 0: of new weights, order of examples, dropout,
    and which examples --max-train-examples takes."""
    batch_size: tuple[int, ...] | None = None
    """Examples per step, one size or several."""
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
    """Tokens per example, longer ones are cut; beyond the checkpoint's positions its position
    table is repeated, beyond 512 tokens layers are computed again in the backward pass."""
    segments: Literal["published", "texts", "sentences", "paragraphs"] = "published"
    """What PoNet pools by segment: texts whole, their sentences, or their paragraphs."""
    max_train_examples: tuple[int, ...] | None = None
    """Examples to learn from at most, one number or several: the smaller sets are parts of the
    larger, and the same for every pooler."""
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
    """CPU threads per run; None: all cores, divided among the jobs."""
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
        if not self.checkpoint:
            raise UsageError("--checkpoint is missing: the folder of a pre-trained model")
        require_at_least(self, _AT_LEAST)
        for name in ("batch_size", "pooler_layers", "max_train_examples"):
            for number in getattr(self, name) or ():
                require(number >= 1, name, "at least 1", number)
        for rate in self.learning_rate or ():
            require(rate > 0, "learning_rate", "above 0", rate)
        warmup = self.warmup_fraction
        require(warmup is None or warmup <= 1, "warmup_fraction", "at most 1", warmup)
        require(self.dropout < 1, "dropout", "below 1", self.dropout)
        for pooler in self.pooler:
            require(pooler in POOLERS, "pooler", f"one of {', '.join(POOLERS)}", pooler)
        if self.train_file is None:
            known = f"one of {', '.join(TASKS)}, all, or with --train-file a name of your own"
            for task in self.task:
                require(task in (*TASKS, "all"), "task", known, task)
            if self.dev_file is not None or self.test_file is not None:
                raise UsageError("--dev-file and --test-file belong to a --train-file")
            return
        names = " ".join(self.task)
        if len(self.task) != 1 or names in (*TASKS, "all"):
            raise UsageError(f"--train-file: give your task one new name by --task, found {names}")
        # it is part of the names of folders
        letters = "letters, digits, '.', '-' and '_'"
        require(re.fullmatch(r"[\w.-]*\w", names) is not None, "task", letters, repr(names))
        texts = self.text_column
        require(len(texts) in (1, 2), "text_column", "one column or two", " ".join(texts))

    @property
    def task_names(self) -> list[str]:
        """Each once; the diagnostic set is scored with the task whose model it needs."""
        if self.train_file is not None:
            return list(self.task)
        all_tasks = [task for task, _ in TWELVE_COLUMNS.values()]
        names = [n for name in self.task for n in (all_tasks if name == "all" else [name])]
        return list(dict.fromkeys(TASKS[name].trained_on or name for name in names))

    def within(self, num_layers: int) -> "GlueConfig":
        """Without the --pooler-layers that an encoder of so many layers lacks."""
        fitting = tuple(k for k in self.pooler_layers if k <= num_layers)
        beyond = " ".join(str(k) for k in self.pooler_layers if k > num_layers)
        if not beyond or all(POOLERS[name].layer_rule == "last" for name in self.pooler):
            return self
        if not fitting:
            raise UsageError(f"--pooler-layers {beyond}: the encoder has {num_layers}")
        logger.warning("--pooler-layers %s left out: the encoder has %d", beyond, num_layers)
        return replace(self, pooler_layers=fitting)

    def poolers(self) -> list[PoolerConfig]:
        """Each pooler that is asked for, those of several layers with each number of them."""
        poolers = [
            PoolerConfig(
                name=name, reading=self.reading, num_layers=number, num_heads=self.pooler_heads
            )
            for name in self.pooler
            for number in self.pooler_layers
        ]
        return list(dict.fromkeys(map(essential, poolers)))

    def runs_of(self, task: TextTask, num_train: int, device: str) -> "list[FineTuningSettings]":
        """All runs of a task with so many training examples on "cpu" or "cuda", seeds innermost."""
        usual = _USUAL | {
            "epochs": task.epochs,
            "dropout": GlueConfig.dropout,
            "max_length": task.max_length,
            "segments": task.segments,
            "max_train_examples": (None,),
            "precision": "bf16" if device == "cuda" else "fp32",
        }
        grid = _GRIDS[self.grid]
        if self.grid == "published" and task.max_length > 512:
            grid = grid | _PUBLISHED_FOR_LONG
        given = {name: getattr(self, name) for name in usual}
        said = {name: x for name, x in given.items() if x not in (None, "published", "auto")}
        chosen = usual | grid | said
        sizes, rates, seeds = (chosen.pop(n) for n in ("batch_size", "learning_rate", "seeds"))
        # as many as there are, or more, are all
        limits = [n if n and n < num_train else None for n in chosen.pop("max_train_examples")]
        settings = []
        # the set is read once for all runs on as many examples
        axes: tuple[Any, ...] = (limits, self.poolers(), sizes, rates)
        for limit, pooler, size, rate in product(*map(dict.fromkeys, axes)):
            of_run: dict[str, Any] = chosen | {"max_train_examples": limit}
            changes = [
                f"{mark}{of_run[name]}".removesuffix(".0")
                for name, mark in _MARKS.items()
                if of_run[name] not in (usual[name], None)
            ]
            point = (task.name, pooler_label(pooler), f"b{size}", f"lr{rate:g}", *changes)
            settings += [
                FineTuningSettings(
                    **of_run,
                    name="-".join([*point, f"seed{seed}"]),
                    task=task.name,
                    from_scratch=self.from_scratch,
                    pooler=pooler,
                    batch_size=size,
                    learning_rate=rate,
                    seed=seed,
                )
                for seed in range(seeds)
            ]
        return settings


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
    epochs: int
    warmup_fraction: float
    weight_decay: float
    dropout: float
    max_length: int
    segments: Segments
    max_train_examples: int | None
    precision: Literal["fp32", "bf16"]


def pooler_label(pooler: PoolerConfig) -> str:
    """A pooler's name and what distinguishes it from the default of its kind."""
    usual, parts = PoolerConfig(name=pooler.name), [pooler.name]
    for name, mark in (("reading", ""), ("num_layers", "k"), ("num_heads", "h")):
        if getattr(pooler, name) != getattr(usual, name):
            parts.append(f"{mark}{getattr(pooler, name)}")
    return "-".join(parts)


def parse(argv: Sequence[str] | None = None) -> GlueConfig:
    """Settings of the command line; raises a `UsageError` for what is wrong there."""
    _, preset, flags = parse_arguments(
        GlueConfig,
        argv,
        description="Fine-tune a checkpoint on GLUE, long texts or your own examples.",
        default_preset="default",
        presets=PRESETS,
    )
    return GlueConfig(**preset | flags)
