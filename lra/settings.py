"""What a command is told, and what each of its runs is: task defaults < YAML < flags."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lra.model import mixer_of, model_config
from lra.published_mixers import PUBLISHED_FORMS
from lra.steps import OneCycle
from lra.store import DATA_DIR
from lra.tasks import TASKS, ArenaTask, ProtocolName, tasks_named
from ponet import PoNetConfig
from ponet.config import BlockSettings
from ponet.mixers import MIXERS
from ponet.run.cli import UsageError, parse_arguments, require, require_at_least

PRESETS = Path(__file__).with_name("configs")

_AT_LEAST = {
    **dict.fromkeys(("seeds", "jobs", "threads", "log_every", "steps", "batch_size"), 1),
    **dict.fromkeys(("eval_every", "eval_batches", "test_examples", "num_segments"), 1),
    **dict.fromkeys(("pretrain_epochs", "checkpoint_minutes"), 0),
}
# the task decides where no flag does
_OF_TASK = ("steps", "batch_size", "learning_rate", "eval_every", "num_segments")
# switches of PoNet's block, by what a run without that part is called
PARTS = {
    "use_global": "global aggregation",
    "use_global_second_stage": "the second stage of global aggregation",
    "use_segment": "segment max-pooling",
    "use_local": "local max-pooling",
}
# the published block
BLOCK: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(BlockSettings)}
_WITH_BLOCK = ("ponet", "ponet_published")


@dataclass(frozen=True, kw_only=True)
class SharedSettings(BlockSettings):
    """What a command hands on to its runs."""

    protocol: ProtocolName = "published"
    """published: the reference code quirk by quirk; clean: no padding, no choice by test data."""
    warmup_steps: int | None = None
    """Steps until the peak; None: the published share of the steps."""
    eval_batches: int | None = None
    """Batches of an evaluation; None: the published number, or in the clean protocol all."""
    test_examples: int | None = None
    """Test examples at most, drawn with the seed; None: all."""
    hidden_size: int = 64
    """Width of the hidden states."""
    num_hidden_layers: int = 2
    """Encoder layers."""
    num_attention_heads: int = 2
    """Heads, in mixers that have them."""
    intermediate_size: int = 128
    """Width inside the feed-forward sub-layer."""
    dropout: float = 0.1
    """Dropout after the embedding, inside the feed-forward sub-layer and after each sub-layer."""
    attention_dropout: float = 0.1
    """Dropout of attention probabilities; on a CPU softmax attention is much faster without."""
    pretrain_epochs: float = 0.0
    """Passes over the training set in which hidden tokens are predicted, before the task."""
    pretrain_learning_rate: float = 1e-3
    """Peak learning rate of these passes."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic; auto: fp32 on a CPU, on a GPU fp16 as published, or bf16 when clean."""
    compile: bool = False
    """Run the encoder through torch.compile."""


@dataclass(frozen=True, kw_only=True)
class ArenaSettings(SharedSettings):
    """All that decides the figures of one run, besides its data; made by `ArenaConfig.runs`."""

    task: str
    model: str
    seed: int
    steps: int
    batch_size: int
    learning_rate: float
    eval_every: int
    num_segments: int

    @property
    def ablation(self) -> list[str]:
        """Switches of the parts of the block that the run leaves out."""
        return [part for part in PARTS if not getattr(self, part)]

    @property
    def mixer(self) -> str:
        """Key of `ponet.mixers.MIXERS`: the form of the model that belongs to the protocol."""
        return mixer_of(self.model, self.protocol)

    @property
    def name(self) -> str:
        """Folder of the run below its protocol."""
        changes = [f"-no-{part}" for part in self.ablation]
        poolings = [(n, getattr(self, n)) for n in BLOCK if n not in PARTS]
        changes += [f"-{n}-{value}" for n, value in poolings if value != BLOCK[n]]
        block = "".join(changes).replace("_", "-")
        return f"{self.task}-{self.model}{block}-seed{self.seed}"

    @property
    def group(self) -> str:
        """Folder of runs that may stand in one table."""
        return f"{self.protocol}-pretrained" if self.pretrain_epochs else self.protocol

    @property
    def schedule(self) -> OneCycle:
        """The published schedule, laid over the steps of the run."""
        task, warmup = TASKS[self.task], self.warmup_steps
        if warmup is None:
            warmup = round(task.warmup_steps * self.steps / task.steps)
        return OneCycle(steps=self.steps, warmup_steps=warmup, peak=self.learning_rate)

    def model_config(self) -> PoNetConfig:
        """The architecture."""
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        return model_config(
            TASKS[self.task],
            self.mixer,
            **{name: getattr(self, name) for name in (*names, "num_segments", *BLOCK)},
            hidden_dropout_prob=self.dropout,
            intermediate_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.attention_dropout,
        )

    def differences(self) -> list[str]:
        """Names of the settings that are not the published ones of the task."""
        free = ("protocol", "precision", "compile", "pretrain_epochs", "pretrain_learning_rate")
        config = ArenaConfig(**{name: getattr(self, name) for name in free})
        published = config.settings(TASKS[self.task], self.model, self.seed, "cuda")
        names = [field.name for field in dataclasses.fields(self)]
        return [name for name in names if getattr(self, name) != getattr(published, name)]


