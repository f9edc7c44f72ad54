"""The PoNet mixer with projections that are no plain linear layers: adapters, hooks."""

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ponet import PoNetConfig
from ponet.mixers.pooling import PoNetMixer
from ponet.mixers.projections import plain_parameters
from ponet.mixers.published import PublishedPoNetMixer
from ponet.packing import BatchLayout, layout_of, stream_of_packed, stream_of_rows
from ponet_kernels import use_backend
from ponet_kernels.testing import assert_close, relative_error

CONFIG = PoNetConfig(hidden_size=24, num_attention_heads=3, initializer_range=0.2)
PARTS = ("query", "key", "output", "segment", "local")
RAGGED = [7, 1, 0, 12, 3]

wrapped = pytest.mark.parametrize(
    "names", [("query",), ("key",), ("query", "key"), ("segment",), PARTS], ids="+".join
)


class LowRank(nn.Module):
    """An adapter: a linear layer, and a product of two narrow matrices beside it."""

    def __init__(self, base: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features).to(base.weight) * 0.3)
        self.up = nn.Parameter(torch.randn(base.out_features, rank).to(base.weight) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def build(cls=PoNetMixer, config: PoNetConfig = CONFIG, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    mixer = cls(config).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            # biases begin at zero, which would hide them
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer.to(dtype)


def layout(lengths: list[int], padding: int = 0) -> BatchLayout:
    """Every fifth token is special; with padding, from rows that are longer than any sequence."""
    total = sum(lengths)
    if padding:
        mask = torch.arange(max(lengths) + padding) < torch.tensor(lengths).unsqueeze(1)
        stream = stream_of_rows(torch.zeros(mask.shape, dtype=torch.long), mask)
    else:
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        stream = stream_of_packed(torch.zeros(total, dtype=torch.long), offsets)
    return layout_of(stream, torch.arange(total) % 5 == 2)


def states(total: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(total, 24, generator=generator, dtype=torch.float64).to(dtype)


def results(mixer: nn.Module, hidden: Tensor, place: BatchLayout) -> dict[str, Tensor]:
    """Output, gradient of the input and of every parameter, for a random upstream gradient."""
    leaves = {"hidden": hidden.detach().requires_grad_(), **dict(mixer.named_parameters())}
    out = mixer(leaves["hidden"], place)
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    found = torch.autograd.grad(out, list(leaves.values()), upstream)
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


def check(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        # what is zero but for rounding, such as the gradient of a bias, has no scale of its own
        floor = torch.full_like(tensor.reshape(-1)[:1], 0.1 * largest)
        ours, theirs = (torch.cat([x[name].reshape(-1), floor]) for x in (found, expected))
        assert_close(ours, theirs, tolerance, name)


@wrapped
@pytest.mark.parametrize(
    ("lengths", "padding"), [(RAGGED, 0), (RAGGED, 4), ([6, 6], 0), ([1], 0)], ids=str
)
def test_adapter_equals_merged_weights(names, lengths, padding):
    plain, adapted = build(), build()
    hidden, place = states(sum(lengths)), layout(lengths, padding)
    before = results(plain, hidden, place)
    for name in names:
        setattr(adapted, name, LowRank(getattr(adapted, name)))
        module = getattr(adapted, name)
        assert plain_parameters(module) is None
        with torch.no_grad():
            getattr(plain, name).weight.add_(module.up @ module.down)
    expected = results(plain, hidden, place)
    # one token has all the weight, whatever the query
    assert lengths == [1] or relative_error(expected["out"], before["out"]) > 1e-3
    wanted = {key: expected[key] for key in ("out", "hidden")}
    for key, gradient in expected.items():
        name, _, kind = key.partition(".")
        module = getattr(adapted, name, None)
        if name in names and isinstance(module, LowRank):
            wanted[f"{name}.base.{kind}"] = gradient
            if kind == "weight":
                wanted[f"{name}.up"] = gradient @ module.down.detach().T
                wanted[f"{name}.down"] = module.up.detach().T @ gradient
        elif "." in key:
            wanted[key] = gradient
    found = results(adapted, hidden, place)
    assert found.keys() == wanted.keys()
    check(found, wanted, 1e-12)


@wrapped
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_adapter_that_adds_nothing_changes_nothing(names, backend):
    """The way by queries and keys of every token is the same function."""
    plain, adapted = build(), build()
    hidden, place = states(23), layout(RAGGED)
    for name in names:
        module = LowRank(getattr(adapted, name))
        with torch.no_grad():
            module.up.zero_()
        setattr(adapted, name, module)
    with use_backend(backend):
        expected, found = results(plain, hidden, place), results(adapted, hidden, place)
    check(found, {key: expected[key] for key in ("out", "hidden", "dense.weight")}, 1e-12)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("second_stage", [True, False])
def test_hook_on_a_projection(name, second_stage):
    """It is called, and what it returns counts: here, twice the projection."""
    config = CONFIG.replace(use_global_second_stage=second_stage)
    if name == "key" and not second_stage:
        return
    plain, hooked = build(config=config), build(config=config)
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
    check(found, {key: expected[key] for key in ("out", "hidden", "dense.weight")}, 1e-12)
    handle.remove()
    assert torch.equal(hooked(hidden, place), before)
    getattr(hooked, name).register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    assert not torch.equal(hooked(hidden, place), before)


def test_parametrised_projection():
    plain, other = build(), build()
    parametrizations.weight_norm(other.key)
    assert plain_parameters(other.key) is None
    hidden, place = states(23), layout(RAGGED)
    assert_close(other(hidden, place), plain(hidden, place), 1e-12)


@pytest.mark.parametrize("second_stage", [True, False])
def test_adapted_mixer_agrees_with_the_published_form(second_stage):
    config = CONFIG.replace(use_global_second_stage=second_stage)
    fast, eager = build(config=config), build(PublishedPoNetMixer, config)
    for mixer in (fast, eager):
        torch.manual_seed(5)
        mixer.query = LowRank(mixer.query)
        mixer.local = LowRank(mixer.local)
    hidden, place = states(23), layout(RAGGED)
    check(results(fast, hidden, place), results(eager, hidden, place), 1e-12)


def test_plain_projections_take_the_short_way(monkeypatch):
    """No query and key of every token, one product for output, segment and local."""
    mixer, hidden, place = build(), states(23), layout(RAGGED)
    expected = mixer(hidden, place)

    def refuse(name: str) -> Callable[..., Tensor]:
        return lambda *_: pytest.fail(f"{name} was called")

    monkeypatch.setattr(PoNetMixer, "attend", refuse("attend"))
    for name in PARTS:
        monkeypatch.setattr(getattr(mixer, name), "forward", refuse(name))
    assert torch.equal(mixer(hidden, place), expected)


def test_adapter_under_autocast_and_in_training():
    mixer = build(dtype=torch.float32)
    hidden, place = states(23, torch.float32), layout(RAGGED)
    mixer.query, mixer.key = LowRank(mixer.query), LowRank(mixer.key)
    expected = mixer(hidden, place)
    with torch.autocast("cpu", torch.bfloat16):
        out = mixer(hidden, place)
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert_close(out, expected, 0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_one_operator_or_its_parts(dtype):
    """Equal bits; parameters that are frozen have no gradient and change no other."""
    mixer, hidden, place = build(dtype=dtype), states(23, dtype), layout(RAGGED)
    whole = results(mixer, hidden, place)
    mixer.plain_projections = lambda: None
    parts = results(mixer, hidden, place)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)

    del mixer.plain_projections
    for name in ("output", "segment", "local"):
        getattr(mixer, name).requires_grad_(False)
    leaf = hidden.clone().requires_grad_()
    upstream = torch.randn(
        whole["out"].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    mixer(leaf, place).backward(upstream.to(dtype))
    assert torch.equal(leaf.grad, whole["hidden"])
    for name, parameter in mixer.named_parameters():
        frozen = name.split(".")[0] in ("output", "segment", "local")
        assert parameter.grad is None if frozen else torch.equal(parameter.grad, whole[name])
