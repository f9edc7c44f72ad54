"""Cases: a model under one token mixer at one length, each measured in a process of its own.

Three models, each with its training step and its inference; the token mixer alone differs:

    lra             text classifier of Long Range Arena in the published setting; bytes as tokens,
                    PoNet segments of 2 tokens, AdamW
    base            the pre-training encoder, 12 layers of width 768, masked-LM head on 15 % of the
                    tokens, AdamW; segments of 10 to 40 tokens
    pretraining     the same with the loss of sentence order and clipping, as in `pretrain/run.py`

Ids are random and sequences full. The cases of one length are measured in rounds of some steps
each, so that a machine that slows down for a while does so for all of them and their ratios stay.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
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
from ponet.mixers import MIXERS
from ponet.model import IGNORED_LABEL, PoNetForPreTraining
from ponet.run.device import return_free_memory, synchronise

MODELS = ("lra", "base", "pretraining")
KINDS = ("infer", "train")
"""What is timed of a case."""

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

_MASKED_SHARE = 0.15
# ids of BERT's vocabulary below this are special or unused
_FIRST_WORD, _BYTES = 1000, 257
_MAX_GRAD_NORM = 1.0
_NUM_BATCHES = 2
# long enough for every mixer's blocks and windows, too short to count
_REHEARSAL_TOKENS = 64
# timed steps of a round last about this long together
_ROUND_S, _MOST_STEPS = {"train": 0.6, "infer": 0.3}, 50
# a training step takes at least about this many times the time of an inference
_TRAINING_OVER_INFERENCE = 2.5
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
    """Or bfloat16 by autocast."""
    layers: int | None = None
    """Instead of the model's own number."""
    compile: bool = False
    inference: bool = True
    threads: int | None = None
    memory_limit: float | None = None
    """MiB beyond the imported libraries; None: what the machine has."""
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch_size * self.seq_len

    @property
    def masked(self) -> int:
        """Masked tokens of a sequence."""
        return max(1, round(_MASKED_SHARE * self.seq_len))

    def config(self) -> PoNetConfig:
        """The architecture."""
        mixer = SDPA if self.mixer in FORCED else self.mixer
        changes: Row = {"max_position_embeddings": self.seq_len}
        if self.layers:
            changes["num_hidden_layers"] = self.layers
        if self.model != "lra":
            num_labels = 3 if self.model == "pretraining" else 0
            return PoNetConfig(mixer=mixer, num_sentence_labels=num_labels, **changes)
        if mixer == SDPA:
            # SDPA's fused kernel on a CPU knows no dropout; without it the baseline is at its best
            changes["attention_probs_dropout_prob"] = 0.0
        # as many segments as tokens make the published rule cut chunks of two
        return model_config(TASKS["text"], mixer, num_segments=self.seq_len, **changes)


def known_mixers() -> list[str]:
    """Names of all registered token mixers, the Transformers last."""
    transformers = [name for name in MIXERS if name.startswith(SDPA)]
    return [name for name in MIXERS if name not in transformers] + transformers


