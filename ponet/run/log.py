"""What a run tells: lines for people on stderr, numbers in JSON lines and TensorBoard."""

import json
import logging
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ponet.files import write_text

logger = logging.getLogger(__name__)


class _BarAwareHandler(logging.StreamHandler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def set_up_logging(rank: int) -> None:
    """Log to stderr from rank 0; other ranks log errors alone."""
    # the usual lock is a semaphore of the system, which a killed process leaves behind
    tqdm.set_lock(threading.RLock())
    handler = _BarAwareHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger().setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    for name in ("ponet", "ponet_kernels", "pretrain", "lra", "glue"):
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.ERROR)


class MetricsWriter:
    """`metrics.jsonl` and TensorBoard files of a run; does nothing on other ranks than 0."""

    def __init__(self, folder: Path, *, rank: int, resume_step: int = 0) -> None:
        """Open the files; entries after `resume_step`, left by a killed run, are dropped."""
        self._file, self._board = None, None
        if rank:
            return
        path = folder / "metrics.jsonl"
        if path.exists():
            _keep_until(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(folder / "tensorboard", purge_step=resume_step + 1)

    def write(self, kind: str, step: int, values: Mapping[str, float | None]) -> None:
        """Record numbers by name after optimizer steps, of kind "train" or "eval"."""
        if self._file is None or self._board is None:
            return
        values = {name: value for name, value in values.items() if value is not None}
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


def _keep_until(path: Path, step: int) -> None:
    kept = []
    # the last line may be cut, where the run was killed
    with suppress(json.JSONDecodeError):
        for line in path.read_text(encoding="utf-8").splitlines():
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_text(path, "".join(kept))


def log_steps(
    writer: MetricsWriter,
    *,
    name: str,
    step: int,
    steps: int,
    metrics: Mapping[str, float],
    remaining_seconds: float,
) -> None:
    """Record and log the steps since the last time: the one line of all programs.

    Metrics are `loss` and its parts (`mlm_loss`), `learning_rate`, `step_ms`, `peak_memory_mib`,
    where tokens are counted `tokens_per_second`, and others for the records alone. The name is
    empty where a program has one run only.
    """
    writer.write("train", step, metrics)
    losses = [(key, value) for key, value in metrics.items() if key.endswith("loss")]
    speed, left = metrics.get("tokens_per_second"), remaining_seconds
    parts = [
        name,
        f"step {step}/{steps}",
        " ".join(f"{key.removesuffix('_loss')} {value:.4f}" for key, value in losses),
        f"lr {metrics['learning_rate']:.1e}",
        f"{metrics['step_ms']:.3g} ms",
        "" if speed is None else f"{speed / 1e3:.1f}k tok/s",
        f"{metrics['peak_memory_mib']:,.0f} MiB",
        f"eta {left / 60:.0f}m" if left >= 60 else f"eta {left:.0f}s",
    ]
    logger.info(" | ".join(filter(None, parts)))


def describe(scores: Mapping[str, float | None]) -> str:
    """Scores on a line."""
    texts = {k: "undefined" if value is None else f"{value:.4f}" for k, value in scores.items()}
    return ", ".join(map(" ".join, texts.items()))
