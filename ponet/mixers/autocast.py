"""One half-precision copy of a mixer's input under autocast, shared by its projections."""

import torch
from torch import Tensor


def cast_for_projections(hidden: Tensor) -> Tensor:
    """The input in autocast's type; itself outside autocast.

    Left alone, autocast would make a copy for each projection and keep all of them for the backward
    pass.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype == torch.float32:
        return hidden.to(torch.get_autocast_dtype(device))
    return hidden
