"""Checkpoints of a run: whole or absent, checked before use, pruned to the newest and the best."""

import hashlib
import json
import logging
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ponet.checkpoint import CheckpointError
from ponet.files import write_json
from pretrain.engine import Engine

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"


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
    seconds: float = 0.0
    """Seconds spent training, without evaluation and checkpoints."""


class CheckpointStore:
    """The folder `checkpoints` of a run, used by all ranks together."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, engine: Engine, position: RunPosition, evaluation_loss: float) -> None:
        """Write a checkpoint, then prune old ones; if that fails, older ones are as they were."""
        name = f"step-{position.step:08d}"
        partial = self._folder / ".partial"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        try:
            engine.save(partial / name)
            dist.barrier()
            if dist.get_rank() == 0:
                _write_manifest(partial / name, position, evaluation_loss)
                # a resumed run may reach a step whose damaged checkpoint is still there
                shutil.rmtree(self._folder / name, ignore_errors=True)
                (partial / name).rename(self._folder / name)
                shutil.rmtree(partial, ignore_errors=True)
                self._prune()
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

    def restore(self, engine: Engine) -> RunPosition:
        """Load the newest checkpoint that is whole; a damaged one is reported and passed over.

        Returns:
            Where to continue; the start when the run has no checkpoint yet.
        """
        chosen = [self._newest_whole() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(chosen, src=0)
        if isinstance(chosen[0], CheckpointError):
            raise chosen[0]
        if chosen[0] is None:
            logger.info("%s holds no checkpoint yet: starting from step 0", self._folder)
            return RunPosition()
        folder, manifest = chosen[0]
        written, processes = manifest["world_size"], dist.get_world_size()
        if engine.zero_stage > 0 and written != processes:
            raise CheckpointError(
                f"{folder}: ZeRO wrote shards for {written} processes, running {processes}"
            )
        engine.load(folder)
        logger.info("resuming from %s", folder)
        return RunPosition(**manifest["progress"])

    def _folders(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"))

    def _prune(self) -> None:
        losses = {}
        for folder in self._folders():
            with suppress(CheckpointError):
                losses[folder] = _read_manifest(folder)["evaluation_loss"]
        best = min(losses, key=losses.__getitem__)
        for folder in self._folders()[: -self._keep]:
            if folder != best:
                shutil.rmtree(folder)

    def _newest_whole(self) -> tuple[Path, dict[str, Any]] | CheckpointError | None:
        error = None
        for folder in reversed(self._folders()):
            try:
                manifest = _read_manifest(folder)
                _verify(folder, manifest["files"])
                return folder, manifest
            except CheckpointError as damage:
                logger.warning("%s; falling back to the checkpoint before it", damage)
                error = damage
        return error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _write_manifest(folder: Path, position: RunPosition, evaluation_loss: float) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    manifest = {
        "progress": asdict(position),
        "evaluation_loss": evaluation_loss,
        "world_size": dist.get_world_size(),
        "files": {str(path.relative_to(folder)): _digest(path) for path in files},
    }
    write_json(folder / _MANIFEST, manifest)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: damaged checkpoint: {error}") from error


def _verify(folder: Path, digests: dict[str, str]) -> None:
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            raise CheckpointError(
                f"{path}: damaged checkpoint: missing or other bytes than written"
            )
