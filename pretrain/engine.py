"""Ranks and what turns gradients into weights: one process by itself, or several by DeepSpeed."""

import importlib.util
import json
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ponet import PoNetForPreTraining
from ponet.model import PreTrainingOutput
from ponet.run.cli import UsageError
from ponet.run.trainer import autocast, linear_schedule, matrices_and_vectors
from pretrain.settings import PretrainConfig

logger = logging.getLogger(__name__)

_STATE = "state.pt"
_DEEPSPEED_FILE = Path(__file__).with_name("deepspeed.json")

# keys of DeepSpeed's file that our flags set
_OURS = {
    "train_batch_size": "--batch-tokens",
    "train_micro_batch_size_per_gpu": "--micro-batch-tokens",
    "gradient_accumulation_steps": "--batch-tokens and --micro-batch-tokens",
    "gradient_clipping": "--max-grad-norm",
    "optimizer": "--learning-rate and its neighbours",
    "scheduler": "--schedule and --warmup-steps",
    "bf16": "--precision",
    "fp16": "--precision",
    "torch_autocast": "--precision",
    "zero_optimization.stage": "--zero-stage",
}


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run."""

    rank: int
    local_rank: int
    """Place among the processes of this machine."""
    world_size: int
    device: torch.device
    patient_group: dist.ProcessGroup
    """For waiting as long as it takes, while one process prepares data."""


def join_ranks() -> Ranks:
    """Join the run that `deepspeed` or `torchrun` started, or one of this process alone."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    # port 0 is any that is free
    for name, value in (alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}).items():
        os.environ.setdefault(name, value)
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // neighbours))
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    patient_group = dist.new_group(backend="gloo", timeout=timedelta(days=2))
    assert isinstance(patient_group, dist.ProcessGroup)
    return Ranks(dist.get_rank(), local_rank, dist.get_world_size(), device, patient_group)


def read_deepspeed_file(path: Path) -> dict[str, Any]:
    """DeepSpeed's JSON file without what our flags set; DeepSpeed itself judges what is in it."""
    try:
        content = {"zero_optimization": {}} | json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"--deepspeed-config: {path}: cannot be read: {error}") from error
    for key in (*content, *(f"zero_optimization.{key}" for key in content["zero_optimization"])):
        if key in _OURS:
            raise UsageError(f"--deepspeed-config: {path}: {key} is set by {_OURS[key]}")
    return content


