"""Pre-train an encoder: `deepspeed pretrain/run.py`, `torchrun ... pretrain/run.py`, or `python`.

Progress goes to stderr; the last line that rank 0 prints is one JSON document with the results,
which `result.json` in the folder of the run holds, too.
"""

import os
import sys
from pathlib import Path

# read when torch is imported: threads that spin while they wait for work make every step up to ten
# times as long on a machine with other work
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# the process that prepares the data on each machine must not tokenise with nested thread pools
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
import yaml
from tokenizers import Tokenizer
from torch import Tensor

from ponet import PoNetConfig, PoNetForPreTraining
from ponet.checkpoint import CONFIG, model_folder
from ponet.files import write_json, write_text
from ponet.model import IGNORED_LABEL, PreTrainingOutput
from ponet.run.cli import UsageError, errors_in_one_line, read_yaml
from ponet.run.device import matmul_rate, peak_memory_mib, source_commit, training_flops
from ponet.run.log import MetricsWriter, describe, log_steps, set_up_logging
from ponet.run.trainer import TrainingError, progress_bar
from ponet.tokenizer import SpecialTokens, save_tokenizer, tokenizer_fingerprint
from pretrain.batches import MicroBatch, MicroBatchSampler, evaluation_batches, make_loader
from pretrain.checkpoints import CheckpointStore, RunPosition
from pretrain.corpus import Corpus, prepare
from pretrain.engine import Engine, Ranks, build_engine, check_engine, join_ranks, needs_deepspeed
from pretrain.examples import length_baseline, split_documents
from pretrain.settings import PretrainConfig, parse

