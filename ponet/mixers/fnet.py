"""FNet: the Fourier transform as token mixer.

Lee-Thorp et al., arXiv 2105.03824, section 3.2: y = Re(F_seq(F_hidden(x))), the discrete transform
along the channels and along the tokens of rows `[B, N, C]`; time O(B N C (log N + log C)).

Padding takes part, as in the paper, which knows no mask: shorter sequences are extended with zero
vectors to the longest of the batch, so what a sequence becomes depends on the batch it is in.
"""

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
        # there is no transform of no tokens
        if not hidden.shape[0]:
            return hidden
        rows = layout.rows
        # half precision lacks kernels for most lengths
        wide = torch.promote_types(hidden.dtype, torch.float32)
        mixed = torch.fft.fft2(rows.from_stream(hidden.to(wide)), dim=(1, 2)).real
        return rows.to_stream(mixed).to(hidden.dtype)
