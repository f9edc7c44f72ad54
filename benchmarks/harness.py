"""Cases: a model under one token mixer at one length, each measured in a process of its own.

Each of three models has its training step and its inference; the token mixer alone differs:

    lra           text classifier of Long Range Arena in the published setting, segments of 2 bytes
    base          the pre-training encoder with the masked-LM head on 15 % of the tokens, segments
                  of 10 to 40 tokens
    pretraining   the same with the loss of sentence order and clipping, as in `pretrain/run.py`

Ids are random and sequences full. The cases of one length are measured in rounds of some steps
each, so that a machine that slows down for a while does so for all of them and their ratios stay.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import MIB, MemoryMeter, Row, first_line, is_out_of_memory, percentiles
from lra.model import LongRangeClassifier, model_config
from lra.tasks import TASKS
from ponet.config import PoNetConfig
from ponet.model import IGNORED_LABEL, PoNetForPreTraining
from ponet.run.device import synchronise

MODELS = ("lra", "base", "pretraining")
KINDS = ("infer", "train")
SDPA = "attention"
"""The Transformer on PyTorch's fused attention, by the kernel that PyTorch picks."""
FORCED = {
    f"{SDPA}:flash": SDPBackend.FLASH_ATTENTION,
    f"{SDPA}:cudnn": SDPBackend.CUDNN_ATTENTION,
}
"""The same by one kernel alone: where that cannot run, nothing else does in its place."""
OK, FAILED, TIMEOUT = "ok", "failed", "timeout"
OUT_OF_MEMORY, UNAVAILABLE = "out of memory", "not available"
SKIPPED = "skipped (over budget)"

# timed steps of a round last about this long together
_ROUND_S, _MOST_STEPS = {"train": 0.6, "infer": 0.3}, 50
# seconds that a process may be late
_GRACE_S = 20.0
# processes are forked from a server that has imported everything and has touched no GPU
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one process measures."""

    model: str
    mixer: str
    """A name of `ponet.mixers.MIXERS` or of `FORCED`."""
    seq_len: int
    batch_size: int
    device: str
    dtype: str = "float32"
    layers: int | None = None
    compile: bool = False
    inference: bool = True
    memory_limit: float | None = None
    """MiB beyond the imported libraries."""
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.batch_size * self.seq_len

    @property
    def masked(self) -> int:
        """Masked tokens of a sequence."""
        return max(1, round(0.15 * self.seq_len))

    def config(self) -> PoNetConfig:
        """The architecture."""
        mixer = SDPA if self.mixer in FORCED else self.mixer
        changes: Row = {"num_hidden_layers": self.layers} if self.layers else {}
        changes["max_position_embeddings"] = self.seq_len
        if self.model != "lra":
            num_labels = 3 if self.model == "pretraining" else 0
            return PoNetConfig(mixer=mixer, num_sentence_labels=num_labels, **changes)
        if mixer == SDPA:
            # SDPA's fused kernel on a CPU knows no dropout; without it the baseline is at its best
            changes["attention_probs_dropout_prob"] = 0.0
        # as many segments as tokens make the published rule cut chunks of two
        return model_config(TASKS["text"], mixer, num_segments=self.seq_len, **changes)


def text_segment_ids(length: int, generator: torch.Generator) -> Tensor:
    """Text-like segments of 10 to 40 tokens: `[N]` int64 ids, from 0."""
    starts = torch.zeros(length, dtype=torch.long)
    places = torch.randint(10, 41, (length // 10 + 1,), generator=generator).cumsum(0)
    starts[places[places < length]] = 1
    return starts.cumsum(0)


def random_batch(case: Case, config: PoNetConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """A random batch: ids with class labels, or rows `[CLS] A [SEP] B [SEP]` with masked ones."""
    shape, size = (case.batch_size, case.seq_len), (case.batch_size,)
    # ids of BERT's vocabulary below 1000 are special or unused
    lowest, highest = (0, 257) if case.model == "lra" else (1000, config.vocab_size)
    ids = torch.randint(lowest, highest, shape, generator=generator)
    if case.model == "lra":
        labels = torch.randint(config.num_labels, size, generator=generator)
        return {"input_ids": ids, "labels": labels}
    ids[:, 0] = config.cls_token_id
    ids[:, [case.seq_len // 2, -1]] = config.sep_token_id
    # the same number in each sequence
    order = torch.rand(shape, generator=generator).argsort(dim=1)
    labels = torch.where(order < case.masked, ids, IGNORED_LABEL)
    segments = torch.stack([text_segment_ids(case.seq_len, generator) for _ in ids])
    batch = {"input_ids": ids, "segment_ids": segments, "labels": labels}
    if config.num_sentence_labels:
        batch["sso_labels"] = torch.randint(config.num_sentence_labels, size, generator=generator)
    return batch


class Workload:
    """The model of a case with its batches, ready to run."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(case.seed)
        self.case = case
        config = case.config()
        lra = case.model == "lra"
        model: Any = LongRangeClassifier(config, 1) if lra else PoNetForPreTraining(config)
        self._model = model.to(case.device)
        generator = torch.Generator().manual_seed(case.seed)
        batches = [random_batch(case, config, generator) for _ in range(2)]
        self._batches = [{k: x.to(case.device) for k, x in batch.items()} for batch in batches]
        # on a CPU, too, four times as fast as the default
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        calls = (self._loss, self._encode)
        self._train, self._infer = map(torch.compile, calls) if case.compile else calls
        self.facts = {
            "input_mib": sum(x.nbytes for batch in self._batches for x in batch.values()) / MIB,
            # parameters, gradients and AdamW's two moments
            "state_mib": 4 * sum(p.nbytes for p in model.parameters()) / MIB,
            "parameters": sum(p.numel() for p in model.parameters()),
        }

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        if self.case.model == "lra":
            return F.cross_entropy(self._encode(batch).float(), batch["labels"])
        return self._model(**batch).loss

    def _encode(self, batch: dict[str, Tensor]) -> Tensor:
        states = self._model.ponet(batch["input_ids"], segment_ids=batch.get("segment_ids"))
        if self.case.model == "lra":
            # sequences are full: the mean over rows, as in the published protocol
            return self._model.classifier(states.last_hidden_state.mean(dim=1))
        return states.last_hidden_state

    def _settings(self) -> ExitStack:
        stack, case = ExitStack(), self.case
        if case.dtype != "float32":
            stack.enter_context(torch.autocast(case.device, dtype=getattr(torch, case.dtype)))
        if case.mixer in FORCED:
            stack.enter_context(sdpa_kernel(FORCED[case.mixer]))
        return stack

    def train(self, number: int) -> Tensor:
        """Forward, backward and optimizer step; returns the loss."""
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        with self._settings():
            loss = self._train(self._batches[number % 2])
        loss.backward()
        if self.case.model == "pretraining":
            nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        return loss.detach()

    def infer(self, number: int) -> Tensor:
        """Forward without a graph: logits, of `base` and `pretraining` the encoder's states."""
        self._model.eval()
        with torch.inference_mode(), self._settings():
            return self._infer(self._batches[number % 2])


