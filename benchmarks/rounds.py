"""Runs cases in processes of their own that take turns, within a time.

All cases of one length are started together and work one at a time, in rounds: each gets a turn of
some steps, then the next case, so that a machine that slows down or speeds up for a while does so
for all of them and their ratios stay. The first round warms up; where time is short, slow cases
take part in fewer rounds than fast ones, and a case too slow for any keeps its warm-up as its
figure. A case expected not to fit into the time, from shorter lengths or from its own inference,
is not run.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from case_client import FAILED, OK, OUT_OF_MEMORY, SKIPPED, TIMEOUT, CaseProcess, CaseStopped
from workloads import Case

Row = dict[str, Any]

# a turn of a short step lasts about this long
_TURN_S = {"train": 0.4, "infer": 0.2}
_MOST_STEPS = 50
# a training step takes at least about this many times the time of an inference
_TRAINING_OVER_INFERENCE = 2.5
# a turn is begun when this many times its expected time is left, and ended so many seconds late
_MARGIN, _GRACE_S = 1.5, 20.0
# seconds a process has to import its libraries
_START_S = 120.0


@dataclass
class CaseRun:
    """What is known of a case so far."""

    case: Case
    status: str = OK
    reason: str | None = None
    process: CaseProcess | None = None
    facts: Row = field(default_factory=dict)
    warm_up: dict[str, float] = field(default_factory=dict)
    """Milliseconds of the first steps by kind."""
    samples: dict[str, list[float]] = field(default_factory=dict)
    """Milliseconds of the timed steps by kind."""
    peaks: dict[str, float] = field(default_factory=dict)
    """MiB by kind."""

    def stop(self, stopped: CaseStopped) -> None:
        """Keep why there will be no further figures."""
        self.status, self.reason = stopped.status, stopped.reason
        self.close()

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.close()
            self.process = None

    def build(self, deadline: float) -> None:
        """Make the model and its inputs."""
        assert self.process is not None
        # importing is not the case's fault
        self.facts = self.process.ask(max(_START_S, deadline - time.monotonic()), do="build")

    def first_steps(self, deadline: float) -> None:
        """Warm up, as far as there is time.

        Raises:
            CaseStopped: as `CaseProcess.ask`, or training is expected to take too long.
        """
        allowance = _allowance(deadline)
        if allowance <= 0:
            raise CaseStopped(SKIPPED, "no time left")
        if self.case.inference:
            begin = time.monotonic()
            self.warm("infer", allowance)
            allowance -= time.monotonic() - begin
            expected = _TRAINING_OVER_INFERENCE * self.warm_up["infer"] / 1e3
            if expected > allowance:
                raise CaseStopped(SKIPPED, f"about {expected:.0f} s expected from its inference")
        self.warm("train", allowance)

    def warm(self, kind: str, seconds: float) -> None:
        """One step, or more where compiling spoils the first."""
        assert self.process is not None
        skip = 1 if self.case.compile else 0
        answer = self.process.ask(seconds, do=kind, steps=1 + skip, skip=skip)
        if self.case.compile:
            self.facts[f"compile_{kind}_s"] = answer["skipped_ms"][0] / 1e3
        self.warm_up[kind] = answer["ms"][0]
        self.peaks[kind] = answer["peak_mib"]

    def turns(self, seconds: float) -> None:
        """A turn of each kind."""
        for kind in self.warm_up:
            self.turn(kind, seconds)

    def turn(self, kind: str, seconds: float) -> None:
        """A turn of timed steps."""
        assert self.process is not None
        steps, skip = self._plan(kind)
        answer = self.process.ask(seconds, do=kind, steps=steps + skip, skip=skip)
        self.samples.setdefault(kind, []).extend(answer["ms"])
        # gradients and moments that training left would count for inference
        if kind == "train":
            self.peaks[kind] = max(self.peaks[kind], answer["peak_mib"])

    def _plan(self, kind: str) -> tuple[int, int]:
        fitting = int(_TURN_S[kind] * 1e3 / max(self._step_ms(kind), 1e-3))
        # where a turn has several steps, the first finds cold caches and is left out
        return max(1, min(fitting, _MOST_STEPS)), int(fitting > 1)

    def _step_ms(self, kind: str) -> float:
        found = self.samples.get(kind)
        return statistics.median(found) if found else self.warm_up[kind]

    def turn_seconds(self) -> float:
        """What a turn of training and inference is expected to take."""
        total = 0.0
        for kind in self.warm_up:
            steps, skip = self._plan(kind)
            total += (steps + skip) * self._step_ms(kind) / 1e3
        return total

    def row(self) -> Row:
        """The figures for the JSON document."""
        row: Row = {
            "model": self.case.model,
            "mixer": self.case.mixer,
            "seq_len": self.case.seq_len,
            "batch_size": self.case.batch_size,
            "tokens": self.case.tokens,
            "dtype": self.case.dtype,
            "compile": self.case.compile,
            "status": self.status,
            "reason": self.reason,
            **self.facts,
        }
        for kind in ("train", "infer"):
            row[kind] = self._figures(kind) if kind in self.warm_up else None
        return row

    def _figures(self, kind: str) -> Row:
        samples = self.samples.get(kind) or [self.warm_up[kind]]
        fifths = (
            statistics.quantiles(samples, n=5, method="inclusive") if samples[1:] else samples * 4
        )
        median = statistics.median(samples)
        return {
            "ms": median,
            "p20_ms": fifths[0],
            "p80_ms": fifths[3],
            "steps": len(samples),
            "warm_up_only": kind not in self.samples,
            "steps_per_s": 1e3 / median,
            "tokens_per_s": self.case.tokens * 1e3 / median,
            "peak_mib": self.peaks[kind],
        }


def plan_rounds(costs: Sequence[float], seconds: float, rounds: int) -> list[int]:
    """How many rounds each case takes part in.

    Args:
        costs: seconds of one turn of each case.
        seconds: time for all.
        rounds: at most so many.

    Returns:
        A number a case: an equal share of the time each, what fast ones leave going to slow ones,
        and what is left then to the fast ones again.
    """
    plan = [0] * len(costs)
    order = sorted(range(len(costs)), key=lambda number: costs[number])
    for shared in (True, False):
        for place, number in enumerate(order):
            share = seconds / (len(order) - place) if shared else seconds
            extra = min(rounds - plan[number], int(max(share, 0.0) / max(costs[number], 1e-9)))
            plan[number] += extra
            seconds -= extra * costs[number]
    return plan


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Slope of log time over log length by least squares; None with fewer than two lengths.

    Args:
        points: length and time of each.
    """
    if len({length for length, _ in points}) < 2:
        return None
    logs = [(math.log(length), math.log(value)) for length, value in points]
    return statistics.linear_regression([x for x, _ in logs], [y for _, y in logs]).slope


