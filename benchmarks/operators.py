"""The operators of `ponet_kernels` beside the published form, and what each must compute.

An operator takes named tensors (`draw_inputs`). The published form is `ponet.mixers.published`
with its projections' results given; it says what outputs must be. Outputs and gradients of ours
are held against plain PyTorch operations in float64, which the tests hold against the formulas.
`sub-layer` is the whole token mixer with its projections.

Bytes are what must cross the memory bus once if everything else is free, in units of one `[T, C]`
tensor; terms of one row per segment or sequence are left out.

    operator             forward                      backward
    segment-max          s; out                       dout; ds
    pooling              s, o, l; out                 dout, o, l; ds, do, dl
    global-aggregation   h                            h; dh
    mixer                h, s, o, l; out              dout, o, l, h; ds, do, dl, dh
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import MIB, Row, available_mib
from benchmarks.harness import text_segment_ids
from ponet.config import PoNetConfig
from ponet.mixers import MIXERS
from ponet.mixers.pooling import PoNetMixer
from ponet.mixers.published import PublishedPoNetMixer
from ponet.packing import BatchLayout, layout_of, stream_of_packed
from ponet_kernels import fused_pooling, global_aggregation, segment_max, use_backend
from ponet_kernels.layout import SPECIAL
from ponet_kernels.testing import relative_error

SHAPES = {
    "text": "10 to 40 tokens, uniform",
    "ones": "1 token",
    "chunks2": "2 tokens",
    "documents": "one per sequence",
}
"""Segment shapes by name; special tokens are segments of their own in each."""
PER_SEGMENT = ("segment-max", "pooling", "mixer")
"""Operators whose time may depend on the shape of segments."""
SUB_LAYER = "sub-layer"
OPERATORS = ("segment-max", "pooling", "global-aggregation", "mixer", SUB_LAYER)

# errors against float64 are about this large, relative to the largest value
_LIMIT = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 1e-3,
}
# beyond so many times that something is wrong: with outputs; with gradients, whose sums cancel,
# and with the sub-layer and its matrix products
_OUTPUT_SLACK, _SLACK = 3, 30
# the published form rounds more often; this tells only that it computes the same function
_PUBLISHED_LIMIT = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}
# gradients of the sub-layer: rounded projections let another token win here and there
_NORM_LIMIT = 1e-2
# tensors of the size of the scores that naive attention holds at once in training
_SCORE_TENSORS = 4

Inputs = dict[str, Tensor]
Call = Callable[[Inputs], Tensor]


class CheckError(AssertionError):
    """Ours does not compute what the published form computes, or not twice the same."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences of one length without padding, and how their tokens are represented."""

    segments: str
    """A key of `SHAPES`."""
    batch_size: int
    seq_len: int
    width: int
    num_heads: int
    dtype: torch.dtype
    device: torch.device
    seed: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.batch_size * self.seq_len

    @property
    def facts(self) -> Row:
        """What a row says of its batch."""
        names = ("seq_len", "batch_size", "segments")
        dtype = str(self.dtype).removeprefix("torch.")
        return {name: getattr(self, name) for name in names} | {"dtype": dtype}

    @cached_property
    def config(self) -> PoNetConfig:
        """Of the token mixers that are compared."""
        return PoNetConfig(
            hidden_size=self.width,
            num_attention_heads=self.num_heads,
            max_position_embeddings=self.seq_len,
            attention_probs_dropout_prob=0.0,
        )

    @cached_property
    def layout(self) -> BatchLayout:
        """Where segments lie; [CLS] and [SEP] are at the ends, in text one in the middle, too."""
        length, generator = self.seq_len, torch.Generator().manual_seed(self.seed)
        special = torch.zeros(length, dtype=torch.bool)
        special[[0, length - 1]] = True
        special[length // 2] |= self.segments == "text"
        if self.segments == "text":
            rows = [text_segment_ids(length, generator) for _ in range(self.batch_size)]
        else:
            size = {"ones": 1, "chunks2": 2, "documents": length}[self.segments]
            rows = [torch.arange(length) // size] * self.batch_size
        ids, offsets = torch.cat(rows), torch.arange(self.batch_size + 1).int() * length
        found = layout_of(stream_of_packed(ids, offsets), special.repeat(self.batch_size), ids)
        return found.with_tensors({k: x.to(self.device) for k, x in found.tensors().items()})

    def rows(self, x: Tensor) -> Tensor:
        """`[T, C]` -> `[B, N, C]`."""
        return x.unflatten(0, (self.batch_size, self.seq_len))


class _Given(nn.Module):
    """In place of a projection: what it would have computed; None: its input is that."""

    value: Tensor | None = None

    def forward(self, rows: Tensor) -> Tensor:
        return rows if self.value is None else self.value


class PublishedOperators(PublishedPoNetMixer):
    """The published form between its projections, whose results are given."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch.config)
        self._batch = batch
        size = (batch.batch_size, batch.seq_len)
        self._real = torch.ones(size, dtype=torch.bool, device=batch.device)
        for name in ("query", "key", "output", "segment", "local", "dense"):
            setattr(self, name, _Given())

    def segment_max(self, v: Inputs) -> Tensor:
        """Maximum of each token's segment; as ours, of special tokens' segments, too."""
        layout = self._batch.layout
        layout = replace(layout, token_marks=layout.token_marks & ~SPECIAL)
        return self._segment(self._batch.rows(v["s"]), self._real, layout)

    def aggregation(self, v: Inputs) -> Tensor:
        """g' of each sequence: `[B, 1, C]`."""
        self.key.value = self._batch.rows(v["k"])
        return self._global(self._batch.rows(v["q"]), self._real)

    def pooling(self, v: Inputs) -> Tensor:
        """Segment maxima, local maxima and their fusion with g'."""
        s, o, local = (self._batch.rows(v[name]) for name in "sol")
        maxima = self._segment(s, self._real, self._batch.layout)
        windows = self._local(local, self._real, self._batch.layout)
        return (v["g_low"] + maxima) * o + windows

    def mixer(self, v: Inputs) -> Tensor:
        """Everything between the projections."""
        return self.pooling({**v, "g_low": self.aggregation(v)})


@dataclass(frozen=True)
class Implementation:
    """One implementation of an operator with its inputs."""

    name: str
    call: Call
    inputs: Inputs
    parameters: Sequence[Tensor] = ()

    def forward(self) -> Tensor:
        """The output, without recording a graph."""
        with torch.no_grad():
            return self.call(self.inputs)

    def run(self, upstream: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output and gradients; None: of the sum of the output."""
        out = self.call(self.inputs)
        upstream = torch.ones_like(out) if upstream is None else upstream
        leaves = [x for x in self.inputs.values() if x.requires_grad] + [*self.parameters]
        return out.detach(), torch.autograd.grad(out, leaves, upstream.to(out.dtype))


@dataclass
class Comparison:
    """One operator on one batch: ours first, then the published form, then others."""

    operator: str
    batch: Batch
    implementations: list[Implementation]
    exact: Implementation
    """Ours in float64, to be run by plain PyTorch operations."""
    repeatable: Implementation
    """What must give equal bits twice."""
    units: tuple[int, int] = (0, 0)
    """Bytes that must be moved forward and backward, in units of one `[T, C]` tensor; 0 where
    matrix products, not bytes, take the time."""
    notes: dict[str, str] = field(default_factory=dict)
    """Why an implementation is missing, by name."""

    def drop(self, name: str, reason: str) -> None:
        """Take an implementation out and say why."""
        self.notes[name] = reason
        self.implementations = [one for one in self.implementations if one.name != name]


def draw_inputs(batch: Batch) -> Inputs:
    """Random inputs of all operators.

    h hidden states with a common mean, so that the mean query is not zero; q k o s l projections,
    osl three of them side by side; g global vectors (`g_low` `[B, 1, C]` in the dtype of the
    batch); wq bq wk bk parameters.
    """
    generator = torch.Generator(batch.device).manual_seed(batch.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=batch.device, generator=generator).to(batch.dtype)

    tokens, width = batch.num_tokens, batch.width
    values = {"h": normal(tokens, width).add_(normal(1, width))}
    for name in "qk":
        weight, bias = normal(width, width) / (3 * width) ** 0.5, normal(width) / 10
        values |= {f"w{name}": weight, f"b{name}": bias}
        values[name] = F.linear(values["h"], weight, bias)
    values |= {name: normal(tokens, width) for name in "osl"}
    values["osl"] = torch.cat([values[name] for name in "osl"], dim=1)
    values["g_low"] = normal(batch.batch_size, 1, width)
    half = batch.dtype in (torch.float16, torch.bfloat16)
    values["g"] = values["g_low"].squeeze(1).to(torch.float32 if half else batch.dtype)
    return values


def compare(name: str, batch: Batch) -> Comparison:
    """Draw the inputs of an operator, and set up ours and what it is compared with."""
    drawn, layout, form = draw_inputs(batch), batch.layout, PublishedOperators(batch)

    def leaves(names: str) -> Inputs:
        return {name: drawn[name].detach().requires_grad_() for name in names.split()}

    if name == SUB_LAYER:
        return _compare_sub_layer(batch, leaves("h"))

    def maxima(v: Inputs) -> Tensor:
        return segment_max(v["s"], layout)

    def segments(v: Inputs) -> Tensor:
        # in the mixer the fusion reads a row per segment; here per token, as the published form
        return maxima(v).index_select(0, layout.token_segments)

    def pooling(v: Inputs) -> Tensor:
        return fused_pooling(v["g"], v["osl"], layout)

    def aggregation(v: Inputs) -> Tensor:
        weights = (v["wq"], v["bq"], v["wk"], v["bk"])
        return global_aggregation(v["h"], *weights, batch.num_heads, layout)

    def mixer(v: Inputs) -> Tensor:
        return pooling({**v, "g": aggregation(v)})

    ours, takes, published, published_takes, units = {
        "segment-max": (segments, "s", form.segment_max, "s", (2, 2)),
        "pooling": (pooling, "g osl", form.pooling, "g_low s o l", (4, 6)),
        "global-aggregation": (aggregation, "h wq bq wk bk", form.aggregation, "q k", (1, 2)),
        "mixer": (mixer, "h wq bq wk bk osl", form.mixer, "q k s o l", (5, 8)),
    }[name]
    first = Implementation("ours", ours, leaves(takes))
    second = Implementation("published", published, leaves(published_takes))
    # the gradient of spreading rows over tokens is PyTorch's, and on a GPU not repeatable
    repeatable = replace(first, call=maxima) if name == "segment-max" else first
    exact = replace(first, inputs=_in_double(first.inputs))
    return Comparison(name, batch, [first, second], exact, repeatable, units)


def _in_double(values: Inputs) -> Inputs:
    return {name: x.detach().double().requires_grad_() for name, x in values.items()}


def _compare_sub_layer(batch: Batch, inputs: Inputs) -> Comparison:
    def sub_layer(name: str, module: nn.Module, inputs: Inputs = inputs) -> Implementation:
        module = module.to(batch.device, inputs["h"].dtype)
        parameters = [x for _, x in sorted(module.named_parameters())]
        return Implementation(name, lambda v: module(v["h"], batch.layout), inputs, parameters)

    torch.manual_seed(batch.seed)
    modules = [form(batch.config) for form in (PoNetMixer, PublishedPoNetMixer, PoNetMixer)]
    for module in modules[1:]:
        module.load_state_dict(modules[0].to(batch.dtype).state_dict())
    ours, published, exact = modules
    forms = [sub_layer("ours", ours), sub_layer("published", published)]
    sdpa = sub_layer("sdpa", MIXERS["attention"](batch.config))
    if batch.device.type == "cuda" and batch.dtype != torch.float32:
        forms += [_by_kernel(sdpa, SDPBackend.FLASH_ATTENTION, "sdpa flash")]
        forms += [_by_kernel(sdpa, SDPBackend.CUDNN_ATTENTION, "sdpa cudnn")]
    else:
        forms.append(sdpa)
    forms.append(sub_layer("naive attention", MIXERS["attention_naive"](batch.config)))
    double = sub_layer("exact", exact, _in_double(inputs))
    found = Comparison(SUB_LAYER, batch, forms, double, forms[0])
    scores = batch.batch_size * batch.num_heads * batch.seq_len**2 * batch.dtype.itemsize
    needed, free = _SCORE_TENSORS * scores / MIB, available_mib(batch.device)
    if needed > free / 2:
        found.drop("naive attention", f"scores need {needed:,.0f} of {free:,.0f} MiB that are free")
    return found


def _by_kernel(attention: Implementation, kernel: SDPBackend, name: str) -> Implementation:
    def call(v: Inputs) -> Tensor:
        with sdpa_kernel(kernel):
            return attention.call(v)

    return replace(attention, name=name, call=call)


def check(comparison: Comparison) -> Row:
    """Compare ours with float64, with the published form and with itself.

    Gradients of the sub-layer are compared in norm, and in half precision not at all: there rounded
    projections are tied, and which token wins is chance.

    Returns:
        Largest relative errors: `output`, `gradient` (None: not compared), `published_output`.

    Raises:
        CheckError: an error is beyond rounding, or two runs of ours differ.
    """
    dtype, whole = comparison.batch.dtype, comparison.operator == SUB_LAYER
    ours, published = comparison.implementations[:2]
    upstream, theirs = torch.randn_like(ours.forward()), published.forward()
    with use_backend("torch"):
        expected, gradients = comparison.exact.run(upstream)
    actual, actual_gradients = ours.run(upstream)
    found: Row = {"gradient": None}
    error = found["published_output"] = relative_error(theirs.view_as(expected), expected)
    _require(error, _PUBLISHED_LIMIT[dtype], "output of the published form")
    error = found["output"] = relative_error(actual, expected)
    _require(error, (_SLACK if whole else _OUTPUT_SLACK) * _LIMIT[dtype], "output of ours")
    if not whole or dtype in (torch.float32, torch.float64):
        measure = _norm_error if whole else relative_error
        error = found["gradient"] = max(map(measure, actual_gradients, gradients))
        _require(error, _NORM_LIMIT if whole else _SLACK * _LIMIT[dtype], "gradient of ours")
    first, second = comparison.repeatable.run(), comparison.repeatable.run()
    for a, b in zip((first[0], *first[1]), (second[0], *second[1]), strict=True):
        if not torch.equal(a, b):
            raise CheckError("two runs of ours differ in bits")
    return found


def _norm_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def _require(error: float, limit: float, what: str) -> None:
    # a NaN compares false, so it fails too
    if not error <= limit:
        raise CheckError(f"{what}: relative error {error:.3g} exceeds {limit:.3g}")
