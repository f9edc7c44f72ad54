"""Train and test on the Long Range Arena: `python lra/run.py --task text --model ponet attention`.

Every task, model and seed is a run in a folder of its own; finished ones are skipped, interrupted
ones continue. Progress goes to stderr; the last line of stdout is one JSON document. A run holds

config.json         settings, data, model, commit, command; a run with others is refused
metrics.jsonl       losses and accuracies by step, and the same in tensorboard/
checkpoint.pt       where training stands, while the run is unfinished
pretrain/           the last three of self-pretraining
model.safetensors   the classifier of the best development accuracy
result.json         the figures, when the run is finished
"""

import os
from pathlib import Path

# threads that wait for work without a core of their own are ten times slower when they spin
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import save

from lra.data import Classification
from lra.model import LongRangeClassifier
from lra.prepare import prepare_task
from lra.resident import obstacle
from lra.selfpretrain import MaskedPrediction
from lra.settings import BLOCK, ArenaConfig, ArenaSettings, parse
from lra.store import ArenaData, load_arena_data
from lra.tasks import tasks_named
from ponet.files import write_bytes
from ponet.run.device import device_name
from ponet.run.runs import Run, run_all, run_options, run_program
from ponet.run.trainer import Progress, Trainer, step_seed

_TRAIN_STAGE, _PRETRAIN_STAGE = 0, 1

# as a script this module has another name
logger = logging.getLogger("lra.run")


@dataclass(frozen=True, kw_only=True)
class ArenaRun(Run):
    """A run, whose process reads the data itself."""

    settings: ArenaSettings
    data_folder: Path
    """Of the prepared task."""
    captures: bool
    """Capture the steps where nothing stands against it."""

    def _load(self) -> ArenaData:
        settings = self.settings
        return load_arena_data(settings.task, self.data_folder, settings.protocol)

    def identity(self) -> dict[str, Any]:
        settings = self.settings
        fields = {"data": self._load().manifest["digest"], **asdict(settings)}
        if settings.mixer != settings.model:
            fields["mixer"] = settings.mixer
        # the published block says nothing of its settings, as before there was a choice
        return {n: x for n, x in fields.items() if n not in BLOCK or x != BLOCK[n]}

    def execute(self) -> dict[str, Any]:
        """Self-pretrain, train and test, or continue to."""
        settings, device, data = self.settings, self.options.device, self._load()
        torch.manual_seed(settings.seed)
        model = LongRangeClassifier(settings.model_config(), data.task.num_inputs).to(device)
        reason = obstacle(settings, data, device) if self.captures else None
        if reason is not None:
            logger.info("%s | steps are not captured: %s", self.name, reason)
        resident = self.captures and reason is None
        classification = Classification(model, data, settings, device, resident=resident)
        self.begin({"data": data.describe(), "model": settings.model_config().to_dict()})
        pretrain_seconds = self._pretrain(model, data) if settings.pretrain_epochs else 0.0
        if settings.compile:
            model.ponet.encoder.compile()
        trainer = Trainer(
            model,
            classification.training_step(_TRAIN_STAGE),
            self.options,
            name=self.name,
            steps=settings.steps,
            eval_every=settings.eval_every,
            evaluate=classification.dev_accuracy,
            best_by="accuracy",
        )
        trainer.train(self.folder)
        assert trainer.best is not None
        model.load_state_dict(trainer.best)
        began = time.perf_counter()
        accuracy = classification.test_accuracy()
        seconds = pretrain_seconds + trainer.progress.seconds + time.perf_counter() - began
        write_bytes(self.folder / "model.safetensors", save(trainer.best))
        result = {
            **self._figures(data, trainer.progress),
            "test_accuracy": accuracy,
            "num_test_examples": sum(map(len, classification.test_batches())),
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "seconds": seconds,
        }
        text = f"test accuracy {accuracy:.4f} (majority baseline {result['majority_rate']:.4f})"
        note = "" if result["complete"] else ", not the complete published run"
        logger.info("%s | %s after %d steps%s", self.name, text, settings.steps, note)
        return self.finish(result)

    def _pretrain(self, classifier: LongRangeClassifier, data: ArenaData) -> float:
        """Give the classifier a self-pretrained encoder; returns the seconds it took."""
        seeds = (self.settings.seed, _PRETRAIN_STAGE)
        torch.manual_seed(step_seed(*seeds))
        prediction = MaskedPrediction(data, self.settings, self.options.device)
        step, steps = prediction.training_step(seeds), prediction.schedule.steps
        name = f"{self.name} pretraining"
        trainer = Trainer(
            prediction.model, step, self.options, name=name, steps=steps, eval_every=steps
        )
        trainer.train(self.folder / "pretrain")
        classifier.ponet.load_state_dict(prediction.model.ponet.state_dict())
        return trainer.progress.seconds

    def _figures(self, data: ArenaData, progress: Progress) -> dict[str, Any]:
        settings, differences = self.settings, self.settings.differences()
        names = ("task", "model", "protocol", "seed", "pretrain_epochs", "precision", "steps")
        return {
            **{name: getattr(settings, name) for name in names},
            "mixer": settings.mixer,
            "ablation": settings.ablation,
            "complete": data.is_whole and set(differences) <= set(settings.ablation),
            "differences": differences,
            "published_steps": data.task.steps,
            "dev_accuracy": progress.best_score,
            "best_step": progress.best_step,
            "majority_rate": data.test.majority_rate,
            "step_ms": 1e3 * progress.train_seconds / progress.step,
            "device": device_name(self.options.device),
            "data": data.describe(),
        }


def plan_runs(config: ArenaConfig) -> list[ArenaRun]:
    """All runs of a command, with their data prepared."""
    options = run_options(config)
    on_gpu = options.device.type == "cuda"
    settings = config.runs(options.device.type)
    data_folders = {
        task.name: prepare_task(task.name, config.data_dir, num_examples=config.num_examples)
        for task in tasks_named(config.task)
    }
    return [
        ArenaRun(
            settings=run,
            folder=Path(config.output_dir) / run.group / run.name,
            data_folder=data_folders[run.task],
            options=options,
            captures=config.capture == "on" or (config.capture == "auto" and on_gpu),
        )
        for run in settings
    ]


def train_tasks(argv: Sequence[str] | None = None) -> tuple[dict[str, Any], list[str]]:
    """All that a command line asks for; returns the document and what went wrong on the way."""
    config = parse(argv)
    results, failures = run_all("lra", plan_runs(config), jobs=config.jobs)
    logger.info("for a table: python lra/report.py %s", config.output_dir)
    return {"runs": results}, failures


if __name__ == "__main__":
    run_program("lra", train_tasks)