class Runner:
    """Measures cases length by length until a deadline."""

    def __init__(self, seconds: float, rounds: int) -> None:
        self._deadline = time.monotonic() + seconds
        self._rounds = rounds
        self._earlier: dict[tuple[str, bool], list[CaseRun]] = {}

    def measure(self, cases: list[Case], lengths_left: int) -> list[Row]:
        """Measure cases of one length.

        Args:
            cases: one a mixer, longer than those of the calls before.
            lengths_left: calls still to come, this one included; each gets an equal share of the
                time that is left.

        Returns:
            A row a case.
        """
        now = time.monotonic()
        deadline = now + max(self._deadline - now, 0.0) / lengths_left
        runs = [CaseRun(case) for case in cases]
        try:
            self._warm_up(runs, deadline)
            self._take_turns([run for run in runs if run.process is not None], deadline)
        finally:
            for run in runs:
                run.close()
        for run in runs:
            key = (run.case.mixer, run.case.compile)
            self._earlier.setdefault(key, []).append(run)
        return [run.row() for run in runs]

    def _warm_up(self, runs: list[CaseRun], deadline: float) -> None:
        _each(runs, lambda run: self._refuse_hopeless(run, _allowance(deadline)))
        waiting = [run for run in runs if run.status == OK]
        for run in waiting:
            # they import side by side, but nobody works before all are ready
            run.process = CaseProcess(run.case)
        _each(waiting, lambda run: run.build(deadline))
        _each([run for run in waiting if run.process], lambda run: run.first_steps(deadline))

    def _refuse_hopeless(self, run: CaseRun, allowance: float) -> None:
        """Raise CaseStopped for a case that shorter lengths say will not fit."""
        if allowance <= 0:
            raise CaseStopped(SKIPPED, "no time left")
        earlier = self._earlier.get((run.case.mixer, run.case.compile), [])
        for shorter in earlier:
            if shorter.status != OK:
                reason = shorter.reason or ""
                if shorter.status in (OUT_OF_MEMORY, FAILED):
                    reason = f"already at {shorter.case.seq_len} tokens: {reason}"
                status = SKIPPED if shorter.status == TIMEOUT else shorter.status
                raise CaseStopped(status, reason)
        expected = _expected_seconds(earlier, run.case.seq_len)
        if expected > allowance:
            reason = f"about {expected:.0f} s expected from shorter lengths"
            raise CaseStopped(SKIPPED, reason)

    def _take_turns(self, runs: list[CaseRun], deadline: float) -> None:
        costs = [run.turn_seconds() for run in runs]
        plan = plan_rounds(costs, deadline - time.monotonic(), self._rounds)
        for number in range(self._rounds):
            for run, rounds in zip(runs, plan, strict=True):
                left = deadline - time.monotonic()
                fits = _MARGIN * run.turn_seconds() <= left
                if run.process is not None and number < rounds and fits:
                    _each([run], partial(CaseRun.turns, seconds=left + _GRACE_S))


def _allowance(deadline: float) -> float:
    """Seconds that one case may take for its first steps."""
    return (deadline - time.monotonic()) / 2


def _each(runs: list[CaseRun], do: Callable[[CaseRun], None]) -> None:
    for run in runs:
        try:
            do(run)
        except CaseStopped as stopped:
            run.stop(stopped)


def _expected_seconds(earlier: list[CaseRun], length: int) -> float:
    """Seconds of the first steps of a case by its shorter lengths; 0 where there are none."""
    points = [
        (run.case.seq_len, sum(run._step_ms(kind) for kind in run.warm_up) / 1e3)
        for run in earlier[-2:]
    ]
    if not points:
        return 0.0
    # without a second point the worst case, softmax attention
    growth = min(max(exponent(points) or 2.0, 1.0), 2.0)
    last, seconds = points[-1]
    return seconds * (length / last) ** growth
