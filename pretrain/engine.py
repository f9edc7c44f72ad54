"""The DeepSpeed engine: its configuration, optimizer and schedule, and safe checkpoint files."""

import difflib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ponet import PoNetForPreTraining
from ponet.cli import UsageError
from pretrain.settings import PretrainConfig

Engine = deepspeed.DeepSpeedEngine
VERSION: str = deepspeed.__version__

# the plain records that DeepSpeed puts beside the tensors of ZeRO's shards
_RECORDS: list[Any] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]

# DeepSpeed accepts unknown keys in silence, so the file may hold only what is known to matter
_ENGINE_KEYS = {
    "activation_checkpointing",
    "comms_logger",
    "communication_data_type",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_optimization",
}
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
}


def read_engine_file(path: Path) -> dict[str, Any]:
    """Read and check the DeepSpeed JSON file.

    Raises:
        UsageError: it is missing or no JSON object, or a key is unknown, ours, or "auto".
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"--deepspeed-config: {path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"--deepspeed-config: {path}: expected a JSON object")
    for key, value in content.items():
        if key in _OURS:
            raise UsageError(f"--deepspeed-config: {path}: {key} is set by {_OURS[key]}")
        if key not in _ENGINE_KEYS:
            near = difflib.get_close_matches(key, _ENGINE_KEYS, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise UsageError(f"--deepspeed-config: {path}: unknown key {key}{hint}")
        if value == "auto":
            raise UsageError(f'--deepspeed-config: {path}: {key} is "auto", expected a value')
    if "stage" in content.get("zero_optimization", {}):
        raise UsageError(
            f"--deepspeed-config: {path}: zero_optimization.stage is set by --zero-stage"
        )
    return content


def engine_config(config: PretrainConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a run.

    Raises:
        UsageError: micro-batches cannot be shared out evenly, or the file is wrong.
    """
    if config.micro_batches_per_step % world_size:
        raise UsageError(
            f"--batch-tokens {config.batch_tokens} makes {config.micro_batches_per_step} "
            f"micro-batches of {config.micro_batch_tokens}, which {world_size} processes cannot "
            "share evenly; change --batch-tokens or --micro-batch-tokens"
        )
    content = read_engine_file(Path(config.deepspeed_config))
    zero = content.get("zero_optimization", {}) | {"stage": config.zero_stage}
    return content | {
        # DeepSpeed counts samples; a packed micro-batch is one
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.micro_batches_per_step // world_size,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": zero,
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "fp16": {"enabled": config.precision == "fp16"},
    }


def learning_rate_factor(config: PretrainConfig) -> Callable[[int], float]:
    """Share of the peak learning rate at each step, counted from 0."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        return max(0.0, (config.steps - step) / max(1, config.steps - config.warmup_steps))

    return factor


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; biases and LayerNorm, which have one dimension, without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


class SafeCheckpointEngine(TorchCheckpointEngine):
    """Loads tensors, plain values and `_RECORDS` only, never pickled code."""

    def load(self, path: str, map_location: Any = None) -> Any:
        """Load a file of a DeepSpeed checkpoint."""
        with torch.serialization.safe_globals(_RECORDS):
            return torch.load(path, map_location=map_location, weights_only=True)


def build_engine(config: PretrainConfig, model: nn.Module, world_size: int) -> Engine:
    """Wrap a model that is on its device already.

    Raises:
        UsageError: for what `engine_config` refuses, or fp16 without a GPU.
    """
    device = next(model.parameters()).device
    if config.precision == "fp16" and device.type == "cpu":
        raise UsageError("--precision fp16 needs a GPU, expected fp32 or bf16 on a CPU")
    # torch 2.13 warns about the collectives that ZeRO calls, once a call and rank
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=device.type == "cuda" or None,
    )
    schedule: Any = LambdaLR(optimizer, learning_rate_factor(config))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=engine_config(config, world_size),
        dist_init_required=False,
    )
    engine.checkpoint_engine = SafeCheckpointEngine(engine._config)
    return engine


def model_of(engine: Engine) -> PoNetForPreTraining:
    """The model inside an engine."""
    assert isinstance(engine.module, PoNetForPreTraining)
    return engine.module


def device_of(engine: Engine) -> torch.device:
    """Where an engine computes."""
    return next(model_of(engine).parameters()).device


def gradient_norm(engine: Engine) -> float | None:
    """Norm of the gradients of this step before clipping; call between backward and step.

    ZeRO knows it only after the step, so there it is that of the step before, or None.
    """
    if engine.zero_optimization_stage() == 0 and not engine.fp16_enabled():
        gradients = [p.grad for p in model_of(engine).parameters() if p.grad is not None]
        return float(nn.utils.get_total_norm(gradients))
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)
