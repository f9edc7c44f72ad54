"""Pre-train an encoder: `deepspeed pretrain/run.py`, `torchrun ... pretrain/run.py`, or `python`.

Progress goes to stderr; the last line of stdout is one JSON document with the results.
"""

import json
import logging
import os
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from tokenizers import Tokenizer
from tqdm import tqdm

from ponet import PoNetForPreTraining
from ponet.checkpoint import write_json, write_text
from ponet.run.cli import UsageError
from ponet.run.device import (
    matmul_rate,
    peak_memory_mib,
    source_commit,
    training_flops,
)
from ponet.run.log import MetricsWriter, set_up_logging
from ponet.run.trainer import TrainingError
from ponet.tokenizer import SpecialTokens, save_tokenizer
from pretrain.batches import Batch, MicroBatchSampler, evaluation_batches, make_loader
from pretrain.checkpoints import CheckpointStore, Progress
from pretrain.corpus import Corpus
from pretrain.engine import Engine, build_engine, check_engine, needs_deepspeed
from pretrain.launch import Launch, finish, print_last, start
from pretrain.prepare import check_unchanged, describe, example_settings, prepare
from pretrain.settings import PretrainConfig, as_yaml, parse
from pretrain.trainer import (
    StepResult,
    Stopwatch,
    Tally,
    evaluate,
    train_step,
)

logger = logging.getLogger("pretrain")


def run_folder(config: PretrainConfig, preset: str, launch: Launch) -> Path:
    """The folder of the run, the same on all ranks; it is made when there is something to write.

    Raises:
        UsageError: the folder is not empty.
    """
    if config.resume:
        return Path(config.resume)
    name = [config.output_dir or f"runs/{preset}-{datetime.now():%Y%m%d-%H%M%S}"]
    dist.broadcast_object_list(name, src=0)
    folder = Path(name[0])
    occupied = [folder.exists() and (not folder.is_dir() or any(folder.iterdir()))]
    dist.broadcast_object_list(occupied, src=0)
    if occupied[0]:
        raise UsageError(
            f"--output-dir {folder} is not an empty folder; choose another, or continue its run "
            f"with --resume {folder}"
        )
    return folder