logger = logging.getLogger("pretrain")

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Run the program."""
    began = time.perf_counter()
    advice = "; --resume FOLDER continues from its newest checkpoint"
    # other ranks may wait in a collective that this one will never join; no clean way out
    with errors_in_one_line("pretrain", advice=advice, leave=os._exit):
        config, preset = parse()
        ranks = join_ranks()
        set_up_logging(ranks.rank)
        result = pretrain(config, preset, ranks, began)
    dist.destroy_process_group()
    if ranks.rank == 0:
        print(json.dumps(result), flush=True)


def pretrain(config: PretrainConfig, preset: str, ranks: Ranks, began: float) -> dict[str, Any]:
    """A whole run on this rank; the results are the same on all ranks."""
    # contradictions first: they should not wait for the data
    check_engine(config, ranks.world_size, ranks.device)
    folder = run_folder(config, preset)
    resumed = folder if config.resume else None
    warn_of_schedule(config)
    tokenizer, corpus = prepare(config, ranks, resumed)
    model = build_model(config, tokenizer, ranks.device)
    engine = build_engine(config, model, ranks.world_size)
    store = CheckpointStore(folder / "checkpoints", keep=config.keep_checkpoints)
    position = store.restore(engine) if resumed else RunPosition()
    sampler, held_out = build_batches(config, tokenizer, corpus, ranks, position)
    baselines = majority_baselines(corpus, held_out)
    if "sso_baseline" in baselines:
        baselines["sso_length_baseline"] = length_baseline(sampler.first_epoch.plan)
    if ranks.rank == 0 and not resumed:
        record_run(folder, config, tokenizer, corpus, ranks)
    with MetricsWriter(folder, rank=ranks.rank, resume_step=position.step) as writer:
        own = held_out[ranks.rank :: ranks.world_size]
        position, evaluation = train(
            config, engine, sampler, own, baselines, store, writer, position, ranks
        )
    result = {
        **evaluation,
        "steps": position.step,
        "tokens": position.tokens,
        "tokens_per_second": position.tokens / max(position.seconds, 1e-9),
        "seconds": time.perf_counter() - began,
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_memory_mib": peak_memory_mib(ranks.device),
        "run": str(folder),
        "checkpoint": str(folder / "model"),
    }
    if ranks.rank == 0:
        model.save_pretrained(folder / "model")
        save_tokenizer(tokenizer, folder / "model", max_length=config.seq_len)
        write_json(folder / "result.json", result)
    return result


def train(
    config: PretrainConfig,
    engine: Engine,
    sampler: MicroBatchSampler,
    held_out: list[MicroBatch],
    baselines: dict[str, float],
    store: CheckpointStore,
    writer: MetricsWriter,
    position: RunPosition,
    ranks: Ranks,
) -> tuple[RunPosition, dict[str, float]]:
    """The loop: steps, lines of the log, evaluations, checkpoints.

    Returns:
        Where the run stands at its end, and the figures of the last evaluation.
    """
    device = engine.device
    peak_rate = matmul_rate(device, _DTYPES[config.arithmetic]) * ranks.world_size
    loader = make_loader(sampler, num_workers=config.num_workers, pin_memory=device.type == "cuda")
    batches = iter(loader)
    bar = progress_bar(position.step, config.steps, shown=ranks.rank == 0)
    evaluation: dict[str, float] = {}
    sums = LossSums(device)
    for step in range(position.step + 1, config.steps + 1):
        saves = step % config.eval_every == 0 or step == config.steps
        # a line of the log finds out whether losses are finite: one before every checkpoint
        logs = step % config.log_every == 0 or saves
        last, norm = train_step(engine, batches, sums, seed=config.seed, want_norm=logs)
        bar.update()
        if not logs:
            continue

        first, steps = position.step + 1, step - position.step
        metrics = sums.means(f"step {step}" if steps == 1 else f"steps {first} to {step}")
        elapsed = time.perf_counter() - sums.began
        position = RunPosition(
            step=step,
            epoch=last.epoch,
            epoch_step=last.step + 1,
            tokens=position.tokens + sums.tokens,
            seconds=position.seconds + elapsed,
        )
        metrics["learning_rate"] = engine.learning_rate
        if norm is not None:
            metrics["grad_norm"] = float(norm)
        metrics["step_ms"] = elapsed / steps * 1e3
        metrics["tokens_per_second"] = sums.tokens / elapsed
        flops = training_flops(engine.model.config, sums.tokens, sums.masked, config.seq_len)
        if flops is not None:
            # executed operations over what a plain matrix product reaches on this device
            metrics["flops_utilisation"] = flops / elapsed / peak_rate
        metrics["peak_memory_mib"] = peak_memory_mib(device)
        left = (config.steps - step) * elapsed / steps
        log_steps(
            writer, name="", step=step, steps=config.steps, metrics=metrics, remaining_seconds=left
        )
        if saves:
            evaluation = evaluate(engine, held_out, baselines, step)
            writer.write("eval", step, evaluation)
            logger.info(f"step {step}/{config.steps} | held out: {describe(evaluation)}")
            store.save(engine, position, evaluation["loss"])
        sums = LossSums(device)
    bar.close()
    return position, evaluation or evaluate(engine, held_out, baselines, position.step)


def train_step(
    engine: Engine, batches: Iterator[MicroBatch], sums: "LossSums", *, seed: int, want_norm: bool
) -> tuple[MicroBatch, Tensor | None]:
    """Accumulate this rank's micro-batches of a global batch and update the weights.

    Nothing is read from the device; `sums` takes the losses.

    Returns:
        The last micro-batch, and the norm of the gradient before clipping, when asked for.
    """
    norm = None
    parts = list(islice(batches, engine.accumulation_steps))
    for batch in parts:
        is_last = batch is parts[-1]
        inputs = batch.inputs.to(engine.device)
        torch.manual_seed(dropout_seed(seed, batch))
        output = engine.forward(inputs)
        sums.add(output, inputs, batch)
        assert output.loss is not None
        engine.backward(output.loss)
        if want_norm and is_last:
            norm = engine.grad_norm()
        engine.end_micro_batch(last=is_last)
    return parts[-1], norm


def dropout_seed(seed: int, batch: MicroBatch) -> int:
    """Seed of the dropout of a micro-batch: the same wherever and whenever it is computed."""
    # distinct odd multipliers keep the three counters from cancelling out
    mixed = seed * 0x9E3779B97F4A7C15 + batch.epoch * 0xC2B2AE3D27D4EB4F
    return (mixed + batch.step * 0x165667B19E3779F9 + batch.slot * 0x27D4EB2F165667C5) % 2**63


@torch.no_grad()
def evaluate(
    engine: Engine, batches: list[MicroBatch], baselines: dict[str, float], step: int
) -> dict[str, float]:
    """Losses and accuracies after a step over the batches of all ranks, with the baselines."""
    sums = LossSums(engine.device)
    engine.model.eval()
    for batch in batches:
        inputs = batch.inputs.to(engine.device)
        sums.add(engine.forward(inputs), inputs, batch)
    engine.model.train()
    return sums.means(f"the evaluation after step {step}") | baselines


class LossSums:
    """Adds up micro-batches without waiting: losses on the device, counts on the host."""

    def __init__(self, device: torch.device) -> None:
        self.began = time.perf_counter()
        # of MLM and SSO each: the loss summed over what is to predict, and how many are right
        self._measured = torch.zeros(4, dtype=torch.float64, device=device)
        self.tokens = self.masked = self.sequences = 0
        """Of this rank; after `means`, of all ranks."""

    @torch.no_grad()
    def add(self, output: PreTrainingOutput, labels: dict[str, Tensor], batch: MicroBatch) -> None:
        """Add a micro-batch, with its `labels` `[M]` and `sso_labels` `[B]` on the device."""
        assert output.mlm_loss is not None
        mlm_correct = (output.mlm_logits.argmax(dim=-1) == labels["labels"]).sum()
        sums = [output.mlm_loss.detach() * batch.masked, mlm_correct]
        if output.sso_loss is not None and output.sso_logits is not None:
            sso_correct = (output.sso_logits.argmax(dim=-1) == labels["sso_labels"]).sum()
            sums += [output.sso_loss.detach() * batch.sequences, sso_correct]
        self._measured[: len(sums)].add_(torch.stack([value.double() for value in sums]))
        self.tokens += batch.tokens
        self.masked += batch.masked
        self.sequences += batch.sequences

    def means(self, where: str) -> dict[str, float]:
        """Means over all ranks, losses in nats and accuracies as shares; waits for the device."""
        counts = self._measured.new_tensor([self.tokens, self.masked, self.sequences])
        total = torch.cat([self._measured, counts])
        dist.all_reduce(total)
        mlm_loss, mlm_correct, sso_loss, sso_correct, *summed = total.tolist()
        self.tokens, self.masked, self.sequences = map(int, summed)
        masked = max(self.masked, 1)
        means = {"mlm_loss": mlm_loss / masked, "mlm_accuracy": mlm_correct / masked}
        if self.sequences:
            means["sso_loss"] = sso_loss / self.sequences
            means["sso_accuracy"] = sso_correct / self.sequences
        loss = means["mlm_loss"] + means.get("sso_loss", 0.0)
        if not math.isfinite(loss):
            parts = ", ".join(f"{n[:3]} {x:.4g}" for n, x in means.items() if n.endswith("loss"))
            raise TrainingError(
                f"loss is {loss} in {where} ({parts}); lower --learning-rate or --max-grad-norm, "
                "or raise --warmup-steps, and --resume from the last checkpoint"
            )
        return {"loss": loss, **means}


def warn_of_schedule(config: PretrainConfig) -> None:
    """Say where the learning rate takes another course than one would think."""
    if config.warmup_steps > config.steps:
        logger.warning(
            f"--warmup-steps {config.warmup_steps}, but the run ends after {config.steps} steps: "
            "the learning rate never reaches --learning-rate"
        )
    if config.resume and config.schedule == "linear":
        begun_with = read_yaml(Path(config.resume, "config.yaml"), PretrainConfig)["steps"]
        if config.steps != begun_with:
            logger.warning(
                f"--steps {config.steps}, but the run began with {begun_with}: from here on the "
                "learning rate falls on another line than in a run of either length"
            )


def run_folder(config: PretrainConfig, preset: str) -> Path:
    """The folder of the run, the same on all ranks; it is made when there is something to write."""
    if config.resume:
        return Path(config.resume)
    folder = Path(config.output_dir or f"runs/{preset}-{datetime.now():%Y%m%d-%H%M%S}")
    occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    shared = [folder, occupied]
    dist.broadcast_object_list(shared, src=0)
    folder, occupied = shared
    if occupied:
        raise UsageError(
            f"--output-dir {folder} is not an empty folder; choose another, or continue its run "
            f"with --resume {folder}"
        )
    return folder


def build_model(
    config: PretrainConfig, tokenizer: Tokenizer, device: torch.device
) -> PoNetForPreTraining:
    """A freshly initialised model or that of the checkpoint, the same on all ranks."""
    special = SpecialTokens.from_tokenizer(tokenizer)
    fresh = config.model_config(tokenizer.get_vocab_size(), special.pad, special.cls, special.sep)
    torch.manual_seed(config.seed)
    if config.checkpoint:
        model = continued_model(config.checkpoint, fresh).to(device)
    else:
        model = PoNetForPreTraining(fresh).to(device)
    encoder = model.ponet.encoder
    encoder.half_residual = config.precision == "bf16-residual"
    if device.type == "cuda" if config.compile is None else config.compile:
        encoder.compile_layers()
    return model


def continued_model(checkpoint: str, fresh: PoNetConfig) -> PoNetForPreTraining:
    """The model of a checkpoint in training mode; a head for another objective is new."""
    dropout = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    of_run = (*dropout, "pad_token_id", "cls_token_id", "sep_token_id", "num_sentence_labels")
    changes = {name: getattr(fresh, name) for name in of_run}
    held = PoNetConfig.from_file(model_folder(checkpoint) / CONFIG).max_position_embeddings
    if held < fresh.max_position_embeddings:
        changes["max_position_embeddings"] = fresh.max_position_embeddings
    return PoNetForPreTraining.from_pretrained(
        checkpoint, ignore_mismatched_sizes=True, **changes
    ).train()


def build_batches(
    config: PretrainConfig,
    tokenizer: Tokenizer,
    corpus: Corpus,
    ranks: Ranks,
    position: RunPosition,
) -> tuple[MicroBatchSampler, list[MicroBatch]]:
    """Training micro-batches of this rank from where the run stands, and all held-out ones."""
    training, validation = split_documents(corpus.num_documents, config.validation_fraction)
    settings = config.example_settings(tokenizer)
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
        training,
        settings,
        seed=config.seed,
        micro_batch_tokens=config.micro_batch_tokens,
        micro_batches_per_step=config.micro_batches_per_step,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start_epoch=position.epoch,
        start_step=position.epoch_step,
    )
    first = sampler.first_epoch
    labelled = (first.plan.label != IGNORED_LABEL).mean()
    logger.info(
        f"epoch {position.epoch}: {len(first.plan):,} examples, {labelled:.0%} with a sentence "
        f"label, {first.num_steps} steps, packing efficiency {first.packing_efficiency:.3f}, "
        f"{first.num_dropped_examples} left over"
    )
    return sampler, held_out


def majority_baselines(corpus: Corpus, batches: list[MicroBatch]) -> dict[str, float]:
    """Held-out accuracy of the most frequent token of the corpus and the most frequent class."""
    most_frequent = int(corpus.token_frequencies().argmax())
    inputs = [batch.inputs.to(torch.device("cpu")) for batch in batches]
    labels = torch.cat([tensors["labels"] for tensors in inputs])
    shares = {"mlm_baseline": float((labels == most_frequent).double().mean())}
    classes = torch.cat([tensors["sso_labels"] for tensors in inputs])
    classes = classes[classes != IGNORED_LABEL]
    # "mlm" labels no sentences
    if len(classes):
        shares["sso_baseline"] = float(classes.bincount().max() / len(classes))
    return shares


def record_run(
    folder: Path, config: PretrainConfig, tokenizer: Tokenizer, corpus: Corpus, ranks: Ranks
) -> None:
    """Save what the run is: settings, tokenizer, versions, commit, command."""
    settings = asdict(config) | {"data": list(config.data)}
    # belongs to one start of the run
    del settings["resume"]
    text = yaml.safe_dump(settings, sort_keys=False)
    logger.info("settings:\n%s", text)
    save_tokenizer(tokenizer, folder, max_length=config.seq_len)
    record = {
        "corpus": corpus.folder.name,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "command": sys.argv,
        "commit": source_commit(),
        "processes": ranks.world_size,
        "device": str(ranks.device),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed") if needs_deepspeed(config, ranks.world_size) else None,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    write_json(folder / "run.json", record)
    # last, because --resume takes a folder with this file for a run
    write_text(folder / "config.yaml", text)


if __name__ == "__main__":
    main()
