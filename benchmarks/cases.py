"""A part at one size: its candidates, checked against float64 before anything is timed."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import psutil
import torch
from goals import OUTPUT_LIMIT
from layouts import Batch, dtype_name
from parts import PARTS, Candidate, Values, chosen, draw_hidden, draw_values
from sublayers import (
    attention_forms,
    attention_sublayer,
    eager_score_bytes,
    our_sublayer,
    public_sublayer,
)
from torch import Tensor

from ponet_kernels.testing import relative_error

try:
    from triton.errors import TritonError
except ModuleNotFoundError:
    _COMPILER: tuple[type[Exception], ...] = ()
else:
    _COMPILER = (TritonError,)

SUB_LAYER = "sub-layer"

_OUTPUT_SLACK = 3
"""Times the goal for errors of outputs (K8): beyond that nothing is timed."""
_SLACK = 30
"""The same for gradients, whose sums cancel, and for the sub-layer with its matrix products."""
_PUBLIC_LIMIT = {
    # of queries and keys that were projected in float32
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}
"""The published form rounds oftener; this tells only that it computes the same function."""
_NORM_LIMIT = 1e-2
"""Gradients of the sub-layer: rounded projections let another token win here and there."""


class CheckError(AssertionError):
    """Ours does not compute what the published form computes, or not twice the same."""


FAILURES = (CheckError, LookupError, RuntimeError, TypeError, ValueError, *_COMPILER)
"""What a part can fail with while others may still run: wrong figures, PyTorch, a compiler."""


def first_line(error: BaseException) -> str:
    """What an error says, for a row of a table."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


@dataclass
class Case:
    """One part at one size."""

    part: str
    batch: Batch
    candidates: list[Candidate]
    reference: Candidate
    """The published form on the inputs of ours, float64."""
    plain: Candidate
    """The same in the type of the batch."""
    repeatable: Callable[[Values], Tensor]
    forward_bytes: int
    """Bytes that must be moved; 0 where matrix products, not bytes, take the time."""
    backward_bytes: int
    notes: dict[str, str] = field(default_factory=dict)
    """Why a candidate is missing, by name."""

    @property
    def ours(self) -> Candidate:
        """The candidate all others are compared with."""
        return self.candidates[0]

    @property
    def public(self) -> Candidate:
        """The published form as it is timed."""
        return self.candidates[1]

    def drop(self, name: str, reason: str) -> None:
        """Take a candidate out and say why."""
        self.notes[name] = reason
        self.candidates = [c for c in self.candidates if c.name != name]


def build_case(part: str, batch: Batch, num_sets: int, seed: int) -> Case:
    """Draw the inputs of a part and set up ours and the baselines."""
    generator = torch.Generator(batch.device).manual_seed(seed)
    if part == SUB_LAYER:
        return _sublayer(batch, [draw_hidden(batch, generator) for _ in range(num_sets)])
    return _operation(part, batch, [draw_values(batch, generator) for _ in range(num_sets)])


def _operation(name: str, batch: Batch, drawn: list[Values]) -> Case:
    part = PARTS[name]
    repeatable = part.repeatable or part.ours
    unit = batch.num_tokens * batch.width * batch.dtype.itemsize
    exact = [chosen(drawn[0], part.ours_takes, torch.float64)]
    ours = [chosen(values, part.ours_takes) for values in drawn]
    public = [chosen(values, part.public_takes) for values in drawn]
    return Case(
        part=name,
        batch=batch,
        candidates=[
            Candidate("ours", lambda v: part.ours(batch, v), ours),
            Candidate("public", lambda v: part.public(batch, v), public),
        ],
        reference=Candidate("float64", lambda v: part.reference(batch, v), exact),
        plain=Candidate("plain", lambda v: part.reference(batch, v), ours),
        repeatable=lambda v: repeatable(batch, v),
        forward_bytes=part.forward_units * unit,
        backward_bytes=part.backward_units * unit,
    )


def _sublayer(batch: Batch, hidden: list[Tensor]) -> Case:
    exact = [hidden[0].double().requires_grad_()]
    hidden = [h.requires_grad_() for h in hidden]
    ours = our_sublayer(batch, hidden)
    public = public_sublayer(batch, hidden, ours.parameters, batch.dtype)
    reference = public_sublayer(batch, exact, ours.parameters, torch.float64)
    case = Case(SUB_LAYER, batch, [ours, public], reference, public, ours.call, 0, 0)
    for name, attend in attention_forms(batch).items():
        case.candidates.append(attention_sublayer(name, attend, batch, hidden))
    needed, available = eager_score_bytes(batch), available_memory(batch.device)
    if needed > available / 2:
        gib = f"scores need {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free"
        case.drop("eager attention", gib)
    return case


