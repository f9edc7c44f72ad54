"""What the tests of token mixers share: a small one, its input, comparison with gradients."""

import torch
from torch import Tensor, nn

from ponet import PoNetConfig
from ponet.packing import BatchLayout
from ponet_kernels.testing import assert_close

CONFIG = PoNetConfig(
    hidden_size=12,
    num_attention_heads=3,
    max_position_embeddings=150,
    initializer_range=0.2,
    linformer_size=5,
    num_random_features=20,
    num_landmarks=4,
    landmark_conv_size=5,
    num_hashes=2,
    lsh_chunk_size=4,
    attention_window=8,
    block_size=4,
    num_random_blocks=2,
)


def build(cls: type[nn.Module], config: PoNetConfig = CONFIG):
    torch.manual_seed(0)
    mixer = cls(config).double().eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            # weights that make attention far from uniform
            parameter.normal_(std=0.5)
    return mixer


def states(num_tokens: int, width: int = 12, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, width, dtype=torch.float64, generator=generator).requires_grad_()


def gradients(mixer: nn.Module, hidden: Tensor, out: Tensor) -> dict[str, Tensor]:
    """Of the input and every parameter, for an upstream gradient that depends on the shape only."""
    leaves = {"hidden": hidden, **dict(mixer.named_parameters())}
    upstream = states(*out.shape, seed=2).detach().to(out)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(out, list(leaves.values()), upstream, **options)
    return dict(zip(leaves, found, strict=True))


def assert_all_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    """Each relative to its largest value, or to a thousandth of the largest of all."""
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        # what is zero but for rounding, such as the gradient of a bias, has no scale of its own
        floor = tensor.new_full((1,), 1e-3 * largest)
        ours, theirs = (torch.cat([x.flatten(), floor]) for x in (found[name], tensor))
        assert_close(ours, theirs, tolerance, name)


def compare(
    mixer: nn.Module, layout: BatchLayout, hidden: Tensor, expected: Tensor, tolerance: float
) -> None:
    """Output, and gradients of the input and of every parameter, which may be less exact."""
    out = mixer(hidden, layout)
    assert_close(out, expected, tolerance, "output")
    found, wanted = (gradients(mixer, hidden, x) for x in (out, expected))
    assert_all_close(found, wanted, 10 * tolerance)
