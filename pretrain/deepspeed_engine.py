"""DeepSpeed behind the calls of `Engine`: several processes, ZeRO, scaled losses of fp16."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from ponet import PoNetForPreTraining
from ponet.checkpoint import CheckpointError
from ponet.model import PreTrainingOutput
from pretrain.engine import Engine, engine_config
from pretrain.settings import PretrainConfig

# the plain records that DeepSpeed puts beside the tensors of ZeRO's shards
_RECORDS: list[Any] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


class SafeCheckpointEngine(TorchCheckpointEngine):
    """Loads tensors, plain values and `_RECORDS` only, never pickled code."""

    def load(self, path: str, map_location: Any = None) -> Any:
        """Load a file of a DeepSpeed checkpoint."""
        with torch.serialization.safe_globals(_RECORDS):
            return torch.load(path, map_location=map_location, weights_only=True)


class DeepSpeed(Engine):
    """A process among others, or one with sharded weights or scaled losses."""

    def __init__(self, config: PretrainConfig, model: PoNetForPreTraining, world_size: int) -> None:
        """Wrap a model; arguments as for `Engine`, and the number of processes."""
        super().__init__(config, model)
        self.accumulation_steps //= world_size
        _quieten()
        if self.device.type == "cpu":
            _skip_compiled_collectives()
        schedule: Any = self._schedule
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            lr_scheduler=schedule,
            config=engine_config(config, world_size),
        )
        self._engine.checkpoint_engine = SafeCheckpointEngine(self._engine._config)
        # the weights and the optimizer that a single process has, too
        self._is_plain = config.zero_stage == 0 and config.precision != "fp16"

    def forward(self, inputs: dict[str, Any]) -> PreTrainingOutput:
        """As the base."""
        return self._engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        """As the base; after the last micro-batch of a step, gradients are summed over ranks."""
        self._engine.backward(loss)

    def grad_norm(self) -> Tensor | None:
        """As the base; ZeRO and fp16 tell that of the step before, None at first."""
        if self._is_plain:
            return super().grad_norm()
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else torch.as_tensor(norm)

    def end_micro_batch(self, *, last: bool) -> None:
        """As the base; DeepSpeed counts by itself."""
        self._engine.step()

    def save(self, folder: Path) -> None:
        """As the base."""
        if self._is_plain:
            super().save(folder)
        else:
            self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)

    def load(self, folder: Path) -> None:
        """As the base; shards need as many ranks as wrote them.

        Raises:
            CheckpointError: DeepSpeed could not load it.
        """
        if self._is_plain:
            super().load(folder)
            return
        path, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed could not load it")


def _quieten() -> None:
    # stdout is for the result; warnings of the engine belong with what a person reads
    for handler in deepspeed_logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    deepspeed_logger.setLevel(logging.ERROR)
    # torch 2.13 warns about the collectives that ZeRO calls, once a call and rank
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")


def _skip_compiled_collectives() -> None:
    # on CPU DeepSpeed compiles a shared-memory all-reduce at the first start, half a minute with a
    # compiler and a failure without one; gloo does the same work
    registry = getattr(deepspeed.ops, "__compatible_ops__", None)
    if registry is not None:
        registry["deepspeed_shm_comm"] = False
