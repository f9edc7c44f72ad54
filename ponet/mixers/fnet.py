"""FNet: the Fourier transform as token mixer.

Lee-Thorp et al., arXiv 2105.03824, section 3.2: y = Re(F_seq(F_hidden(x))), the discrete transform
along the channels and along the tokens of each sequence; time O(T C (log N + log C)).

A sequence of N tokens is transformed at length N, whatever its neighbours are. The paper knows no
mask: to mix padding as it does, give rows whose padding is tokens.
"""

from itertools import groupby

import torch
from torch import Tensor, nn

from ponet.config import PoNetConfig
from ponet.packing import BatchLayout


class FNetMixer(nn.Module):
    """The transform alone, without parameters."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()

    def forward(self, hidden: Tensor, layout: BatchLayout) -> Tensor:
        """`[T, C]` -> `[T, C]`; half precision is transformed in float32."""
        # half precision lacks kernels for most lengths
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        transform = _by_length
        if torch.compiler.is_compiling():
            # compiled code would be made anew for every batch of other lengths
            transform = torch.compiler.disable(_by_length)
        return transform(wide, layout).to(hidden.dtype)  # pyright: ignore[reportCallIssue]


def _by_length(hidden: Tensor, layout: BatchLayout) -> Tensor:
    """Neighbours of one length in one transform."""
    runs = [(length, len(list(run))) for length, run in groupby(layout.lengths)]
    parts = hidden.split([length * count for length, count in runs])
    mixed = [
        torch.fft.fft2(part.unflatten(0, (count, length))).real.flatten(0, 1)
        for part, (length, count) in zip(parts, runs, strict=True)
        if length
    ]
    # there is no transform of no tokens
    return torch.cat(mixed) if mixed else hidden