def _time_steps(step: Callable[[int], Tensor], device: torch.device, steps: int) -> list[float]:
    """Milliseconds of each step; a GPU is not waited for in between."""

    def now() -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    moments, out = [now()], torch.empty(0)
    for number in range(steps):
        # the result of the step before must not take room beside this one
        del out
        out = step(number)
        moments.append(now())
    synchronise(device)
    if not out.isfinite().all():
        raise ValueError("the result is not finite")
    if device.type == "cuda":
        return [a.elapsed_time(b) for a, b in pairwise(moments)]
    return [(b - a) * 1e3 for a, b in pairwise(moments)]


def _time_kind(workload: Workload, meter: MemoryMeter, kind: str, seconds: float) -> Row:
    """Time a first step that warms up, then as many as fill a round and fit into the seconds."""
    case, device, step = workload.case, meter.device, getattr(workload, kind)
    meter.begin()
    # compiling spoils the first
    first_ms = _time_steps(step, device, 1 + case.compile)[-1]
    left_ms = 1e3 * seconds - first_ms
    steps = min(int(1e3 * _ROUND_S[kind] / first_ms), int(left_ms / first_ms), _MOST_STEPS)
    steps = max(steps, int(left_ms > first_ms))
    found: Row = {"first_ms": first_ms, "ms": _time_steps(step, device, steps)}
    return {kind: found | {"peak_mib": meter.peak_mib()}}


def _measure(case: Case, seconds: float, connection: Connection) -> None:
    """The work of a case's process: send facts of the model, then what is found of each kind."""
    deadline = time.monotonic() + seconds
    try:
        # a tiny step, so that what libraries set up once is not counted
        tokens = min(case.seq_len, 64)
        Workload(replace(case, seq_len=tokens, batch_size=1, layers=1, compile=False)).train(0)
        meter = MemoryMeter(torch.device(case.device), case.memory_limit)
        workload = Workload(case)
        connection.send(workload.facts)
        for kind in KINDS if case.inference else ("train",):
            connection.send(_time_kind(workload, meter, kind, deadline - time.monotonic()))
    except BaseException as error:
        status, reason = FAILED, first_line(error)
        if is_out_of_memory(error):
            status = OUT_OF_MEMORY
        elif str(error).startswith(("No available kernel", "No viable backend")):
            status, reason = UNAVAILABLE, f"{case.mixer} does not run on this device and dtype"
        connection.send({"status": status, "reason": reason})
        if status == FAILED:
            raise


