"""What a run tells: lines for people on stderr, numbers in JSON lines and TensorBoard."""

import json
import logging
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ponet.checkpoint import write_text


class _BarAwareHandler(logging.StreamHandler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def set_up_logging(rank: int) -> None:
    """Log to stderr from rank 0; other ranks log errors alone."""
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

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Record numbers.

        Args:
            kind: "train" or "eval".
            step: optimizer steps done.
            values: numbers by name.
        """
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


def _keep_until(path: Path, step: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            # the run was killed while it wrote this line, the last one
            break
        if entry["step"] <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
