"""Checkpoints of a run: whole or absent, checked before use, pruned to the newest and the best."""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ponet.checkpoint import CheckpointError
from ponet.files import write_json
from pretrain.engine import Engine

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_PARTIAL = ".partial"


@dataclass(frozen=True, kw_only=True)
class RunPosition:
    """Where a run stands; together with the settings it fixes all that follows."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Pass over the documents that the next step belongs to."""
    epoch_step: int = 0
    """Global batches of that pass already used."""
    tokens: int = 0
    """Tokens trained on."""
    seconds: float = 0.0
    """Seconds spent training, without evaluation and checkpoints."""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


class CheckpointStore:
    """The folder `checkpoints` of a run."""

    def __init__(self, folder: Path, *, keep: int, rank: int, world_size: int) -> None:
        self._folder = folder
        self._keep = keep
        self._rank = rank
        self._world_size = world_size

    def save(self, engine: Engine, position: RunPosition, evaluation_loss: float) -> None:
        """Write a checkpoint from all ranks, then prune old ones.

        Raises:
            CheckpointError: it could not be written, for want of space for example; older
                checkpoints are as they were.
        """
        name = f"step-{position.step:08d}"
        partial = self._folder / _PARTIAL
        if self._rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        try:
            engine.save(partial / name)
            dist.barrier()
            if self._rank == 0:
                self._complete(partial / name, position, evaluation_loss, engine)
        # PyTorch reports a full disk as RuntimeError
        except (OSError, RuntimeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(self._folder).free // 2**20
            newest = max((folder.name for folder in self._folders()), default="none")
            raise CheckpointError(
                f"{self._folder / name}: cannot be written ({free} MiB free): {error}; "
                f"the newest checkpoint is {newest}"
            ) from error
        dist.barrier()

    def _complete(
        self, written: Path, position: RunPosition, evaluation_loss: float, engine: Engine
    ) -> None:
        files = sorted(path for path in written.rglob("*") if path.is_file())
        manifest = {
            "progress": asdict(position),
            "evaluation_loss": evaluation_loss,
            "zero_stage": engine.zero_stage,
            "world_size": self._world_size,
            "files": {str(path.relative_to(written)): _digest(path) for path in files},
        }
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        write_json(written / _MANIFEST, manifest)
        target = self._folder / written.name
        # a resumed run may reach a step whose damaged checkpoint is still there
        shutil.rmtree(target, ignore_errors=True)
        written.rename(target)
        shutil.rmtree(written.parent, ignore_errors=True)
        self._prune()

    def _folders(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"))

    def _prune(self) -> None:
        folders = self._folders()
        losses = {}
        for folder in folders:
            try:
                losses[folder] = _read_manifest(folder)["evaluation_loss"]
            except CheckpointError:
                continue
        best = min(losses, key=losses.__getitem__, default=None)
        for folder in folders[: -self._keep]:
            if folder != best:
                shutil.rmtree(folder)

    def restore(self, engine: Engine) -> RunPosition:
        """Load the newest checkpoint that is whole; a damaged one is reported and passed over.

        Returns:
            Where to continue; the start when the run has no checkpoint yet.

        Raises:
            CheckpointError: all checkpoints are damaged, or ZeRO's shards fit other processes.
        """
        chosen = [self._newest_whole() if self._rank == 0 else None]
        dist.broadcast_object_list(chosen, src=0)
        if isinstance(chosen[0], CheckpointError):
            raise chosen[0]
        if chosen[0] is None:
            logger.info("%s holds no checkpoint yet: starting from step 0", self._folder)
            return RunPosition()
        folder, manifest = chosen[0]
        self._check_shards(folder, manifest, engine.zero_stage)
        engine.load(folder)
        logger.info("resuming from %s", folder)
        return RunPosition(**manifest["progress"])

    def _newest_whole(self) -> tuple[Path, dict[str, Any]] | CheckpointError | None:
        error = None
        for folder in reversed(self._folders()):
            try:
                return folder, _verified_manifest(folder)
            except CheckpointError as damage:
                logger.warning("%s; falling back to the checkpoint before it", damage)
                error = damage
        return error

    def _check_shards(self, folder: Path, manifest: dict[str, Any], stage: int) -> None:
        if manifest["zero_stage"] != stage:
            raise CheckpointError(
                f"{folder}: written with --zero-stage {manifest['zero_stage']}, running {stage}"
            )
        if stage > 0 and manifest["world_size"] != self._world_size:
            raise CheckpointError(
                f"{folder}: ZeRO stage {stage} wrote shards for {manifest['world_size']} "
                f"processes, running {self._world_size}"
            )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: damaged checkpoint: {error}") from error


def _verified_manifest(folder: Path) -> dict[str, Any]:
    manifest = _read_manifest(folder)
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: damaged checkpoint: the file is missing")
        if _digest(path) != digest:
            raise CheckpointError(
                f"{path}: damaged checkpoint: {path.stat().st_size} bytes with another checksum"
            )
    return manifest