def text_segment_ids(length: int, generator: torch.Generator) -> Tensor:
    """Text-like segments of 10 to 40 tokens: `[N]` int64 ids, from 0."""
    starts = torch.zeros(length, dtype=torch.long)
    places = torch.randint(10, 41, (length // 10 + 1,), generator=generator).cumsum(0)
    starts[places[places < length]] = 1
    return starts.cumsum(0)


def random_batch(case: Case, config: PoNetConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """A random batch: ids with class labels, or rows `[CLS] A [SEP] B [SEP]` with masked ones."""
    shape, size = (case.batch_size, case.seq_len), (case.batch_size,)
    if case.model == "lra":
        ids = torch.randint(_BYTES, shape, generator=generator)
        labels = torch.randint(config.num_labels, size, generator=generator)
        return {"input_ids": ids, "labels": labels}
    ids = torch.randint(_FIRST_WORD, config.vocab_size, shape, generator=generator)
    ids[:, 0] = config.cls_token_id
    ids[:, case.seq_len // 2] = config.sep_token_id
    ids[:, -1] = config.sep_token_id
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
        batches = [random_batch(case, config, generator) for _ in range(_NUM_BATCHES)]
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

    def _classify(self, batch: dict[str, Tensor]) -> Tensor:
        # sequences are full: the mean over rows, as in the published protocol
        states = self._model.ponet(batch["input_ids"]).last_hidden_state
        return self._model.classifier(states.mean(dim=1))

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        if self.case.model == "lra":
            return F.cross_entropy(self._classify(batch).float(), batch["labels"])
        return self._model(**batch).loss

    def _encode(self, batch: dict[str, Tensor]) -> Tensor:
        if self.case.model == "lra":
            return self._classify(batch)
        inputs = {name: batch[name] for name in ("input_ids", "segment_ids")}
        return self._model.ponet(**inputs).last_hidden_state

    def _settings(self) -> ExitStack:
        stack = ExitStack()
        if self.case.dtype != "float32":
            dtype = getattr(torch, self.case.dtype)
            stack.enter_context(torch.autocast(self.case.device, dtype=dtype))
        if self.case.mixer in FORCED:
            stack.enter_context(sdpa_kernel(FORCED[self.case.mixer]))
        return stack

    def train(self, number: int) -> Tensor:
        """Forward, backward and optimizer step on the batch of a number; returns the loss."""
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        with self._settings():
            loss = self._train(self._batches[number % _NUM_BATCHES])
        loss.backward()
        if self.case.model == "pretraining":
            nn.utils.clip_grad_norm_(self._model.parameters(), _MAX_GRAD_NORM)
        self._optimizer.step()
        return loss.detach()

    def infer(self, number: int) -> Tensor:
        """Forward without a graph: logits, of `base` and `pretraining` the encoder's states."""
        self._model.eval()
        with torch.inference_mode(), self._settings():
            return self._infer(self._batches[number % _NUM_BATCHES])


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
        out = torch.empty(0)
        out = step(number)
        moments.append(now())
    synchronise(device)
    if not bool(out.isfinite().all()):
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
    found = {"first_ms": first_ms, "ms": _time_steps(step, device, steps) if steps else []}
    found["peak_mib"] = meter.peak_mib()
    return_free_memory(device)
    return {kind: found}


def _measure(case: Case, seconds: float, connection: Connection) -> None:
    """The work of a case's process: send facts of the model, then what is found of each kind."""
    deadline = time.monotonic() + seconds
    try:
        if case.threads is not None:
            torch.set_num_threads(case.threads)
        # a tiny step, so that what libraries set up once is not counted
        tokens = min(case.seq_len, _REHEARSAL_TOKENS)
        Workload(replace(case, seq_len=tokens, batch_size=1, layers=1, compile=False)).train(0)
        meter = MemoryMeter(torch.device(case.device), case.memory_limit)
        workload, expected = Workload(case), 0.0
        connection.send(workload.facts)
        for kind in KINDS if case.inference else ("train",):
            left = deadline - time.monotonic()
            if expected > left:
                reason = f"about {expected:.0f} s expected from its inference"
                connection.send({"status": SKIPPED, "reason": reason})
                return
            found = _time_kind(workload, meter, kind, left)
            connection.send(found)
            expected = _TRAINING_OVER_INFERENCE * found[kind]["first_ms"] / 1e3
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
    seconds: float = 0.0
    """What a round of it takes."""
    found: Row = field(default_factory=dict)
    """Facts of the model, and by kind: `first_ms` of the step that warms up, `ms` of the timed
    steps, `peak_mib`."""

    def stop(self, status: str, reason: str) -> None:
        """Keep why there will be no further figures."""
        self.status, self.reason = status, reason

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
            self.stop(TIMEOUT, f"a round takes more than {seconds:.0f} s")
        except EOFError:
            work.join()
            # the system ends processes in this way when memory runs out
            if work.exitcode == -signal.SIGKILL:
                self.stop(OUT_OF_MEMORY, "the system killed the process")
            elif work.exitcode and self.status == OK:
                self.stop(FAILED, f"the process ended with status {work.exitcode}")
        finally:
            work.kill()
            work.join()
            connection.close()
        self.seconds = time.monotonic() - start

    def _take(self, message: Row) -> None:
        if "status" in message:
            self.stop(**message)
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


class Harness:
    """Measures cases length by length until a deadline.

    A case that shorter lengths say will not fit into the time or memory is not run.
    """

    def __init__(self, seconds: float, rounds: int) -> None:
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        _CONTEXT.set_forkserver_preload([__name__])
        with _CONTEXT.Pool(1) as first:
            # the server has imported everything when its first process works
            first.apply(os.getpid)
        self._deadline = time.monotonic() + seconds
        self._rounds = rounds
        self._shorter: dict[str, CaseRun] = {}

    def measure(self, cases: Sequence[Case], lengths_left: int) -> list[Row]:
        """Measure cases of one length.

        Args:
            cases: one per mixer, longer than those of the calls before; the first come first
                where time is short.
            lengths_left: calls still to come, this one included; each gets an equal share of the
                time that is left.

        Returns:
            A row per case.
        """
        now = time.monotonic()
        deadline = now + max(self._deadline - now, 0.0) / lengths_left
        runs = [CaseRun(case) for case in cases]
        for _ in range(self._rounds):
            for run in runs:
                self._measure(run, deadline - time.monotonic())
        self._shorter |= {run.case.mixer: run for run in runs}
        return [run.row() for run in runs]

    def _measure(self, run: CaseRun, left: float) -> None:
        """A round of a case, unless it has stopped or will not fit."""
        if run.status != OK or (run.found and run.seconds > left):
            return
        if not run.found:
            # one slow case leaves time to the others
            left /= 2
            refused = refusal(self._shorter.get(run.case.mixer), run.case.seq_len, left)
            if refused:
                run.stop(*refused)
                return
        run.measure(left)


def refusal(shorter: CaseRun | None, length: int, seconds: float) -> tuple[str, str] | None:
    """Status and reason of a case that will not fit, as a shorter length says; None: it may."""
    if seconds <= 0:
        return SKIPPED, "no time left"
    if shorter is None:
        return None
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
    return None
