"""The PoNet mixer: its poolings, and projections that are no plain linear layers."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ponet.config import ConfigError, PoNetConfig
from ponet.mixers.pooling import PoNetMixer
from ponet.mixers.projections import plain_parameters
from ponet.mixers.published import PublishedPoNetMixer
from ponet.packing import BatchLayout, layout_of, stream_of_rows
from ponet_kernels import use_backend
from ponet_kernels.testing import assert_close, relative_error
from tests.mixing import CONFIG, assert_all_close, build, compare, gradients, states
from tests.streams import packed, padded

PARTS = ("query", "key", "output", "segment", "local")
RAGGED = [7, 1, 0, 12, 3]
AVERAGE = CONFIG.replace(segment_pooling="average", local_pooling="average", local_window=5)


class LowRank(nn.Module):
    """An adapter: a linear layer, and a product of two narrow matrices beside it."""

    def __init__(self, base: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features).to(base.weight) * 0.3)
        self.up = nn.Parameter(torch.randn(base.out_features, rank).to(base.weight) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def layout(lengths: list[int], padding: int = 0) -> BatchLayout:
    """Every fifth token is special; with padding, from rows that are longer than any sequence."""
    special = torch.arange(sum(lengths)) % 5 == 2
    if padding:
        return padded(lengths, max(lengths) + padding, special)
    return packed(lengths, special)


def results(mixer: nn.Module, hidden: Tensor, place: BatchLayout) -> dict[str, Tensor]:
    """Output, gradient of the input and of every parameter, for a random upstream gradient."""
    out = mixer(hidden, place)
    return {"out": out.detach(), **gradients(mixer, hidden, out)}


def pooled_row(mixer: PoNetMixer, hidden: dict[int, Tensor], row: str) -> list[Tensor]:
    """The block on the tokens of one row, written out: columns by number, as in the row's text.

    `s` is a special token, `.` padding, and a token is a letter, that of its segment.
    """
    config, real = mixer.config, list(hidden)
    keys = torch.stack([mixer.key(x) for x in hidden.values()]).unflatten(1, (3, -1))
    g = torch.stack([mixer.query(x) for x in hidden.values()]).mean(dim=0).unflatten(0, (3, -1))
    weights = ((keys * g).sum(dim=2) / keys.shape[2] ** 0.5).softmax(dim=0)
    g = (weights.unsqueeze(2) * keys).sum(dim=0).flatten()

    def pool(kind: str, projection: nn.Linear, columns: list[int]) -> Tensor:
        values = torch.stack([projection(hidden[m]) for m in columns])
        return values.mean(dim=0) if kind == "average" else values.max(dim=0).values

    def joined(m: int, n: int, parted_by: str) -> bool:
        return not set(row[min(m, n) : max(m, n) + 1]) & set(parted_by)

    out, reach = [], config.local_window // 2
    for n in real:
        total = g * mixer.output(hidden[n])
        if row[n] != "s":
            segment = [m for m in real if row[m] == row[n] and joined(m, n, "s")]
            window = [m for m in real if abs(m - n) <= reach and joined(m, n, "s.")]
            segment_vector = pool(config.segment_pooling, mixer.segment, segment)
            total = (g + segment_vector) * mixer.output(hidden[n])
            total = total + pool(config.local_pooling, mixer.local, window)
        out.append(mixer.dense(total))
    return out


@pytest.mark.parametrize("window", [1, 3, 5, 9])
@pytest.mark.parametrize("local", ["max", "average"])
@pytest.mark.parametrize("segment", ["max", "average"])
@settings(deadline=None, max_examples=6)
@given(
    rows=st.lists(
        st.lists(st.sampled_from(["s", ".", "t", "t", "t", "|t"]), max_size=14),
        min_size=1,
        max_size=3,
    )
)
@example(rows=["tttttttttttt", "sttts..tt.|tttt", "", "s|t|t|t", "|t"])
def test_poolings_equal_their_formula(segment, local, window, rows):
    """Gaps, special tokens, segments (from a `|` on) of one token, empty rows; with gradients."""
    parts = [enumerate("".join(row).split("|")) for row in rows]
    texts = ["".join(part.replace("t", chr(65 + n)) for n, part in row) for row in parts]
    length = max(map(len, texts))
    texts = [text.ljust(length, ".") for text in texts]
    codes = torch.tensor([[*text.encode()] for text in texts]).view(len(texts), length)
    config = CONFIG.replace(segment_pooling=segment, local_pooling=local, local_window=window)
    mixer = build(PoNetMixer, config)
    stream = stream_of_rows(codes, codes != ord("."))
    kinds = stream.pack(codes)
    # a special token is a segment of its own, whatever its id: here that of those before
    ids = stream.pack(torch.where(codes < ord("a"), codes, 0).cummax(dim=1).values)
    place = layout_of(stream, kinds == ord("s"), ids)
    hidden, expected = states(len(kinds)), []
    for text, tokens in zip(texts, hidden.split(place.cu_seqlens.diff().tolist()), strict=True):
        columns = [n for n, kind in enumerate(text) if kind != "."]
        if columns:
            expected += pooled_row(mixer, dict(zip(columns, tokens, strict=True)), text)
    if expected:
        for backend in ("torch", "reference"):
            with use_backend(backend):
                compare(mixer, place, hidden, torch.stack(expected), 1e-12)
    else:
        assert mixer(hidden, place).shape == (0, 12)


@pytest.mark.parametrize(
    ("name", "value"),
    [("segment_pooling", "average"), ("local_pooling", "average"), ("local_window", 5)],
)
def test_the_published_form_has_the_published_poolings(name, value):
    with pytest.raises(ConfigError, match=f"ponet_published: {name} must be .*, found {value}"):
        PublishedPoNetMixer(CONFIG.replace(**{name: value}))


@pytest.mark.parametrize(
    "names", [("query",), ("key",), ("query", "key"), ("segment",), PARTS], ids="+".join
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    ("config", "lengths", "padding"),
    [
        (CONFIG, RAGGED, 0),
        (CONFIG, RAGGED, 4),
        (CONFIG, [6, 6], 0),
        (CONFIG, [1], 0),
        (AVERAGE, RAGGED, 0),
    ],
    ids=lambda value: "" if isinstance(value, PoNetConfig) else str(value),
)
def test_adapter_equals_merged_weights(names, backend, config, lengths, padding):
    plain, adapted = build(PoNetMixer, config), build(PoNetMixer, config)
    hidden, place = states(sum(lengths)), layout(lengths, padding)
    before = results(plain, hidden, place)
    for name in names:
        module = LowRank(getattr(adapted, name))
        setattr(adapted, name, module)
        assert plain_parameters(module) is None
        with torch.no_grad():
            getattr(plain, name).weight.add_(module.up @ module.down)
    with use_backend(backend):
        expected, found = results(plain, hidden, place), results(adapted, hidden, place)
    # one token has all the weight, whatever the query
    assert lengths == [1] or relative_error(expected["out"], before["out"]) > 1e-3
    for name in names:
        module, merged = getattr(adapted, name), expected.pop(f"{name}.weight")
        expected[f"{name}.base.weight"] = merged
        expected[f"{name}.base.bias"] = expected.pop(f"{name}.bias")
        expected[f"{name}.up"] = merged @ module.down.detach().T
        expected[f"{name}.down"] = module.up.detach().T @ merged
    assert found.keys() == expected.keys()
    assert_all_close(found, expected, 1e-11)


@pytest.mark.parametrize(
    ("name", "second_stage"),
    [*((name, True) for name in PARTS), *((name, False) for name in PARTS if name != "key")],
)
def test_hook_on_a_projection(name, second_stage):
    """It is called, and what it returns counts: here, twice the projection."""
    config = CONFIG.replace(use_global_second_stage=second_stage)
    plain, hooked = build(PoNetMixer, config), build(PoNetMixer, config)
    hidden, place = states(23), layout(RAGGED)
    before, seen = results(plain, hidden, place)["out"], []
    with torch.no_grad():
        for parameter in getattr(plain, name).parameters():
            parameter.mul_(2)
    expected = results(plain, hidden, place)
    handle = getattr(hooked, name).register_forward_hook(
        lambda _, inputs, out: seen.append(inputs[0].shape) or 2 * out
    )
    found = results(hooked, hidden, place)
    assert seen == [hidden.shape]
    assert relative_error(found["out"], before) > 1e-3
    wanted = {key: expected[key] for key in ("out", "hidden", "dense.weight")}
    assert_all_close(found, wanted, 1e-12)
    handle.remove()
    assert torch.equal(hooked(hidden, place), before)
    getattr(hooked, name).register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    assert not torch.equal(hooked(hidden, place), before)


def test_parametrised_projection():
    plain, other = build(PoNetMixer), build(PoNetMixer)
    parametrizations.weight_norm(other.key)
    assert plain_parameters(other.key) is None
    hidden, place = states(23), layout(RAGGED)
    assert_close(other(hidden, place), plain(hidden, place), 1e-12)


def test_plain_projections_take_the_short_way(monkeypatch):
    """No query and key of every token, one product for output, segment and local."""
    mixer, hidden, place = build(PoNetMixer), states(23), layout(RAGGED)
    expected = mixer(hidden, place)
    monkeypatch.setattr(PoNetMixer, "attend", None)
    for name in PARTS:
        monkeypatch.setattr(getattr(mixer, name), "forward", None)
    assert torch.equal(mixer(hidden, place), expected)


def test_adapter_under_autocast_and_in_training():
    mixer = build(PoNetMixer).float()
    hidden, place = states(23).detach().float(), layout(RAGGED)
    mixer.query, mixer.key = LowRank(mixer.query), LowRank(mixer.key)
    expected = mixer(hidden, place)
    with torch.autocast("cpu", torch.bfloat16):
        out = mixer(hidden, place)
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert_close(out, expected, 0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.float64), ("torch", torch.bfloat16), ("triton", torch.float32)],
)
def test_one_function_or_its_parts(backend, dtype):
    """Equal bits; parameters that are frozen change no other's gradient."""
    if backend == "triton":
        pytest.importorskip("triton")
    mixer, place = build(PoNetMixer).to(dtype), layout(RAGGED)
    hidden = states(23).detach().to(dtype).requires_grad_()
    with use_backend(backend):
        whole = results(mixer, hidden, place)
        mixer.plain_projections = lambda: None
        parts = results(mixer, hidden, place)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)

    del mixer.plain_projections
    for name in ("output", "segment", "local"):
        getattr(mixer, name).requires_grad_(False)
    for name in ("query.weight", "key.bias", "dense.weight", "hidden"):
        leaf = hidden if name == "hidden" else mixer.get_parameter(name)
        upstream = states(*whole["out"].shape, seed=2).detach().to(dtype)
        with use_backend(backend):
            (found,) = torch.autograd.grad(mixer(hidden, place), leaf, upstream)
        assert torch.equal(found, whole[name])