def engine_config(config: PretrainConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a run; micro-batches must be shared out evenly."""
    if config.micro_batches_per_step % world_size:
        raise UsageError(
            f"--batch-tokens {config.batch_tokens} makes {config.micro_batches_per_step} "
            f"micro-batches of {config.micro_batch_tokens}, which {world_size} processes cannot "
            "share evenly; change --batch-tokens or --micro-batch-tokens"
        )
    content = read_deepspeed_file(Path(config.deepspeed_config or _DEEPSPEED_FILE))
    return content | {
        # DeepSpeed counts samples; a packed micro-batch is one
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.micro_batches_per_step // world_size,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": content["zero_optimization"] | {"stage": config.zero_stage},
        "torch_autocast": {"enabled": config.arithmetic == "bf16", "dtype": "bfloat16"},
        "fp16": {"enabled": config.precision == "fp16"},
    }


def learning_rate_factor(config: PretrainConfig, step: int) -> float:
    """Share of the peak learning rate at a step, counted from 0."""
    if config.schedule == "constant" and step >= config.warmup_steps:
        return 1.0
    return linear_schedule(step, steps=config.steps, warmup_steps=config.warmup_steps)


class Engine:
    """A process that trains alone."""

    def __init__(self, config: PretrainConfig, model: PoNetForPreTraining) -> None:
        """Make an optimizer and its schedule for a model that is on its device."""
        self.model = model
        self.device = next(model.parameters()).device
        self.zero_stage = config.zero_stage
        self.accumulation_steps = config.micro_batches_per_step
        """Micro-batches of this process in a step."""
        self._config = config
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.AdamW(
            matrices_and_vectors(model, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            # on a CPU, too, several times as fast as one operation after another
            fused=True,
        )
        self._schedule = LambdaLR(self._optimizer, lambda step: learning_rate_factor(config, step))
        self._parts = {"model": model, "optimizer": self._optimizer, "schedule": self._schedule}

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self._optimizer.param_groups[0]["lr"]

    def forward(self, inputs: dict[str, Any]) -> PreTrainingOutput:
        """Run a micro-batch through the model."""
        with autocast(self._config.arithmetic, self.device):
            return self.model(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's share of the loss."""
        (loss / self.accumulation_steps).backward()

    def grad_norm(self) -> Tensor | None:
        """Norm of the gradients before clipping; between the last backward pass and the step."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
        # summed as DeepSpeed does, so that a run has the same bits with it and without
        return torch.stack(norms).square().sum().sqrt()

    def end_micro_batch(self, *, last: bool) -> None:
        """Update the weights after the last micro-batch of a step."""
        if not last:
            return
        if self._config.max_grad_norm:
            norm = self.grad_norm()
            assert norm is not None
            nn.utils.clip_grads_with_norm_(self._parameters, self._config.max_grad_norm, norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._schedule.step()

    def save(self, folder: Path) -> None:
        """Write a checkpoint, on all ranks; a full disk is an OSError or a RuntimeError."""
        if dist.get_rank() == 0:
            folder.mkdir()
            parts = {name: part.state_dict() for name, part in self._parts.items()}
            torch.save(parts, folder / _STATE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on all ranks, whether there are as many as then or not."""
        state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
        for name, part in self._parts.items():
            part.load_state_dict(state[name])


class DeepSpeedEngine(Engine):
    """A process among others, or one with sharded weights or scaled losses."""

    def __init__(self, config: PretrainConfig, model: PoNetForPreTraining, world_size: int) -> None:
        super().__init__(config, model)
        self.accumulation_steps //= world_size
        deepspeed = _import_deepspeed(self.device)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            lr_scheduler=self._schedule,
            config=engine_config(config, world_size),
        )
        self._engine.checkpoint_engine.load = _load_plain
        # the weights and the optimizer that a single process has, too
        self._is_plain = config.zero_stage == 0 and config.precision != "fp16"

    def forward(self, inputs: dict[str, Any]) -> PreTrainingOutput:
        return self._engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        """As the base; after the last of a step, gradients are summed over ranks."""
        self._engine.backward(loss)

    def grad_norm(self) -> Tensor | None:
        """As the base; ZeRO and fp16 tell that of the step before, None at first."""
        if self._is_plain:
            return super().grad_norm()
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else torch.as_tensor(norm)

    def end_micro_batch(self, *, last: bool) -> None:
        self._engine.step()

    def save(self, folder: Path) -> None:
        if self._is_plain:
            super().save(folder)
        else:
            self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)

    def load(self, folder: Path) -> None:
        """As the base; shards need as many ranks as wrote them."""
        if self._is_plain:
            super().load(folder)
        else:
            path, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
            assert path is not None, folder


def _load_plain(path: str, map_location: Any = None) -> Any:
    """Load a file of a DeepSpeed checkpoint: tensors and plain values, never pickled code."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # the plain records that DeepSpeed puts beside the tensors of ZeRO's shards
    records: list[Any] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    with torch.serialization.safe_globals(records):
        return torch.load(path, map_location=map_location, weights_only=True)


def _import_deepspeed(device: torch.device) -> Any:
    """The library, silent and without its compiler."""
    if device.type == "cpu":
        # it looks for an accelerator when it is imported, and warns on stdout if there is none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # stdout is for the result; warnings of the engine belong with what a person reads
    for handler in deepspeed.utils.logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # torch 2.13 warns about the collectives that ZeRO calls, once per call and rank
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
    if device.type == "cpu":
        # it would compile a shared-memory all-reduce at the first start, half a minute with a
        # compiler and a failure without one; gloo does the same work
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def needs_deepspeed(config: PretrainConfig, world_size: int) -> bool:
    """To sum gradients over processes, shard states or scale losses, or because it has a file."""
    has_file = config.deepspeed_config is not None
    return world_size > 1 or config.zero_stage > 0 or config.precision == "fp16" or has_file


def check_engine(config: PretrainConfig, world_size: int, device: torch.device) -> None:
    """Refuse what no engine can do, before anything is prepared for it."""
    engine_config(config, world_size)
    if config.precision == "fp16" and device.type == "cpu":
        raise UsageError("--precision fp16 needs a GPU, expected fp32 or bf16 on a CPU")
    if needs_deepspeed(config, world_size) and importlib.util.find_spec("deepspeed") is None:
        raise UsageError(
            "several processes, --zero-stage 1 and 2, --precision fp16 and --deepspeed-config need "
            "DeepSpeed, which is not installed; install deepspeed, or run one process without them"
        )


def build_engine(config: PretrainConfig, model: PoNetForPreTraining, world_size: int) -> Engine:
    """The engine of a model that is on its device already."""
    if not needs_deepspeed(config, world_size):
        logger.info("engine: one process by itself, the same arithmetic as DeepSpeed's")
        return Engine(config, model)
    logger.info("engine: DeepSpeed, %d processes, ZeRO stage %d", world_size, config.zero_stage)
    return DeepSpeedEngine(config, model, world_size)