def available_memory(device: torch.device) -> int:
    """Bytes free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


@dataclass(frozen=True)
class Errors:
    """Largest relative errors against float64; None where not compared."""

    output: float
    gradient: float | None
    public_output: float


def check(case: Case) -> Errors:
    """Compare ours and the published form with float64, and ours with itself.

    Ours may be off by a fixed small amount, or by twice what the published form in the same type
    is off, whichever is more. Gradients of the sub-layer are compared in norm, and in half
    precision not at all: rounded projections have ties there, which the two forms resolve
    differently. Its operators are compared on inputs without ties.

    Raises:
        CheckError: an error is beyond rounding, or two runs of ours differ.
    """
    dtype = case.batch.dtype
    where = f"{case.part}, {case.batch.seq_len} tokens, {dtype_name(dtype)}, {case.batch.segments}"
    upstream = torch.randn_like(case.ours.call(case.ours.sets[0]).detach()).to(dtype)
    expected = _run(case.reference, case.reference.call, upstream)
    plain = _run(case.plain, case.plain.call, upstream)
    actual = _run(case.ours, case.ours.call, upstream)
    with torch.no_grad():
        timed = case.public.call(case.public.sets[0])
    public_error = relative_error(timed.view_as(expected[0]), expected[0])
    _require(public_error, _PUBLIC_LIMIT[dtype], f"{where}: output of public")

    whole, limit = case.part == SUB_LAYER, OUTPUT_LIMIT[dtype_name(dtype)]
    output, bound = (
        relative_error(x[0].view_as(expected[0]), expected[0]) for x in (actual, plain)
    )
    allowed = (_SLACK if whole else _OUTPUT_SLACK) * limit
    _require(output, max(allowed, 2 * bound), f"{where}: output of ours")
    gradient = None
    if not whole or dtype == torch.float32:
        measure = _norm_error if whole else relative_error
        errors = [
            (measure(a, e), measure(p, e))
            for a, p, e in zip(actual[1], plain[1], expected[1], strict=True)
        ]
        gradient = max(error for error, _ in errors)
        for error, bound in errors:
            allowed = max(_NORM_LIMIT if whole else _SLACK * limit, 2 * bound)
            _require(error, allowed, f"{where}: gradient of ours")
    _require_equal_bits(case, where)
    return Errors(output, gradient, public_error)


def _norm_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def _run(
    candidate: Candidate, call: Callable[[Values], Tensor], upstream: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    values = candidate.sets[0]
    out = call(values)
    grad = torch.ones_like(out) if upstream is None else upstream.view_as(out).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, candidate.leaves(values), grad)


def _require(error: float, limit: float, what: str) -> None:
    # a NaN compares false, so it fails too
    if not error <= limit:
        raise CheckError(f"{what}: relative error {error:.3g} exceeds {limit:.3g}")


def _require_equal_bits(case: Case, where: str) -> None:
    first, second = (_run(case.ours, case.repeatable, None) for _ in range(2))
    for a, b in zip((first[0], *first[1]), (second[0], *second[1]), strict=True):
        if not torch.equal(a, b):
            raise CheckError(f"{where}: two runs of ours differ in bits")


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def add_compiled(case: Case, seconds: int) -> None:
    """Add torch.compile of the published form, or a note why it cannot be had.

    Args:
        case: gains the candidate "compiled".
        seconds: give up after so long.
    """
    public = case.public
    torch.compiler.reset()
    call = torch.compile(public.call, dynamic=False, fullgraph=True)
    compiled = Candidate("compiled", call, public.sets, public.parameters)
    try:
        with _time_limit(math.ceil(seconds)):
            with torch.no_grad():
                call(public.sets[0])
            _run(compiled, call, None)
    # the errors of the compiler and of its C++ and Triton toolchains derive from RuntimeError
    except (RuntimeError, TimeoutError) as error:
        case.notes["compiled"] = first_line(error)
        return
    case.candidates.append(compiled)