@dataclass(frozen=True, kw_only=True)
class ArenaConfig(SharedSettings):
    """Settings of a command: a run for each task, model and seed."""

    task: tuple[str, ...] = ("listops",)
    """Tasks: listops, text, retrieval, image, pathfinder, pathx, or all (without pathx)."""
    model: tuple[str, ...] = ("ponet",)
    """Token mixers: ponet, attention, fnet, fnet_linear, linear, linformer, performer, ..."""
    seeds: int = 1
    """Runs of each task and model, with seeds from 0: of weights, order of examples, dropout."""
    steps: int | None = None
    """Training steps; None, here and below: the task's published value."""
    batch_size: int | None = None
    """Examples in a step."""
    learning_rate: float | None = None
    """Peak learning rate."""
    eval_every: int | None = None
    """Steps between evaluations on the development set."""
    num_segments: int | None = None
    """PoNet's segments have model length // num_segments + 1 tokens."""
    jobs: int = 1
    """Runs at a time, each in a process of its own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto: a GPU if there is one."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Keep the data on the device and run each step as one CUDA graph, in the published protocol
    and with mixers that allow it; auto: on a GPU. Figures change by rounding and dropout only."""
    threads: int | None = None
    """CPU threads of a run; None: all cores, divided among the jobs."""
    data_dir: str = DATA_DIR
    """Folder of prepared tasks; what is not there is prepared first, see lra/prepare.py."""
    num_examples: int | None = None
    """Examples to generate where a generated task is not prepared; None: the published number."""
    output_dir: str = "runs/lra"
    """Folder of all runs."""
    log_every: int = 50
    """Steps between lines of the log."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints, besides those after each evaluation."""

    def __post_init__(self) -> None:
        models = tuple(name for name in MIXERS if name not in PUBLISHED_FORMS.values())
        for names, known in (("task", (*TASKS, "all")), ("model", models)):
            for name in getattr(self, names):
                require(name in known, names, f"one of {', '.join(known)}", name)
        require_at_least(self, _AT_LEAST)
        for name in ("learning_rate", "pretrain_learning_rate"):
            value = getattr(self, name)
            require(value is None or value > 0, name, "above 0", value)
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, name, "at least 0 and below 1", value)
        window = self.local_window
        require(window > 0 and window % 2 == 1, "local_window", "odd and at least 1", window)

    def runs(self, device: str) -> list[ArenaSettings]:
        """All runs of the command on a device, "cpu" or "cuda", seeds innermost."""
        return [
            self.settings(task, model, seed, device)
            for task in tasks_named(self.task)
            for model in dict.fromkeys(self.model)
            for seed in range(self.seeds)
        ]

    def settings(self, task: ArenaTask, model: str, seed: int, device: str) -> ArenaSettings:
        """Those of one run: what task and protocol decide is filled in."""
        values: dict[str, Any] = {"task": task.name, "model": model, "seed": seed}
        names = {field.name for field in dataclasses.fields(ArenaSettings)} - values.keys()
        of_protocol = ("eval_batches",) if self.protocol == "published" else ()
        for name in names:
            value = getattr(self, name)
            from_task = value is None and name in (*_OF_TASK, *of_protocol)
            values[name] = getattr(task, name) if from_task else value
        if model not in _WITH_BLOCK:
            values |= BLOCK
        if self.precision == "auto":
            half = "fp16" if self.protocol == "published" else "bf16"
            values["precision"] = half if device == "cuda" else "fp32"
        if values["precision"] == "fp16" and device == "cpu":
            raise UsageError(
                "--precision fp16 scales the loss for a GPU; on a CPU use fp32 or bf16"
            )
        settings = ArenaSettings(**values)
        warmup, steps = settings.warmup_steps, settings.steps
        fits = warmup is None or 0 <= warmup <= steps
        require(fits, "warmup_steps", f"0 to {steps}, the steps of {task.name}", warmup)
        # sizes that contradict each other are found before the first run begins
        settings.model_config()
        return settings


def parse(argv: Sequence[str] | None = None) -> ArenaConfig:
    """Settings of the command line."""
    _, preset, flags = parse_arguments(
        ArenaConfig,
        argv,
        description="Train and test token mixers on the Long Range Arena.",
        default_preset="default",
        presets=PRESETS,
    )
    return ArenaConfig(**preset | flags)