def record_run(
    folder: Path, config: PretrainConfig, tokenizer: Tokenizer, corpus: Corpus, launch: Launch
) -> None:
    """Save what the run is: settings, tokenizer, versions, commit, command."""
    text = yaml.safe_dump(as_yaml(config), sort_keys=False)
    logger.info("settings:\n%s", text)
    save_tokenizer(tokenizer, folder, max_length=config.seq_len)
    record = {
        **describe(tokenizer, corpus),
        "command": sys.argv,
        "commit": source_commit(),
        "processes": launch.world_size,
        "device": str(launch.device),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed") if needs_deepspeed(config, launch.world_size) else None,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    write_json(folder / "run.json", record)
    # last, because --resume takes a folder with this file for a run
    write_text(folder / "config.yaml", text)


def build_model(
    config: PretrainConfig, tokenizer: Tokenizer, device: torch.device
) -> PoNetForPreTraining:
    """A freshly initialised model, the same on all ranks."""
    special = SpecialTokens.from_tokenizer(tokenizer)
    torch.manual_seed(config.seed)
    model = PoNetForPreTraining(
        config.model_config(tokenizer.get_vocab_size(), special.pad, special.cls, special.sep)
    ).to(device)
    encoder = model.ponet.encoder
    encoder.half_residual = config.precision == "bf16-residual"
    if device.type == "cuda" if config.compile is None else config.compile:
        encoder.compile_layers()
    return model


@dataclass(frozen=True, kw_only=True)
class Data:
    """Examples of a run."""

    train: MicroBatchSampler
    """Training micro-batches of this rank, from where the run stands."""
    evaluation: list[Batch]
    """Evaluation micro-batches of this rank."""
    baselines: dict[str, float]
    """Accuracy of always answering the commonest token and the commonest class."""


def build_data(
    config: PretrainConfig,
    tokenizer: Tokenizer,
    corpus: Corpus,
    launch: Launch,
    progress: Progress,
) -> Data:
    """Training and evaluation examples.

    Raises:
        ValueError: the corpus is too small for the settings.
    """
    train, validation = corpus.split(config.validation_fraction)
    settings = example_settings(config, tokenizer)
    held_out = evaluation_batches(
        corpus,
        validation,
        settings,
        seed=config.seed,
        micro_batch_tokens=config.micro_batch_tokens,
        max_batches=max(1, config.eval_tokens // config.micro_batch_tokens),
    )
    sampler = MicroBatchSampler(
        corpus,
        train,
        settings,
        seed=config.seed,
        micro_batch_tokens=config.micro_batch_tokens,
        micro_batches_per_step=config.micro_batches_per_step,
        rank=launch.rank,
        world_size=launch.world_size,
        start_epoch=progress.epoch,
        start_step=progress.epoch_step,
    )
    first = sampler.first_epoch
    logger.info(
        "epoch %d: %s examples, %d steps, packing efficiency %.3f, %d examples left over",
        progress.epoch,
        f"{len(first.plan):,}",
        first.num_steps,
        first.packing_efficiency,
        first.num_dropped_examples,
    )
    return Data(
        train=sampler,
        evaluation=held_out[launch.rank :: launch.world_size],
        baselines=baselines(corpus, held_out),
    )


def baselines(corpus: Corpus, batches: list[Batch]) -> dict[str, float]:
    """Held-out accuracy of the answers that need no model.

    Returns:
        `mlm_baseline`: share of masked tokens that are the commonest token of the corpus;
        `sso_baseline`: share of the commonest class, absent without a sentence objective.
    """
    commonest = int(corpus.token_frequencies().argmax())
    inputs = [batch.inputs.to(torch.device("cpu")) for batch in batches]
    labels = torch.cat([tensors["labels"] for tensors in inputs])
    shares = {"mlm_baseline": float((labels == commonest).double().mean())}
    classes = torch.cat([tensors["sso_labels"] for tensors in inputs])
    # "mlm" labels no sentences
    if (classes >= 0).all():
        shares["sso_baseline"] = float(classes.bincount().max() / len(classes))
    return shares


class Reporter:
    """Turns the sums of the steps since the last report into one line and one record."""

    def __init__(
        self,
        config: PretrainConfig,
        engine: Engine,
        writer: MetricsWriter,
        peak_rate: float,
        world_size: int,
        progress: Progress,
    ) -> None:
        self._config = config
        self._engine = engine
        self._writer = writer
        self._peak_rate = peak_rate * world_size
        self._begin(progress.step, progress.seconds)

    def _begin(self, step: int, seconds: float) -> None:
        """Begin an interval after a step, at this reading of the stopwatch."""
        self._step, self._seconds = step, seconds
        self.tally = Tally(self._engine.device)
        """For the steps of the interval."""

    def report(self, step: int, result: StepResult, stopwatch: Stopwatch) -> int:
        """Log the interval, on all ranks because they add up their sums, then begin another.

        Returns:
            Tokens of the interval.

        Raises:
            TrainingError: a loss is not finite.
        """
        sums = self.tally.read()
        now = stopwatch.seconds()
        steps, seconds = step - self._step, now - self._seconds
        where = f"step {step}" if steps == 1 else f"steps {self._step + 1} to {step}"
        flops = training_flops(self._engine.model.config, int(sums.tokens), int(sums.masked))
        values = sums.metrics(where) | {
            "learning_rate": self._engine.learning_rate,
            **({} if result.grad_norm is None else {"grad_norm": float(result.grad_norm)}),
            "step_ms": seconds / steps * 1e3,
            "tokens_per_second": sums.tokens / seconds,
            # executed operations over what a plain matrix product reaches on this device
            "flops_utilisation": flops / seconds / self._peak_rate,
            "peak_memory_mib": peak_memory_mib(self._engine.device),
        }
        self._writer.write("train", step, values)
        remaining = (self._config.steps - step) * seconds / steps
        logger.info(
            "step %d/%d | loss %.3f mlm %.3f sso %.3f | lr %.1e | %.0f ms | %.1fk tok/s | "
            "%s MiB | eta %s",
            step,
            self._config.steps,
            values["loss"],
            values["mlm_loss"],
            values.get("sso_loss", 0.0),
            values["learning_rate"],
            values["step_ms"],
            values["tokens_per_second"] / 1e3,
            f"{values['peak_memory_mib']:,.0f}",
            f"{remaining / 60:.0f}m" if remaining >= 60 else f"{remaining:.0f}s",
        )
        self._begin(step, now)
        return int(sums.tokens)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What training ended with."""

    progress: Progress
    """Where the run stands."""
    evaluation: dict[str, float]
    """Held-out losses and accuracies of the last evaluation."""


def train(
    config: PretrainConfig,
    engine: Engine,
    data: Data,
    store: CheckpointStore,
    writer: MetricsWriter,
    progress: Progress,
    launch: Launch,
) -> Outcome:
    """The loop: steps, reports, evaluations, checkpoints.

    Raises:
        TrainingError: a loss is not finite.
        CheckpointError: a checkpoint cannot be written.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    peak_rate = matmul_rate(launch.device, dtype[config.arithmetic])
    reporter = Reporter(config, engine, writer, peak_rate, launch.world_size, progress)
    on_gpu = launch.device.type == "cuda"
    loader = iter(make_loader(data.train, num_workers=config.num_workers, pin_memory=on_gpu))
    evaluation: dict[str, float] = {}
    stopwatch = Stopwatch(progress.seconds)
    tokens = progress.tokens
    bar = progress_bar(progress.step, config.steps, shown=launch.rank == 0)
    for step in range(progress.step + 1, config.steps + 1):
        saves = step % config.eval_every == 0 or step == config.steps
        # a report finds out whether losses are finite: there is one before every checkpoint
        logs = step % config.log_every == 0 or saves
        result = train_step(engine, loader, reporter.tally, seed=config.seed, want_norm=logs)
        bar.update()
        if logs:
            tokens += reporter.report(step, result, stopwatch)
        if not saves:
            continue
        stopwatch.pause()
        evaluation = evaluate(engine, data.evaluation, step)
        report_evaluation(step, evaluation, data.baselines, writer)
        progress = Progress(
            step=step,
            epoch=result.epoch,
            epoch_step=result.epoch_step + 1,
            tokens=tokens,
            seconds=stopwatch.seconds(),
        )
        store.save(engine, progress, evaluation["loss"])
        stopwatch.resume()
    bar.close()
    if not evaluation:
        evaluation = evaluate(engine, data.evaluation, progress.step)
    return Outcome(progress=progress, evaluation=evaluation)


def progress_bar(step: int, steps: int, *, shown: bool) -> tqdm:
    """A bar where a person watches a terminal."""
    hidden = not shown or not sys.stderr.isatty()
    return tqdm(initial=step, total=steps, unit="step", disable=hidden, dynamic_ncols=True)


def report_evaluation(
    step: int, evaluation: dict[str, float], baselines: dict[str, float], writer: MetricsWriter
) -> None:
    """Log held-out figures beside their baselines."""
    writer.write("eval", step, evaluation | baselines)
    line = f"mlm {evaluation['mlm_accuracy']:.3f} (commonest {baselines['mlm_baseline']:.3f})"
    if "sso_accuracy" in evaluation:
        line += f" sso {evaluation['sso_accuracy']:.3f} (commonest {baselines['sso_baseline']:.3f})"
    logger.info("step %d | held out: loss %.3f | accuracy: %s", step, evaluation["loss"], line)


def export(
    folder: Path,
    engine: Engine,
    tokenizer: Tokenizer,
    config: PretrainConfig,
) -> Path:
    """Write the model folder that `from_pretrained` loads."""
    target = folder / "model"
    engine.model.save_pretrained(target)
    save_tokenizer(tokenizer, target, max_length=config.seq_len)
    return target


def pretrain(config: PretrainConfig, preset: str, launch: Launch, began: float) -> dict[str, Any]:
    """A whole run on this rank.

    Returns:
        The results, the same on all ranks.
    """
    # contradictions first: they should not wait for the data
    check_engine(config, launch.world_size, launch.device)
    folder = run_folder(config, preset, launch)
    resumed = folder if config.resume else None
    tokenizer, corpus = prepare(config, launch, resumed)
    if resumed:
        check_unchanged(corpus, json.loads((folder / "run.json").read_text()), folder)
    model = build_model(config, tokenizer, launch.device)
    engine = build_engine(config, model, launch.world_size)
    store = CheckpointStore(
        folder / "checkpoints",
        keep=config.keep_checkpoints,
        rank=launch.rank,
        world_size=launch.world_size,
    )
    progress = store.restore(engine) if resumed else Progress()
    data = build_data(config, tokenizer, corpus, launch, progress)
    if launch.rank == 0 and not resumed:
        record_run(folder, config, tokenizer, corpus, launch)
    with MetricsWriter(folder, rank=launch.rank, resume_step=progress.step) as writer:
        outcome = train(config, engine, data, store, writer, progress, launch)
    result = {
        **outcome.evaluation,
        **data.baselines,
        "steps": outcome.progress.step,
        "tokens": outcome.progress.tokens,
        "tokens_per_second": outcome.progress.tokens / max(outcome.progress.seconds, 1e-9),
        "seconds": time.perf_counter() - began,
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_memory_mib": peak_memory_mib(launch.device),
        "run": str(folder),
        "checkpoint": str(folder / "model"),
    }
    if launch.rank == 0:
        export(folder, engine, tokenizer, config)
        write_json(folder / "result.json", result)
    return result


def fail(error: Exception) -> None:
    """End the process with the message and nothing else: its cause is outside the program."""
    sys.stderr.write(f"pretrain: error: {error}\n")
    sys.stderr.flush()
    # other ranks may wait in a collective that this one will never join; no clean way out of that
    os._exit(2 if isinstance(error, UsageError) else 1)


def main() -> None:
    """Run the program."""
    began = time.perf_counter()
    # the process that DeepSpeed starts on each machine must not tokenise with nested thread pools
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        config, preset = parse()
        launch = start()
        set_up_logging(launch.rank)
        result = pretrain(config, preset, launch, began)
    # usage, configuration, data and checkpoint errors are ValueErrors; a full disk is an OSError
    except (ValueError, TrainingError, OSError) as error:
        fail(error)
        return
    finish()
    if launch.rank == 0:
        print_last(json.dumps(result))


if __name__ == "__main__":
    main()
