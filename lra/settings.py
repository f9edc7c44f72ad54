"""What a command is told, and what each of its runs is: task defaults < YAML < flags."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lra.model import model_config
from lra.prepare import DATA_DIR
from lra.protocol import Protocol
from lra.tasks import COMPARED, TASKS, Task
from ponet import PoNetConfig
from ponet.mixers import MIXERS
from ponet.run.cli import UsageError, parse_arguments, preset_path, read_yaml

PRESETS = Path(__file__).with_name("configs")


@dataclass(frozen=True, kw_only=True)
class LRAConfig:
    """Settings of a command; where the default is None, each task brings its published value.

    Raises:
        UsageError: values contradict each other.
    """

    task: tuple[str, ...] = ("listops",)
    """Tasks: listops, text, retrieval, image, pathfinder, pathx, or all (without pathx)."""
    model: tuple[str, ...] = ("ponet",)
    """Token mixers: ponet, attention, fnet, linear, linformer, nystromformer, ..."""
    protocol: Literal["published", "clean"] = "published"
    """published: the reference code quirk by quirk; clean: no padding, all examples, selection
    without test data."""
    seeds: int = 1
    """Runs of each task and model, with consecutive seeds."""
    first_seed: int = 0
    """Seed of the first run: of weights, order of examples and dropout."""
    jobs: int = 1
    """Runs at a time, each in a process of its own."""
    steps: int | None = None
    """Training steps."""
    max_minutes: float | None = None
    """Minutes that a run may train, evaluate and test, besides self-pretraining: the speed is
    measured first and the whole schedule laid over the steps that fit."""
    batch_size: int | None = None
    """Examples in a step."""
    learning_rate: float | None = None
    """Peak learning rate."""
    warmup_steps: int | None = None
    """Steps until the peak; None: the published share of the steps."""
    eval_every: int | None = None
    """Steps between evaluations on the development set; under --max-minutes at least so many that
    they take no more than a fifth of the training."""
    eval_batches: int | None = None
    """Batches of an evaluation; None: the published number, or in the clean protocol all."""
    test_examples: int | None = None
    """Test examples at most, drawn with the seed; None: all."""
    num_segments: int | None = None
    """PoNet's segments have model length // num_segments + 1 tokens."""
    hidden_size: int = 64
    """Width of the hidden states."""
    num_hidden_layers: int = 2
    """Encoder layers."""
    num_attention_heads: int = 2
    """Heads."""
    intermediate_size: int = 128
    """Width inside the feed-forward sub-layer."""
    dropout: float = 0.1
    """Dropout after the embedding and each sub-layer."""
    attention_dropout: float = 0.1
    """Dropout of attention probabilities, in mixers that have them. On a CPU softmax attention is
    several times faster without."""
    pretrain_epochs: float = 0.0
    """Passes over the training set in which hidden tokens are predicted, before the task."""
    pretrain_learning_rate: float = 1e-3
    """Peak learning rate of these passes."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic; auto: fp32 on a CPU; on a GPU fp16 with loss scaling as published, and bf16 in
    the clean protocol."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto: a GPU if there is one."""
    compile: bool = False
    """Run the encoder through torch.compile."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Keep the data on the device and run each step as one CUDA graph, in the published protocol
    and with mixers that allow it; auto: on a GPU. Figures change by rounding and dropout only."""
    threads: int | None = None
    """CPU threads of a run; None: all cores, divided among the jobs."""
    data_dir: str = DATA_DIR
    """Folder of prepared tasks; what is not there is prepared first, see lra/prepare.py."""
    num_examples: int | None = None
    """Examples to generate for listops, pathfinder or pathx where they are not prepared yet; None:
    the published numbers."""
    output_dir: str = "runs/lra"
    """Folder of all runs."""
    log_every: int = 50
    """Steps between lines of the log."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints, besides those after each evaluation."""

    def __post_init__(self) -> None:
        known = (*TASKS, "all")
        for name in self.task:
            _require(name in known, "task", name, f"one of {', '.join(known)}")
        for name in self.model:
            _require(name in MIXERS, "model", name, f"one of {', '.join(MIXERS)}")
        for name in ("seeds", "jobs", "log_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("steps", "batch_size", "eval_every", "eval_batches", "test_examples"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        for name in ("num_segments", "threads"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        for name in ("learning_rate", "max_minutes"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "above 0")
        for name in ("first_seed", "pretrain_epochs", "checkpoint_minutes"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            _require(0 <= value < 1, name, value, "at least 0 and below 1")
        if self.steps is not None and self.max_minutes is not None:
            raise UsageError("--steps and --max-minutes both decide the steps: give one")
        if self.compile and self.max_minutes is not None:
            raise UsageError("--max-minutes measures the speed without --compile: give one")

    @property
    def tasks(self) -> list[Task]:
        """The tasks, each once."""
        names = [n for name in self.task for n in (COMPARED if name == "all" else (name,))]
        return [TASKS[name] for name in dict.fromkeys(names)]

    def runs(self, device: str) -> "list[RunSettings]":
        """All runs of the command, seeds innermost.

        Args:
            device: "cpu" or "cuda".

        Raises:
            UsageError: a value does not fit a task.
            ConfigError: the sizes contradict each other.
        """
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        models = dict.fromkeys(self.model)
        return [
            RunSettings.resolve(self, task, model, seed, device)
            for task in self.tasks
            for model in models
            for seed in seeds
        ]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """All that decides the figures of one run, besides its data."""

    task: str
    """Key of `TASKS`."""
    model: str
    """Key of `MIXERS`."""
    protocol: Protocol
    """Of the run."""
    seed: int
    """Of the run."""
    steps: int
    """Training steps; at most so many with `max_minutes`."""
    max_minutes: float | None
    """Time that decides the steps."""
    warmup_steps: int | None
    """Steps of rising learning rate; None: the published share of the steps."""
    batch_size: int
    """Examples in a step."""
    learning_rate: float
    """Peak."""
    eval_every: int | None
    """Steps between evaluations; None: the published number, or more with `max_minutes`."""
    eval_batches: int | None
    """Batches of an evaluation; None: all examples."""
    test_examples: int | None
    """At most so many; None: all."""
    num_segments: int
    """Of PoNet."""
    hidden_size: int
    """Width."""
    num_hidden_layers: int
    """Layers."""
    num_attention_heads: int
    """Heads."""
    intermediate_size: int
    """Feed-forward width."""
    dropout: float
    """Probability."""
    attention_dropout: float
    """Probability."""
    pretrain_epochs: float
    """Passes of self-pretraining."""
    pretrain_learning_rate: float
    """Peak of self-pretraining."""
    precision: Literal["fp32", "bf16", "fp16"]
    """Arithmetic."""
    compile: bool
    """The encoder runs through torch.compile."""

    @classmethod
    def resolve(
        cls, config: LRAConfig, task: Task, model: str, seed: int, device: str
    ) -> "RunSettings":
        """Fill in what the task and the protocol decide.

        Raises:
            UsageError: a value does not fit the task or the device.
            ConfigError: the sizes contradict each other.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        values = {name: x for name, x in dataclasses.asdict(config).items() if name in names}
        for name in ("steps", "batch_size", "learning_rate", "num_segments"):
            if values[name] is None:
                values[name] = getattr(task, name)
        if values["eval_batches"] is None and config.protocol == "published":
            values["eval_batches"] = task.eval_batches
        if config.precision == "auto":
            half = "fp16" if config.protocol == "published" else "bf16"
            values["precision"] = half if device == "cuda" else "fp32"
        if values["precision"] == "fp16" and device == "cpu":
            raise UsageError(
                "--precision fp16 scales the loss for a GPU; on a CPU use fp32 or bf16"
            )
        settings = cls(**values | {"task": task.name, "model": model, "seed": seed})
        warmup = settings.warmup_steps
        if warmup is not None and not 0 <= warmup <= settings.steps:
            raise UsageError(
                f"--warmup-steps must be 0 to {settings.steps}, the steps of {task.name}, found "
                f"{warmup}"
            )
        settings.model_config()
        return settings

    @property
    def name(self) -> str:
        """Folder of the run below its protocol."""
        return f"{self.task}-{self.model}-seed{self.seed}"

    @property
    def group(self) -> str:
        """Folder of runs that may stand in one table."""
        return f"{self.protocol}-pretrained" if self.pretrain_epochs else self.protocol

    def model_config(self) -> PoNetConfig:
        """The architecture."""
        return model_config(
            TASKS[self.task],
            self.model,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            num_segments=self.num_segments,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.attention_dropout,
        )

    def departures(self) -> list[str]:
        """Names of the settings that are not the published ones of the task."""
        published = LRAConfig(
            protocol=self.protocol,
            precision=self.precision,
            compile=self.compile,
            pretrain_epochs=self.pretrain_epochs,
            pretrain_learning_rate=self.pretrain_learning_rate,
        )
        expected = RunSettings.resolve(
            published, TASKS[self.task], self.model, self.seed, device="cuda"
        )
        names = [field.name for field in dataclasses.fields(self)]
        return [name for name in names if getattr(self, name) != getattr(expected, name)]


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise UsageError(f"--{name.replace('_', '-')} must be {expected}, found {value}")


def parse(argv: Sequence[str] | None = None) -> LRAConfig:
    """Settings of the command line.

    Raises:
        UsageError: a file, key, flag or value is wrong.
    """
    preset, flags = parse_arguments(
        LRAConfig,
        argv,
        description="Train and test token mixers on the Long Range Arena.",
        default_preset="default",
    )
    return LRAConfig(**read_yaml(preset_path(preset, PRESETS), LRAConfig) | flags)