@dataclass
class CaseRun:
    """What is known of a case so far."""

    case: Case
    status: str = OK
    reason: str | None = None
    """Why there will be no further figures."""
    seconds: float = 0.0
    """Of its last round."""
    found: Row = field(default_factory=dict)
    """Facts of the model, and what is measured by kind; `ms` of its timed steps."""

    def measure_if_it_fits(self, shorter: "CaseRun | None", seconds: float) -> None:
        """A round, unless the case has stopped or will not fit into the time or memory."""
        if self.status == OK and not self.found:
            # one slow case leaves time to the others
            seconds /= 2
            self.status, self.reason = forecast(shorter, self.case.seq_len, seconds)
        if self.status == OK and self.seconds <= seconds:
            self.measure(seconds)

    def measure(self, seconds: float) -> None:
        """A round, in a process that is gone afterwards."""
        start = time.monotonic()
        connection, theirs = _CONTEXT.Pipe(duplex=False)
        work = _CONTEXT.Process(target=_measure, args=(self.case, seconds, theirs), daemon=True)
        work.start()
        theirs.close()
        try:
            while connection.poll(max(start + seconds + _GRACE_S - time.monotonic(), 0.0)):
                self._take(connection.recv())
            self.status, self.reason = TIMEOUT, f"a round takes more than {seconds:.0f} s"
        except EOFError:
            work.join()
            # the system ends processes in this way when memory runs out
            if work.exitcode == -signal.SIGKILL:
                self.status, self.reason = OUT_OF_MEMORY, "the system killed the process"
            elif work.exitcode and self.status == OK:
                self.status, self.reason = FAILED, f"the process ended with {work.exitcode}"
        finally:
            work.kill()
            work.join()
            connection.close()
        self.seconds = time.monotonic() - start

    def _take(self, message: Row) -> None:
        self.status = message.pop("status", self.status)
        self.reason = message.pop("reason", self.reason)
        for kind in set(KINDS) & message.keys() & self.found.keys():
            new, old = message[kind], self.found[kind]
            new["ms"] = old["ms"] + new["ms"]
            new["peak_mib"] = max(old["peak_mib"], new["peak_mib"])
        self.found |= message

    def row(self) -> Row:
        """The figures for the JSON document."""
        names = ("model", "mixer", "seq_len", "batch_size", "tokens", "dtype", "compile")
        row = {name: getattr(self.case, name) for name in names} | self.found
        row |= {kind: self._figures(kind) for kind in KINDS}
        return row | {"status": self.status, "reason": self.reason}

    def _figures(self, kind: str) -> Row | None:
        if kind not in self.found:
            return None
        found = self.found[kind]
        samples = found["ms"] or [found["first_ms"]]
        median, low, high = percentiles(samples)
        return {
            "ms": median,
            "p20_ms": low,
            "p80_ms": high,
            "steps": len(samples),
            "warm_up_only": not found["ms"],
            "steps_per_s": 1e3 / median,
            "tokens_per_s": self.case.tokens * 1e3 / median,
            "peak_mib": found["peak_mib"],
        }


def measure_lengths(
    lengths: Sequence[Sequence[Case]], seconds: float, rounds: int
) -> Iterator[list[Row]]:
    """Measure cases length by length, a row per case, until the time is over.

    Args:
        lengths: of each length, shorter ones first, a case per mixer; where time is short, the
            first come first.
        seconds: for all; what is left is shared equally among the lengths to come.
        rounds: times that each case is measured.
    """
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    _CONTEXT.set_forkserver_preload([__name__])
    with _CONTEXT.Pool(1) as first:
        # the server has imported everything when its first process works
        first.apply(os.getpid)
    end = time.monotonic() + seconds
    shorter: dict[str, CaseRun] = {}
    for number, cases in enumerate(lengths):
        now = time.monotonic()
        deadline = now + max(end - now, 0.0) / (len(lengths) - number)
        runs = [CaseRun(case) for case in cases]
        for run in runs * rounds:
            run.measure_if_it_fits(shorter.get(run.case.mixer), deadline - time.monotonic())
        shorter = {run.case.mixer: run for run in runs}
        yield [run.row() for run in runs]


def forecast(shorter: CaseRun | None, length: int, seconds: float) -> tuple[str, str | None]:
    """Status and reason of a case that will not fit, as a shorter length says; else that it may."""
    if seconds <= 0:
        return SKIPPED, "no time left"
    if shorter is None:
        return OK, None
    if shorter.status != OK:
        reason = shorter.reason or ""
        if not reason.startswith("already"):
            reason = f"already at {shorter.case.seq_len} tokens: {reason}"
        return SKIPPED if shorter.status == TIMEOUT else shorter.status, reason
    # time grows at least as the length does
    first_ms = sum(shorter.found[kind]["first_ms"] for kind in KINDS if kind in shorter.found)
    expected = first_ms / 1e3 * length / shorter.case.seq_len
    if expected > seconds:
        return SKIPPED, f"about {expected:.0f} s expected from shorter lengths"
    return OK, None
